r"""Answers as text: finding them, cleaning them, and what can be said of two of them without computer algebra.

`compare` takes lists, sets, tuples, intervals and equations apart and leaves the pieces to a `leaf`: here only literals
are compared (`settle`); in a worker process math-verify compares the rest (`symbolic`).
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

# A longer text is no answer. It bounds the work that an answer can cause before any clock runs.
MAX_LENGTH = 10_000
# What is settled as text, where no clock runs.
_SHORT = 500
RELATIVE_TOLERANCE = Fraction(1, 10**6)
# Gold answers in scientific notation are measured values. Their digits say how exact they are; a gold answer of one
# digit would accept half as much again, so there is a bound.
_LOOSEST = Fraction(5, 100)

_TOKEN = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_SYMBOLS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{EN DASH}": "-",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{DOT OPERATOR}": r"\cdot ",
        "\N{MIDDLE DOT}": r"\cdot ",
        "\N{DEGREE SIGN}": r"^\circ ",
        "\N{PRIME}": r"^\prime ",
        "\N{DOUBLE PRIME}": r"^{\prime\prime} ",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{INFINITY}": r"\infty ",
        "\N{UNION}": r"\cup ",
        "\N{PLUS-MINUS SIGN}": r"\pm ",
        "\N{LESS-THAN OR EQUAL TO}": r"\le ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
        "\N{FULLWIDTH COMMA}": ",",
    }
)
_CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (r"(?<!\\)\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
        (r"(?<!\\)\\(?:[,;:!> ]|(?:quad|qquad|displaystyle|textstyle|limits)(?![A-Za-z]))|~", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|textbf|textit|textrm|textnormal)(?![A-Za-z])", r"\\text"),
        (r"\\?\$", ""),
        (r"\\%", "%"),
        (r"\\(?:mathrm|text|rm)\s*\{\s*([ije])\s*\}", r" \1 "),  # not a unit
        (r"\{\s*,\s*\}", ","),
        (r",?\s*\\text\s*\{\s*(?:and|or)\s*\}\s*|,?\s+(?:and|or)\s+|;", ","),
    )
]
_THOUSANDS = re.compile(r"(?<=\d),\\!\s*(?=\d{3})|(?<=\d)\{,\}(?=\d{3})")

_TEXT = re.compile(r"\\text\s*\{([^{}\\]*)\}")
_UNITS = re.compile(
    r"(?:\s*\\(?:text|mathrm|rm|operatorname)\s*\{[^{}]*\}"
    r"(?:\s*\^\s*(?:\{\s*[+-]?\d+\s*\}|\d))?(?:\s|/|\.|\\cdot(?![A-Za-z]))*)+$"
)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*(?:[CF]|\\(?:text|mathrm)\s*\{\s*[CF]\s*\})?$|\\degrees?$")
_PRIMES = re.compile(r"(?:\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime)|'+)$")
_ORDINAL = re.compile(r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?\s*(?:st|nd|rd|th)\s*\}?\s*\}?$")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<digits>\d{1,3}(?:,\d{3}){1,9}|\d{1,100})?(?P<fraction>\.\d{0,100})?"
    r"(?:\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<power>[+-]?\d{1,4})\s*\}|(?P<bare_power>[+-]?\d{1,4}))"
    r"|[eE](?P<exponent>[+-]?\d{1,4}))?\s*(?P<percent>%?)"
)
_RATIO = re.compile(
    r"(?P<sign>[+-]?)\s*(?:\\frac\s*(?:\{\s*(?P<over>-?\d{1,100})\s*\}|(?P<over1>\d))"
    r"\s*(?:\{\s*(?P<under>-?\d{1,100})\s*\}|(?P<under1>\d))|(?P<over2>\d{1,100})\s*/\s*(?P<under2>\d{1,100}))"
)
_BASED = re.compile(r"([0-9A-Z]+)\s*_\s*\{?\s*(\d+)\s*\}?")
_SUPERFLUOUS_BRACES = re.compile(r"(?<=[_^])\{(\w)\}")
_INDEXED = re.compile(r"[A-Za-z]\s*_\s*(?:\w|\{\w+\})")
_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{\\?\w+\s*\}))?'?(?:\(\w+\))?")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` with its braces matched, or None.

    A last box that is cut off, or that holds more than 10,000 characters, is no answer, even if an earlier one is
    complete.
    """
    end = len(text)
    while True:
        begin = max(text.rfind(r"\boxed", 0, end), text.rfind(r"\fbox", 0, end))
        if begin < 0:
            return None
        box = _BOX.match(text, begin)
        start = box.end() if box else begin
        while box and start < len(text) and text[start].isspace():
            start += 1
        if box and start == len(text):
            return None
        if box and text[start] == "{":
            break
        end = begin + 1  # something like \boxedwidth, or no brace: look further to the left
    depth = 0
    for token in _TOKEN.finditer(text, start, start + MAX_LENGTH + 2):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0 and token.group() == "}":
            return text[start + 1 : token.start()].strip()
    return None


