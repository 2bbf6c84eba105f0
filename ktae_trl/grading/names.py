r"""Rename the variables in LaTeX so that the parser sees a distinct symbol for each.

The parser confuses some names (R and r, x and x', E_0 and e), takes others for functions (\gamma for the gamma
function) and cannot read some (\hbar, L_{\odot}, \bar z). This module replaces each name, with its accent, index and
primes, by `v_{n}`. A function value (`f(2)`) and a derivative count as names. e, i and \pi stay as they are.
"""

import re
from collections.abc import Callable

_ACCENT = r"\\(?:bar|overline|vec|overrightarrow|hat|widehat|tilde|dot|ddot|mathcal|mathbb|mathscr|mathfrak)"
_GREEK = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|varrho|sigma"
    r"|varsigma|tau|upsilon|phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|hbar|ell"
    r"|nabla|aleph|mho|imath|jmath)(?![A-Za-z])"
)
_TOKEN = re.compile(
    r"(?P<kept>\\(?:begin|end)\s*+\{[^{}]*\})"
    r"|(?P<figure>\\(?:angle|triangle)\s*+\{?\s*+[A-Z]{1,4}(?![A-Za-z])\s*+\}?)"
    rf"|(?P<accent>{_ACCENT}\s*+(?:\{{[^{{}}A-Za-z]*+[A-Za-z][^{{}}]*+\}}|\\[A-Za-z]+|[A-Za-z]))"
    r"|(?P<text>\\(?:text|mathrm|operatorname\*?)\s*+\{(?P<words>[^{}]*)\})"
    rf"|(?P<greek>{_GREEK})|(?P<command>\\[A-Za-z]+|\\.)|(?P<letter>[A-Za-z])",
    re.DOTALL,
)
_INDEX = re.compile(r"\s*+_\s*+(?:\{(?P<braced>(?:[^{}]|\{[^{}]*\})*)\}|(?P<bare>\\[A-Za-z]+|\w))")
_PRIMES = re.compile(
    r"\s*+(?:(?P<marks>'+)|\^\s*+(?:\{\s*+(?P<commands>(?:\\prime\s*+)++)\}|(?P<command>\\prime(?![A-Za-z]))))"
)
_STAR = re.compile(
    r"\s*+\^\s*+(?:\{\s*+(?P<sign>\*|\+|-|\\(?:ast|star|circ|top|dagger))\s*+\}|(?P<bare>\*|\\(?:ast|star|top|dagger)))"
)
_POWER = re.compile(r"\s*+\^\s*+(?:\{\s*+(?P<braced>-?\w+|\(\w\))\s*+\}|(?P<bare>\w))(?=\s*+\()")
_ARGUMENT = re.compile(r"\s*+\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
_DERIVATIVE = re.compile(
    r"\\frac\s*+\{\s*+(?P<d>d|\\partial|\\mathrm\s*+\{\s*+d\s*+\})\s*+(?:\^\s*+\{?\s*+(?P<order>\d)\s*+\}?)?(?P<of>[^{}]++)\}"
    r"\s*+\{\s*+(?:d|\\partial|\\mathrm\s*+\{\s*+d\s*+\})\s*+(?P<by>[^{}]+?)(?<=\S)\s*+(?:\^\s*+\{?\s*+\d\s*+\}?)?\s*+\}"
)
_FUNCTIONS = {*"fghFGH", r"\phi", r"\varphi", r"\psi", r"\sigma", r"\tau", r"\Gamma", r"\zeta", r"\Phi", r"\Psi"}
_KNOWN = {"sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "ln", "log",
          "exp", "det", "gcd", "lcm", "max", "min"}  # fmt: skip
_BOUND_I = re.compile(r"_\s*+\{?\s*+i\s*+(?:=|\\in)")


class Names:
    """The names in two answers that are compared, numbered."""

    def __init__(self, same_argument: Callable[[str, str], bool] | None = None):
        self.numbers: dict[str, int] = {}
        self.calls: list[tuple[str, str, str]] = []  # head, argument, name
        self.same_argument = same_argument
        self.fold = False  # ignore case

    def rename(self, latex: str) -> str:
        """Return the LaTeX with each name replaced by `v_{n}`."""
        latex = _DERIVATIVE.sub(self._derivative, latex)
        written, position = [], 0
        index_i = bool(_BOUND_I.search(latex))
        while match := _TOKEN.search(latex, position):
            written.append(latex[position : match.start()])
            position = match.end()
            name, position, symbol = self._read(latex, match, position, index_i)
            if name is not None:
                symbol = f"v_{{{self._number(name)}}}"
                before = "".join(written[-2:]).rstrip()
                symbol = f"{{{symbol}}}" if before.endswith(("^", "_")) else f" {symbol} "
            written.append(symbol)
        return "".join([*written, latex[position:]])

    def _read(self, latex: str, match: re.Match, position: int, index_i: bool) -> tuple[str | None, int, str]:
        """Return the name at a match (None if it is not a name), its end, and the text to write if it is not a name."""
        token = re.sub(r"\s+", "", match.group())
        if match["kept"] or (match["command"] and token not in (r"\partial", r"\ldots")):
            return None, position, match.group()
        if match["words"] is not None:
            words = match["words"].strip()
            if words in _KNOWN:
                return None, position, f"\\{words} "
            token = f"text:{' '.join(words.split())}"
        if match["figure"]:
            letters = re.sub(r"\\[a-z]+|[{}]", "", token)
            # Angle ABC is the same as CBA, and the order of a triangle's vertices does not matter.
            token = f"angle {min(letters, letters[::-1])}" if "angle" in token[:6] else f"triangle {sorted(letters)}"
        if match["accent"]:
            token = (
                token.replace(r"\overline", r"\bar")
                .replace(r"\overrightarrow", r"\vec")
                .replace("{", "")
                .replace("}", "")
            )
        name, changed = token, True
        while changed:
            changed = False
            for pattern in (_INDEX, _PRIMES, _STAR):
                if found := pattern.match(latex, position):
                    name += self._decoration(pattern, found)
                    position, changed = found.end(), True
        if name in ("e", "i") and not (name == "i" and index_i):
            return None, position, match.group() + (" " if name == "e" else "")
        if token in _FUNCTIONS:
            power = _POWER.match(latex, position)
            argument = _ARGUMENT.match(latex, power.end() if power else position)
            if argument:
                head = name + (f"^{power['braced'] or power['bare']}" if power else "")
                return self._call(head, argument[1]), argument.end(), ""
        return name, position, ""

    @staticmethod
    def _decoration(pattern: re.Pattern, found: re.Match) -> str:
        if pattern is _INDEX:
            return "_" + re.sub(r"[\s{}]|\\(?:text|mathrm|rm)(?![A-Za-z])", "", found["braced"] or found["bare"])
        if pattern is _PRIMES:
            count = len(found["marks"]) if found["marks"] else (found["commands"] or found["command"]).count("prime")
            return "'" * count
        return (
            "*"
            if (found["sign"] or found["bare"]) in ("*", r"\ast", r"\star")
            else "^" + (found["sign"] or found["bare"])
        )

    def _derivative(self, match: re.Match) -> str:
        name = "".join(re.sub(r"[\s\\]", "", match[part] or "1") for part in ("order", "of", "by"))
        partial = "p" if match["d"] == r"\partial" else "d"
        return rf"\text{{{partial} {name}}} "

    def _call(self, head: str, argument: str) -> str:
        for other, known, name in self.calls:
            if other == head and (known == argument or (self.same_argument and self.same_argument(known, argument))):
                return name
        name = f"{head}({argument})"
        self.calls.append((head, argument, name))
        return name

    def _number(self, name: str) -> int:
        return self.numbers.setdefault(name.lower() if self.fold else name, len(self.numbers) + 1)


def other_case(gold: str, answer: str) -> bool:
    """Return whether an answer has every name of the gold answer in the other case: `3r^2` for `3R^2`.

    Such an answer may be correct: a model may write r for R throughout. If only some names change their case, they are
    different names (`gM/R` for `GM/R`). Greek letters always are.
    """
    golds, answers = _names(gold), _names(answer)
    small = {name.lower() for name in golds}
    greek = any("\\" in name for name in golds)
    return (
        not greek and not golds & answers and small == {name.lower() for name in answers} and len(small) == len(golds)
    )


def _names(text: str) -> set[str]:
    names = Names()
    names.rename(text)
    return set(names.numbers)
