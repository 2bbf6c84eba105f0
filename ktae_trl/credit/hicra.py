"""HICRA: hierarchy-aware credit assignment (arXiv 2509.03646, ICLR 2026).

The tokens of planning n-grams, such as "let us first find", get a larger advantage than the others. The n-grams are a
list: the package's own, the user's, or one that `ktae mine-ngrams` made from rollouts (`ktae_trl.report.mining`).

The formula and alpha are the paper's, as summaries of the paper give them; its text and code were not read. Departures:

- The list. The paper clusters the n-grams of correct solutions by sentence embeddings. The package's list is written by
  hand, and `ktae mine-ngrams` counts words without a second model.
- Which words match is defined here (see `clauses`).
"""

import hashlib
import os
import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ktae_trl.arguments import TINY, NotFoundError, UserError
from ktae_trl.credit.decoding import decoded, need_fast
from ktae_trl.credit.method import Card, Credit, Groups, Method, Settings

SIZES = (3, 4, 5)  # words of an n-gram
LISTS = Path(__file__).parent / "ngrams"
# Letters, with apostrophes inside. Not a part of a name with digits (`x1`), nor of a LaTeX command (`\frac`).
_WORD = re.compile(r"(?<![\w\\])(?<!\w['\u2019])[^\W\d_]++(?:['\u2019][^\W\d_]++)*+(?!\w)")
_JOINT = re.compile(r",?[ \u00a0]++")  # between two words of an n-gram


class HICRA(Method):
    """A larger advantage for the tokens of planning n-grams, such as "let us first find"."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: hicra`.

        Parameters:
            hicra_alpha (`float`, *optional*, defaults to `0.2`):
                Value K of the tokens of planning n-grams, above 0 and at most 1. Their advantage is `A + alpha |A|`:
                raised in rollouts with A > 0, and lowered in size where A < 0.
            hicra_ngrams (`str`, *optional*):
                File with the planning n-grams: one per line, of 3 to 5 words; `#` begins a comment. `"tiny"` is the
                list of the offline task. Defaults to the package's list for mathematics in English.
        """

        hicra_alpha: float = field(
            default=0.2, metadata={"help": "Value K of the tokens of planning n-grams, above 0 and at most 1."}
        )
        hicra_ngrams: str | None = field(
            default=None,
            metadata={"help": "File with planning n-grams of 3 to 5 words, one per line. Default: the package's list."},
        )

        def check(self) -> None:
            if not 0 < self.hicra_alpha <= 1:
                raise UserError(f"hicra_alpha must be above 0 and at most 1, not {self.hicra_alpha}")
            if self.hicra_ngrams is not None:
                read_ngrams(self.hicra_ngrams)

    name = "hicra"
    family = "hicra"
    title = "HICRA (planning n-grams)"
    card = Card(
        "HICRA",
        'Each token gets the advantage of its rollout, A. Tokens of planning n-grams, such as "let us first find", get '
        "A + alpha |A|.",
        ("hicra",),
        {
            "title": "Emergent Hierarchical Reasoning in LLMs through Reinforcement Learning",
            "id": "2509.03646",
            "citation": textwrap.dedent("""\
                @inproceedings{wang2026hicra,
                    title     = {{Emergent Hierarchical Reasoning in LLMs through Reinforcement Learning}},
                    author    = {Haozhe Wang and Qixin Xu and Che Liu and Junhong Wu and Fangzhen Lin and Wenhu Chen},
                    booktitle = {International Conference on Learning Representations},
                    year      = 2026,
                    eprint    = {arXiv:2509.03646},
                }"""),
        },
    )
    value = "planning value K"
    columns = {
        "plan": ("hicra/planning_tokens", "{:.1%}", "share of tokens in planning n-grams"),
        "plan correct": ("hicra/planning_right", "{:.1%}", "the same in correct rollouts"),
        "plan wrong": ("hicra/planning_wrong", "{:.1%}", "the same in wrong rollouts"),
        "with plan": ("hicra/planning_rollouts", "{:.0%}", "share of rollouts with a planning n-gram"),
    }
    panels = {
        "Share of tokens in planning n-grams": [
            "hicra/planning_tokens",
            "hicra/planning_right",
            "hicra/planning_wrong",
        ],
        "Share of rollouts with a planning n-gram": ["hicra/planning_rollouts"],
    }
    needs_both_sides = False  # K scales rollout advantages from any reward

    def __init__(self, settings: Any, tools: Any):
        super().__init__(settings, tools)
        need_fast(tools.tokenizer, "HICRA")
        self.ngrams = read_ngrams(settings.hicra_ngrams)
        self._special = [i for i, token in tools.tokenizer.added_tokens_decoder.items() if token.special]

    @classmethod
    def content(cls, config: Any) -> dict[str, Any]:
        listed = "\n".join(sorted(read_ngrams(config.hicra_ngrams)))
        return {"hash of the n-grams": hashlib.sha256(listed.encode()).hexdigest()[:12]}

    def credit(self, groups: Groups) -> Credit:
        """Return K = alpha for the tokens of planning n-grams of this process's rollouts, and 0 for all others."""
        mask_BT, ids_BT = groups.mask_BT, groups.ids_BT
        found_BT = torch.zeros(mask_BT.shape, dtype=torch.bool)
        for row, ids in enumerate(groups.completions):
            found_BT[row] = planning_tokens(ids, self.tools.tokenizer, self.ngrams, mask_BT.shape[1])
        special = torch.tensor([*self._special, *groups.special_ids], device=ids_BT.device)
        planning_BT = found_BT.to(mask_BT.device) & mask_BT & ~torch.isin(ids_BT, special)
        return Credit(self.settings.hicra_alpha * planning_BT.float(), sums(groups, planning_BT))

    @classmethod
    def no_signal(cls, sums: dict[str, float], config: Any, first: str) -> str | None:
        if sums.get("hicra/planning_tokens"):
            return None
        source = "the package's list" if config.hicra_ngrams is None else f"hicra_ngrams: {config.hicra_ngrams}"
        return (
            f"The rollouts of {first} contain none of the planning n-grams of credit: {config.credit} ({source}), so "
            "all tokens of a rollout get the same advantage. Mine the n-grams of this model: set record_steps, run "
            "ktae mine-ngrams RUN -o ngrams.txt on the run, and set hicra_ngrams: ngrams.txt."
        )


