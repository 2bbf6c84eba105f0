r"""Two answers piece by piece: lists, sets, tuples, intervals, equations, down to literals and expressions.

`compare` leaves expressions to a `leaf`. Here only text and literals are compared (`settle`); in a worker process
math-verify compares the rest (`symbolic`).
"""

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import product

from ktae_trl.grading import literals
from ktae_trl.grading.text import clean, split, squeeze

# What is settled in the caller's process, where no clock runs.
_SHORT = 500

_NAME = re.compile(
    r"(?:[A-Za-z]|\\(?!frac|sqrt|pi(?![A-Za-z]))[A-Za-z]+)(?:_(?:\w|\{\\?\w+\s*\}))?'?\s*(?:\([^()=]*\))?"
    r"|\\text\s*\{[A-Za-z ]+\}"
)
_COMPARISON = re.compile(r"(\\(?:le|ge|lt|gt)(?![A-Za-z])|<=|>=|<|>)")
_DERIVATIVE = re.compile(r"\\frac\s*\{\s*(?:d|\\partial)")
_LETTER = re.compile(r"\\[A-Za-z]+|([A-Za-z])")
_TEXT = re.compile(r"\\(?:text|mathrm|rm|operatorname)\s*\{")
_TUPLES = {"()", "[]", "(]", "[)"}

Leaf = Callable[[str, str], bool | None]


def settle(gold: str, answer: str) -> bool | None:
    """Compare two answers as far as text and literals go. None: computer algebra has to decide.

    False only for two literal numbers: whether another gold answer can be parsed at all is for `symbolic` to say.
    """
    if not gold or max(len(gold), len(answer)) > _SHORT:
        return None
    verdict = compare(gold, answer, leaf=lambda g, a: None)
    return None if verdict is False and not (is_number(gold) and is_number(answer)) else verdict


def is_number(text: str) -> bool:
    """Say whether an answer (of at most 500 characters) is a literal number."""
    return len(text) <= _SHORT and literals.number(clean(text)) is not None


def parts(text: str) -> list[str]:
    """Return what `compare` would compare in the end: the elements of a list or interval, the value of an equation."""
    text = clean(text)
    _, elements = _structure(text)
    if len(elements) > 1:
        return [part for element in elements for part in parts(element)]
    if inequality := _interval(text):
        return parts(inequality[1])
    members = split(text, "=")
    return parts(members[1]) if len(members) == 2 and _NAME.fullmatch(members[0]) else [literals.without_units(text)]


def compare(gold: str, answer: str, leaf: Leaf) -> bool | None:
    r"""Compare two answers piece by piece.

    - The same text, up to spaces and LaTeX's decoration, is equal; so are literals of the same value (`literals`).
    - `(a, b)`, `[a, b)`: the same brackets and equal elements in order. `\{a, b\}`, bare lists, parts of unions: in any
      order, each as often in both. A bare list may stand for a tuple. `\pm` stands for two elements.
    - `-2 \le x < 7` is the interval `[-2, 7)`; `x \in A` is `A`.
    - `x = 1, y = 2` (sorted by name) is `1, 2`, in that order; with one name, `x = 1, x = 2`, in any order.
    - An answer `name = a = b` to a gold answer without `=` needs every member right, `5 \approx 7` the first: a model
      must not have two tries. A gold answer `x = 5` accepts `5`; other equations need both sides.
    - What is left goes to `leaf`, without units; an answer with words in it is wrong if the gold answer has none.

    None if a leaf that matters said None.
    """
    gold, answer = clean(gold), clean(answer)
    if not gold or not answer:
        return False
    if squeeze(gold) == squeeze(answer):
        return True
    literal = literals.same_literal(gold, answer)
    if literal or (literal is False and "," not in gold + answer):
        return literal
    gold, answer = _without_membership(gold), _without_membership(answer)
    gold_interval, answer_interval = _interval(gold), _interval(answer)
    if gold_interval and answer_interval and gold_interval[0] != answer_interval[0]:
        return False  # about another variable
    gold = gold_interval[1] if gold_interval else gold
    answer = answer_interval[1] if answer_interval else answer

    (gold_kind, golds), (kind, answers) = _structure(gold), _structure(answer)
    kinds = {gold_kind, kind}
    if len(golds) == len(answers) == 1 and kinds == {"set", None}:
        return compare(golds[0], answers[0], leaf)  # {5} and 5
    if gold_kind == kind == "set" or (len(golds) > 1 and len(answers) > 1):
        if kinds <= {"list", "set"}:
            return _lists(golds, answers, leaf)
        if kinds <= {"union", "list"}:
            return _any_order(golds, answers, leaf)
        if kinds == {"list", "()"}:
            return _in_order(_values_by_name(golds), _values_by_name(answers), leaf)
        return _in_order(golds, answers, leaf) if len(kinds) == 1 else False
    if literal is False:
        return False  # 1,234 against 1235
    if len(golds) != len(answers) and kinds <= {"list", "set", None}:
        return False  # a list of another length; FiniteSet would make -2, -2 equal to -2
    return _equations(gold, answer, leaf)