def gold_text(answer: str) -> str:
    r"""Return an accepted answer without the `\boxed{}`, `$` and full stop that datasets leave around it."""
    boxed = last_boxed(answer)
    return (answer if boxed is None else boxed).strip().rstrip(".").strip("$").strip()


def settle(gold: str, answer: str) -> bool | None:
    """Compare two answers as far as text and literal numbers go. None: computer algebra has to decide.

    False only for two literal numbers: whether another gold answer can be parsed at all is for `symbolic` to say.
    """
    if not gold or max(len(gold), len(answer)) > _SHORT:
        return None
    verdict = compare(gold, answer, leaf=lambda g, a: None)
    if verdict is False and not (is_number(gold) and is_number(answer)):
        return None
    return verdict


def is_number(text: str) -> bool:
    return _number(_clean(text)) is not None


def is_literal(text: str) -> bool:
    r"""Say whether `compare` needs no leaf for an answer: a number, words in `\text{}`, or a name such as E_1."""
    text = _clean(text)
    return _number(text) is not None or _words(text) is not None or _INDEXED.fullmatch(text) is not None


def parts(text: str) -> list[str]:
    """Return what `compare` would give to its leaf: the elements of a list or interval, the value of an equation."""
    text = _clean(text)
    _, elements = _structure(text)
    if len(elements) > 1:
        return [part for element in elements for part in parts(element)]
    name, value = _equation(text)
    return parts(value) if name else [text]


def compare(gold: str, answer: str, leaf: Callable[[str, str], bool | None]) -> bool | None:
    r"""Compare two answers piece by piece.

    - The same text, up to spaces and LaTeX's decoration, is equal.
    - Literal numbers are equal by value; see `_same_number`. Words in `\text{}` are compared without case.
    - `(a, b)`, `[a, b)`: the same brackets and equal elements in order; `\{a, b\}` and bare lists: in any order, each
      element as often in both; unions: their parts in any order. A bare list may stand for a tuple.
    - `\pm` in a list counts as two elements; `a = 1, b = 2` equals `1, 2`; `x \in A` and `x = A` equal `A`.
    - What is left goes to `leaf`.

    None if a leaf that matters said None.
    """
    gold, answer = _clean(gold), _clean(answer)
    if not gold or not answer:
        return False
    if _squeeze(gold) == _squeeze(answer):
        return True
    literal = _literals(gold, answer)
    if literal or (literal is False and "," not in gold + answer):
        return literal

    (gold_kind, golds), (kind, answers) = _structure(gold), _structure(answer)
    if len(golds) > 1 and len(answers) > 1:
        kinds = {gold_kind, kind}
        if kinds <= {"list", "set"} or kinds == {"union"}:
            return _any_order(*_without_names(golds, answers), leaf)
        if kinds == {"list", "()"} or len(kinds) == 1:
            return _in_order(golds, answers, leaf)
        if kinds <= {"()", "[]", "(]", "[)"}:
            return False
    elif literal is False:
        return False  # 1,234 against 1235
    elif {len(golds), len(answers)} != {1} and gold_kind in ("list", "set", None) and kind in ("list", "set", None):
        return False  # a list of another length; FiniteSet would make -2, -2 equal to -2

    (gold_name, gold_value), (name, value) = _equation(gold), _equation(answer)
    if (gold_name or name) and (not gold_name or not name or _squeeze(gold_name) == _squeeze(name)):
        return compare(gold_value, value, leaf)
    return leaf(gold, answer)


@dataclass(frozen=True)
class _Number:
    value: Fraction
    kind: str  # "integer", "decimal", "scientific" or "ratio"
    ulp: Fraction  # one unit of the last digit given
    percent: bool


