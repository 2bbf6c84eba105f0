"""Every regular expression of the package takes time that is linear in its text, or nearly so.

Each is found (as an attribute of a module, also inside of tuples, lists and dicts, or as a literal in a call of `re`),
and run on texts that are made from its own parts: the shortest text that leads to each of its repetitions, then much of
what may be repeated there, then an end that makes the match fail.
"""

import ast
import functools
import importlib
import itertools
import pkgutil
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from re import _constants as op
from re import _parser

import pytest

import ktae_trl

ROOT = Path(ktae_trl.__file__).parents[1]
FILES = [*sorted((ROOT / "ktae_trl").rglob("*.py")), ROOT / "train.py", ROOT / "eval.py"]
CALLS = {"compile", "search", "match", "fullmatch", "sub", "subn", "split", "findall", "finditer"}
ANCHORED = {"match", "fullmatch"}
MADE = {r"f'\\b{re.escape(name)}\\b'"}  # at run time, from data: the names of a template's variables
SHORT, LONG = 4_000, 32_000
MOST = 1_500  # texts for a pattern; few have more, and these are drawn
SLOWEST = 10  # that are looked at again, on the long text
LINEAR = LONG / SHORT
FAST = 0.002  # seconds for a short text: nothing to be seen yet
MUCH = 0.25  # a hundred times as much
REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


def attributes() -> Iterator[tuple[str, re.Pattern]]:
    names = [module.name for module in pkgutil.walk_packages(ktae_trl.__path__, "ktae_trl.")]
    for name in ["ktae_trl", *(name for name in names if not name.endswith("__main__"))]:
        for attribute, value in vars(importlib.import_module(name)).items():
            for pattern in inside(value):
                yield f"{name}.{attribute}", pattern


def inside(value) -> Iterator[re.Pattern]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict):
        yield from inside([*value, *value.values()])
    elif isinstance(value, (tuple, list, set, frozenset)):
        for member in value:
            yield from inside(member)


@functools.cache
def calls() -> tuple[list[tuple[str, str, bool, int]], set[str], dict[tuple[str, str], set[str]]]:
    """Literals in calls of `re` (place, pattern, whether anchored, flags), other patterns there, and the methods that
    are called on a name of a file, or on what a loop takes out of it."""
    literals, others, methods = [], set(), {}
    for file in FILES:
        tree = ast.parse(file.read_text())
        nodes, loops = list(ast.walk(tree)), {}
        for node in nodes:
            if isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
                names = node.iter.elts if isinstance(node.iter, ast.Tuple) else [node.iter]
                loops.setdefault(node.target.id, []).extend(name.id for name in names if isinstance(name, ast.Name))
        for node in nodes:
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called, owner = node.func.attr, node.func.value
            if called not in CALLS or not isinstance(owner, ast.Name):
                continue
            if owner.id != "re":
                for name in [owner.id, *loops.get(owner.id, [])]:
                    methods.setdefault((file.stem, name), set()).add(called)
            elif isinstance(node.args[0], ast.Constant):
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                flags = {
                    n.attr for a in given for n in ast.walk(a) if isinstance(n, ast.Attribute) and n.attr.isupper()
                }
                value = sum(getattr(re, flag) for flag in flags if hasattr(re, flag))
                literals.append((f"{file.stem}:{node.lineno}", node.args[0].value, called, value))
            else:
                # Constants of the module may stand in it: then it is an attribute, or inside of one.
                names = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
                if not (called == "compile" and node in at_the_top(tree)):
                    others.add((ast.unparse(node.args[0]), *names))
    return literals, others, methods


def at_the_top(tree: ast.Module) -> set[ast.AST]:
    """What is run when the module is imported, outside of functions."""
    return {
        node
        for statement in tree.body
        if not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for node in ast.walk(statement)
    }


def patterns() -> list[tuple[str, re.Pattern, bool]]:
    """Every pattern once, with its name and whether it is only asked to match from where it stands."""
    literals, _, methods = calls()
    names, uses = {}, {}
    for name, pattern in attributes():
        module, _, attribute = name.rpartition(".")
        names.setdefault(pattern, name)
        uses.setdefault(pattern, set()).update(methods.get((module.rpartition(".")[2], attribute), ()))
    for name, text, called, flags in literals:
        pattern = re.compile(text, flags)
        names.setdefault(pattern, name)
        uses.setdefault(pattern, set()).update({called} - {"compile"})
    return [(name, pattern, bool(uses[pattern]) and uses[pattern] <= ANCHORED) for pattern, name in names.items()]


def shortest(nodes) -> str:
    """A short text that the nodes match, but for what they ask of the text around them."""
    return "".join(map(shortest_of, nodes))


def shortest_of(node) -> str:
    kind, value = node
    if kind is op.LITERAL:
        return chr(value)
    if kind in (op.IN, op.ANY, op.NOT_LITERAL):
        return next((c for c in "1a {x" if belongs(c, kind, value)), None) or example(value)
    if kind is op.BRANCH:
        return min(map(shortest, value[1]), key=len)
    if kind is op.SUBPATTERN:
        return shortest(value[3])
    if kind is op.ATOMIC_GROUP:
        return shortest(value)
    if kind in REPEATS:
        return shortest(value[2]) * value[0]
    if kind is op.ASSERT and value[0] < 0:
        return shortest(value[1])  # what has to stand before: it is written, whatever else does
    return ""


def belongs(character: str, kind, value) -> bool:
    if kind is op.ANY:
        return True
    if kind is op.NOT_LITERAL:
        return ord(character) != value
    negated = value[0][0] is op.NEGATE
    return negated != any(matches(character, *item) for item in value)


