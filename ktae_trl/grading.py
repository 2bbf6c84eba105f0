r"""Is the final answer of a completion right? One function for training and evaluation, on math-verify.

Only the content of the last `\boxed{...}` counts. This module loads neither torch nor trl, so that worker processes
can import it cheaply.
"""

import logging
import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from math_verify import LatexExtractionConfig, parse, verify

_TIMEOUT_SECONDS = 5
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(r"[+-]?\d{1,100}(?:\.\d{1,100})?")
_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]


class Grade(NamedTuple):
    verdict: bool | None  # None: none of the accepted answers could be parsed
    extracted: str | None  # the completion's final answer as written, None if it has none
    reason: str  # why: "equal", "different", "no boxed answer", "unparsable answer", "unparsable gold"


def grade(completion: str, answers: str | Sequence[str]) -> bool | None:
    r"""Say whether the last `\boxed{...}` of `completion` equals one of `answers`.

    Args:
        completion: text of the model.
        answers: the accepted answer, or several of which any one is right. LaTeX, with or without `$` or `\boxed{}`.

    Returns:
        True or False; False too for a completion without a complete box, with an answer that cannot be parsed, or
        that takes longer than 5 s. None if no accepted answer can be parsed: the completion is unscorable.

    math-verify's time-outs need the main thread; elsewhere there is none.
    """
    return grade_full(completion, answers).verdict


def grade_many(completions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> list[bool | None]:
    """Grade each completion against its own answers: the verdicts of `grade`, in order.

    Raises:
        ValueError: the two sequences differ in length.
    """
    return [grade(completion, accepted) for completion, accepted in zip(completions, answers, strict=True)]


def grade_full(completion: str, answers: str | Sequence[str]) -> Grade:
    """Grade like `grade`, and say what was extracted and why the verdict is what it is."""
    golds = [_gold(answer) for answer in ([answers] if isinstance(answers, str) else answers)]
    extracted = last_boxed(completion)
    verdicts = [_equal(gold, extracted) for gold in golds]
    if True in verdicts:
        return Grade(True, extracted, "equal")
    if all(verdict is None for verdict in verdicts):
        return Grade(None, extracted, "unparsable gold")
    if extracted is None:
        return Grade(False, None, "no boxed answer")
    return Grade(False, extracted, "different" if _parse(extracted) else "unparsable answer")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` with its braces matched, or None.

    A last box that is cut off is no answer, even if an earlier one is complete.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for i in range(start, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start:i].strip()
    return None


def _gold(answer: str) -> str:
    boxed = last_boxed(answer)
    return (answer if boxed is None else boxed).strip().strip("$").strip()


def _equal(gold: str, extracted: str | None) -> bool | None:
    """Compare; None if `gold` cannot be parsed. Equal strings and plain numbers need no SymPy."""
    if not gold:
        return None
    if gold == extracted:
        return True
    gold_is_number = _NUMBER.fullmatch(gold)
    if extracted is None:
        return False if gold_is_number or _parse(gold) else None
    if gold_is_number and _NUMBER.fullmatch(extracted):
        return Fraction(gold) == Fraction(extracted)
    parsed = _parse(gold)
    if not parsed:
        return None
    try:
        return verify(parsed, _parse(extracted), timeout_seconds=_timeout())
    except Exception:  # whatever a model writes, it must not end the training
        return False


def _parse(latex: str) -> list:
    """Return math-verify's readings of `latex`, or nothing if it found no mathematics in it."""
    try:
        readings = parse(
            rf"\boxed{{{latex}}}",
            extraction_config=_EXTRACTION,
            extraction_mode="first_match",
            parsing_timeout=_timeout(),
        )
    except Exception:
        return []
    return readings if any(not isinstance(reading, str) for reading in readings) else []


def _timeout() -> int | None:
    """Return math-verify's time-out; it uses SIGALRM, which only the main thread may set."""
    if threading.current_thread() is threading.main_thread():
        return _TIMEOUT_SECONDS
    for name in ("math_verify.parser", "math_verify.grader"):  # they warn of it at every call
        logging.getLogger(name).setLevel(logging.ERROR)
    return None
