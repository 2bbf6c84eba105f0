r"""What needs computer algebra: math-verify (SymPy), with rules of our own where it says 'equal' too easily.

- Constants: math-verify compares floats rounded to six decimals and lets small differences vanish, so that 2.88e-19
  equals 5.11e-19. Here exact constants are equal if their difference is 0, decimal ones by relative difference.
- Names: it reads R and r, and x and x', as the same variable; they are told apart before it sees them.
- Units: it takes letters after a number for units, so that 5c equals 5; `literals` has stricter ones, its are off.

Only worker processes import this module.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Float, MatrixBase

from ktae_trl.grading import answers, literals
from ktae_trl.grading.extraction import MAX_LENGTH
from ktae_trl.grading.text import clean

_EXTRACTION = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        try_extract_without_anchor=False,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    )
]
_DIGITS = 30
_DIFFERENT = 1e-12  # relative; far above the error of evaluation to 30 digits
_NAMES = re.compile(r"\\([A-Za-z]+)|(?<!_)(?<!_\{)([A-Za-z])(?:_(\w|\{\w+\}))?")
_GREEK = {"gamma", "delta", "theta", "lambda", "xi", "pi", "sigma", "upsilon", "phi", "psi", "omega"}
_PRIMED = re.compile(r"([A-Za-z])(?:('+)|\^\s*(?:\{\s*((?:\\prime\s*)+)\}|(\\prime)))")

# Time is limited from outside (`pool`), by a signal that cannot be missed; math-verify warns that it does not do it.
for name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def equal(gold: str, answer: str) -> bool:
    """Compare two answers in full."""
    return bool(answers.compare(gold, answer, leaf=_same_expression))


@lru_cache(maxsize=4096)
def parsable(gold: str) -> bool:
    """Say whether every part of an accepted answer is mathematics, a number, words or a name."""
    if not clean(gold) or len(gold) > MAX_LENGTH:
        return False
    return all(
        literals.is_literal(part) or _parse(_told_apart(part, _in_both_cases(part, part))) is not None
        for part in answers.parts(gold)
    )


def _same_expression(gold: str, answer: str) -> bool:
    twice = _in_both_cases(gold, answer)
    gold_expression, expression = _parse(_told_apart(gold, twice)), _parse(_told_apart(answer, twice))
    if gold_expression is None or expression is None:
        return False
    measured = _value(expression)
    if measured is not None and measured.is_real:
        verdict = answers.same_constant(gold, Fraction(str(measured)))
        if verdict is not None:
            return verdict
    return _same(gold_expression, expression)


def _in_both_cases(gold: str, answer: str) -> set[str]:
    """Return the (lower case) names to tell apart from their capitals.

    R and r are two variables if one of the answers has both; else a model may write r for R. Greek letters, such as
    Delta, always are.
    """
    texts = [{match[1] or match[2] for match in _NAMES.finditer(text)} for text in (gold, answer)]
    latin = {name for names in texts for name in names if len(name) == 1 and {name.lower(), name.upper()} <= names}
    greek = {name for name in texts[0] | texts[1] if name in _GREEK and name.capitalize() in texts[0] | texts[1]}
    return {name.lower() for name in latin} | greek


def _told_apart(latex: str, twice: set[str]) -> str:
    r"""Rename what math-verify would take for one: x' and x, and the capitals of the names in `twice`."""

    def primed(match: re.Match) -> str:
        count = len(match[2] or "") or (match[3] or match[4]).count("prime")
        return f"{match[1]}_{{99{count}}}"

    def capital(match: re.Match) -> str:
        name = match[1] or match[2]
        lower = name[0].lower() + name[1:]
        if name == lower or lower not in twice:
            return match.group()
        command = "\\" if match[1] else ""
        return f"{command}{lower}_{{98{(match[3] or '').strip('{}')}}}"

    return _NAMES.sub(capital, _PRIMED.sub(primed, latex))


def _same(gold, answer) -> bool:
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(_same(g, a) for g, a in zip(gold.flat(), answer.flat(), strict=True))
    gold_value, value = _value(gold), _value(answer)
    if gold_value is None or value is None:
        return verify(gold, answer, timeout_seconds=None)
    decimal = gold.has(Float) or answer.has(Float)
    if decimal and gold_value != 0 and not gold.doit().is_integer:
        tolerance = float(literals.RELATIVE_TOLERANCE) * (1 + 1e-9)
        return bool(abs(gold_value - value) <= tolerance * abs(gold_value))
    if abs(gold_value - value) > _DIFFERENT * max(abs(gold_value), abs(value)) and gold_value * value != 0:
        return False
    return bool((gold.doit() - answer.doit()).equals(0))  # also tells 2^1009 from 2^1009 - 1


def _value(expression):
    """Return a constant's value to 30 digits, None for what is not a finite number."""
    if not isinstance(expression, Expr) or expression.free_symbols:
        return None
    value = expression.doit().evalf(_DIGITS)
    real, imaginary = value.as_real_imag()
    return value if real.is_Number and imaginary.is_Number and value.is_finite else None


@lru_cache(maxsize=4096)
def _parse(latex: str):
    """Return math-verify's reading of `latex`, or None if it found no mathematics in it."""
    try:
        readings = parse(
            rf"\boxed{{{latex}}}", extraction_config=_EXTRACTION, extraction_mode="first_match", parsing_timeout=None
        )
    except MemoryError:
        raise  # of this moment, not of this text: it must not be remembered
    except Exception:  # the parser fails in many ways on what a model may write
        return None
    expressions = [reading for reading in readings if isinstance(reading, sympy.Basic | MatrixBase)]
    # \gamma^2 is read as the gamma function at a pole, and all such infinities are equal to each other.
    return expressions[0] if expressions and not expressions[0].has(sympy.zoo, sympy.nan) else None
