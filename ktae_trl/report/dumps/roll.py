"""ROLL: `rollout_dump_data.step_N.jsonl`. A file is one line, and its columns are lists."""

from ktae_trl.report.dumps.rollout import Place, Rollout, Row, by_row, decides, number, prompt, step, text

NEEDS = {"prompt", "responses", "scores"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: lists `prompt`, `responses`, `scores`, and perhaps `global_step`."""
    result = []
    for one in by_row(row, "responses"):
        found = {"score": number(one["scores"], "scores")}
        result.append(
            Rollout(
                prompt(one["prompt"]),
                text(one, "responses"),
                rewards=found,
                decides=decides(found, found),
                step=step(one, place.path, "global_step", "step"),
            )
        )
    return result