def matches(character: str, kind, value) -> bool:
    if kind is op.LITERAL:
        return ord(character) == value
    if kind is op.RANGE:
        return value[0] <= ord(character) <= value[1]
    if kind is op.CATEGORY:
        letter = {"SPACE": r"\s", "DIGIT": r"\d", "WORD": r"\w"}
        name = str(value).removeprefix("CATEGORY_").removeprefix("UNI_")
        one = letter[name.removeprefix("NOT_")]
        return bool(re.match(one, character)) != name.startswith("NOT_")
    return False


def example(items) -> str:
    kind, value = items[0]
    return chr(value if kind is op.LITERAL else value[0]) if kind in (op.LITERAL, op.RANGE) else "?"


def leads(nodes, before: str = "") -> Iterator[tuple[str, str, str]]:
    """The repetitions of a pattern: what leads to each, what it repeats, and what follows."""
    nodes = list(nodes)
    for i, (kind, value) in enumerate(nodes):
        start, end = before + shortest(nodes[:i]), shortest(nodes[i + 1 :])
        if kind in REPEATS:
            if value[1] > 20:
                yield start, shortest(value[2]) or "a", end
            yield from leads(value[2], start)
        for part in parts(kind, value):
            yield from leads(part, start)


def parts(kind, value) -> list:
    if kind is op.BRANCH:
        return value[1]
    return {op.SUBPATTERN: lambda: [value[3]], op.ATOMIC_GROUP: lambda: [value]}.get(kind, list)()


def alphabet(nodes) -> set[str]:
    """Characters that a pattern names, one of each class; of letters a few."""
    found = set()
    for kind, value in nodes:
        if kind is op.LITERAL:
            found.add(chr(value))
        elif kind is op.IN:
            found |= {chr(v) for k, v in value if k is op.LITERAL} | {shortest_of((kind, value))}
        elif kind in REPEATS:
            found |= alphabet(value[2])
        for part in parts(kind, value):
            found |= alphabet(part)
    letters = sorted(c for c in found if c.isalnum())
    return {*(c for c in found if not c.isalnum()), *letters[:2], *letters[-2:], " ", "1", "a"}


def texts(pattern: re.Pattern, length: int) -> Iterator[str]:
    nodes = _parser.parse(pattern.pattern, pattern.flags)
    whole, characters = shortest(nodes), sorted(alphabet(nodes))
    ways = list(dict.fromkeys(leads(nodes)))
    starts = dict.fromkeys(["", *(start for start, _, _ in ways)])
    pumps = dict.fromkeys([*characters, *(f" {c}" for c in characters), *(pump for _, pump, _ in ways)])
    pumps |= dict.fromkeys(a + b for (_, a, _), (_, b, _) in itertools.pairwise(ways))
    ends = dict.fromkeys(["", "\x00", *(end for _, _, end in ways[:3])])
    made = list(itertools.product(starts, pumps, ends))
    for start, pump, end in random.Random(0).sample(made, min(MOST, len(made))):
        yield start + pump * (length // len(pump)) + end
    for start in [*starts, whole]:  # many beginnings
        if start:
            yield start * (length // len(start)) + "\x00"


class TooLongError(Exception):
    pass


def stop(*_):
    raise TooLongError


def seconds(pattern: re.Pattern, anchored: bool, text: str, limit: float) -> float:
    """Processor time that the pattern takes, or the limit."""
    text = text.encode() if isinstance(pattern.pattern, bytes) else text
    before = signal.signal(signal.SIGPROF, stop)
    begin = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        if anchored:
            pattern.match(text)
            pattern.fullmatch(text)
        else:
            for _ in pattern.finditer(text):
                pass
    except TooLongError:
        return limit
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return time.process_time() - begin


def superlinear(pattern: re.Pattern, anchored: bool) -> str | None:
    """A text whose growth makes the pattern take more than in proportion, None if there is none."""
    slow = []
    for short, long in zip(texts(pattern, SHORT), texts(pattern, LONG), strict=True):
        took = seconds(pattern, anchored, short, MUCH)
        if took >= MUCH and all(seconds(pattern, anchored, short, MUCH) >= MUCH for _ in range(2)):
            return short
        slow = sorted([*slow, (took, short, long)])[-SLOWEST:]
    for took, short, long in slow:
        if took < FAST:
            continue
        least = min(seconds(pattern, anchored, short, MUCH) for _ in range(3))
        most = 3 * LINEAR * max(least, FAST / 2)
        if all(seconds(pattern, anchored, long, 1.1 * most) > most for _ in range(3)):
            return short
    return None


PATTERNS = patterns()


@pytest.mark.parametrize("i", range(len(PATTERNS)), ids=lambda i: PATTERNS[i][0])
def test_time_is_linear(i):
    _, pattern, anchored = PATTERNS[i]
    text = superlinear(pattern, anchored)
    assert text is None, (
        f"{pattern.pattern} takes too long on {text[:20]!r} ... {text[-20:]!r} of {len(text)} characters"
    )


def test_no_pattern_is_left_out():
    """A pattern that is no literal is made on import, so that it is an attribute, or known to be made of data."""
    _, others, _ = calls()
    assert len(PATTERNS) > 100
    assert {text for text, *_ in others} == MADE


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    ("pattern", "anchored"),
    [
        (r"(?<=\d)\s*\^?\s*\{?\s*(?:\\(?:text|mathrm)\s*\{)?\s*(?:st|nd|rd|th)\s*\}?\s*\}?$", False),
        (r"\s+$", False),
        (r"(?:a|a)*b", True),
        (r"(.+?)\s*,\s*x", True),
        (r"<a>.*?</a>", False),
    ],
)
def test_slow_patterns_are_found(pattern, anchored):
    assert superlinear(re.compile(pattern), anchored)
