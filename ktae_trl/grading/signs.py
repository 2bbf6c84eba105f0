r"""Write Unicode symbols, full-width letters and plain-text mathematics in LaTeX: `√3`, `½`, `x²`, `sqrt(3)`, `pi`."""

# ruff: noqa: RUF001 (ambiguous characters are the point of this module)

import re
import unicodedata


def _greek() -> dict[str, str]:
    table = {}
    for sign in map(chr, [*range(ord("α"), ord("ω") + 1), *map(ord, "ΓΔΘΛΞΠΣΦΨΩ")]):
        name = unicodedata.name(sign).split()[-1].lower().replace("lamda", "lambda")
        if name not in ("omicron",) and sign != "ς":
            table[sign] = rf"\{name if sign.islower() else name.capitalize()} "
    return table


_SIGNS = str.maketrans(
    {
        **_greek(),
        **dict.fromkeys("−–—‐‑﹣－", "-"),
        **{"×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "÷": "/", "∗": "*"},
        **{"°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F"},
        **{"′": r"^\prime ", "″": r"^{\prime\prime} ", "∣": r"\mid ", "∧": r"\land ", "∨": r"\lor ", "→": r"\to "},
        **{"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus "},
        **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"},
        **{"±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne "},
        **{"≈": r"\approx ", "≡": r"\equiv ", "∠": r"\angle ", "△": r"\triangle ", "ℏ": r"\hbar "},
        **{"⟨": "(", "⟩": ")", "〈": "(", "〉": ")", "【": "", "】": "", "“": "", "”": "", "「": "", "」": ""},
        **{"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "},
        **{"、": ",", "。": ".", "．": ".", "…": r"\ldots ", "⋯": r"\ldots "},
    }
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ", "0123456789+-()nx")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ", "0123456789+-()nx")
_RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿˣ]+")
_LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ]+")
_ROOT = re.compile(r"([√∛∜])\s*(?:(\d+(?:\.\d+)?|[A-Za-z]|\\pi(?![A-Za-z]))|(?=[({\\]))")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}

_FUNCTIONS = "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|ln|log|exp|pi|theta|alpha|beta|infty"
_PLAIN = re.compile(
    rf"(?P<kept>\\(?:text|mathrm|operatorname|rm)\s*\{{[^{{}}]*\}}|\\[A-Za-z]+)|(?<![A-Za-z\\])(?P<name>{_FUNCTIONS})(?![A-Za-z])"
    r"|(?<![A-Za-z\\])(?P<infinity>infinity|inf|oo)(?![A-Za-z])|(?P<power>\*\*)|(?P<relation><=|>=|!=)"
)
_RELATIONS = {"<=": r"\le ", ">=": r"\ge ", "!=": r"\ne "}
_ROOT_IN_BRACKETS = re.compile(r"(\\sqrt|\^)\s*\(((?:[^()]|\([^()]*\))*)\)")


def in_latex(text: str) -> str:
    """Write Unicode symbols in LaTeX and full-width letters as plain ones; remove invisible characters."""
    text = _RAISED_RUN.sub(lambda run: f"^{{{run.group().translate(_RAISED)}}}", text)
    text = _LOWERED_RUN.sub(lambda run: f"_{{{run.group().translate(_LOWERED)}}}", text)
    text = "".join(map(_fraction, text))
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS)).translate(_SIGNS)
    text = _ROOT.sub(lambda root: _ROOTS[root[1]] + (f"{{{root[2]}}}" if root[2] else ""), text)
    return "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Co", "Cn", "Cs"))


def _fraction(sign: str) -> str:
    """Return `\\frac{1}{2}` for ½ and other characters unchanged."""
    kind, *codes = unicodedata.decomposition(sign).split() or [""]
    if kind != "<fraction>" or len(codes) < 3:
        return sign
    over, under = "".join(chr(int(code, 16)) for code in codes).split("\N{FRACTION SLASH}")
    return rf"\frac{{{over}}}{{{under}}}"


def plain_mathematics(text: str) -> str:
    r"""Write `sqrt(3)`, `pi`, `x**2`, `>=` outside `\text{}` in LaTeX."""

    def latex(match: re.Match) -> str:
        if match["kept"]:
            return match["kept"]
        if match["name"]:
            return f"\\{match['name']} "
        if match["infinity"]:
            return r"\infty "
        return "^" if match["power"] else _RELATIONS[match["relation"]]

    text = _PLAIN.sub(latex, text)
    return _ROOT_IN_BRACKETS.sub(r"\1{\2}", text) if "(" in text else text
