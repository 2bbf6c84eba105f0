"""Collect the contents of a page: the groups of records, described and packed, and notes about them."""

import base64
import json
import logging
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ktae_trl.arguments import NotImportedError
from ktae_trl.credit.ktae.method import KTAE
from ktae_trl.report.curves import means_of, sums_of
from ktae_trl.report.group_view import describe, is_key_token_value, split
from ktae_trl.report.over_steps import Token, keys_of
from ktae_trl.report.records import Method, Record
from ktae_trl.report.rendered import rendered
from ktae_trl.report.tokens import visible

logger = logging.getLogger(__name__)

_FORMULA = {"multiply": "A' = A + |A| {}", "add": "A' = A + {}", "scale": "A' = A {}", "replace": "A' = {}"}
MOST_RENDERED = 1_000_000  # characters of a page: about 5 seconds and 1 MB
LONGEST_RENDERED = 50_000  # characters of a completion
_PREVIEW = 160  # characters of a prompt in the list of groups


class Shown(NamedTuple):
    """The contents of a page."""

    groups: list[dict[str, Any]]  # entries of the list of groups
    blocks: list[str]  # packed data of each group
    methods: list[dict[str, Any]]  # as displayed
    recorded: list[Method]  # as recorded
    by_step: list[dict[str, float]]  # means over each step's groups, named like the trainer's metrics
    keys: list[dict[Token, float]]  # key tokens of each group
    rendered: dict[int, str]  # packed nodes of the rollouts of a group, if they have Markdown or formulas
    notes: list[str]  # about records and groups that are not on the page


def collect(some: Iterable[Record], most: int | None = None, characters: int = MOST_RENDERED) -> Shown:
    """Describe and pack the groups of records, one record at a time.

    Args:
        most: Maximum number of groups of each record.
        characters: Maximum number of characters of each record whose Markdown is rendered, most telling groups first.
    """
    shown = Shown([], [], [], [], [], [], {}, [])
    recorded, known, generated = 0, 0, 0  # recorded groups; those with a known generation size; sum of these sizes
    methods: list[tuple[Method, ...]] = []  # that of the training, and those that it is compared with
    prompts: list[str] = []
    left_out = 0  # groups that are not rendered
    for record in map(_without_copies, some):
        settings = (record.method._replace(generated_groups=None), *record.compared)
        if settings not in methods:
            methods.append(settings)
            shown.recorded.append(settings[0])
            shown.methods.append(_method(settings[0]) | {"compared": [_method(other) for other in record.compared]})
        begin = len(shown.groups)
        means: list[dict[str, list[float]]] = []
        groups = list(split(record))
        some_rows = _nearest_to_half(groups, most)
        recorded += len(groups)
        if record.method.generated_groups:
            known, generated = known + len(groups), generated + record.method.generated_groups
        for rows in some_rows:
            group = describe(record.method, rows)
            means.append(sums_of(group))
            prompts.append(visible(rows[0]["prompt"]))
            shown.blocks.append(pack(group))
            shown.keys.append(keys_of(group) if is_key_token_value(record.method) else {})
            shown.groups.append(
                {
                    **{key: group[key] for key in ("step", "group", "score", "unscored")},
                    "right": sum(row["correct"] is True for row in rows),
                    "wrong": sum(row["correct"] is False for row in rows),
                    "method": methods.index(settings),
                }
            )
        if shown.groups[begin:]:
            step = shown.groups[begin]["step"]
            shown.by_step.append({"step": step, **means_of(means, shown.groups[begin:])})
            left_out += _render(shown, begin, some_rows, characters)
    if known < generated:
        shown.notes.append(f"The run recorded {known} of the {generated} groups generated in these steps.")
    if len(shown.groups) < recorded:
        shown.notes.append(
            f"This page shows {len(shown.groups)} of {recorded} recorded groups: for each step, those closest to an "
            "equal number of correct and wrong rollouts. To see all groups of a step, make a page of its file "
            "(ktae report step_N.parquet) or raise --max_groups."
        )
    if left_out:
        shown.notes.append(
            f"Markdown and LaTeX are rendered in {len(shown.groups) - left_out} of {len(shown.groups)} groups, in each "
            f"step in those with the largest mean |K|: at most {MOST_RENDERED:,} characters a page, and no completion "
            f"of more than {LONGEST_RENDERED:,}."
        )
    begin, end = _own_part(prompts)
    for group, prompt in zip(shown.groups, prompts, strict=True):
        own = (begin, len(prompt) - end)
        group |= {"prompt": prompt, "own": own, "preview": prompt[slice(*own)][:_PREVIEW]}
    return shown


