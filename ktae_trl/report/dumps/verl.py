"""verl: `{step}.jsonl` in the folder `trainer.rollout_data_dir`. A line is a rollout."""

from ktae_trl.report.dumps.rollout import Place, Rollout, Row, decides, number, rewards, step, text

NEEDS = {"input", "output", "score"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: `input`, `output`, `score`, `step`, and perhaps `gts`, `acc`, `uid` and other numbers."""
    found = {"score": number(row["score"], "score"), **rewards(row, {"step", "uid", "score"})}
    uid = row.get("uid")
    return [
        Rollout(
            text(row, "input"),
            text(row, "output"),
            rewards=found,
            decides=decides(found, ["score"]),
            step=step(row, place.path, "step"),
            group=None if uid is None else str(uid),
        )
    ]
