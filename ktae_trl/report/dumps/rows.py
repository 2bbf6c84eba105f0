"""Rows of any source: `prompt`, `completion`, and what says whether it is correct. A line is a rollout.

`--map prompt=input,completion=output,reward=score` reads rows with other names.
"""

from collections.abc import Mapping, Set
from typing import Any

from ktae_trl.arguments import UserError, nearest
from ktae_trl.report.dumps.rollout import (
    Place,
    Rollout,
    Row,
    arrays,
    completion,
    decides,
    encodable,
    number,
    prompt,
    rewards,
    step,
    token_ids,
)

NEEDS = {"prompt", "completion"}
FIELDS = (
    *("prompt", "completion", "correct", "answers", "reward", "advantage", "step", "group"),
    *("token_ids", "logprobs", "entropy"),
)
_NO_REWARDS = {"step", "group", "advantage"}
_VERDICTS = {"correct", "answers", "reward"}
_LIKELY = {  # other names of a field, for a suggestion
    "prompt": ("input", "question", "problem", "query", "instruction"),
    "completion": ("output", "response", "generation", "reply"),
    "correct": ("is_correct", "acc"),
    "reward": ("score", "rewards", "scores"),
    "answers": ("gold", "ground_truth", "answer", "target", "solution", "label"),
}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: `prompt`, `completion` (text or messages), and `correct`, gold `answers`, or a `reward`.

    It may also have `step`, `group`, `advantage`, `token_ids` of the completion, and lists with a number per token.
    """
    check(row)
    content, turns = completion(row["completion"])
    found = rewards(row, _NO_REWARDS)
    ids = None if row.get("token_ids") is None else token_ids(row["token_ids"], "token_ids")
    answers = row.get("answers")
    if "correct" in row:
        found["correct"] = number(row["correct"], "correct")  # null: it could not be graded
        answers = None
    named = decides(found, ["reward"] if "reward" in found and answers is None else ())
    return [
        Rollout(
            prompt(row["prompt"]),
            content,
            ids,
            turns=() if ids else turns,
            arrays={} if ids is None else arrays(row, None, len(ids), {"token_ids"}),
            rewards=found,
            decides=named,
            answers=[answers] if isinstance(answers, str) else answers,
            advantage=number(row.get("advantage"), "advantage"),
            step=step(row, place.path, "step") if "step" in row else 0,
            group=None if row.get("group") is None else str(row["group"]),
        )
    ]


def check(row: Any) -> None:
    """Raise a `UserError` if a row lacks a field or has a value of the wrong type."""
    if not isinstance(row, Mapping):
        raise UserError(f"a row must be an object with prompt, completion and correct (or answers), not {row!r:.60}")
    missing = [name for name in ("prompt", "completion") if name not in row]
    if not {"correct", "answers"} & set(row) and not rewards(row, _NO_REWARDS):
        missing.append("correct (or answers)")
    if missing:
        there = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{', '.join(missing)} is missing. The row has: {there}")
    if row.get("correct") is not None and row["correct"] not in (0, 1):
        raise UserError(f"correct must be true, false or null, not {row['correct']!r:.60}")
    if "answers" in row and "correct" not in row:
        answers = row["answers"]
        several = isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
        if not isinstance(answers, str) and not several:
            raise UserError(f"answers must be a string or a non-empty list of strings, not {answers!r:.60}")


def mapping(text: str) -> dict[str, str]:
    """Return the names of a file by the fields' own names, from `prompt=input,completion=output`.

    Raises:
        UserError: It is not written like this, or a field is unknown.
    """
    pairs = [pair.strip().partition("=") for pair in text.split(",") if pair.strip()]
    if not pairs or not all(own and equals and theirs for own, equals, theirs in pairs):
        raise UserError(f"--map must be like prompt=input,completion=output,reward=score, not {text!r}")
    for own, _, _ in pairs:
        if own not in FIELDS:
            raise UserError(f"--map has no field {own!r}{nearest(own, FIELDS)}. Fields: {', '.join(FIELDS)}")
    return {own.strip(): theirs.strip() for own, _, theirs in pairs}


def suggested_mapping(keys: Set[str]) -> str:
    """Return a `--map` for a file with these keys, or an example if they do not tell what is what."""
    found = {own: next((name for name in (own, *names) if name in keys), None) for own, names in _LIKELY.items()}
    verdict = next((own for own in ("correct", "reward", "answers") if found[own]), None)
    if not (verdict and found["prompt"] and found["completion"]):
        return "prompt=input,completion=output,reward=score"
    return ",".join(f"{own}={found[own]}" for own in ("prompt", "completion", verdict) if own != found[own])


def renamed(row: Row, names: Mapping[str, str]) -> Row:
    """Return a row with the fields' own names. A name may be a dotted path: `response.text`.

    Fields that are not renamed keep their values, but what says whether a rollout is correct is only what was named.
    """
    replaced = {*names, *names.values(), *(_VERDICTS if _VERDICTS & set(names) else ())}
    result = {name: found for name, found in row.items() if name not in FIELDS or name not in replaced}
    for own, theirs in names.items():
        found: Any = row
        for part in [theirs] if theirs in row else theirs.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise UserError(f"{theirs} is missing. The row has: {', '.join(map(encodable, row))}")
            found = found[part]
        result[own] = found
    return result
