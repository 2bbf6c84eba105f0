r"""Compare two answers piece by piece: lists, sets, tuples, intervals and equations, down to literals and expressions.

`compare` passes expressions to a function `leaf`. In the caller's process only text and literals are compared
(`settle`); in a worker process, math-verify compares the expressions (`symbolic`).
"""

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise, product

from ktae_trl.grading import literals
from ktae_trl.grading.names import Names
from ktae_trl.grading.text import SEPARATORS, clean, split, squeeze

# Longest answer, in characters, that is settled in the caller's process, which has no time limit.
_SHORT = 500
_MEMBERS = 20  # most members of a chain of equations that counts as an answer

# A quantity that a problem may ask for by name: x, AB, f(2), P(X=2), |AB|, \angle ABC, \text{Area}, x_{1}, \bar x.
_SUBSCRIPT = r"(?:\s*+_\s*+(?:\w|\\[A-Za-z]+|\{[^{}]*\}))?"
_NAME = re.compile(
    r"(?:\\(?:angle|triangle|Delta|measuredangle|overline|bar|vec|hat|overrightarrow|widehat|mathrm|mathcal)\s*+)*"
    r"(?:[A-Z]{1,4}|[A-Za-z]|\{[A-Za-z]+\}|\\(?!frac|sqrt|pi(?![A-Za-z])|log|ln|lg|sin|cos|tan|binom|left|begin|l?dots)[A-Za-z]+)"
    + _SUBSCRIPT
    + r"'*\s*+(?:\^\s*+\{?(?:-1|\\prime|\(\w\))\s*+\}?\s*+(?=\())?(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?"
    r"|\\(?:text|mathrm|operatorname)\s*+\{[A-Za-z .]+\}" + _SUBSCRIPT + r"\s*+(?:\([^()]*\))?"
    r"|\|[A-Za-z\\{}_ ]+\||\[[A-Z]+\]|\\l[vf]\w+ [^=]+\\r[vf]\w+"
)
_LENGTH = re.compile(r"(?<![A-Za-z\\{])[A-Z]{2,3}(?![A-Za-z])")
_IN_ORDER = (r"\Rightarrow", r"\implies", r"\to", r"\subset", r"\subseteq", r"\setminus")
_SQUARE_OF_LENGTH = re.compile(r"[A-Z]{2}\s*+\^\s*+\{?\s*+2\s*+\}?")
_POINTS = r"(?:\|?\s*+(?:\\overline\s*+)?\{?[A-Z]'?[A-Z]'?\}?\s*+\|?|S_\s*+\{[^{}]*\}|\[[A-Z]+\])"
_QUOTIENT = re.compile(rf"\\frac\s*+\{{\s*+{_POINTS}\s*+\}}\s*+\{{\s*+{_POINTS}\s*+\}}|{_POINTS}\s*+[:/]\s*+{_POINTS}")
_NAMES_IN_BRACKETS = re.compile(
    r"\(\s*+((?:\\?[A-Za-z]+(?:_\s*+(?:\w|\{\w+\}))?\s*+,\s*+)+\\?[A-Za-z]+(?:_\s*+(?:\w|\{\w+\}))?)\s*+\)"
)
_FUNCTION_VALUE = re.compile(
    r"(?:\d+\s*+)?\\(?:sin|cos|tan|cot|sec|csc|max|min|gcd|deg|det|dim|lim|sum|prod|int|operatorname|Pr|lfloor|lceil)(?![A-Za-z]).*"
)
_FUNCTION_OF_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot)\s*+(?:\\angle\s*+)?(?:[A-Za-z]{1,3}|\\[A-Za-z]+)")
_COMPARISON = re.compile(r"(\\(?:le|ge|lt|gt|ne)(?![A-Za-z])|<=|>=|<|>)")
_DERIVATIVE = re.compile(
    r"\\frac\s*+\{\s*+(?:d|\\partial)(?:\^\{?\d\}?)?\s*+\\?[A-Za-z]+\s*+\}\s*+\{\s*+(?:d|\\partial)\s*+\\?[A-Za-z]+(?:\^\{?\d\}?)?\s*+\}"
)
_ASKED = (_NAME, _QUOTIENT, _NAMES_IN_BRACKETS, _FUNCTION_OF_ANGLE, _DERIVATIVE)
_LETTER = re.compile(r"\\[A-Za-z]+|([A-Za-z])")
_NO_LETTERS = {"frac", "sqrt", "pi", "cdot", "times", "binom", "infty", "circ", "log", "ln", "lg", "sin", "cos", "tan",
               "cot", "sec", "csc", "exp", "ldots"}  # fmt: skip
