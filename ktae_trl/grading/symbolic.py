r"""Compare what needs computer algebra: expressions, equations and sets, read into SymPy by math-verify's parser.

- Before parsing, each name gets its own symbol (`names`), and mixed numbers and degrees are written out.
- Exact constants are equal if their difference is 0; decimal ones if their relative difference is small. A decimal
  fraction does not equal an irrational number.
- Formulas are equal if their values agree at eight points where both are real, to far more digits than chance could
  explain. Roots and logarithms therefore need no assumptions about the signs of variables: `\sqrt{ab}` equals
  `\sqrt{a}\sqrt{b}`, and `\sqrt{x^2}` does not equal x.
- Equations and inequalities are equal if the differences of their sides are multiples of each other.

Only worker processes import this module.
"""

import logging
import random
import re
from fractions import Fraction
from functools import lru_cache

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy import Expr, Float, I, MatrixBase, Rational, S

from ktae_trl.grading import answers, literals
from ktae_trl.grading.extraction import MAX_LENGTH
from ktae_trl.grading.names import Names, other_case
from ktae_trl.grading.text import clean, split

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_DIGITS = 30
_DIFFERENT = 1e-12  # relative difference; far above the error of an evaluation to 30 digits
_POINTS = 8  # number of points at which two formulas must agree
_TRIES = 60
_REWRITING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$|(?<=\d)%", ""),
        (
            r"(?<![\d.,}^_])(\d+)\s*+\\frac\s*+\{\s*+(\d+)\s*+\}\s*+\{\s*+(\d+)\s*+\}",
            r"(\1+\\frac{\2}{\3})",
        ),  # mixed numbers
        (r"\(((?:[^()])*)\)\s*+\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ(?![A-Za-z]))", r"\\frac{(\1)\\pi}{180}"),
        (
            r"((?<!\d)\d++(?:\.\d++)?|[A-Za-z]|\\[A-Za-z]+)\s*+(?:\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z]))",
            r"\\frac{\1\\pi}{180}",
        ),
        (r"^([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)$", r"\1 \\cdot 10^{\2}"),
        (r"\^\s*+(\\frac\s*+\{[^{}]*\}\s*+\{[^{}]*\}|\\sqrt\s*+\{[^{}]*\})", r"^{\1}"),
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"(?<![A-Za-z\\])C\s*+_\s*+\{?(\d+)\}?\s*+\^\s*+\{?(\d+)\}?", r"\\binom{\1}{\2}"),
        (r"(?:\{\s*+\}\s*+)?(?<![\w}])_\s*+\{?(\d+)\}?\s*+C\s*+_\s*+\{?(\d+)\}?", r"\\binom{\1}{\2}"),
        (r"(?<![A-Za-z\\])C\s*+\(\s*+(\d+|n|m)\s*+,\s*+(\d+|k|r)\s*+\)", r"\\binom{\1}{\2}"),
        (r"\\operatorname\s*+\{\s*+arc(sin|cos|tan)\s*+\}", r"\\arc\1"),
        (r"(?<!\d)(\d*+)\.(\d*+)\\overline\s*+\{(\d+)\}", lambda m: _repeating(m)),
        (r"\\text\s*+\{\s*+\}", ""),
        (r"\\[lr]vert", "|"),
        (r"\\overline\s*+\{\s*+([A-Z]{2})\s*+\}", r"\1"),
        (r"(?<![A-Za-z])\\mid(?![A-Za-z])", "|"),
    )
]
_RELATION = re.compile(r"\\(?:le|ge|lt|gt|ne)(?![A-Za-z])|[<>]")

# `pool` limits the time by a signal that cannot be missed. math-verify's own time-outs are off; silence its warnings.
for name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def equal(gold: str, answer: str) -> bool:
    """Return whether two answers are equal."""
    return bool(answers.compare(gold, answer, leaf=_same_leaf))