def same_constant(gold: str, value: Fraction) -> bool | None:
    """Compare a literal gold answer in scientific notation with a computed value; None if it is not such."""
    number = _number(_clean(gold))
    if number is None or number.kind != "scientific":
        return None
    return _rounds_to(number, value)


def _same_number(gold: _Number, answer: _Number) -> bool:
    """Compare literal numbers by value: exactly, but for what a decimal point or scientific notation leaves open.

    - A percent sign on one side only may be left out or written out as a fraction: 62.5% is 62.5 and 0.625.
    - Gold in scientific notation is a measured value: an answer equals it if it rounds to it at the digits given (and
      is at most 5% off): 4.57e-24 equals 4.6e-24; 4.5e-24 does not, nor does 4.6e-24 equal 4.57e-24.
    - A decimal fraction against a ratio or another decimal fraction: a millionth of the value, at most of 1.
    - Integers: exactly.
    """
    if gold.percent != answer.percent:
        scale = Fraction(100) if gold.percent else Fraction(1, 100)
        candidates = [answer.value, answer.value * scale]
    else:
        candidates = [answer.value]
    if gold.kind == "scientific":
        return any(_rounds_to(gold, value) for value in candidates)
    if "integer" in (gold.kind, answer.kind) or gold.kind == answer.kind == "ratio":
        return gold.value in candidates
    tolerance = RELATIVE_TOLERANCE * (
        abs(gold.value) if "ratio" in (gold.kind, answer.kind) else min(1, abs(gold.value))
    )
    return any(abs(value - gold.value) <= tolerance for value in candidates)


def _rounds_to(gold: _Number, value: Fraction) -> bool:
    return abs(value - gold.value) <= min(gold.ulp / 2, _LOOSEST * abs(gold.value))


def _number(text: str) -> _Number | None:
    for ending in (_UNITS, _DEGREES, _PRIMES, _ORDINAL):
        text = ending.sub("", text).strip()
    if match := _RATIO.fullmatch(text):
        over = int(match["over"] or match["over1"] or match["over2"])
        under = int(match["under"] or match["under1"] or match["under2"])
        sign = -1 if match["sign"] == "-" else 1
        return _Number(Fraction(sign * over, under), "ratio", Fraction(0), False) if under else None
    match = _NUMBER.fullmatch(text)
    if not match or (match["digits"] is None and len(match["fraction"] or "") < 2):
        return None
    places = (match["fraction"] or ".")[1:]
    power = next((match[name] for name in ("power", "bare_power", "exponent") if match[name] is not None), None)
    scale = Fraction(10) ** int(power or 0)
    mantissa = Fraction(int((match["digits"] or "0").replace(",", "") + places), 10 ** len(places))
    return _Number(
        value=mantissa * scale * (-1 if match["sign"] == "-" else 1),
        kind="scientific" if power is not None else "decimal" if places else "integer",
        ulp=scale / 10 ** len(places),
        percent=bool(match["percent"]),
    )


def _literals(gold: str, answer: str) -> bool | None:
    """Compare two numbers, numerals with a base, names with an index, or texts; None for anything else."""
    gold_number, number = _number(gold), _number(answer)
    if gold_number and number:
        return _same_number(gold_number, number)
    if based := _BASED.fullmatch(gold):
        other = _BASED.fullmatch(answer)
        if other:
            return based.groups() == other.groups()
        if number:
            return based[1] == answer  # the base may be left out
    if _INDEXED.fullmatch(gold) and _INDEXED.fullmatch(answer):
        return _squeeze(gold) == _squeeze(answer)  # E_1 is a name, though math-verify reads e
    gold_words, words = _words(gold), _words(answer)
    if gold_words and (words or re.fullmatch(r"\(?[A-Za-z][A-Za-z .'-]*\)?", answer)):
        return gold_words == (words or _words(rf"\text{{{answer}}}"))
    return None


def _words(text: str) -> str | None:
    match = _TEXT.fullmatch(text)
    return re.sub(r"[\s().]", "", match[1]).lower() or None if match else None


