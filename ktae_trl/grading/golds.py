r"""Gold answers as datasets hold them: any value of an answer column -> the accepted answers as strings.

    72   72.0   Decimal("72")   "72"   "... = 72\n#### 72"   r"... so $\boxed{72}$."   "So the answer is 72."   '["72"]'

are all read as `["72"]`. Loads neither torch nor trl nor SymPy.
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
    """What an answer column's value means."""

    answers: list[str]  # any one of them is right; none if the answer is missing
    how: str  # "missing", "value", "last line ####", "last box", "sentence", or such as "list of 2"


def gold_answers(value) -> list[str]:
    r"""Return the accepted answers that a dataset's value holds, as strings.

    Args:
        value: a number (`142.0` is "142", 1e-05 is "0.00001"), a truth value, or a list of such values and strings,
            any of which is right. A string is one of these, the first that fits:

            - a list of strings in JSON, or as Python writes it: `["34", "35"]`. Numbers in brackets, `[1, 2]`, are an
              interval or a point, and stay one answer;
            - a solution with `#### X` at its end, as in GSM8K;
            - a solution with a box, of which the last counts: `\boxed{X}`, as in MATH;
            - a text that ends with `The answer is X.` or `Answer: X`;
            - the answer itself.

    Returns:
        The answers without the `$` and the full stop around them. `[]` for a missing one: None, NaN, an empty string,
        an empty list, or a list of such.

    Raises:
        TypeError: a value of another kind (a dict, bytes, a date), or a list within a list.
    """
    return read_gold(value).answers


def describe(value) -> str:
    """Say in a word or two how `gold_answers` understands `value` (`Gold.how`); it raises the same errors."""
    return read_gold(value).how


def read_gold(value) -> Gold:
    """Return the accepted answers and how they were found: `gold_answers` and `describe` in one."""
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
        found += f" (choose a field with a dotted path, such as COLUMN.{next(iter(value))})"
    raise TypeError(f"An answer must be a text, a number or a list of these, not {found}")


def is_prose(answer: str) -> bool:
    """Say whether an answer is a sentence or more: no completion's answer will be these very words.

    It is if it has more than seven words. Those of 2,000 benchmark answers have at most three, but for one.
    """
    return len(_WORD.findall(answer)) > 7


_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # not a command of LaTeX, nor a variable


def _read_list(values: list) -> Gold:
    for value in values:
        if isinstance(value, list | tuple | set | frozenset):
            raise TypeError(
                f"An answer must be a text, a number or a list of these, not a list of lists: {values}"[:200]
            )
    answers = list(dict.fromkeys(answer for value in values for answer in gold_answers(value)))
    return Gold(answers, f"list of {len(answers)}" if answers else "missing")


def _read_text(text: str) -> Gold:
    if (several := _listed(text)) is not None:
        return _read_list(several)
    for how, find in _PLACES.items():
        found = find(text)
        if found is not None:
            # Once more: `#### \boxed{5}`. So what has been read, read again, stays what it is.
            answers = _read_text(found.strip()).answers
            return Gold(answers, how if answers else "missing")
    bare = text.rstrip(".").strip("$").strip() or text
    return Gold([bare], "value") if bare else Gold([], "missing")


def _listed(text: str) -> list | None:
    """Return the elements of a list that somebody wrote as text, None if it is not one: see `gold_answers`."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    read: Callable
    # LaTeX in JSON needs doubled backslashes. Without, `\frac` is no error but a form feed and "rac".
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
    found = _HASH.search(text[-500:])  # a longer one is no answer
    return found and found[1]


def _after_words(text: str) -> str | None:
    found = _SENTENCE.match(text[-500:])
    return found and found["answer"]


def _boxed(text: str) -> str | None:
    found = find_answer(text)  # several boxes with commas between are one answer, as in a completion
    return found and found.text


_PLACES = {"last line ####": _after_hashes, "last box": _boxed, "sentence": _after_words}


def _number(value: Real | Decimal) -> str:
    """Write a number in plain digits: never `1e-05`, whose single digit would read as a rounded figure."""
    if isinstance(value, bool | Integral):
        return str(value)
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator}".removesuffix("/1")
    number = Decimal(str(value))  # the shortest digits that stand for it, also of NumPy's float32
    if number.is_infinite():
        return r"\infty" if number > 0 else r"-\infty"
    digits = f"{number:f}" if number else "0"  # not -0
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
