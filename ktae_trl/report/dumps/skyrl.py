"""SkyRL: one file per data source in `dumped_evals/global_step_N_evals`. A line is a rollout."""

from ktae_trl.arguments import UserError
from ktae_trl.report.dumps.rollout import Place, Rollout, Row, decides, number, numbers, step, text

NEEDS = {"input_prompt", "output_response", "score"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: `input_prompt`, `output_response` and `score`, a number or one per token, which are added."""
    score = row["score"]
    if isinstance(score, list):
        parts = numbers(score, len(score))
        if parts is None or None in parts:
            raise UserError(f"score must be a number or a list of numbers, not {score!r:.60}")
        score = sum(parts)
    found = {"score": number(score, "score")}
    return [
        Rollout(
            text(row, "input_prompt"),
            text(row, "output_response"),
            rewards=found,
            decides=decides(found, found),
            step=step(row, place.path, "step"),
        )
    ]
