"""Turn the rows of a group into the data that is displayed: its tokens, and its key-token statistics computed again.

The result can be written as JSON. The page reads it in the browser, the notebook view in Python.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ktae_trl.credit.ktae.method import KTAE
from ktae_trl.credit.ktae.values import key_token_table, key_token_values
from ktae_trl.credit.method import Groups
from ktae_trl.report.records import Method, Record
from ktae_trl.report.tokens import visible

LONGEST_TOKEN = 200  # displayed characters of a token
_AGREE = 1e-4  # largest difference between the recorded K and K computed again by the same code
_STATISTICS = ("a", "b", "p", "F", "IG", "D", "K")


class Statistics(NamedTuple):
    """Key-token statistics of one group."""

    right: int  # correct rollouts that count
    wrong: int  # wrong rollouts that count
    values: list[list[float]]  # K at each position of each rollout, with the method's settings
    tokens: dict[int, tuple]  # token id -> _STATISTICS with K of the whole group; empty without correct or wrong ones


def split(record: Record) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each group, in the order in which the groups first appear."""
    groups: dict[tuple[int, int], list[dict]] = {}
    for row in record.rows:
        groups.setdefault((row["step"], row["group"]), []).append(row)
    yield from groups.values()


def is_key_token_value(method: Method) -> bool:
    """Return whether the recorded credit is the key-token value K, perhaps scaled, which is computed again here."""
    return method.credit == KTAE.name and method.how != "scale" and KTAE.of_own_group(method.settings)


def counted(method: Method, row: dict[str, Any]) -> list[bool]:
    """Return which tokens of a rollout count: those trained on.

    If rows share tokens, all count, because each shared token is trained on in one row only.
    """
    return [True] * len(row["trained"]) if method.shares_tokens else row["trained"]