def sums(groups: Groups, planning_BT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of this process's rollouts as (numerator, denominator). See `docs/reference/metrics.md`.

    Args:
        planning_BT: bool, the tokens that get K = alpha.
    """
    mask_BT = groups.mask_BT
    correct_B1, scored_B1 = (groups.own_rows(x[..., None]) for x in (groups.correct_PG, groups.scored_PG))
    right_BT, wrong_BT = (mask_BT & scored_B1 & side_B1 for side_B1 in (correct_B1, ~correct_B1))
    return {
        "hicra/planning_tokens": (planning_BT.sum(), mask_BT.sum()),
        "hicra/planning_right": ((planning_BT & right_BT).sum(), right_BT.sum()),
        "hicra/planning_wrong": ((planning_BT & wrong_BT).sum(), wrong_BT.sum()),
        "hicra/planning_rollouts": (planning_BT.any(1).sum(), mask_BT.any(1).sum()),
    }


def planning_tokens(ids: list[int], tokenizer: Any, ngrams: Collection[str], T: int) -> Tensor:
    """Return which tokens of a completion hold a character of a planning n-gram.

    The spaces and commas between the words of an n-gram belong to it. N-grams may overlap.

    Args:
        ids: token ids of the completion, without padding.
        tokenizer: a fast tokenizer.
        ngrams: from `read_ngrams`.
        T: length of the result, at least that of `ids`.

    Returns:
        (T,) bool on the CPU.
    """
    text = decoded(ids, tokenizer)
    found_T = torch.zeros(T, dtype=torch.bool)
    for begin, end in find_ngrams(text.text, ngrams):
        tokens = text.tokens(begin, end)
        found_T[tokens.start : tokens.stop] = True
    return found_T


# N-grams in a text


class Word(NamedTuple):
    """A word of a text."""

    form: str  # lower case, with a straight apostrophe
    begin: int
    end: int


def clauses(text: str) -> Iterator[list[Word]]:
    """Yield the sequences of words in which an n-gram can be.

    A word consists of letters, with apostrophes inside (`let's`). Words are separated by spaces, before which there may
    be a comma. Anything else ends a sequence: other punctuation, a hyphen, a line break, digits, symbols, names with
    digits, and LaTeX commands. Case does not matter.
    """
    words: list[Word] = []
    for match in _WORD.finditer(text):
        if words and not _JOINT.fullmatch(text, words[-1].end, match.start()):
            yield words
            words = []
        words.append(Word(match[0].lower().replace("\u2019", "'"), *match.span()))
    if words:
        yield words


def find_ngrams(text: str, ngrams: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yield the places (begin, end) of n-grams in a text, in order: at each word the longest that begins there.

    Args:
        ngrams: a set of n-grams, their words in lower case and separated by one space.
    """
    for words in clauses(text):
        forms = [word.form for word in words]
        for i in range(len(words) - SIZES[0] + 1):
            for size in reversed(SIZES):
                if i + size <= len(words) and " ".join(forms[i : i + size]) in ngrams:
                    yield words[i].begin, words[i + size - 1].end
                    break


# Lists of n-grams


def read_ngrams(name: str | None) -> frozenset[str]:
    """Read a list of n-grams.

    Args:
        name: a file; "tiny" for the list of the offline task; None for the package's list. A line is an n-gram of 3 to
            5 words. `#` begins a comment.

    Raises:
        NotFoundError: there is no such file.
        UserError: it is not a text file, has no n-gram, or has a line that is not an n-gram.
    """
    lists = {None: "general", TINY: "tiny"}
    path = LISTS / f"{lists[name]}.txt" if name in lists else Path(os.path.expanduser(name))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise NotFoundError(
            f"There is no list of n-grams {name} (hicra_ngrams; looked in {Path.cwd()}). `ktae mine-ngrams RUN -o "
            "FILE` makes one from rollouts; null selects the package's list"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list of n-grams {name} (hicra_ngrams) cannot be read as a text file: {error}") from None
    ngrams = set()
    for number, line in enumerate(lines, 1):
        if entry := line.partition("#")[0].strip():
            ngrams.add(_ngram(entry, f"{name}, line {number}"))
    if not ngrams:
        raise UserError(
            f"The list of n-grams {name} (hicra_ngrams) is empty. Write one n-gram of 3 to 5 words per line"
        )
    return frozenset(ngrams)


def _ngram(entry: str, place: str) -> str:
    found = list(clauses(entry))
    forms = [word.form for word in found[0]] if found else []
    if len(found) != 1 or (found[0][0].begin, found[0][-1].end) != (0, len(entry)):
        raise UserError(
            f"{place}: {entry!r} has characters that no n-gram has. Write words of letters, separated by spaces"
        )
    if len(forms) not in SIZES:
        raise UserError(f"{place}: {entry!r} has {len(forms)} words. An n-gram has 3 to 5 words")
    return " ".join(forms)