def _equations(gold: str, answer: str, leaf: Leaf) -> bool | None:
    if r"\equiv" in answer and r"\equiv" not in gold:
        return False
    golds, members = split(gold, "="), split(answer, "=")
    if len(golds) == 1:
        if len(members) > 1:
            values = members[1:] if _has_letter(members[0]) else members
            return _all(compare(gold, value, leaf) for value in values)
        return _expressions(gold, answer, leaf)
    named = len(golds) == 2 and _NAME.fullmatch(golds[0])
    if len(members) == 1:
        return compare(golds[1], answer, leaf) if named else False
    if squeeze(golds[0]) == squeeze(members[0]):
        return _all(compare(golds[1], value, leaf) for value in members[1:]) if len(golds) == 2 else leaf(gold, answer)
    if any(_DERIVATIVE.match(side[0]) for side in (golds, members)):
        return False  # math-verify reads dx/dt = 1 and dy/dt = 1 alike
    if all(re.fullmatch("[A-Z]{2,}", member) for member in golds + members):
        return sorted(golds) == sorted(members)  # MR = SRMC are names, not products of variables
    return leaf(gold, answer)


def _expressions(gold: str, answer: str, leaf: Leaf) -> bool | None:
    first, *rest = split(answer.removeprefix(r"\approx").strip(), r"\approx")
    if rest and r"\approx" not in gold:
        return compare(gold, rest[0] if _NAME.fullmatch(first) else first, leaf)
    bare_gold, bare_answer = literals.without_units(gold), literals.without_units(first if not rest else answer)
    if (bare_gold, bare_answer) != (gold, answer):
        return compare(bare_gold, bare_answer, leaf)
    if _TEXT.search(answer) and not _TEXT.search(gold):
        return False
    return leaf(gold, answer)


def same_constant(gold: str, value: Fraction) -> bool | None:
    """Compare a literal gold answer in scientific notation with a computed value; None if it is not such."""
    number = literals.number(clean(gold))
    return literals.rounds_to(number, value) if number and number.kind == "scientific" else None


def _all(verdicts) -> bool | None:
    verdicts = list(verdicts)
    return False if False in verdicts else None if None in verdicts else True


def _in_order(golds: list[str], answers: list[str], leaf: Leaf) -> bool | None:
    if len(golds) != len(answers):
        return False
    return _all(compare(g, a, leaf) for g, a in zip(golds, answers, strict=True))


def _any_order(golds: list[str], answers: list[str], leaf: Leaf) -> bool | None:
    """Pair each gold element with an answer of its own, the first that is equal."""
    if len(golds) != len(answers):
        return False
    # Those that are written alike go first: a long list in another order stays cheap.
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
    """Compare lists in any order, unless just one of them gives its elements different names."""
    names = [[_name(element) for element in side] for side in (golds, answers)]
    all_named = [all(side) for side in names]
    if all_named[0] != all_named[1] and len(set(names[all_named.index(True)])) > 1:
        return _in_order(_values_by_name(golds), _values_by_name(answers), leaf)
    return _any_order(golds, answers, leaf)


def _values_by_name(elements: list[str]) -> list[str]:
    """Return the values of `y = 2, x = 1` in the order of their names; other elements as they are."""
    if not all(_name(element) for element in elements):
        return elements
    pairs = sorted((split(element, "=") for element in elements), key=lambda pair: squeeze(pair[0]))
    return [value for _, value in pairs]


def _name(element: str) -> str | None:
    members = split(element, "=")
    return squeeze(members[0]) if len(members) == 2 and _NAME.fullmatch(members[0]) else None


def _has_letter(text: str) -> bool:
    return any(match[1] or match.group()[1:] not in ("frac", "sqrt", "pi", "cdot") for match in _LETTER.finditer(text))


def _without_membership(text: str) -> str:
    name, sign, members = text.partition(r"\in ")
    return members.strip() if sign and _NAME.fullmatch(name.strip()) else text


def _interval(text: str) -> tuple[str, str] | None:
    r"""Read `x > a` and `a \le x < b` as a name and an interval."""
    pieces = _COMPARISON.split(text)
    if len(pieces) not in (3, 5) or not all(piece.strip() for piece in pieces):
        return None
    pieces = [piece.strip() for piece in pieces]
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


def _one_way(signs: list[tuple[str, bool]]) -> bool:
    return len({direction for direction, _ in signs}) == 1


def _structure(text: str) -> tuple[str | None, list[str]]:
    r"""Take apart a union, a bare list, a `\{set\}` or something in brackets; (None, [text]) if it is none of them."""
    unions = split(text, r"\cup")
    if len(unions) > 1:
        return "union", unions
    elements = split(text, ",")
    if len(elements) > 1:
        return "list", [one for element in elements for one in _both_signs(element)]
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", [one for element in split(text[2:-2].strip(), ",") for one in _both_signs(element)]
    if text[:1] + text[-1:] in _TUPLES:
        elements = split(text[1:-1].strip(), ",")
        if len(elements) > 1:
            return text[0] + text[-1], elements
    elements = _both_signs(text)
    return ("list", elements) if len(elements) > 1 else (None, [text])


def _both_signs(element: str) -> list[str]:
    r"""Write `1 \pm a` out as two elements; several `\pm` are independent, unless there is a `\mp`."""
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
