r"""Read gold answers from datasets: any value of an answer column -> the accepted answers as strings.

    72   72.0   Decimal("72")   "72"   "... = 72\n#### 72"   r"... so $\boxed{72}$."   "So the answer is 72."   '["72"]'

are all read as `["72"]`. This module loads neither torch nor trl nor SymPy.
"""

import ast
import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import NamedTuple

from ktae_trl.grading.extraction import find_answer


class Gold(NamedTuple):
    """The accepted answers that a value of an answer column contains."""

    answers: list[str]  # any one of them is correct; empty if the answer is missing
    how: str  # "missing", "value", "last line ####", "last box", "sentence", or for example "list of 2"


def gold_answers(value) -> list[str]:
    r"""Return the accepted answers in a value of an answer column, as strings.

    Args:
        value: a number (`142.0` is "142", 1e-05 is "0.00001"), a boolean, a string, or a list of these, any one of
            which is correct. A string is read as the first of these forms that fits:

            - a list of strings in JSON or Python syntax: `["34", "35"]`. Numbers in brackets, `[1, 2]`, are an interval
              or a point and stay one answer;
            - a solution that ends with `#### X`, as in GSM8K;
            - a solution with a box `\boxed{X}`, as in MATH; the last box counts;
            - text that ends with `The answer is X.` or `Answer: X`;
            - the answer itself.

    Returns:
        The answers, without enclosing `$` and final full stop. `[]` if the answer is missing: None, NaN, an empty
        string, an empty list, or a list of these.

    Raises:
        TypeError: the value has another type (such as a dict, bytes or a date) or is a list of lists.
    """
    return read_gold(value).answers


def describe(value) -> str:
    """Return the form in which `gold_answers` finds the answer in `value` (`Gold.how`); raises the same errors."""
    return read_gold(value).how


def read_gold(value) -> Gold:
    """Return both the accepted answers (`gold_answers`) and the form they were found in (`describe`)."""
    if value is None or (isinstance(value, Real | Decimal) and value != value):
        return Gold([], "missing")
    if isinstance(value, str):
        return _read_text(value.strip())
    if isinstance(value, Real | Decimal):
        return Gold([_number(value)], "value")
    if hasattr(value, "tolist"):  # an array, or NumPy's bool
        return read_gold(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return _read_list(list(value))
    found = f"a {type(value).__name__}: {str(value)[:80]}"
    if isinstance(value, dict) and value:
        found += f" (select a field with a dotted path, such as COLUMN.{next(iter(value))})"
    raise TypeError(f"An answer must be text, a number or a list of these, not {found}")


def is_prose(answer: str) -> bool:
    """Return whether an answer has more than seven words: no completion's answer will match such a text.

    Of 2,000 answers in benchmarks, all but one have at most three words.
    """
    return len(_WORD.findall(answer)) > 7


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # neither a LaTeX command nor a variable


def _read_list(values: list) -> Gold:
    for value in values:
        if isinstance(value, list | tuple | set | frozenset):
            raise TypeError(f"An answer must be text, a number or a list of these, not a list of lists: {values}"[:200])
    answers = list(dict.fromkeys(answer for value in values for answer in gold_answers(value)))
    return Gold(answers, f"list of {len(answers)}" if answers else "missing")


def _read_text(text: str) -> Gold:
    if (several := _listed(text)) is not None:
        return _read_list(several)
    for how, find in _PLACES.items():
        found = find(text)
        if found is not None:
            # The answer may be marked twice, as in `#### \boxed{5}`. Reading a result again does not change it.
            answers = _read_text(found.strip()).answers
            return Gold(answers, how if answers else "missing")
    bare = text.rstrip(".").strip("$").strip() or text
    return Gold([bare], "value") if bare else Gold([], "missing")


def _listed(text: str) -> list | None:
    """Return the elements of a list that is written as a string, or None if it is not one (see `gold_answers`)."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    read: Callable
    # LaTeX in JSON needs doubled backslashes. With a single one, `\frac` is read as a form feed and "rac", no error.
    for read in (json.loads, lambda t: json.loads(t.replace("\\", r"\\")), ast.literal_eval):
        try:
            values = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        texts = [value for value in values if isinstance(value, str)]
        if all(value is None for value in values) or (texts and not any(re.search(r"[\b\f\r\t\n]", t) for t in texts)):
            return values
    return None


_HASH = re.compile(r"####[ \t]*([^\n#]+)$")
_SENTENCE = re.compile(
    r"(?s:.*)(?:^|\n|[.!?:]\s|\b(?:the|final|correct|our)\s)[*_ ]*answer"
    r"(?:\s+(?:to|of|for)\s+(?:the|this)\s+(?:question|problem))?"
    r"[*_ ]*(?:\bis\b|:|=)(?:\s*:)?[*_\s]*+"
    r"(?P<answer>(?:(?!\.\s)[^\n])+?)(?<![*_\s.])[*_\s.]*+(?:I hope it is correct\.?)?$",
    re.IGNORECASE,
)


def _after_hashes(text: str) -> str | None:
    found = _HASH.search(text[-500:])  # a longer match would not be an answer
    return found and found[1]


def _after_words(text: str) -> str | None:
    found = _SENTENCE.match(text[-500:])
    return found and found["answer"]


def _boxed(text: str) -> str | None:
    found = find_answer(text)  # boxes joined by commas are one answer, as in a completion
    return found and found.text


_PLACES = {"last line ####": _after_hashes, "last box": _boxed, "sentence": _after_words}


def _number(value: Real | Decimal) -> str:
    """Write a number in plain digits, never as `1e-05`, which the grader would take for a rounded value."""
    if isinstance(value, bool | Integral):
        return str(value)
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}".removesuffix("/1")
    number = Decimal(str(value))  # the shortest digits that represent it, also for NumPy's float32
    if number.is_infinite():
        return r"\infty" if number > 0 else r"-\infty"
    digits = f"{number:f}" if number else "0"  # not -0
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
