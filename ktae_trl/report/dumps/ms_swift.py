"""ms-swift: `completions.jsonl`, which `log_completions` writes. A line is a log, and its columns are lists."""

from ktae_trl.report.dumps.rollout import Place, Rollout, Row, by_row
from ktae_trl.report.dumps.trl import of_columns

NEEDS = {"prompt", "completion", "advantages"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: lists `prompt`, `completion`, `advantages` and one per reward; `step` or `gen_step`."""
    return [of_columns(one, place, "advantages") for one in by_row(row, "prompt")]