_TEXT = re.compile(r"\\(?:text|mathrm|rm|operatorname)\s*+\{")
_TUPLES = {"()", "[]", "(]", "[)"}
_GRID = re.compile(
    r"\\begin\s*+\{(cases|[pbB]?matrix|smallmatrix|array|aligned)\}(?:\s*+\{[lcr| ]*\})?(.*)\\end\s*+\{\1\}", re.DOTALL
)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
# A qualifier after a formula, such as "for all x" or "where x > 0".
_QUALIFIER = re.compile(
    r"((?:.*=)?+.*?)(?<=\S)\s*+,?\s*+(?:\\text\s*+\{\s*+,?\s*+\(?\s*+|\(\s*+|(?<=\s))"
    r"(?:for (?:all|any|every|each|some|an? )|where |with ).*",
    re.DOTALL,
)
_DOMAIN = re.compile(
    r"(.+?),\s*+(?:\\forall\s*+)?[a-z]\s*+\\in\s*+\\mathbb\{[RZNQC]\}(?:\^?[+*])?|(.+?)(?<=\S)\s*+\\forall.*"
)
_CONSTANT = re.compile(r"(.+?)(?<=\S)\s*+\+\s*+(C|c|K|\\text\s*+\{\s*+(?:constant|const|C)\s*+\})")
_BUILDER = re.compile(r"\\\{\s*+([A-Za-z])\s*+(?:\\in\s*+\\mathbb\{R\})?\s*+(?:\\mid|\||:)\s*+(.+)\\\}")
_MEMBER = re.compile(r"(.+?)\\in(?![A-Za-z])(.+)")
_DISTANCE = re.compile(r"\|\s*+([a-z])\s*+([+-]\s*+\d+)?\s*+\|")
_UNIT = (
    r"\\(?:vec|hat|overrightarrow|mathbf|widehat|boldsymbol)\s*+"
    r"(?:\{\s*+\\?([ijk])(?:math)?\s*+\}|([ijk])(?![A-Za-z])|\\([ij])math)"
)
_ANY_UNIT_VECTOR, _UNIT_VECTOR = re.compile(_UNIT), re.compile(rf"(.*?)(?<!\s)\s*+{_UNIT}")

_PLAIN = re.compile(
    r"(?:\d++(?:\.\d++)?+|[A-Za-z]|[-+*/(){}]|\^(?:\d|\{\d+\})|\\(?:frac(?=\{[^{}]+\}\{)|sqrt(?=\{)|pi(?![A-Za-z])))+"
)
_INCOMPLETE = re.compile(r"^[*/^)}]|[-+*/({]$|[-+*/({][-+*/^)}]|\d\.\d*\.|\^[^{\d]|\^\d\^|\}\^|[a-z]{4}")

Leaf = Callable[[str, str], bool | None]


def settle(gold: str, answer: str) -> bool | None:
    """Compare two answers as text and literals; None if computer algebra has to decide.

    The result is False only for two literal numbers, because only `symbolic` can tell whether any other gold answer
    can be parsed.
    """
    if not gold or max(len(gold), len(answer)) > _SHORT:
        return None
    verdict = compare(gold, answer, leaf=lambda g, a: None)
    return None if verdict is False and not (is_number(gold) and is_number(answer)) else verdict


@lru_cache(maxsize=4096)
def surely_readable(gold: str) -> bool:
    """Return True if an accepted answer has only literals and plain formulas, so that it is certain to be parsable.

    If the result is False, only the parser can tell.
    """
    if not gold or len(gold) > _SHORT or not clean(gold):
        return False
    return all(literals.is_literal(part) or _plain_formula(part) for part in parts(gold))


def _plain_formula(text: str) -> bool:
    text = text.replace(" ", "")
    return bool(
        _PLAIN.fullmatch(text)
        and not _INCOMPLETE.search(text)
        and text.count("(") == text.count(")")
        and split(text, "+", "-")
        and text.count("{") == text.count("}")
    )


def is_number(text: str) -> bool:
    """Return whether an answer (of at most 500 characters) is a literal number, with or without a unit."""
    return len(text) <= _SHORT and literals.number(literals.quantity(clean(text)).value) is not None