@lru_cache(maxsize=4096)
def parsable(gold: str) -> bool:
    """Return whether every part of an accepted answer is mathematics, a number, words or a name."""
    if not clean(gold) or len(gold) > MAX_LENGTH:
        return False
    return all(literals.is_literal(part) or _readable(part) for part in answers.parts(gold))


def _readable(part: str) -> bool:
    sides = [side for side in _RELATION.split(part) if side.strip()]
    return all(_read(Names(_same_leaf), member) is not None for side in sides for member in split(side, "=")) and bool(
        sides
    )


def _same_leaf(gold: str, answer: str) -> bool:
    gold_set, answer_set = _number_set(gold), _number_set(answer)
    if gold_set is not None or answer_set is not None:
        return gold_set == answer_set
    sides = _sides(gold), _sides(answer)
    if sides[0] and sides[1]:
        return _same_relation(*sides)
    if sides[0] or sides[1]:
        return False
    return _same_expression(gold, answer)


def _readings(*texts: str) -> list:
    names = Names(_same_leaf)
    half = len(texts) // 2
    names.fold = other_case(" ".join(texts[:half]), " ".join(texts[half:]))
    return [_read(names, text) for text in texts]


def _same_expression(gold: str, answer: str) -> bool:
    gold_expression, expression = _readings(gold, answer)
    if gold_expression is None or expression is None:
        return False
    measured = _value(expression)
    if measured is not None and measured.is_real:
        verdict = answers.same_constant(gold, Fraction(str(measured)))
        if verdict is not None:
            return verdict
    return _same(gold_expression, expression)


def _same(gold, answer) -> bool:
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(_same(g, a) for g, a in zip(gold.flat(), answer.flat(), strict=True))
    if any(isinstance(side, Expr) and side.is_infinite for side in (gold, answer)):
        return gold == answer
    gold_value, value = _value(gold), _value(answer)
    if gold_value is None and value is None and isinstance(gold, Expr) and isinstance(answer, Expr):
        verdict = _agree(gold, answer)
        return verify(gold, answer, timeout_seconds=None) if verdict is None else verdict
    if gold_value is None or value is None:
        if isinstance(gold, Expr) and isinstance(answer, Expr):
            return bool(_agree(gold, answer))
        return verify(gold, answer, timeout_seconds=None)
    gold, answer = _real_roots(gold), _real_roots(answer)
    decimal = gold.has(Float) or answer.has(Float)
    if decimal and gold_value != 0 and not gold.doit().is_integer:
        if not gold.has(Float) and _rational(answer) and not _rational(gold):
            return False  # 3.14159 is not pi
        tolerance = float(literals.RELATIVE_TOLERANCE) * (1 + 1e-9)
        return bool(abs(gold_value - value) <= tolerance * abs(gold_value))
    if abs(gold_value - value) > _DIFFERENT * max(abs(gold_value), abs(value)) and gold_value * value != 0:
        return False
    return bool((gold.doit() - answer.doit()).equals(0))  # exact: distinguishes 2^1009 from 2^1009 - 1


def _rational(expression) -> bool:
    return bool(_exact(expression).doit().is_rational)


def _exact(expression):
    """Return an expression with its decimal fractions written as ratios."""
    return expression.xreplace({number: Rational(str(number)) for number in expression.atoms(Float)})


def _value(expression):
    """Return the value of a constant to 30 digits; None if it is not a finite number."""
    if not isinstance(expression, Expr) or expression.free_symbols:
        return None
    value = _real_roots(expression).doit().evalf(_DIGITS)
    real, imaginary = value.as_real_imag()
    return value if real.is_Number and imaginary.is_Number and value.is_finite else None


def _real_roots(expression):
    """Replace odd roots of negative numbers by their real values: `\\sqrt[3]{-8}` is -2."""

    def odd_root(power) -> bool:
        return (
            power.is_Pow and power.exp.is_Rational and power.exp.q % 2 == 1 and power.exp.q > 1
            and power.base.is_number and power.base.is_negative
        )  # fmt: skip

    return expression.replace(odd_root, lambda power: (-1) ** power.exp.p * (-power.base) ** power.exp)


