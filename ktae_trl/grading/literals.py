r"""Answers that need no algebra: numbers with their units, numerals with a base, names with an index, words.

All functions take clean text (`text.clean`).
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from ktae_trl.grading.text import squeeze

RELATIVE_TOLERANCE = Fraction(1, 10**6)
# Gold answers in scientific notation are measured values. Their digits say how exact they are; a gold answer of one
# digit would accept half as much again, so there is a bound.
_LOOSEST = Fraction(5, 100)

# Text after a number is a unit, unless it says something else about the number. The quantifiers are possessive (`*+`),
# which keeps the time linear.
_UNIT_TEXT = (
    r"\s*+\{(?![^{}]*\b(?:or|and|not|more|less|most|least|about|hundred|thousand|[mbtr]+illion|dozen)\b)[^{}\d!?=]*\}"
)
_POWER = r"(?:\s*+\^\s*+(?:\{\s*+[+-]?\d+\s*+\}|\d))?+"
_WRAPPED = rf"(?:\\mu\s*+)?+\\(?:text|mathrm|rm|operatorname){_UNIT_TEXT}{_POWER}"
_BARE = (
    r"(?<=[\d\s])(?:square |cubic )?+(?:[cmk]m|[mk]g|[kMG]?Hz|[kMG]?eV|k?Pa|nm|ms|min|hr|hours?|minutes?|seconds?|days?"
    rf"|years?|degrees?|dollars?|cents?|units?|inch(?:es)?|feet|ft|miles?|mph|meters?|percent){_POWER}"
)
_UNITS = re.compile(
    rf"(?:(?:{_WRAPPED}|\\frac\s*+\{{\s*+{_WRAPPED}\s*+\}}\s*+\{{(?:{_WRAPPED}|\\cdot|\s)++\}}"
    rf"|\{{\\rm\s[A-Za-z]+\}}|[MRL]_\s*+(?:\{{\s*+\\odot\s*+\}}|\\odot)|{_BARE})(?:\s|/|\.|\\cdot(?![A-Za-z]))*+)++$"
)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:[CF]|\\(?:text|mathrm)\s*\{\s*[CF]\s*\})?$|\\degrees?$")
_PRIMES = re.compile(r"(?:\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime)|'+)$")
_ORDINAL = re.compile(r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?\s*(?:st|nd|rd|th)\s*\}?\s*\}?$")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<digits>[1-9]\d{0,2}(?:,\d{3}){1,9}|\d{1,100})?(?P<fraction>\.\d{0,100})?"
    r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?\d{1,4})\s*\}|(?P<bare_power>[+-]?\d{1,4}))"
    r"|[eE](?P<exponent>[+-]?\d{1,4}))?\s*(?P<percent>%?)"
)
_RATIO = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<whole>\d{1,100}(?=\s*\\|\s+\d))?\s*(?:\\frac\s*(?:\{\s*(?P<over>-?\d{1,100})\s*\}|(?P<over1>\d))"
    r"\s*(?:\{\s*(?P<under>-?\d{1,100})\s*\}|(?P<under1>\d))|(?P<over2>\d{1,100})\s*/\s*(?P<under2>\d{1,100}))"
)
_REPEATING = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d{0,50})\.(?P<once>\d{0,50})\\overline\s*\{(?P<again>\d{1,50})\}")
_BASED = re.compile(r"([0-9A-Z]+)\s*_\s*\{?\s*(\d+)\s*\}?")
_INDEXED = re.compile(r"[A-Za-z]\s*_\s*(?:\w|\{\w+\})")
_WORDS = re.compile(r"\\text\s*\{([^{}\\]*)\}")
_BARE_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z0-9 .'-]*\)?")
_CHOICE = re.compile(r"\\text\s*\{\s*\(?([A-Z])[).]?\s*\}.*")


@dataclass(frozen=True)
class Number:
    value: Fraction
    kind: str  # "integer", "decimal", "scientific" or "ratio"
    ulp: Fraction  # one unit of the last digit given
    percent: bool = False


def is_literal(text: str) -> bool:
    r"""Say whether text is a number, words in `\text{}`, or a name such as E_1."""
    return bool(number(text) or _words(text) or _INDEXED.fullmatch(text))


def same_literal(gold: str, answer: str) -> bool | None:
    """Compare two numbers, numerals with a base, names with an index, or texts; None for anything else."""
    gold_number, answer_number = number(gold), number(answer)
    if gold_number and answer_number:
        return same_number(gold_number, answer_number)
    gold_base, answer_base = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if gold_base and answer_base:
        return gold_base.groups() == answer_base.groups()
    if gold_base and answer_number:
        return gold_base[1] == answer  # the base may be left out
    if answer_base and gold_number:
        return answer_base[2] == "10" and answer_base[1] == gold
    if _INDEXED.fullmatch(gold) and _INDEXED.fullmatch(answer):
        return squeeze(gold) == squeeze(answer)  # E_1 is a name, though math-verify reads e
    words = _words(gold)
    if _words(answer) and _BARE_WORDS.fullmatch(gold):
        return _words(answer) == _words(rf"\text{{{gold}}}") or None
    if words and (choice := _CHOICE.fullmatch(answer)) and len(words) == 1:
        return words == choice[1].lower()  # \text{(C) } 5
    if words and (_words(answer) or _BARE_WORDS.fullmatch(answer)):
        return words == (_words(answer) or _words(rf"\text{{{answer}}}"))
    return None


def same_number(gold: Number, answer: Number) -> bool:
    """Compare literal numbers by value: exactly, but for what a decimal point or scientific notation leaves open.

    - A percent sign on one side only may be left out or written out as a fraction: 62.5% is 62.5 and 0.625.
    - Gold in scientific notation is a measured value: an answer equals it if it rounds to it at the digits given (and
      is at most 5% off): 4.57e-24 equals 4.6e-24; 4.5e-24 does not, nor does 4.6e-24 equal 4.57e-24.
    - A decimal fraction against a ratio or another decimal fraction: a millionth of the value, at most of 1.
    - Integers: exactly.
    """
    candidates = [answer.value]
    if gold.percent != answer.percent:
        candidates.append(answer.value * (Fraction(100) if gold.percent else Fraction(1, 100)))
    if gold.kind == "scientific":
        return any(rounds_to(gold, value) for value in candidates)
    if gold.value in candidates:
        return True
    integers = gold.value.denominator == 1 or answer.kind == "integer"
    if integers or gold.kind == answer.kind == "ratio":
        return False
    scale = abs(gold.value) if "ratio" in (gold.kind, answer.kind) else min(1, abs(gold.value))
    return any(abs(value - gold.value) <= RELATIVE_TOLERANCE * scale for value in candidates)


def rounds_to(gold: Number, value: Fraction) -> bool:
    """Say whether a value rounds to a measured gold answer at the digits given, and is at most 5% off."""
    return abs(value - gold.value) <= min(gold.ulp / 2, _LOOSEST * abs(gold.value))


def without_units(text: str) -> str:
    r"""Remove units at the end (`\text{ cm}^2`), unless nothing else is there."""
    return _UNITS.sub("", text).strip() or text


def number(text: str) -> Number | None:
    """Read a literal number, with or without unit, degree sign, prime, ordinal ending or percent sign."""
    text = without_units(text)
    for ending in (_DEGREES, _PRIMES, _ORDINAL):
        text = ending.sub("", text).strip()
    if match := _RATIO.fullmatch(text):
        over = int(match["over"] or match["over1"] or match["over2"])
        under = int(match["under"] or match["under1"] or match["under2"])
        if not under or (match["whole"] and over * under < 0):
            return None
        value = int(match["whole"] or 0) + Fraction(over, under)
        return Number(-value if match["sign"] == "-" else value, "ratio", Fraction(0))
    if match := _REPEATING.fullmatch(text):
        once, again = match["once"], match["again"]
        value = Fraction(int((match["whole"] or "0") + once), 10 ** len(once))
        value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))
        return Number(-value if match["sign"] == "-" else value, "ratio", Fraction(0))
    match = _NUMBER.fullmatch(text)
    if not match or (match["digits"] is None and len(match["fraction"] or "") < 2):
        return None
    places = (match["fraction"] or ".")[1:]
    power = next((match[name] for name in ("power", "bare_power", "exponent") if match[name] is not None), None)
    scale = Fraction(10) ** int(power or 0)
    mantissa = Fraction(int((match["digits"] or "0").replace(",", "") + places), 10 ** len(places))
    return Number(
        value=mantissa * scale * (-1 if match["sign"] == "-" else 1),
        kind="scientific" if power is not None else "decimal" if places else "integer",
        ulp=scale / 10 ** len(places),
        percent=bool(match["percent"]),
    )


def _words(text: str) -> str | None:
    match = _WORDS.fullmatch(text)
    return re.sub(r"[\s().]", "", match[1]).lower() or None if match else None