def parts(text: str) -> list[str]:
    """Return the pieces that `compare` would compare: the elements of a list or interval, the value of an equation."""
    text = _unqualified(clean(text))
    if literals.is_literal(text):
        return [text]
    if rows := _grid(text):
        return [part for row in rows for cell in row for part in parts(cell)]
    text = _membership(text)[1]
    kind, elements = _structure(text)
    if len(elements) > 1 or kind == "set":
        return [part for element in elements for part in parts(element)]
    if inequality := interval(text):
        return parts(inequality[1])
    members = split(text, "=")
    if len(members) > 1 and all(members):
        return parts(members[1]) if len(members) == 2 and _asked(members[0]) else [text]
    return [literals.quantity(text).value]


def compare(gold: str, answer: str, leaf: Leaf) -> bool | None:
    r"""Compare two answers piece by piece.

    - Texts that differ only in spaces and LaTeX formatting are equal; so are literals with the same value (`literals`).
    - Units are converted and compared if both answers have one. Either answer may leave out its unit.
    - `(a, b)` and `[a, b)` need the same brackets and equal elements in order. The elements of `\{a, b\}`, bare lists
      and unions may be in any order, but each must occur equally often; lists with `\ldots` are compared in order. A
      bare list may replace a tuple. `\pm` means two elements. Matrices and cases are compared cell by cell.
    - "and" and "or" separate elements as a comma does, but inequalities or words that are joined by "and" do not equal
      those joined by "or".
    - `-2 \le x < 7` is the interval `[-2, 7)`, and `x \in A` is `A`.
    - `x = 1, y = 2` (sorted by name) is `1, 2`, in that order; with a single name, `x = 1, x = 2`, in any order.
    - If the gold answer has no `=`, all members of an answer `name = a = b` must be correct, and the first member of
      `5 \approx 7`: a model gets no second try. A gold answer `x = 5` accepts `5`; other equations need both sides.
    - An answer `left = 5` to the gold answer 5 is correct if `left` can be what the problem asks for (`_may_be_asked`).
    - Everything else is passed to `leaf`, without units. An answer with words is wrong if the gold answer has none.

    Returns None if a comparison that decides the verdict returned None.
    """
    gold, answer = _unqualified(clean(gold)), _unqualified(clean(answer))
    if not gold or not answer:
        return False
    if squeeze(gold) == squeeze(answer):
        return True
    if (verdict := _quantities(gold, answer, leaf)) is not _SAME_UNITS:
        return verdict
    literal = literals.same_literal(gold, answer)
    if literal or (literal is False and "," not in gold + answer):
        return literal
    gold, answer = _by_names(gold, answer), _by_names(answer, gold)
    gold_rows, rows = _grid(gold), _grid(answer)
    if gold_rows and rows:
        return (_cases if r"{cases}" in gold else _rows)(gold_rows, rows, leaf)
    gold, answer = _components(_listed(gold)), _components(_listed(answer))
    (gold_name, gold), (answer_name, answer) = _membership(gold), _membership(answer)
    gold_interval, answer_interval = interval(gold), interval(answer)
    if gold_interval and answer_interval:
        gold_name, answer_name = gold_interval[0], answer_interval[0]
    if gold_name and answer_name and gold_name != answer_name:
        return False  # different variables
    gold = gold_interval[1] if gold_interval else gold
    answer = answer_interval[1] if answer_interval else answer

    (gold_kind, golds), (kind, answers) = _structure(gold), _structure(answer)
    kinds = {gold_kind, kind}
    if len(golds) == len(answers) == 1 and kinds == {"set", None} and r"\emptyset" not in golds + answers:
        return compare(golds[0], answers[0], leaf)  # {5} and 5
    if gold_kind == kind == "set" or (len(golds) > 1 and len(answers) > 1):
        verdict = _elements(gold_kind, golds, kind, answers, leaf)
        sets = kinds & _SETS or any(map(interval, golds + answers))
        return leaf(gold, answer) if verdict is False and sets and literal is None else verdict
    if literal is False:
        return False  # 1,234 and 1235
    if kinds & _SETS:
        return leaf(gold, answer)
    if len(golds) != len(answers) and kinds <= {"list", "set", None}:
        joined = [_THOUSANDS.sub(lambda number: number.group().replace(",", ""), text) for text in (gold, answer)]
        if joined != [gold, answer] and kinds == {"list", None}:
            return compare(*joined, leaf)  # 1,024 and 2^{10}
        return False  # lists of different lengths; FiniteSet would make -2, -2 equal to -2
    return _equations(gold, answer, leaf)


