r"""Compare answers that need no algebra: numbers, times, ratios, residues, numerals with a base, indexed names, words.

All functions expect clean text (`text.clean`).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from ktae_trl.grading import units
from ktae_trl.grading.text import MULTIPLIERS, squeeze

RELATIVE_TOLERANCE = Fraction(1, 10**6)
# Largest relative error against a gold answer in scientific notation. Such an answer is taken for a measured value,
# whose digits decide how exact it is; without this limit, a single digit would allow errors of up to 50%.
_LOOSEST = Fraction(5, 100)

# Where a unit may begin; `units.read` decides whether it is one. Possessive quantifiers (`*+`) keep the time linear.
_POWER = r"(?:\s*+\^\s*+(?:\{\s*+[+-]?\d+\s*+\}|[+-]?\d))?+"
_WRAPPED = rf"(?:\\mu\s*+)?+\\(?:text|mathrm|rm|operatorname)\s*+\{{[^{{}}]*+\}}{_POWER}"
_CIRCLE = r"\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ(?![A-Za-z]))(?:\s*+[CF](?![A-Za-z]))?+|\\degrees?(?![A-Za-z])"
_BARE = (
    r"(?<=[\d\s}])(?:square |cubic )?+(?:[cmk]m|[mk]g|[kMG]?Hz|[kMG]?eV|k?Pa|nm|ms|min|hr|hours?|minutes?|seconds?"
    rf"|days?|years?|degrees?|dollars?|cents?|units?|inch(?:es)?|feet|ft|miles?|mph|meters?|radians?|rad){_POWER}"
)
_UNITS = re.compile(
    rf"(?:(?:{_WRAPPED}|\\frac\s*+\{{\s*+{_WRAPPED}\s*+\}}\s*+\{{(?:{_WRAPPED}|\\cdot|\s)++\}}|{_CIRCLE}"
    rf"|\{{\\rm\s[A-Za-z]+\}}|[MRL]_\s*+(?:\{{\s*+\\odot\s*+\}}|\\odot)|{_BARE}|[€£¥₹¢])"
    rf"(?:\s|/|\.|\\cdot(?![A-Za-z]))*+){{1,40}}+$"
)
_LAST_UNIT = re.compile(rf"{_WRAPPED}$")
_AFTER_NUMBER = re.compile(
    r"(?P<value>[+-]?\s*+(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:\s*+(?:\\times|\\cdot|\*)\s*+10\s*+\^\s*+(?:\{[+-]?\d+\}|\d))?)"
    r"(?P<space>\s*+)(?P<unit>(?:[^\W\d_]|µ)[^\\{}()=,+!?]{0,60}(?:\{[+-]?\d\}[^\\{}()=,+!?]{0,30})*)"
)
_SHORT = {"k": "thousand", "K": "thousand", "M": "million", "m": "million", "B": "billion"}  # after a currency
_SHORT_MULTIPLIER = re.compile(r"\\text\s*+\{\s*+([kKMmB])\s*+\}$")
_CURRENCIES = re.compile("[$€£¥₹]")
_CURRENCY = re.compile(r"(?P<sign>[+-]?)\s*+(?P<currency>\\\$|[€£¥₹])\s*+(?P<value>.+)|(?P<before>.+?)(?<=\S)\s*+\\\$")
OF_AN_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_PRIMES = re.compile(r"(?:\^\s*+(?:\{\s*+(?:\\prime\s*+)++\}|\\prime)|(?<!')'++)$")
_ORDINAL = re.compile(r"(?<=\d)\s*+\^?\s*+\{?\s*+(?:\\(?:text|mathrm)\s*+\{)?\s*+(?:st|nd|rd|th)\s*+\}?\s*+\}?$")
_MULTIPLIER = re.compile(r"(?:\\text\s*+\{\s*+)?([^\W\d_]+)\s*+\}?")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*+(?P<digits>[1-9]\d{0,2}(?:,\d{3}){1,9}|\d{1,100})?(?P<fraction>\.\d{0,100})?"
    r"(?:\s*+(?:\\times|\\cdot|\*|x)\s*+10\s*+\^\s*+(?:\{\s*+(?P<power>[+-]?\d{1,4})\s*+\}|(?P<bare_power>[+-]?\d{1,4}))"
    r"|[eE](?P<exponent>[+-]?\d{1,4}))?"
)
_RATIO = re.compile(
    r"(?P<sign>[+-]?)\s*+(?P<whole>\d{1,100}(?=\s*+\\|\s+\d))?\s*+(?:\\frac\s*+(?:\{\s*+(?P<over>-?\d{1,100})\s*+\}|(?P<over1>\d))"
    r"\s*+(?:\{\s*+(?P<under>-?\d{1,100})\s*+\}|(?P<under1>\d))|(?P<over2>\d{1,100})\s*+/\s*+(?P<under2>\d{1,100}))"
)
_REPEATING = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d{0,50})\.(?P<once>\d{0,50})\\overline\s*+\{(?P<again>\d{1,50})\}")
_AND_SO_ON = re.compile(r"([+-]?\d{0,50}\.\d{0,50}?)(\d{1,12}?)(\2+)\s*+\\ldots")
_BASED = re.compile(r"([0-9A-Z]+)\s*+_\s*+\{?\s*+(\d+)\s*+\}?")
_INDEXED = re.compile(r"[A-Za-z]\s*+_\s*+(?:\w|\{\w+\})")
_TEXT = r"\\(?:text|mathrm|rm|operatorname)"
_WORDS = re.compile(rf"(?:{_TEXT}\s*+\{{[^{{}}\\]*\}}\s*+)+")
_BARE_WORDS = re.compile(r"\(?[^\W\d_][\w .'-]*\)?")
_BARE_WORD, _VOWEL = re.compile("[A-Za-z]{3,}"), re.compile("[aeiouAEIOU]")
# A letter in brackets or followed by a full stop or colon, alone or with the text of the choice.
_CHOICE = re.compile(
    rf"(?:{_TEXT}\s*+\{{\s*+(?:(?:Option|Choice|Answer|option|choice)\s*+)?)?(?:\(\s*+(?P<bracketed>[A-Z])\s*+\)|(?P<marked>[A-Z])\s*+[).:]|(?P<alone>[A-Z])(?=\s*+\}}?$))[.:]?"
    r"\s*+\}?(?P<rest>.*)"
)
_OTHER_CHOICE = re.compile(
    rf"^\s*+(?:,|\\lor|\\land|[-+*/=^_])|\([A-Z]\)|{_TEXT}\s*+\{{\s*+\(?[A-Z]\)?\s*+\}}|(?<![A-Za-z])[B-Z][).:](?![A-Za-z])"
)
_TIME = re.compile(
    rf"(?:{_TEXT}\s*+\{{\s*+)?(?P<hours>[01]?\d|2[0-4])(?::(?P<minutes>[0-5]\d)(?::(?P<seconds>[0-5]\d))?)?\s*+(?:{_TEXT}\s*+\{{\s*+)?"
    r"(?P<half>[AaPp]\.?\s?[Mm]\.?|noon|midnight)?\s*+\}?"
)
_COLON = re.compile(
    r"(?:(?:(?<!\s)\s++)?+(?::|\\colon(?![A-Za-z])|\\text\s*+\{\s*+to\s*+\})|(?<=\d)\s++to\s++(?=\d))\s*+"
)
_RESIDUE = re.compile(
    r"(?:(?P<name>[A-Za-z]\w?)\s*+(?:\\equiv|=)\s*+)?(?P<residues>[-\d\s,]+?)(?<=\S)\s*+\\pmod\s*+\{\s*+(?P<modulus>\d{1,18})\s*+\}"
)


_GENERAL_TERM = re.compile(r"([a-z])\s*+=\s*+(\d{1,9})\s*+[kntm]\s*+([+-]\s*+\d{1,9})?")  # x = 6k + 2


@dataclass(frozen=True)
class Number:
    value: Fraction
    kind: str  # "integer", "decimal", "scientific" or "ratio"
    ulp: Fraction  # value of one unit in the last digit
    percent: bool = False


class Quantity(NamedTuple):
    value: str
    unit: units.Unit | None


def is_literal(text: str) -> bool:
    r"""Return whether text is a number, a time, a residue, words in `\text{}`, or a name such as E_1."""
    text = quantity(text).value
    if text in (r"\ldots", r"\emptyset", r"\mathbb{R}") or _INDEXED.fullmatch(text):
        return True
    if r"\pmod" in text and residues(text):
        return True
    return bool(number(text) or time(text) or words(text) or words_alone(text))


def same_literal(gold: str, answer: str) -> bool | None:
    """Compare two numbers, times, ratios, residues, numerals, indexed names or words; None for anything else."""
    gold_number, answer_number = number(gold), number(answer)
    if gold_number and answer_number:
        return same_number(gold_number, answer_number)
    gold_time, answer_time = time(gold), time(answer)
    if gold_time or answer_time:
        return _same_time(gold_time, answer_time, gold, answer)
    gold_ratio, answer_ratio = ratio(gold), ratio(answer)
    if gold_ratio and answer_ratio:
        return _proportional(gold_ratio, answer_ratio)
    for pair, single in ((gold_ratio, answer_number), (answer_ratio, gold_number)):
        if pair and single and len(pair) == 2 and pair[1]:
            return pair[0] / pair[1] == single.value
    gold_residues, answer_residues = residues(gold), residues(answer)
    if r"\pmod" in gold + answer and (gold_residues or answer_residues):
        return _same_residues(gold_residues, answer_residues)
    gold_base, answer_base = _BASED.fullmatch(gold), _BASED.fullmatch(answer)
    if gold_base and answer_base:
        return gold_base.groups() == answer_base.groups()
    if gold_base and answer_number:
        return gold_base[1] == answer  # the base may be left out
    if answer_base and gold_number:
        return answer_base[2] == "10" and answer_base[1] == gold
    if _INDEXED.fullmatch(gold) and _INDEXED.fullmatch(answer):
        return squeeze(gold) == squeeze(answer)  # E_1 is a name, which math-verify would read as e
    return _same_words(gold, answer)


def _same_words(gold: str, answer: str) -> bool | None:
    gold_choice, answer_choice = choice(gold), choice(answer)
    if gold_choice and answer_choice:
        return gold_choice == answer_choice
    said_in_text, answer_words = words(gold), words(answer)
    if not (said_in_text or answer_words or words_alone(gold) or words_alone(answer)):
        return _same_bare_words(gold, answer)
    gold_said = said_in_text or (_plain(gold) if _BARE_WORDS.fullmatch(gold) else None)
    said = answer_words or (_plain(answer) if _BARE_WORDS.fullmatch(answer) else None)
    if gold_said and said:
        return gold_said == said or (None if not said_in_text and not words_alone(gold) else False)
    if gold_said and number(answer):
        return False
    return None


def _same_bare_words(gold: str, answer: str) -> bool | None:
    """Compare words such as `east` and `seat`; None if the text may be a product of variables."""
    if not (_BARE_WORD.fullmatch(gold) and _BARE_WORD.fullmatch(answer)):
        return None
    if gold.lower() == answer.lower() and all(t.istitle() or t.isupper() or t.islower() for t in (gold, answer)):
        return True
    return False if all(len(text) > 3 and len(_VOWEL.findall(text)) > 1 for text in (gold, answer)) else None


def same_number(gold: Number, answer: Number) -> bool:
    """Compare literal numbers by value, with a tolerance for decimal fractions and scientific notation.

    - Gold answer with a percent sign: 62.5% equals 62.5 and 0.625.
    - Answer with a percent sign: it means a hundredth of the number. A gold answer that is an integer, or a decimal
      fraction of at least 1, may also be a percentage without its sign: 62.5% equals 62.5. A decimal fraction below 1
      or a ratio is never taken for a percentage: 0.25% equals 0.0025, not 0.25.
    - Gold answer in scientific notation: it is a measured value, so an answer is equal if it rounds to the gold answer
      at the gold answer's digits and differs by at most 5%. 4.57e-24 equals a gold answer of 4.6e-24; 4.5e-24 does not,
      and 4.6e-24 does not equal a gold answer of 4.57e-24.
    - A decimal fraction and a ratio: equal up to a millionth of the gold answer.
    - Two decimal fractions: equal up to a millionth of the gold answer, but at most up to 1e-6.
    - Integers: exactly equal.
    """
    candidates = [answer.value]
    if gold.percent and not answer.percent:
        candidates.append(answer.value * 100)
    elif answer.percent and not gold.percent:
        may_be_percentage = gold.kind == "integer" or (gold.kind == "decimal" and abs(gold.value) >= 1)
        candidates = [answer.value / 100] + candidates * may_be_percentage
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
    """Return whether a value rounds to a measured gold answer at its number of digits and differs by at most 5%."""
    return abs(value - gold.value) <= min(gold.ulp / 2, _LOOSEST * abs(gold.value))


def quantity(text: str) -> Quantity:
    r"""Split text into value and unit: `5\text{ cm}^2`, `\$5`, `12 people`, `90^\circ`. The unit may be None.

    A single letter directly after a number is a variable (`6m`). A longer word (`5cm`, `12 people`) or letters after a
    space (`9.8 m/s^2`) are a unit if they can be one.
    """
    if time(text):
        return Quantity(text, None)
    if (match := _CURRENCY.fullmatch(text)) and not _CURRENCIES.search(match["value"] or match["before"]):
        value = match["sign"] + match["value"] if match["value"] else match["before"]
        value = _SHORT_MULTIPLIER.sub(lambda short: rf"\text{{{_SHORT[short[1]]}}}", value)
        if quantity(value).unit is None:
            return Quantity(value, units.read(match["currency"] or r"\$"))
    if (match := _AFTER_NUMBER.fullmatch(text)) and (unit := units.read(match["unit"])):
        letters = sum(map(str.isalpha, match["unit"]))
        if match["space"] or (letters > 1 and match["unit"] not in ("mg", "mm", "MN", "Pa", "PA")):
            return Quantity(match["value"].strip(), unit)
    match = _UNITS.search(text)
    if match and units.read(match.group()) is None:
        match = _LAST_UNIT.search(text)
    if match and match.start() and (unit := units.read(match.group())):
        if r"\circ" in match.group() and (OF_AN_ANGLE.search(text) or r"\circ" in text[: match.start()]):
            return Quantity(text, None)
        return Quantity(text[: match.start()].strip(), unit)
    return Quantity(text, None)


def number(text: str) -> Number | None:
    """Read a literal number, possibly with a prime, an ordinal ending, a percent sign or a multiplier (2.5 million)."""
    percent = text.endswith("%")
    if percent:
        text = text[:-1].strip()
    for ending in (_PRIMES, _ORDINAL):
        text = ending.sub("", text).strip()
    scale = Fraction(1)
    if text and not text[-1].isdigit() and (match := re.search(r"\d\s*+((?:\\text\s*+\{[^{}]*\}|[^\W\d_]+)$)", text)):
        word = _MULTIPLIER.fullmatch(match[1])
        if word and word[1] in MULTIPLIERS and (word[1] not in ("k", "K") or "\\text" in match[1]):
            scale, text = Fraction(MULTIPLIERS[word[1]]), text[: match.start(1)].strip()
    read = _ratio_number(text) or _repeating(text) or _decimal(text)
    if read is None or (scale == 1 and not percent):
        return read
    value = read.value * scale
    kind = read.kind if scale == 1 else "integer" if value.denominator == 1 else "decimal"
    return Number(value, kind, read.ulp * scale, percent)


def _ratio_number(text: str) -> Number | None:
    match = _RATIO.fullmatch(text)
    if not match:
        return None
    over = int(match["over"] or match["over1"] or match["over2"])
    under = int(match["under"] or match["under1"] or match["under2"])
    if not under or (match["whole"] and over * under < 0):
        return None
    value = int(match["whole"] or 0) + Fraction(over, under)
    return Number(-value if match["sign"] == "-" else value, "ratio", Fraction(0))


def _repeating(text: str) -> Number | None:
    r"""Read repeating decimals: `0.1\overline{6}` and `0.1666\ldots`."""
    if match := _AND_SO_ON.fullmatch(text):
        text = rf"{match[1]}\overline{{{match[2]}}}"
    match = _REPEATING.fullmatch(text)
    if not match:
        return None
    once, again = match["once"], match["again"]
    value = Fraction(int((match["whole"] or "0") + once), 10 ** len(once))
    value += Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(once))
    return Number(-value if match["sign"] == "-" else value, "ratio", Fraction(0))


def _decimal(text: str) -> Number | None:
    match = _NUMBER.fullmatch(text)
    if not match or (match["digits"] is None and len(match["fraction"] or "") < 2):
        return None
    places = (match["fraction"] or ".")[1:]
    power = next((match[name] for name in ("power", "bare_power", "exponent") if match[name] is not None), None)
    scale = Fraction(10) ** int(power or 0)
    mantissa = Fraction(int((match["digits"] or "0").replace(",", "") + places), 10 ** len(places))
    value = mantissa * scale * (-1 if match["sign"] == "-" else 1)
    kind = "scientific" if power is not None else "decimal" if places else "integer"
    if match["exponent"] and re.search(r"e(?:-0\d|\+\d\d)", text):
        kind = "decimal"  # Python writes floats as 1e-05 and 1e+16; they are not measured values
    return Number(value, kind, ulp=scale / 10 ** len(places))


def time(text: str) -> tuple[int, int | None] | None:
    """Read a time of day or a duration (`2:30`, `1:20 p.m.`) as seconds and half of the day (0, 12 or None).

    One or two digits, a colon and two digits up to 59 are a time. Other colons are ratios (3:2, 1:100).
    """
    match = _TIME.fullmatch(text)
    if not match or not (match["minutes"] or match["half"]):
        return None
    half = match["half"] and (12 if match["half"][0] in "pPn" else 0)
    hours = int(match["hours"])
    if half is not None:
        if not 1 <= hours <= 12:
            return None
        hours = hours % 12 + half
    elif hours > 12:
        half = 12  # 15:00 can only be p.m.
    return hours * 3600 + int(match["minutes"] or 0) * 60 + int(match["seconds"] or 0), half


def _same_time(gold, answer, gold_text: str, text: str) -> bool | None:
    if gold is None or answer is None:
        gold_ratio, answer_ratio = ratio(gold_text), ratio(text)
        if gold_ratio and answer_ratio:
            return gold_ratio == answer_ratio  # 8:15 and "8 to 15"
        return False if number(gold_text) or number(text) else None
    if gold[1] is None or answer[1] is None:
        return gold[0] % 43200 == answer[0] % 43200
    return gold[0] == answer[0]


def ratio(text: str) -> tuple[Fraction, ...] | None:
    r"""Read `3:2`, `1:2:3` or `3\text{ to }2` as a tuple of numbers."""
    parts = [number(part) for part in _COLON.split(text)]
    return tuple(part.value for part in parts) if len(parts) > 1 and all(parts) else None


def _proportional(gold: tuple[Fraction, ...], answer: tuple[Fraction, ...]) -> bool:
    if len(gold) != len(answer) or not gold[0] or not answer[0]:
        return gold == answer
    return all(g * answer[0] == a * gold[0] for g, a in zip(gold, answer, strict=True))


def residues(text: str) -> tuple[str, frozenset[int], int] | None:
    r"""Read `x \equiv 3 \pmod 7`, with or without a name, as name, residues and modulus."""
    if general := _GENERAL_TERM.fullmatch(text):
        text = rf"{general[1]} \equiv {(general[3] or '0').replace('+', '')} \pmod{{{general[2]}}}"
    match = _RESIDUE.fullmatch(text)
    if not match or not int(match["modulus"]):
        return None
    modulus = int(match["modulus"])
    try:
        found = frozenset(int(part.replace(" ", "")) % modulus for part in match["residues"].split(","))
    except ValueError:
        return None
    return match["name"] or "", found, modulus


def _same_residues(gold, answer) -> bool:
    if gold is None or answer is None:
        return False
    return gold[1:] == answer[1:] and (gold[0] == answer[0] or not gold[0] or not answer[0])


def choice(text: str) -> str | None:
    r"""Return the letter of an answer to a multiple-choice question: `C`, `\text{(C)}`, `\text{(C) }12`, `B. 12`.

    None if a second choice follows.
    """
    match = _CHOICE.fullmatch(text)
    if not match or _OTHER_CHOICE.search(match["rest"]):
        return None
    if match["rest"].count("{") != match["rest"].count("}") and not text.startswith("\\"):
        return None
    return match["bracketed"] or match["marked"] or match["alone"]


def words_alone(text: str) -> str | None:
    """Return words that are not in ASCII, such as Chinese ones, in plain form; they are not products of variables."""
    if text.isascii() or not _BARE_WORDS.fullmatch(text):
        return None
    return _plain(text)


def words(text: str) -> str | None:
    r"""Return the words of an answer that has only `\text{}`, in plain form; None for other answers."""
    if not _WORDS.fullmatch(text):
        return None
    return _plain(" ".join(re.findall(r"\{([^{}]*)\}", text)))


def _plain(text: str) -> str | None:
    """Return words in lower case and in the singular, without articles, brackets and spaces."""
    said = re.sub(r"[().,:]", " ", text).lower().split()
    return "".join(units.singular(word) for word in said if word not in ("the", "a", "an") or len(said) == 1) or None