def _agree(gold, answer) -> bool | None:
    """Return whether two formulas have the same values where both are real; None if too few points are found."""
    gold, answer = gold.doit(), answer.doit()
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if any(
        expression.has(sympy.Function) and expression.atoms(sympy.core.function.AppliedUndef)
        for expression in (gold, answer)
    ):
        return None
    tolerance = literals.RELATIVE_TOLERANCE if gold.has(Float) or answer.has(Float) else Rational(1, 10**15)
    draw, found = random.Random(0), 0
    for attempt in range(_TRIES):
        integers = attempt >= _TRIES // 2
        point = {s: _coordinate(draw, attempt, integers) for s in symbols}
        values = _at(gold, point), _at(answer, point)
        if None in values:
            continue
        if not _close(*values, tolerance):
            return False
        found += 1
        if found == _POINTS:
            return True
    return None


def _coordinate(draw: random.Random, attempt: int, integer: bool):
    if integer:
        return S(draw.randint(2, 12))
    number = Float(Rational(draw.randint(100, 99999), 30011), 40)
    return -number if attempt % 2 and draw.random() < 0.5 else number


def _close(gold, value, tolerance) -> bool:
    scale = max(abs(gold), abs(value))
    return scale < 1e-25 or bool(abs(gold - value) <= tolerance * scale)


def _at(expression, point: dict):
    """Evaluate at a point; None if the value or a part of it is not real (allowed if the expression contains i)."""
    complex_values = expression.has(I)
    try:
        value = _evaluated(expression, point, complex_values)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError, ArithmeticError):
        return None
    return value


def _evaluated(expression, point: dict, complex_values: bool):
    if expression in point:
        return point[expression]
    if not expression.args:
        if expression.is_finite is False:
            raise ValueError("not finite")
        return expression if expression.is_Integer else expression.evalf(40)
    if expression.has(sympy.Sum, sympy.Product, sympy.Integral, sympy.Derivative, sympy.Limit):
        value = expression.subs(point).doit().evalf(40)
    else:
        args = [_evaluated(arg, point, complex_values) for arg in expression.args]
        if expression.is_Pow and not complex_values and args[0].is_negative and not args[1].is_integer:
            exponent = expression.exp
            if not (exponent.is_Rational and exponent.q % 2):
                raise ValueError("not real")
            return ((-1) ** exponent.p * (-args[0]) ** exponent).evalf(40)
        value = expression.func(*args).evalf(40)
    if (
        not value.is_number
        or value.has(sympy.zoo, sympy.nan, sympy.oo, -sympy.oo)
        or (not complex_values and not value.is_real)
    ):
        raise ValueError("not real")
    return value


_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_SIGNS = {r"\le": "<=", r"\ge": ">=", r"\lt": "<", r"\gt": ">", r"\ne": "!=", "<": "<", ">": ">"}


def _sides(text: str) -> tuple[list[str], str] | None:
    """Return the sides and the sign of an equation or inequality; None for other text."""
    members = split(text, "=")
    found = _RELATION.findall(text)
    if len(members) > 1 and not found:
        return members, "="
    if len(found) == 1 and len(members) == 1:
        return [side.strip() for side in _RELATION.split(text)], _SIGNS[found[0]]
    return None


def _same_relation(gold: tuple[list[str], str], answer: tuple[list[str], str]) -> bool:
    (golds, gold_sign), (members, sign) = gold, answer
    if len(golds) != 2 or len(members) != 2:
        return len(golds) == len(members) and all(map(_same_leaf, golds, members))
    readings = _readings(*golds, *members)
    if any(not isinstance(reading, Expr) for reading in readings):
        return None not in readings and gold_sign == sign and all(map(_same_leaf, golds, members))
    difference, other = readings[0] - readings[1], readings[2] - readings[3]
    ratio = _ratio(difference, other)
    if ratio is None:
        return False
    if gold_sign in ("=", "!="):
        return gold_sign == sign
    return sign == (gold_sign if ratio > 0 else _MIRRORED[gold_sign])