def as_groups(method: Method, rows: list[dict[str, Any]], prompts: Sequence[list[int]] = ()) -> Groups:
    """Return the rows of one group as credit methods read them, without rows of the dataset.

    Args:
        method: Provides the special ids.
        rows: All rows of the group.
        prompts: Token ids of each row's prompt. Without them, all prompts are empty.
    """
    prompts = prompts or [[] for _ in rows]
    lengths, longest = [len(row["token_ids"]) for row in rows], max(map(len, prompts))
    # At least one position: metrics of methods need one, even if all completions are empty.
    ids = torch.zeros(1, len(rows), max(1, *lengths), dtype=torch.int64)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    prompt_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    prompt_mask = torch.zeros_like(prompt_ids)
    for i, (row, prompt, length) in enumerate(zip(rows, prompts, lengths, strict=True)):
        ids[0, i, :length] = torch.tensor(row["token_ids"], dtype=torch.int64)
        mask[0, i, :length] = torch.tensor(counted(method, row), dtype=torch.bool)
        prompt_ids[i, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        prompt_mask[i, longest - len(prompt) :] = 1
    return Groups(
        ids_PGT=ids,
        mask_PGT=mask,
        correct_PG=torch.tensor([[row["correct"] is True for row in rows]]),
        scored_PG=torch.tensor([[row["correct"] is not None for row in rows]]),
        advantages_B=torch.tensor([row["advantage"] for row in rows]),
        prompt_ids_BL=prompt_ids,
        prompt_mask_BL=prompt_mask,
        lengths_B=torch.tensor(lengths),
        special_ids=method.special_ids,
        own=slice(0, len(rows)),
    )


def statistics(method: Method, rows: list[dict[str, Any]]) -> Statistics:
    """Compute the key-token statistics of a group from the token ids and verdicts of its rows.

    Args:
        method: Provides KTAE's settings (defaults if the credit is not KTAE) and the special ids.
        rows: All rows of one group, with the columns of `records.schema`.
    """
    groups = as_groups(method, rows)
    ids = groups.ids_PGT
    settings = KTAE.options(method.settings)
    leave_one_out = settings.pop("leave_one_out")
    settings |= {"scored": groups.scored_PG, "ignore_ids": method.special_ids}
    table = key_token_table(ids, groups.mask_PGT, groups.correct_PG, **settings)
    values = table.values
    if leave_one_out:
        values = key_token_values(ids, groups.mask_PGT, groups.correct_PG, leave_one_out=True, **settings)
    K = dict(zip(ids[table.values != 0].tolist(), table.values[table.values != 0].tolist(), strict=True))
    columns = [getattr(table, name).tolist() for name in ("a", "b", "p", "F", "IG", "D")]
    tokens = {
        token: (*numbers, K.get(token, 0.0)) for token, *numbers in zip(table.token.tolist(), *columns, strict=True)
    }
    by_row = [values[0, i, : len(row["token_ids"])].tolist() for i, row in enumerate(rows)]
    return Statistics(int(table.n_right), int(table.n_wrong), by_row, tokens)


def describe(method: Method, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the data that is displayed of a group, with visible strings and numbers that JSON can represent.

    `tokens` has one column per statistic, over the distinct tokens of the group. A rollout's `cells` are its distinct
    combinations of token, value, advantage and whether it is trained on. Its `at` has a cell's index for each position.
    Its `arrays` and `compared` have a number for each position, `segments` the turns, and `parts` the result of
    `parting`.
    """
    found = statistics(method, rows)
    parts = parting(rows)
    number_of: dict[tuple[int, str], int] = {}
    rollouts = []
    for row, part in zip(rows, parts, strict=True):
        credit = row["credit"] if row["credit"] is not None else [None] * len(row["token_ids"])
        cells: dict[tuple, int] = {}
        at = []
        for *token, value, advantage, trained in zip(
            row["token_ids"], row["tokens"], credit, row["advantages"], row["trained"], strict=True
        ):
            token = number_of.setdefault(tuple(token), len(number_of))
            at.append(cells.setdefault((token, value, advantage, trained), len(cells)))
        token, value, advantage, trained = zip(*cells, strict=True) if cells else ((),) * 4
        rollouts.append(
            {
                "rollout": row["rollout"],
                "correct": row["correct"],
                "advantage": number(row["advantage"]),
                "rewards": {visible(name): number(reward) for name, reward in row["rewards"].items()},
                "cells": {
                    "token": token,
                    "value": list(map(number, value)),
                    "advantage": list(map(number, advantage)),
                    "trained": list(map(int, trained)),
                },
                "at": at,
                "arrays": {visible(name): _short(numbers) for name, numbers in row.get("arrays", {}).items()},
                "compared": [_short(numbers) for numbers in row.get("compared", ())],
                "segments": [{**turn, "role": visible(turn["role"])} for turn in row.get("segments") or ()],
                "parts": part,
            }
        )
    nothing = (None,) * len(_STATISTICS)
    of_token = [found.tokens.get(token, nothing) for token, _ in number_of]
    return {
        "step": rows[0]["step"],
        "group": rows[0]["group"],
        "right": found.right,
        "wrong": found.wrong,
        "unscored": sum(row["correct"] is None for row in rows),
        "notes": _notes(method, rows, found),
        "score": number(_mean_abs(found.values, [counted(method, row) for row in rows])),
        "tokens": {
            "id": [token for token, _ in number_of],
            "text": [clip(visible(text), LONGEST_TOKEN) for _, text in number_of],
            **{name: [number(numbers[i]) for numbers in of_token] for i, name in enumerate(_STATISTICS)},
        },
        "rollouts": rollouts,
    }


def parting(rows: list[dict[str, Any]]) -> list[int | None]:
    """Return, for each wrong rollout of a group, the first position at which it leaves all correct rollouts.

    This is the first position t such that no correct rollout begins with the same t + 1 tokens: a place where the
    rollout parts from them, not a proof that the token there is an error. It is None for other rollouts, if no rollout
    is correct, and if a correct rollout begins with the whole wrong one.
    """
    right = [row["token_ids"] for row in rows if row["correct"] is True]

    def leaves(ids: list[int]) -> int | None:
        same = max(_same_beginning(ids, own) for own in right)
        return same if same < len(ids) else None

    return [leaves(row["token_ids"]) if right and row["correct"] is False else None for row in rows]


def _same_beginning(some: list[int], others: list[int]) -> int:
    pairs = zip(some, others, strict=False)
    return next((t for t, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))


def _short(numbers: list[float | None]) -> list[float | str | None]:
    """Return numbers for a colour and a tooltip: with four digits of their range, and with three decimals or more."""
    finite = [x for x in numbers if x is not None and math.isfinite(x)]
    spread = max(finite) - min(finite) if finite else 0.0
    decimals = max(3, 4 - math.ceil(math.log10(spread))) if spread else 6
    return [number(x) if x is None or not math.isfinite(x) else round(x, decimals) + 0.0 for x in numbers]  # no -0.0


def number(x: float | None) -> float | str | None:
    """Return `x` rounded to 7 digits, the precision of records. NaN and infinities become strings, for JSON."""
    if x is None or isinstance(x, int):
        return x
    return float(f"{x:.7g}") if math.isfinite(x) else str(x)


def clip(text: str, length: int) -> str:
    """Return `text`, cut to `length` characters and followed by its full length if it is longer."""
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def _mean_abs(values: list[list[float]], counted: list[list[bool]]) -> float:
    """Return the mean |K| of the tokens that count, which measures the strength of a group's signal."""
    return sum(abs(v) for row in values for v in row) / max(sum(map(sum, counted)), 1)


def _notes(method: Method, rows: list[dict[str, Any]], found: Statistics) -> list[str]:
    notes = []
    silent = sum(row["correct"] is not None and not any(counted(method, row)) for row in rows)
    has_K = is_key_token_value(method)
    if has_K and len(rows) == 1:
        notes.append("The group has a single rollout and nothing to compare it with, so K is 0 for all tokens.")
    elif has_K and not found.right and not found.wrong:
        notes.append("No rollout could be graded, so there are no statistics.")
    elif has_K and not (found.right and found.wrong):
        side = "correct" if found.right else "wrong"
        notes.append(f"All counted rollouts are {side}, so there is nothing to compare and K is 0 for all tokens.")
    if silent:
        notes.append(f"Rollouts that are not counted, because none of their tokens is trained on: {silent}.")
    if has_K:
        scale = KTAE.scale_of(method.settings)
        computed = [[scale * value for value in values] for values in found.values]
        differences = [
            abs(recorded - again)
            for row, values in zip(rows, computed, strict=True)
            for recorded, again in zip(row["credit"] or values, values, strict=True)
        ]
        largest = max((math.inf if d != d else d for d in differences), default=0.0)
        if largest > _AGREE:
            notes.append(
                f"K computed for this page differs from the recorded K by up to {largest:.2g}: the record was written "
                "by another version of ktae_trl, or the group is incomplete. The colours show the recorded K; a, b, p, "
                "F, IG and D are computed for this page."
            )
    return notes