_SETS = {"union", "intersection", r"\setminus", "and"}
_SAME_UNITS = object()


def _quantities(gold: str, answer: str, leaf: Leaf):
    """Compare two quantities if at least one has a unit; return `_SAME_UNITS` if neither has one."""
    if len(split(gold, *SEPARATORS, "=")) > 1 or len(split(answer, *SEPARATORS, "=")) > 1:
        return _SAME_UNITS
    (value, unit), (answer_value, answer_unit) = literals.quantity(gold), literals.quantity(answer)
    if unit is None and answer_unit is None:
        return _SAME_UNITS
    if (unit and answer_value.endswith("%")) or (answer_unit and value.endswith("%")):
        return False
    if _TEXT.search(answer_value) and not (_TEXT.search(value) or literals.number(answer_value)):
        return False
    angle = [(u is not None and u.dimension == _DEGREE) for u in (unit, answer_unit)]
    if unit and answer_unit:
        if angle[0] != angle[1] and _RADIAN in (unit.dimension, answer_unit.dimension):
            return leaf(
                *(
                    text if is_angle else v
                    for text, is_angle, v in (
                        (_in_degrees(value), angle[0], value),
                        (_in_degrees(answer_value), angle[1], answer_value),
                    )
                )
            )
        if not unit.converts_to(answer_unit):
            temperatures = {frozenset({("celsius", 1)}), frozenset({("fahrenheit", 1)}), _DEGREE}
            if not (any(angle) and {unit.dimension, answer_unit.dimension} <= temperatures):
                return False
        elif answer_unit.factor != unit.factor:
            factor = answer_unit.factor / unit.factor
            return _converted(value, answer_value, factor, leaf)
        return compare(value, answer_value, leaf)
    if unit is None and _bare_letters(answer, answer_value):
        return leaf(gold, answer)
    verdict = compare(value, answer_value, leaf)
    if any(angle) and not verdict and re.search(r"\\(?:pi|circ)", answer if angle[0] else gold):
        return leaf(_in_degrees(value), answer) if angle[0] else leaf(gold, _in_degrees(answer_value))
    return verdict


_DEGREE_SIGN = re.compile(r"\^\s*+(?:\{\s*+\\circ\s*+\}|\\circ(?![A-Za-z]))")
_DEGREE, _RADIAN = frozenset({("degree", 1)}), frozenset({("radian", 1)})


def _bare_letters(text: str, value: str) -> bool:
    """Return whether the text after the value may be variables: `m` in `5 m` is a unit only if the gold has a unit."""
    rest = text.removeprefix(value).strip()
    return (
        all(len(word) == 1 for word in re.findall("[A-Za-z]+", rest))
        and not re.search(r"[\\$€£¥₹¢]", rest)
        and rest.isascii()
    )


def _in_degrees(value: str) -> str:
    return rf"\frac{{({value})\pi}}{{180}}"