def _ratio(gold, answer):
    """Return the constant ratio of two formulas; None if their ratio is not constant."""
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if not symbols:
        return None
    draw, ratios = random.Random(1), []
    tolerance = literals.RELATIVE_TOLERANCE if gold.has(Float) or answer.has(Float) else Rational(1, 10**15)
    for attempt in range(_TRIES):
        point = {s: _coordinate(draw, attempt, attempt >= _TRIES // 2) for s in symbols}
        values = _at(gold, point), _at(answer, point)
        if None in values or abs(values[1]) < 1e-25 or abs(values[0]) < 1e-25:
            continue
        ratios.append(values[0] / values[1])
        if not _close(ratios[0], ratios[-1], tolerance):
            return None
        if len(ratios) == _POINTS:
            return ratios[0] if ratios[0].is_real else None
    return None


def _number_set(text: str):
    """Read unions, intersections and differences of intervals and finite sets of numbers as a SymPy set, else None."""
    for sign, conjunction, join in ((r"\cup", r"\lor", sympy.Union), (r"\cap", r"\land", sympy.Intersection)):
        for separator in (conjunction, sign):
            pieces = split(text, separator)
            if len(pieces) > 1:
                sets = [_number_set(piece) for piece in pieces]
                return None if None in sets else join(*sets)
    if len(pieces := split(text, r"\setminus")) == 2:
        sets = [_number_set(piece) for piece in pieces]
        return None if None in sets else sets[0] - sets[1]
    if interval := answers.interval(text):
        return _number_set(interval[1])
    if text == r"\mathbb{R}":
        return S.Reals
    if text == r"\emptyset":
        return S.EmptySet
    if text.startswith(r"\{") and text.endswith(r"\}"):
        values = [_real_value(one) for one in split(text[2:-2].strip(), ",")]
        return None if None in values else sympy.FiniteSet(*values)
    if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
        ends = [_real_value(one) for one in split(text[1:-1].strip(), ",")]
        if (text[0], ends[0]) == ("[", -S.Infinity) or (text[-1], ends[-1]) == ("]", S.Infinity):
            return None
        if len(ends) == 2 and None not in ends and ends[0] < ends[1]:
            return sympy.Interval(*ends, left_open=text[0] == "(", right_open=text[-1] == ")")
    return None


def _real_value(text: str):
    if text.replace(" ", "") in (r"\infty", r"+\infty", r"-\infty"):
        return -S.Infinity if "-" in text else S.Infinity
    value = _read(Names(), text)
    if not isinstance(value, Expr) or value.free_symbols:
        return None
    value = _real_roots(value).doit()
    return sympy.nsimplify(value, rational=True) if value.has(Float) else value if value.is_real else None


def _read(names: Names, latex: str):
    """Return LaTeX as a SymPy expression, or None if the parser finds no mathematics in it."""
    for pattern, replacement in _REWRITING:
        latex = pattern.sub(replacement, latex)
    expression = _parse(latex if r"\int" in latex or r"\lim" in latex else names.rename(latex))
    if isinstance(expression, Expr) and not re.search(r"_\s*+\{?\s*+i\s*+=", latex):
        expression = expression.subs(sympy.Symbol("i"), I)
    # 1/0 and 2/0 are the same infinity to SymPy and must not count as equal answers.
    return None if expression is None or expression.has(sympy.zoo, sympy.nan) else expression


@lru_cache(maxsize=4096)
def _parse(latex: str):
    try:
        expression = latex2sympy(latex, normalization_config=_NORMALIZATION, conversion_config=_CONVERSION)
    except MemoryError:
        raise  # must not be cached: it depends on the moment, not on the text
    except Exception:  # the parser raises many kinds of errors on text written by a model
        return None
    return expression if isinstance(expression, sympy.Basic | MatrixBase) else None


def _repeating(match: re.Match) -> str:
    number = literals.number(match.group())
    return match.group() if number is None else rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"
