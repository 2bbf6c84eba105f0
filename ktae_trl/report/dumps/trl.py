"""TRL: `completions/completions_00001.parquet`, which `log_completions` writes. A row is a rollout."""

from pathlib import Path

from ktae_trl.report.dumps.rollout import Place, Rollout, Row, completion, decides, number, prompt, rewards, step

NEEDS = {"step", "prompt", "completion", "advantage"}
_NO_REWARDS = {"step", "gen_step", "prompt", "completion", "advantage", "advantages"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a row: `step`, `prompt` and `completion` (text or messages), a float per reward function, `advantage`."""
    return [of_columns(row, place, "advantage")]


def of_columns(row: Row, place: Place, advantage: str) -> Rollout:
    """Read a row whose floats are rewards, except those of TRL's own columns."""
    content, turns = completion(row["completion"])
    found = rewards(row, _NO_REWARDS)
    return Rollout(
        prompt(row["prompt"]),
        content,
        turns=turns,
        rewards=found,
        decides=decides(found, [name for name in found if isinstance(row.get(name), float)]),
        advantage=number(row.get(advantage), advantage),
        step=step(row, place.path, "step", "gen_step"),
    )


def tokenizer(paths: list[Path]) -> str | None:
    """Return the folder of the run, if it holds the trained model's tokenizer."""
    run = paths[0].parent.parent
    return str(run) if (run / "tokenizer_config.json").is_file() else None
