"""Explain files of rollouts: recognise them, choose groups, and value the tokens of these group by group."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ktae_trl.arguments import UserError, loading, model_path
from ktae_trl.report.dumps import own_records, sources
from ktae_trl.report.dumps.formats import Format, named
from ktae_trl.report.dumps.index import Index, recognise
from ktae_trl.report.dumps.rows import mapping
from ktae_trl.report.page import MAX_GROUPS, progress
from ktae_trl.report.records import Method, Record
from ktae_trl.report.rows import Valuer
from ktae_trl.report.tokens import visible


class Explained(NamedTuple):
    """What a page of files has: a record per group, valued as it is asked for, and what is said of them."""

    records: Iterator[Record]
    lines: list[str]  # for the terminal: what was recognised
    notes: list[str]  # for the page; complete once all records were asked for


def explain_files(
    paths: list[Path],
    method: Method,
    *,
    tokenizer: str | None = None,
    format: str | None = None,
    names: str | None = None,
    correct: str | None = None,
    threshold: float | None = None,
    max_groups: int = MAX_GROUPS,
) -> Explained:
    """Read files of rollouts of any known format and value the tokens of the most telling groups.

    Args:
        paths: Files and folders, of one format.
        method: KTAE with its settings.
        tokenizer: Hub id or folder of a tokenizer. Default: the one that the files name.
        format: Name of the format. Default: the one whose keys the files have.
        names: Names of the fields in the files, such as `prompt=input,completion=output`.
        correct: The number that says whether a rollout is correct.
        threshold: The value above which that number says so.
        max_groups: Maximum number of groups; each step has an equal share.

    Raises:
        UserError: The files cannot be read, are of several formats or of an unknown one, have nothing to compare, or do
            not say which rollouts are correct; or the tokenizer is missing or does not fit.
    """
    if max_groups < 1:
        raise UserError(f"max_groups must be at least 1, not {max_groups}")
    chosen = named(format, None if names is None else mapping(names))
    found = sources.files(paths)
    kind, found = recognise(found, chosen)
    valuer = _valuer(kind, found, method, tokenizer)
    index = Index(found, kind, correct)
    if index.sizes.max() < 2:
        raise UserError(
            f"{index.recognised()}. Each prompt has one completion, so there is nothing to compare: key tokens need "
            "correct and wrong completions of the same prompt in the same step"
        )
    verdicts = index.verdicts(threshold)
    groups = index.choose(verdicts, max_groups)
    notes: list[str] = []

    def valued() -> Iterator[Record]:
        numbers = index.numbers()
        for group, rollouts, own in progress(index.groups(groups, verdicts), "Valuing tokens"):
            yield Record(valuer.method, valuer.rows(numbers[group], rollouts, own))
        notes.extend(map(visible, [*index.notes(len(groups), threshold), *valuer.notes()]))

    lines = [index.recognised(), index.summary(verdicts)]
    if tokenizer is None and valuer.tokenizer is not None:
        lines.append(f"Tokenizer, which the files name: {valuer.tokenizer.name_or_path}")
    return Explained(valued(), lines, notes)


def _valuer(kind: Format, paths: list[Path], method: Method, name: str | None) -> Valuer:
    """Return what values tokens, with the tokenizer that the user or the files name."""
    theirs = kind.tokenizer(paths) if name is None else None
    if kind.has_tokens and name is None:
        return Valuer(method, None, own_records.method(paths[0]).special_ids)
    if name is None and theirs is None:
        raise UserError(
            f"The tokenizer of the model is needed for {kind.title}: --tokenizer NAME, a Hub id or a folder, such as "
            "--tokenizer Qwen/Qwen2.5-Math-1.5B"
        )
    from transformers import AutoTokenizer

    with loading(f"The tokenizer {name or theirs!r}", by="--tokenizer" if name else "named by the files"):
        return Valuer(method, AutoTokenizer.from_pretrained(model_path(name or theirs)))
