"""Mine planning n-grams, the list of `hicra_ngrams`, from rollouts: a run's records or the files of other trainers.

ktae mine-ngrams runs/my_run -o ngrams.txt

An n-gram of 3 to 5 words is counted where it begins a clause: at the beginning of a text or line, or after punctuation.
"We need to find" begins a clause, "to find the number" is a part of one. It is kept if it

- has no words of a single letter, which are mostly symbols, except `a` and `I`;
- is used in rollouts of at least `min_problems` problems, not counting those whose own text contains it;
- is used at most `MOST_TIMES` times on average by the rollouts that use it: calculations repeat their words;
- is not the beginning of a longer kept n-gram that has at least `MOSTLY` of its rollouts.

The kept n-grams are sorted by the number of problems. What a word is, and where an n-gram can be, is defined by
`ktae_trl.credit.hicra.clauses`, as in training. There is no second model: whether an n-gram is a plan is for the reader
of the list to judge.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ktae_trl.arguments import UserError, loading, model_path
from ktae_trl.credit.hicra import SIZES, clauses
from ktae_trl.files.writing import replace_text
from ktae_trl.report.dumps import sources
from ktae_trl.report.dumps.formats import add_options, named
from ktae_trl.report.dumps.index import recognise
from ktae_trl.report.dumps.rollout import ASSISTANT, Place, Rollout
from ktae_trl.report.dumps.rows import mapping
from ktae_trl.report.page import progress
from ktae_trl.report.tokens import visible

MOST_TIMES = 1.5
MOSTLY = 0.5
_SHOWN = 20  # n-grams in the table
_AROUND = 60  # characters of an example
_ONE_LETTER = {"a", "i"}
_MARKS = " \u00a0*#>-([{\"'\u201c\u2018`"  # what may stand between the beginning of a clause and its first word
_ENDINGS = "\n.,;:!?…—"  # what may end the clause before
logger = logging.getLogger(__name__)


class Mined(NamedTuple):
    """An n-gram, with how it is used where it begins a clause."""

    ngram: str
    problems: int  # of which a rollout uses it
    rollouts: int  # that use it
    times: int  # in all rollouts
    example: str  # the text from it on


class Said(NamedTuple):
    """A rollout as it is mined."""

    problem: str
    said: str


def mine(rollouts: Iterable[Said], min_problems: int, top: int) -> list[Mined]:
    """Return the planning n-grams of rollouts, at most `top`, sorted by the number of problems. See the module.

    Memory grows with the number of different n-grams that begin a clause.
    """
    numbers: dict[str, int] = {}  # of the problems
    problems: dict[str, set[int]] = {}
    counts: dict[str, list[int]] = {}  # rollouts, times
    examples: dict[str, str] = {}
    for problem, said in rollouts:
        own = numbers.setdefault(problem, len(numbers))
        asked, used = _ngrams_of(problem), set()
        for ngram, at in beginnings(said):
            if ngram in asked:
                continue
            count = counts.setdefault(ngram, [0, 0])
            count[0] += ngram not in used
            count[1] += 1
            if ngram not in used:
                problems.setdefault(ngram, set()).add(own)
                examples.setdefault(ngram, " ".join(said[at : at + _AROUND].split()))
                used.add(ngram)
    found = [
        Mined(ngram, len(problems[ngram]), *count, examples[ngram])
        for ngram, count in counts.items()
        if len(problems[ngram]) >= min_problems and count[1] <= MOST_TIMES * count[0]
    ]
    return sorted(_longest(found), key=lambda one: (-one.problems, -one.rollouts, one.ngram))[:top]


def beginnings(text: str) -> Iterator[tuple[str, int]]:
    """Yield the n-grams that begin a clause of a text, each with the place at which it begins."""
    for words in clauses(text):
        for i, word in enumerate(words):
            if _begins(text, word.begin):
                for size in SIZES:
                    forms = [other.form for other in words[i : i + size]]
                    if len(forms) == size and all(map(_is_plain, forms)):
                        yield " ".join(forms), word.begin


def _is_plain(form: str) -> bool:
    return form in _ONE_LETTER or (len(form) > 1 and form.replace("'", "").isalpha())  # "²" is a letter to `re`


def _begins(text: str, at: int) -> bool:
    before = text[max(0, at - 20) : at].rstrip(_MARKS)
    return not before or before[-1] in _ENDINGS


@lru_cache(maxsize=256)  # the rollouts of a problem are mostly together
def _ngrams_of(problem: str) -> frozenset[str]:
    """Return all n-grams of a problem's text."""
    return frozenset(
        " ".join(word.form for word in words[i : i + size])
        for words in clauses(problem)
        for size in SIZES
        for i in range(len(words) - size + 1)
    )


