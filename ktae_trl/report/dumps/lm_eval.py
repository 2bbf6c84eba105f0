"""lm-evaluation-harness: `samples_TASK_TIME.jsonl`, which `--log_samples` writes. A line is a problem."""

from typing import Any

from ktae_trl.arguments import UserError
from ktae_trl.grading.golds import gold_answers
from ktae_trl.report.dumps.rollout import Place, Rollout, Row, encodable, number, step_in

NEEDS = {"doc_id", "doc", "resps", "filtered_resps"}
_VERDICTS = ("exact_match", "acc")


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: `doc_id`, `arguments` (with the prompt), `resps`, `target`, and the metrics, such as `exact_match`.

    A metric with one value counts for a problem with one response. Several responses with one value are graded by
    their own text and the target. A task with several filters has a line for each, which are groups of their own.
    """
    responses = list(_flat(row["resps"]))
    if not responses or not all(isinstance(text, str) for text in responses):
        raise UserError("resps has no texts: only tasks that generate text can be explained")
    name = next((name for name in _VERDICTS if name in row), None)
    verdicts = _verdicts(row, name, len(responses))
    answers = _answers(row) if verdicts is None else None
    rest = {
        encodable(metric): number(row[metric], metric)
        for metric in (row.get("metrics") if isinstance(row.get("metrics"), list) else ())
        if isinstance(metric, str) and metric != name and isinstance(row.get(metric), (bool, int, float))
    }
    return [
        Rollout(
            _prompt(row),
            encodable(text),
            rewards=rest if verdicts is None else {name: verdicts[i], **rest},
            decides=None if verdicts is None else (name, verdicts[i]),
            answers=answers,
            step=step_in(place.path),
            group=(place.path.name, str(row["doc_id"]), str(row.get("filter"))),
        )
        for i, text in enumerate(responses)
    ]


def _verdicts(row: Row, name: str | None, count: int) -> list[float | None] | None:
    if name is None:
        return None
    found = row[name] if isinstance(row[name], list) else [row[name]]
    return [number(one, name) for one in found] if len(found) == count else None


def _answers(row: Row) -> list[str]:
    try:
        answers = gold_answers(row.get("target"))
    except TypeError as error:
        raise UserError(f"target: {error}") from None
    if not answers:
        raise UserError(f"there is neither a verdict per response ({' or '.join(_VERDICTS)}) nor a target")
    return answers


def _prompt(row: Row) -> str:
    """Return the first argument of the request, `{"gen_args_0": {"arg_0": ...}}` or `[[...]]`, or else the problem."""
    found: Any = row.get("arguments")
    while isinstance(found, (dict, list)) and found:
        found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    return encodable(found if isinstance(found, str) else str(row.get("doc")))


def _flat(found: Any):
    for one in found if isinstance(found, list) else [found]:
        if isinstance(one, list):
            yield from one
        else:
            yield one