def _without_copies(record: Record) -> Record:
    """Return the record without compared methods that are its own, with the same settings and values."""

    def is_own(i: int, method: Method) -> bool:
        own = record.method._replace(title=method.title, generated_groups=method.generated_groups)
        return method == own and all(row["compared"][i] == row["credit"] for row in record.rows)

    kept = [i for i, method in enumerate(record.compared) if not is_own(i, method)]
    if len(kept) == len(record.compared):
        return record
    rows = [{**row, "compared": [row["compared"][i] for i in kept]} for row in record.rows]
    return record._replace(rows=rows, compared=tuple(record.compared[i] for i in kept))


def _render(shown: Shown, begin: int, groups: list[list[dict[str, Any]]], characters: int) -> int:
    """Add the rendered completions of a record's groups, and return the number of groups that are not rendered.

    Args:
        begin: The index of the first group of the record on the page.
        groups: The rows of its groups.
        characters: The maximum number of characters.
    """
    left_out = 0
    for i in sorted(range(len(groups)), key=lambda i: -shown.groups[begin + i]["score"]):
        texts = [row["completion"] for row in groups[i]]
        characters -= sum(map(len, texts))
        if characters < 0 or max(map(len, texts)) > LONGEST_RENDERED:
            left_out += 1
            continue
        try:
            nodes = list(map(rendered, texts))
        except NotImportedError as error:
            note = f"Markdown and LaTeX are not rendered: {error}"
            if note not in shown.notes:
                logger.warning("%s", note)
                shown.notes.append(note)
            return 0
        if any(nodes):
            shown.rendered[begin + i] = pack(nodes)
    return left_out


def _nearest_to_half(groups: list[list[dict[str, Any]]], most: int | None) -> list[list[dict[str, Any]]]:
    """Return at most `most` groups, in their order: those closest to equal numbers of correct and wrong rollouts."""

    def smaller_side(i: int) -> int:
        return min(sum(row["correct"] is side for row in groups[i]) for side in (True, False))

    return [groups[i] for i in sorted(sorted(range(len(groups)), key=smaller_side, reverse=True)[:most])]


def _own_part(prompts: list[str]) -> tuple[int, int]:
    """Return the lengths of the beginning and end that all prompts share (a template), to fold them."""
    if len(set(prompts)) < 2:
        return 0, 0
    begin = _same_beginning(prompts, " \n>]")
    return begin, _same_beginning([prompt[begin:][::-1] for prompt in prompts], " \n<[")


def _same_beginning(texts: list[str], ends: str) -> int:
    """Return the length of the longest common beginning of all texts whose last character is one of `ends`."""
    first, last = min(texts), max(texts)
    same = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return max(first.rfind(end, 0, same) for end in ends) + 1


def _method(method: Method) -> dict[str, Any]:
    """Return a method's title, symbols and settings as the page displays them."""
    settings = {}
    if method.how is not None:
        settings["token advantage"] = _FORMULA[method.how].format(visible(method.symbol))
    settings |= {visible(name): visible(str(value)) for name, value in method.settings.items()}
    key_tokens = is_key_token_value(method)
    return {
        "title": visible(method.title or method.credit),
        "how": method.how,
        "value": method.how and {"symbol": visible(method.symbol), "name": visible(method.value_name)},
        "key_tokens": key_tokens,
        "leave_one_out": key_tokens and KTAE.options(method.settings)["leave_one_out"],
        "shares_tokens": method.shares_tokens,
        "settings": settings,
    }


def pack(data: Any) -> str:
    """Return data as compressed JSON in base64, which is safe inside a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()