def _longest(found: list[Mined]) -> list[Mined]:
    """Leave out n-grams that are the beginning of a longer kept one with most of their rollouts."""
    kept, longer = [], {}  # beginning -> the most rollouts of a longer kept n-gram
    for one in sorted(found, key=lambda one: -len(one.ngram.split())):
        if longer.get(one.ngram, 0) < MOSTLY * one.rollouts:
            kept.append(one)
            words = one.ngram.split()
            for size in range(SIZES[0], len(words)):
                part = " ".join(words[:size])
                longer[part] = max(longer.get(part, 0), one.rollouts)
    return kept


# The command


def main(words: list[str]) -> None:
    """Run `ktae mine-ngrams`."""
    try:
        _mine(words)
    except UserError as error:  # the message may quote an untrusted file
        sys.exit(f"ktae mine-ngrams: {_one_line(str(error))}")


def _mine(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ktae mine-ngrams",
        description="Write a list of planning n-grams, for credit: hicra, from the rollouts of a run or of another "
        "trainer. Read it and edit it: it is sorted by the number of problems, not by meaning.",
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run's folder with records (record_steps), or files and folders of any format that ktae explain reads",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("ngrams.txt"), help="the list, a new file (default: ngrams.txt)"
    )
    parser.add_argument(
        "--min_problems",
        type=int,
        default=5,
        metavar="N",
        help="an n-gram must be used in rollouts of at least N different problems (default: 5)",
    )
    parser.add_argument("--top", type=int, default=100, metavar="N", help="length of the list, at most (default: 100)")
    add_options(parser)
    options = parser.parse_args(words)
    for name in ("min_problems", "top"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.output.exists():  # it may have been edited
        raise UserError(f"{options.output} already exists. Choose another file with -o, or remove this one")
    files = Files(options.paths, options.format, options.names, options.tokenizer)
    mined = mine(progress(files, "Mining n-grams"), options.min_problems, options.top)
    if files.skipped:
        logger.warning("Skipped %d rows that could not be read. The first: %s", files.skipped, visible(files.bad))
    if not mined:
        raise UserError(
            f"No n-gram is used in rollouts of at least {options.min_problems} problems ({files.described()}). Lower "
            "--min_problems, or write the list by hand: one n-gram of 3 to 5 words per line"
        )
    settings = f"--min_problems {options.min_problems} --top {options.top}"
    command = _one_line(f"ktae mine-ngrams {shlex.join(words)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(options.output, listed(mined, files.described(), command, settings))
    Console(highlight=False, markup=False, emoji=False).print(table(mined))
    Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print(
        f"Saved {options.output} ({len(mined)} n-grams, mined from {files.described()}). Remove those that are no "
        f"plans. Train with --credit hicra --hicra_ngrams {options.output}"
    )


class Files:
    """The rollouts of files of any known format as they are mined, and counts of what has been read."""

    def __init__(self, paths: list[Path], format: str | None, names: str | None, tokenizer: str | None):
        """Recognise the files. The arguments are those of `dumps.explaining.explain_files`.

        Raises:
            UserError: The files cannot be read, or are of several formats or of an unknown one.
        """
        chosen = named(format, None if names is None else mapping(names))
        self.kind, self.files = recognise(sources.files(paths), chosen)
        self._paths, self._tokenizer_name = paths, tokenizer
        self.problems: set[str] = set()
        self.rollouts = self.skipped = 0
        self.bad = ""  # the first row that could not be read

    def __iter__(self) -> Iterator[Said]:
        for path in self.files:
            for at, where, row in sources.read(path):
                try:
                    if isinstance(row, UserError):
                        raise row
                    rollouts = self.kind.rollouts(row, Place(path, at))
                except UserError as error:
                    self.skipped += 1
                    self.bad = self.bad or f"{path}, {where}: {error}"
                    continue
                for rollout in rollouts:
                    prompt = rollout.prompt
                    text = Said(prompt if isinstance(prompt, str) else self._decode(prompt), self._said(rollout))
                    self.problems.add(text.problem)
                    self.rollouts += 1
                    yield text

    def described(self) -> str:
        """Return what has been read, on one line."""
        paths = " ".join(map(str, self._paths))
        return _one_line(f"{self.rollouts:,} rollouts of {len(self.problems):,} problems in {paths}")

    def _said(self, rollout: Rollout) -> str:
        """Return what the model wrote, without the turns of others."""
        text, ids, trained = rollout.text, rollout.token_ids, rollout.trained
        if rollout.tokens is not None and not all(trained):
            return "".join(token for token, own in zip(rollout.tokens, trained, strict=True) if own)
        if text is None:
            return self._decode([i for i, own in zip(ids, trained or [True] * len(ids), strict=True) if own])
        if ids is None and rollout.turns:
            ends = [*(at for _, at in rollout.turns[1:]), len(text)]
            turns = zip(rollout.turns, ends, strict=True)
            return "\n".join(text[begin:end] for (role, begin), end in turns if role == ASSISTANT)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @cached_property
    def _tokenizer(self):
        name = self._tokenizer_name or self.kind.tokenizer(self.files)
        if name is None:
            raise UserError(
                f"The {self.kind.title} have token ids without a text. Name the tokenizer of the model: --tokenizer "
                "NAME, a Hub id or a folder"
            )
        from transformers import AutoTokenizer

        with loading(f"The tokenizer {name!r}", by="--tokenizer" if self._tokenizer_name else "named by the files"):
            return AutoTokenizer.from_pretrained(model_path(name))


def listed(mined: list[Mined], source: str, command: str, settings: str) -> str:
    """Return the text of a list of n-grams.

    Args:
        source, command, settings: What was mined, by which command line, and its settings with the defaults.
    """
    head = [
        "Planning n-grams for the setting hicra_ngrams of credit: hicra. One n-gram of 3 to 5 words per line.",
        f"Mined from {source}",
        f"by {command}",
        f"({settings}). They are sorted by the number of problems. Edit the list: remove what is no plan.",
    ]
    lines = [f"{one.ngram}  # {one.problems} problems, {one.rollouts} rollouts" for one in mined]
    return "\n".join([*(f"# {line}" for line in head), "", *lines, ""])


def table(mined: list[Mined]) -> Table:
    """Return a table of the first n-grams."""
    shown = mined[:_SHOWN]
    title = f"The first {len(shown)} of {len(mined)} n-grams" if len(mined) > len(shown) else None
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="")
    result.add_column("n-gram", no_wrap=True)
    for name in ("problems", "rollouts", "per rollout"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("example")  # the only column that is cut off on a narrow terminal
    for one in shown:
        times = f"{one.times / one.rollouts:.2f}"
        example = Text(visible(one.example), no_wrap=True, overflow="ellipsis")
        result.add_row(one.ngram, f"{one.problems:,}", f"{one.rollouts:,}", times, example)
    return result


def _one_line(text: str) -> str:
    return visible(" ".join(text.split()))