def _converted(gold: str, answer: str, factor: Fraction, leaf: Leaf) -> bool | None:
    gold_number, number = literals.number(gold), literals.number(answer)
    if gold_number and number:
        value = number.value * factor
        kind = "integer" if value.denominator == 1 and number.kind == "integer" else "decimal"
        return literals.same_number(gold_number, literals.Number(value, kind, number.ulp * factor))
    return leaf(gold, rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({answer})")


def _elements(gold_kind, golds: list[str], kind, answers: list[str], leaf: Leaf) -> bool | None:
    kinds = {gold_kind, kind}
    golds, answers = _written_out(golds), _written_out(answers)
    if any(r"\ldots" in side for side in (golds, answers)):
        return _in_order(golds, answers, leaf) if kinds <= {"list", "set"} or gold_kind == kind else False
    if kinds <= {"list", "set"}:
        return _lists(golds, answers, leaf)
    if "and" in kinds or "or" in kinds:
        return _any_order(golds, answers, leaf) if len(kinds - {"list"}) == 1 else False
    if kinds <= {"union", "list"}:
        return _any_order(golds, answers, leaf)
    if kinds == {"list", "()"}:
        names = [_name(element) for element in (golds if gold_kind == "list" else answers)]
        if all(names) and len(set(names)) < len(names):
            return False  # x = 1, x = 2 are two values of x, not a point
        return _in_order(_values_by_name(golds), _values_by_name(answers), leaf)
    if kinds == {"intersection"}:
        return _any_order(golds, answers, leaf)
    return _in_order(golds, answers, leaf) if len(kinds) == 1 else False


def _written_out(elements: list[str]) -> list[str]:
    r"""Write out `1, 3, \ldots, 9`, up to a thousand integers."""
    *first, dots, last = elements if len(elements) > 3 else ["", "", ""]
    if dots != r"\ldots" or not all(re.fullmatch(r"-?\d{1,6}", element) for element in (*first, last)):
        return elements
    steps = {int(b) - int(a) for a, b in pairwise(first)}
    step = steps.pop()
    if steps or step == 0 or (int(last) - int(first[0])) % step or not 0 < (int(last) - int(first[0])) // step < 1000:
        return elements
    return [str(number) for number in range(int(first[0]), int(last) + (1 if step > 0 else -1), step)]


def _unqualified(text: str) -> str:
    r"""Remove a qualifier after a formula, such as `\text{ for any constant } c` or `, x \in \mathbb{R}`."""
    if " " not in text and "\\" not in text:
        return text
    if (match := _QUALIFIER.fullmatch(text)) and _LETTER.search(match[1]):
        text = match[1].rstrip(" ,\\(")
    if (match := _DOMAIN.fullmatch(text)) and "=" in text:
        text = match[1] or match[2]
    return text


def _grid(text: str) -> list[list[str]] | None:
    """Return the cells of a matrix or of cases, row by row."""
    match = _GRID.fullmatch(text)
    if not match or r"\begin" in match[2]:
        return None
    rows = [row.strip().rstrip(",") for row in re.split(r"\\\\(?:\[[^\[\]]*+\])?", match[2])]
    return [[_condition(cell) for cell in row.split("&")] for row in rows if row]


def _condition(cell: str) -> str:
    return (
        re.sub(r"^\s*+\\text\s*+\{\s*+(?:if|for|when)\s*+:?\s*+\}|,\s*+$", "", cell.strip()).strip(" ,") or r"\text{}"
    )


def _rows(golds: list[list[str]], answers: list[list[str]], leaf: Leaf) -> bool | None:
    if [len(row) for row in golds] != [len(row) for row in answers]:
        return False
    return _all(_in_order(gold, answer, leaf) for gold, answer in zip(golds, answers, strict=True))


def _cases(golds: list[list[str]], answers: list[list[str]], leaf: Leaf) -> bool | None:
    """Compare the rows of cases in any order."""
    if len(golds) != len(answers):
        return False
    return _all(_any(_in_order(gold, answer, leaf) for answer in answers) for gold in golds)


def _listed(text: str) -> str:
    """Write a system in `cases` as a list of its equations."""
    match = _GRID.fullmatch(text)
    rows = _grid(text) if match and match[1] in ("cases", "aligned", "array") and r"\begin{cases}" in text else None
    return ", ".join(row[0] for row in rows) if rows and all(len(row) == 1 for row in rows) else text


def _components(text: str) -> str:
    r"""Write `1\vec i + 2\vec j` as `(1, 2)`."""
    if not _ANY_UNIT_VECTOR.search(text):
        return text
    terms = re.sub(r"(?<=.)([+-])", r" , \1", text).split(" , ")
    found = {}
    for term in terms:
        match = _UNIT_VECTOR.fullmatch(term.strip())
        letter = match and (match[2] or match[3] or match[4])
        if not letter or letter in found:
            return text
        coefficient = match[1].replace(" ", "").removeprefix("+")
        found[letter] = {"": "1", "-": "-1"}.get(coefficient, coefficient)
    letters = "ijk" if "k" in found else "ij"
    return f"({', '.join(found.get(letter, '0') for letter in letters)})"


def _equations(gold: str, answer: str, leaf: Leaf) -> bool | None:
    golds, members = split(gold, "="), split(answer, "=")
    if len(members) > _MEMBERS:
        return False
    if r"\equiv" in answer and r"\equiv" not in gold:
        return False
    if len(golds) == 1:
        if len(members) == 1:
            return _expressions(gold, answer, leaf)
        if not _has_letter(members[0]) and len(members) == 2 and _NAME.fullmatch(members[1]):
            members.reverse()  # 5 = x
        if (names := _NAMES_IN_BRACKETS.fullmatch(members[0])) and len(members) == 2:
            return compare(gold, _by_name(names[1], members[1]), leaf)
        members = [member for member in members[:-1] if r"\ldots" not in member] + members[-1:]
        if not _has_letter(members[0]):
            return _all(compare(gold, value, leaf) for value in members)
        return _may_be_asked(members[0]) and _all(compare(gold, value, leaf) for value in members[1:])
    if all(re.fullmatch("[A-Z]{2,}", member) for member in golds):
        return sorted(golds) == sorted(members)  # MR = SRMC are names, not products of variables
    named = len(golds) == 2 and _asked(golds[0])
    if len(members) == 1:
        if named and (names := _NAMES_IN_BRACKETS.fullmatch(golds[0])):
            return compare(_by_name(names[1], golds[1]), answer, leaf)
        return compare(golds[1], answer, leaf) if named else False
    if squeeze(golds[0]) == squeeze(members[0]):
        return _all(compare(golds[1], value, leaf) for value in members[1:]) if len(golds) == 2 else leaf(gold, answer)
    if len(golds) == len(members) == 2 and all(map(_NAMES_IN_BRACKETS.fullmatch, (golds[0], members[0]))):
        return compare(*(_by_name(side[0].strip("()"), side[1]) for side in (golds, members)), leaf)
    return leaf(gold, answer)


def _asked(left: str) -> bool:
    """Return whether the left side of a gold answer only names its value: `x`, `AB`, `f(2)`, `(p, q)`, a length ratio.

    A combination of names, as in `a + b = 5`, is a relation, to which the number alone is not an answer.
    """
    return any(form.fullmatch(left) for form in _ASKED)


def _may_be_asked(left: str) -> bool:
    r"""Return whether a problem with the answer 5 can ask for the left side of an answer `left = 5`.

    It can be a name or the value of a function (`x`, `AB`, `f(2)`, `|z|`, `\sin\theta`, `AB^2`), or a combination of
    several names (`m + n = 17`, `xy = 6`), because problems ask for such sums, products and quotients. Any other
    expression in one name (`2x = 5`, `\sqrt{x} = 9`, `x - 3 = 0`) is an unsolved equation, whose right side is not the
    value of the name.
    """
    if _asked(left) or _FUNCTION_VALUE.fullmatch(left):
        return True
    names = Names()
    names.rename(_LENGTH.sub(r"\\text{\g<0>}", left))  # AB is one length
    return len(names.numbers) > 1 or bool(_SQUARE_OF_LENGTH.fullmatch(left))


def _by_names(text: str, other: str) -> str:
    """Write `(a, b) = (5, 6)` as `a = 5, b = 6` if the other answer has that form."""
    members = split(text, "=")
    if len(members) != 2 or not (names := _NAMES_IN_BRACKETS.fullmatch(members[0])):
        return text
    letters, values = names[1].split(","), split(members[1][1:-1], ",")
    if len(letters) != len(values) or not all(_name(element) for element in split(other, *SEPARATORS)):
        return text
    return ", ".join(f"{letter.strip()} = {value}" for letter, value in zip(letters, values, strict=True))


def _by_name(names: str, values: str) -> str:
    """Sort the values of `(y, x) = (1, 2)` by name if the names are consecutive letters."""
    values = values.strip()
    letters, elements = [name.strip() for name in names.split(",")], split(values[1:-1], ",")
    codes = [ord(letter) for letter in letters if len(letter) == 1]
    if len(codes) != len(elements) or sorted(codes) != list(range(min(codes), min(codes) + len(codes))):
        return values
    ordered = [value for _, value in sorted(zip(codes, elements, strict=True))]
    return f"{values[0]}{', '.join(ordered)}{values[-1]}"


def _expressions(gold: str, answer: str, leaf: Leaf) -> bool | None:
    first, *rest = split(answer.removeprefix(r"\approx").strip(), r"\approx")
    if rest and r"\approx" not in gold:
        return compare(gold, rest[0] if _NAME.fullmatch(first) else first, leaf)
    if not rest and first != answer:
        return compare(gold, first, leaf)
    if _TEXT.search(answer) and not _TEXT.search(gold):
        return False
    if (r"\circ" in gold) != (r"\circ" in answer) and not literals.OF_AN_ANGLE.search(gold + answer):
        bare = [_DEGREE_SIGN.sub("", side) for side in (gold, answer)]
        return _any([leaf(*bare), leaf(gold, answer)])
    if (formula := _without_constant(gold, answer)) and compare(*formula, leaf):
        return True
    return leaf(gold, answer)


def _without_constant(gold: str, answer: str) -> tuple[str, str] | None:
    """Return both answers without the constant of integration; None if it cannot be ignored.

    The completion may add the constant or give it another name. The formula must be in lower case, so that a capital C
    or K can only be the constant.
    """
    given, asked = _CONSTANT.fullmatch(answer), _CONSTANT.fullmatch(gold)
    formula = asked[1] if asked else gold
    if not given or not re.search("[a-z]", formula) or re.search("(?<![A-Za-z])[A-Z]", formula):
        return None
    return (formula, given[1]) if asked or given[2] not in ("c", "K") else None


def same_constant(gold: str, value: Fraction) -> bool | None:
    """Compare a literal gold answer in scientific notation with a computed value; None for other gold answers."""
    number = literals.number(clean(gold))
    return literals.rounds_to(number, value) if number and number.kind == "scientific" else None


def _all(verdicts) -> bool | None:
    verdicts = list(verdicts)
    return False if False in verdicts else None if None in verdicts else True


def _any(verdicts) -> bool | None:
    verdicts = list(verdicts)
    return True if True in verdicts else None if None in verdicts else False


def _in_order(golds: list[str], answers: list[str], leaf: Leaf) -> bool | None:
    if len(golds) != len(answers):
        return False
    return _all(compare(g, a, leaf) for g, a in zip(golds, answers, strict=True))


def _any_order(golds: list[str], answers: list[str], leaf: Leaf) -> bool | None:
    """Match each gold element with a different element of the answer, the first one that is equal."""
    if len(golds) != len(answers):
        return False
    # Elements with the same text are matched first, which keeps long lists in another order cheap.
    alike = Counter(map(squeeze, golds)) & Counter(map(squeeze, answers))
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
        key = squeeze(element)
        if left[key]:
            left[key] -= 1
        else:
            rest.append(element)
    return rest


def _lists(golds: list[str], answers: list[str], leaf: Leaf) -> bool | None:
    """Compare lists in any order, or in the order of names if only one list gives its elements different names."""
    names = [[_name(element) for element in side] for side in (golds, answers)]
    all_named = [all(side) for side in names]
    unnamed = answers if all_named[0] else golds
    if all_named[0] != all_named[1] and any(len(split(element, "=")) > 1 for element in unnamed):
        return _any_order(golds, answers, leaf) if not all_named[0] else False
    if all_named[0] != all_named[1] and len(set(names[all_named.index(True)])) > 1:
        return _in_order(_values_by_name(golds), _values_by_name(answers), leaf)
    return _any_order(golds, answers, leaf)


def _values_by_name(elements: list[str]) -> list[str]:
    """Return the values of `y = 2, x = 1` sorted by name; other elements unchanged."""
    if not all(_name(element) for element in elements):
        return elements
    pairs = sorted((split(element, "=") for element in elements), key=lambda pair: squeeze(pair[0]))
    return [value for _, value in pairs]


def _name(element: str) -> str | None:
    members = split(element, "=")
    return squeeze(members[0]) if len(members) == 2 and _NAME.fullmatch(members[0]) else None


def _has_letter(text: str) -> bool:
    return any(match[1] or match.group()[1:] not in _NO_LETTERS for match in _LETTER.finditer(text))


def _membership(text: str) -> tuple[str | None, str]:
    r"""Split `x \in A` into name and set; of `\{x \mid x > 2\}` return None and the condition."""
    if (builder := _BUILDER.fullmatch(text)) and builder[1] in builder[2]:
        return None, builder[2].strip()
    if (member := _MEMBER.fullmatch(text)) and _NAME.fullmatch(member[1].strip()):
        return squeeze(member[1]), member[2].strip()
    return None, text


def interval(text: str) -> tuple[str, str] | None:
    r"""Read `x > a`, `a \le x < b` and `x \ne a` as a name and one or two intervals; None for other text."""
    if "," in text:
        return None
    pieces = _COMPARISON.split(text)
    if len(pieces) not in (3, 5) or not all(piece.strip() for piece in pieces):
        return None
    pieces = [piece.strip() for piece in pieces]
    if r"\ne" in pieces[1::2]:
        if len(pieces) != 3 or not _NAME.fullmatch(pieces[0]):
            return None
        return squeeze(pieces[0]), rf"(-\infty, {pieces[2]}) \cup ({pieces[2]}, \infty)"
    if len(pieces) == 3 and (distance := _DISTANCE.fullmatch(pieces[0])):
        return _around(distance, *pieces[1:])
    signs = [("<" if sign in ("<", r"\lt", r"\le", "<=") else ">", "e" in sign or "=" in sign) for sign in pieces[1::2]]
    values = pieces[::2]
    if signs[0][0] == ">":  # 7 > x >= -2 from the left
        values, signs = values[::-1], [("<", equal) for _, equal in reversed(signs)] if _one_way(signs) else []
    if not _one_way(signs):
        return None
    if len(values) == 3:
        low, name, high = values
    elif _NAME.fullmatch(values[0]):
        (name, high), low, signs = values, r"-\infty", [("<", False), *signs]
    else:
        (low, name), high, signs = values, r"\infty", [*signs, ("<", False)]
    if not _NAME.fullmatch(name) or "," in low + high:
        return None
    return squeeze(name), f"{'[' if signs[0][1] else '('}{low}, {high}{']' if signs[1][1] else ')'}"


def _around(distance: re.Match, sign: str, radius: str) -> tuple[str, str] | None:
    """Read `|x| < 3` as `(-3, 3)` and `|x - 1| >= 2` as two intervals."""
    if not literals.number(radius):
        return None
    centre = (distance[2] or "").replace(" ", "").translate(str.maketrans("+-", "-+"))
    low, high = f"{centre}-{radius}", f"{centre}+{radius}".removeprefix("+")
    low, high = low.removeprefix("+"), high.removeprefix("+")
    open_end = sign in ("<", r"\lt", ">", r"\gt")
    if sign in ("<", r"\lt", r"\le", "<="):
        return distance[1], f"{'(' if open_end else '['}{low}, {high}{')' if open_end else ']'}"
    left, right = (")", "(") if open_end else ("]", "[")
    return distance[1], rf"(-\infty, {low}{left} \cup {right}{high}, \infty)"


def _one_way(signs: list[tuple[str, bool]]) -> bool:
    return len({direction for direction, _ in signs}) == 1


def _structure(text: str) -> tuple[str | None, list[str]]:
    r"""Return kind and elements of a union, a bare list, a `\{set\}` or text in brackets; else (None, [text])."""
    unions = split(text, r"\cup")
    if len(unions) > 1:
        kinds, elements = zip(*map(_structure, unions), strict=True)
        if set(kinds) == {"set"}:
            merged = {squeeze(one): one for side in elements for one in side}
            return "set", list(merged.values())
        return "union", unions
    for sign in _IN_ORDER:
        if len(sections := split(text, sign)) > 1:
            return sign, sections
    if len(sections := split(text, r"\cap")) > 1:
        return "intersection", sections
    elements = split(text, *SEPARATORS)
    if len(elements) > 1:
        conjunctions = {word for word in (r"\land", r"\lor") if len(split(text, word)) > 1}
        if len(conjunctions) == 1 and all(map(_is_statement, elements)):
            statements = any(map(_COMPARISON.search, elements))
            kind = "and" if conjunctions == {r"\land"} else "union" if statements else "or"
            return kind, elements
        return "list", [one for element in elements for one in _both_signs(element)]
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", [one for element in split(text[2:-2].strip(), *SEPARATORS) for one in _both_signs(element)]
    if text[:1] + text[-1:] in _TUPLES:
        elements = split(text[1:-1].strip(), ",")
        if len(elements) > 1:
            return text[0] + text[-1], elements
    elements = _both_signs(text)
    return ("list", elements) if len(elements) > 1 else (None, [text])


def _is_statement(text: str) -> bool:
    """Return whether "and" differs from "or" for this element: an inequality, words or a name, but not x = 1."""
    return bool(
        _COMPARISON.search(text) or literals.words(text) or (_has_letter(text) and not re.search(r"[=\d]", text))
    )


def _both_signs(element: str) -> list[str]:
    r"""Write out `1 \pm a` as two elements. Several `\pm` are independent, unless the text has a `\mp`."""
    count = len(re.findall(r"\\pm(?![A-Za-z])", element))
    if not 0 < count <= 3 or element.startswith(("(", "[")):
        return [element]
    independent = r"\mp" not in element
    written = []
    for signs in product("+-", repeat=count if independent else 1):
        draw = iter(signs if independent else signs * count)
        one = re.sub(r"\\pm(?![A-Za-z])", lambda _, draw=draw: next(draw), element)
        written.append(re.sub(r"\\mp(?![A-Za-z])", "-" if signs[0] == "+" else "+", one))
    return written
