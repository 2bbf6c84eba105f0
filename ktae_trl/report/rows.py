"""Compute key tokens of rollouts from any source: read, grade and tokenize rows, and value their tokens."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ktae_trl.arguments import UserError
from ktae_trl.credit.combine import combine as combine_with
from ktae_trl.credit.ktae.method import COMBINE, KTAE
from ktae_trl.files.lines import read_json_lines
from ktae_trl.grading import grade_many
from ktae_trl.report.group_view import as_groups
from ktae_trl.report.notebook import KeyTokens
from ktae_trl.report.page import progress
from ktae_trl.report.records import Record, method_of
from ktae_trl.report.tokens import token_strings


def explain(
    rows: Iterable[Mapping[str, Any]],
    tokenizer,
    *,
    combine: str = "multiply",
    fisher_weight: float = 1.0,
    ig_weight: float = 1.0,
    tf_weight: float = 1.0,
    leave_one_out: bool = False,
) -> KeyTokens:
    """Compute the token values that KTAE would give rollouts in training.

    Rows with the same prompt form a group, in any order. The advantage of a rollout is GRPO's as in TRL, with reward 1
    for a correct answer and 0 for a wrong one:

        A = (r - mean) / (std + 1e-4), with the unbiased standard deviation.

    Args:
        rows: Mappings with `prompt` and `completion` (strings or lists of chat messages), and with `correct` (true,
            false, or null if it could not be graded) or `answers` (the accepted answer or a list of accepted answers).
            With `answers`, the completion is graded as in training.
        tokenizer: A transformers tokenizer, which should be that of the model that wrote the completions.
        combine: How the advantage A is changed: "multiply", "add" or "importance", as in `ktae_combine`.
        fisher_weight, ig_weight, tf_weight, leave_one_out: As in `key_token_table`.

    If all rollouts of a prompt are correct or all are wrong, or it has a single rollout, its values are 0. A rollout
    that cannot be graded (null, or answers that cannot be parsed) does not count in the statistics and has values of 0.
    A lone surrogate in a text is replaced by U+FFFD.

    Raises:
        ValueError: There are no rows, a row lacks a column or has a value of the wrong type (the message has its
            number), or a setting is unknown or out of range.
    """
    if combine not in COMBINE:
        raise UserError(f"combine must be one of {', '.join(COMBINE)}, not {combine!r}")
    weights = {"fisher_weight": fisher_weight, "ig_weight": ig_weight, "tf_weight": tf_weight}
    settings = KTAE.settings_from({**weights, "leave_one_out": leave_one_out}, combine)
    rows = list(rows)
    if not rows:
        raise UserError("No rollouts to explain: rows is empty")
    for number, row in enumerate(rows):
        check_row(row, f"row {number}")

    prompts = [_encodable(_text(row["prompt"])) for row in rows]
    completions = [_encodable(_text(row["completion"], only="assistant")) for row in rows]
    verdicts = _verdicts(rows, completions)
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)

    special = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    ids = tuple(sorted({i for i in special if i is not None}))
    ktae = KTAE(SimpleNamespace(**settings), None)
    method = method_of(ktae, ktae.how, settings, special_ids=ids)
    strings: dict[int, str] = {}
    explained = []
    for number, members in enumerate(progress(groups.values(), "Valuing tokens")):
        tokens = tokenizer([completions[i] for i in members], add_special_tokens=False)["input_ids"]
        strings |= token_strings({i for row in tokens for i in row} - strings.keys(), tokenizer)
        advantages = group_advantages([verdicts[i] for i in members])
        group = [
            {
                "step": 0,
                "group": number,
                "rollout": place,
                "prompt": prompts[i],
                "completion": completions[i],
                "token_ids": own,
                "tokens": [strings[token] for token in own],
                "trained": [True] * len(own),
                "rewards": {"correct": None if verdicts[i] is None else float(verdicts[i])},
                "correct": verdicts[i],
                "advantage": advantage,
            }
            for place, (i, own, advantage) in enumerate(zip(members, tokens, advantages, strict=True))
        ]
        groups = as_groups(method, group)
        values_BT = ktae.credit(groups).values_BT
        advantages_BT = combine_with(groups.advantages_B, values_BT, method.how)
        for row, values, own in zip(group, values_BT.tolist(), advantages_BT.tolist(), strict=True):
            length = len(row["token_ids"])
            row["credit"], row["advantages"] = values[:length], own[:length]
        explained += group
    return KeyTokens(Record(method, explained))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read rollouts from a `.jsonl` or `.jsonl.gz` file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is empty, or a line is not a valid row for `explain`. The message has the line number.
    """
    rows = []
    for number, row in read_json_lines(path):
        check_row(row, f"{path}, line {number}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} contains no rollouts")
    return rows


def check_row(row: Any, where: str) -> None:
    """Raise a ValueError that begins with `where` if `row` is not a valid row for `explain`."""
    if not isinstance(row, Mapping):
        raise UserError(
            f"{where}: a row must be an object with prompt, completion and correct (or answers), not {row!r:.60}"
        )
    missing = [name for name in ("prompt", "completion") if name not in row]
    if "correct" not in row and "answers" not in row:
        missing.append("correct (or answers)")
    if missing:
        raise UserError(
            f"{where}: {', '.join(missing)} is missing. The row has: {', '.join(map(str, row)) or 'nothing'}"
        )
    for name in ("prompt", "completion"):
        value = row[name]
        chat = isinstance(value, list) and all(
            isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in value
        )
        if not isinstance(value, str) and not chat:
            raise UserError(f"{where}: {name} must be a string or a list of chat messages, not {value!r:.60}")
    if "correct" in row:
        if row["correct"] is not None and row["correct"] not in (0, 1):
            raise UserError(f"{where}: correct must be true, false or null, not {row['correct']!r:.60}")
        return
    answers = row["answers"]
    if not isinstance(answers, str) and not (
        isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
    ):
        raise UserError(f"{where}: answers must be a string or a non-empty list of strings, not {answers!r:.60}")


def group_advantages(verdicts: list[bool | None]) -> list[float]:
    """Return GRPO's advantages of a group as in TRL 1.16, with reward 1 for correct and 0 for wrong rollouts.

    The advantage is 0 for a rollout without a verdict, and for all rollouts if all verdicts are equal or if fewer than
    two rollouts have one.
    """
    rewards = torch.tensor([float("nan") if verdict is None else float(verdict) for verdict in verdicts])
    known = rewards[~rewards.isnan()]
    if len(known) < 2:
        return [0.0] * len(verdicts)
    return ((rewards - known.mean()) / (known.std() + 1e-4)).nan_to_num(nan=0.0).tolist()


def _verdicts(rows: list[Mapping[str, Any]], completions: list[str]) -> list[bool | None]:
    verdicts = [None if row.get("correct") is None else bool(row["correct"]) for row in rows]
    asked = [i for i, row in enumerate(rows) if "correct" not in row]
    graded = grade_many([completions[i] for i in asked], [rows[i]["answers"] for i in asked])
    for i, verdict in zip(asked, graded, strict=True):
        verdicts[i] = verdict
    return verdicts


def _text(value: str | list[Mapping[str, str]], only: str | None = None) -> str:
    """Return chat messages as readable text. For a single message with role `only`, return its content."""
    if isinstance(value, str):
        return value
    if len(value) == 1 and value[0].get("role") == only:
        return value[0]["content"]
    return "\n\n".join(f"{message.get('role', '')}: {message['content']}" for message in value)


def _encodable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
