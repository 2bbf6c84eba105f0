r"""What needs computer algebra: math-verify (SymPy), with one rule of our own for constants.

math-verify compares floats rounded to six decimals and lets small differences vanish, so that 2.88e-19 equals 5.11e-19.
Constants are compared here by their relative difference instead. Only worker processes import this module.
"""

import logging
from fractions import Fraction
from functools import lru_cache

import sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Expr, Float, MatrixBase

from ktae_trl.grading import answers

_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
_DIGITS = 30
_TOLERANCE = 1e-12  # between constants without a decimal point: far above the error of evaluation

# Time is limited from outside (`pool`), by a signal that cannot be missed; math-verify warns that it does not do it.
for name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.CRITICAL)


def equal(gold: str, answer: str) -> bool:
    """Compare two answers in full."""
    return bool(answers.compare(gold, answer, leaf=_same_expression))


@lru_cache(maxsize=4096)
def parsable(gold: str) -> bool:
    """Say whether every part of an accepted answer is mathematics, a number, words or a name."""
    if not gold or len(gold) > answers.MAX_LENGTH:
        return False
    return all(answers.is_literal(part) or _parse(part) is not None for part in answers.parts(gold))


def _same_expression(gold: str, answer: str) -> bool:
    gold_expression, expression = _parse(gold), _parse(answer)
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
    gold_value, value = _value(gold), _value(answer)
    if gold_value is None or value is None:
        return verify(gold, answer, timeout_seconds=None)
    if gold_value == 0 or value == 0:
        return bool((gold.doit() - answer.doit()).equals(0))
    decimal = gold.has(Float) or answer.has(Float)
    tolerance = float(answers.RELATIVE_TOLERANCE) * (1 + 1e-9) if decimal else _TOLERANCE
    return bool(abs(gold_value - value) <= tolerance * abs(gold_value))


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
    except (Exception, RecursionError):  # the parser fails in many ways on what a model may write
        return None
    expressions = [reading for reading in readings if isinstance(reading, sympy.Basic | MatrixBase)]
    # \gamma^2 is read as the gamma function at a pole, and all such infinities are equal to each other.
    return expressions[0] if expressions and not expressions[0].has(sympy.zoo, sympy.nan) else None