def _in_order(golds: list[str], answers: list[str], leaf) -> bool | None:
    if len(golds) != len(answers):
        return False
    verdicts = [compare(g, a, leaf) for g, a in zip(golds, answers, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _any_order(golds: list[str], answers: list[str], leaf) -> bool | None:
    """Pair each gold element with an answer of its own, the first that is equal."""
    if len(golds) != len(answers):
        return False
    # Those that are written alike go first: a long list in another order stays cheap.
    alike = Counter(map(_squeeze, golds)) & Counter(map(_squeeze, answers))
    rest, undecided = _without(answers, alike), False
    for gold in _without(golds, alike):
        verdicts = []
        for answer in rest:
            verdicts.append(compare(gold, answer, leaf))
            if verdicts[-1]:
                break
        if verdicts[-1]:
            rest.pop(len(verdicts) - 1)
        elif None in verdicts:
            undecided = True
        else:
            return False
    return None if undecided else True


def _without(elements: list[str], written: Counter) -> list[str]:
    left, rest = written.copy(), []
    for element in elements:
        key = _squeeze(element)
        if left[key]:
            left[key] -= 1
        else:
            rest.append(element)
    return rest


def _without_names(golds: list[str], answers: list[str]) -> tuple[list[str], list[str]]:
    """Drop `a =` from each element if all elements of one side, and none of the other, have it."""
    named = [all(_equation(part)[0] for part in side) for side in (golds, answers)]
    unnamed = [not any("=" in part for part in side) for side in (golds, answers)]
    if named[0] and unnamed[1]:
        return [_equation(part)[1] for part in golds], answers
    if named[1] and unnamed[0]:
        return golds, [_equation(part)[1] for part in answers]
    return golds, answers


def _equation(text: str) -> tuple[str | None, str]:
    r"""Split `name = value`, `f(x) = value` and `x \in value`."""
    name, sign, value = text.partition(r"\in ") if r"\in " in text else text.partition("=")
    if sign and "=" not in value and value.strip() and _NAME.fullmatch(name.strip()):
        return name.strip(), value.strip()
    return None, text


def _structure(text: str) -> tuple[str | None, list[str]]:
    r"""Take apart a union, a bare list, a `\{set\}` or something in brackets; (None, [text]) if it is none of them."""
    unions = _split(text, r"\cup")
    if len(unions) > 1:
        return "union", unions
    elements = _split(text, ",")
    if len(elements) > 1:
        return "list", _both_signs(elements)
    for opening, closing, kind in (
        (r"\{", r"\}", "set"),
        ("(", ")", "()"),
        ("[", "]", "[]"),
        ("(", "]", "(]"),
        ("[", ")", "[)"),
    ):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)].strip()
            elements = _split(inner, ",")
            if len(elements) > 1 or (kind == "set" and elements):
                return kind, _both_signs(elements) if kind == "set" else elements
    elements = _both_signs([text])
    return ("list", elements) if len(elements) > 1 else (None, [text])


def _both_signs(elements: list[str]) -> list[str]:
    signs = {r"\pm": ("+", "-"), r"\mp": ("-", "+")}
    both = []
    for element in elements:
        if r"\pm" not in element:
            both.append(element)
            continue
        both += [re.sub(r"\\(?:pm|mp)(?![A-Za-z])", lambda m, i=i: signs[m.group()][i], element) for i in (0, 1)]
    return both


def _split(text: str, separator: str) -> list[str]:
    """Split at the separators outside all brackets; [text] if the brackets do not match."""
    pieces, depth, start = [], 0, 0
    for token in re.finditer(r"\\[{}]|\\[A-Za-z]+|\\.|[()\[\]{},]", text):
        if token.group() in ("(", "[", "{", r"\{"):
            depth += 1
        elif token.group() in (")", "]", "}", r"\}"):
            depth -= 1
            if depth < 0:
                return [text]
        elif token.group() == separator and depth == 0:
            pieces.append(text[start : token.start()].strip())
            start = token.end()
    pieces.append(text[start:].strip())
    return [text] if depth or not all(pieces) else pieces


def _clean(text: str) -> str:
    if not text.isascii():
        text = "".join(c for c in text.translate(_SYMBOLS) if unicodedata.category(c) not in ("Cf", "Co", "Cn", "Cs"))
    text = _THOUSANDS.sub("", "".join(c if c.isprintable() else " " for c in text))
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(". ")


def _squeeze(text: str) -> str:
    return _SUPERFLUOUS_BRACES.sub(r"\1", text.replace(" ", ""))
