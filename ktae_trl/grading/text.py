r"""Answers as text: cleaning LaTeX of what does not matter."""

import re
import unicodedata

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
        (r"(?<=\d),\\! ?(?=\d{3})|(?<=\d)\{,\}(?=\d{3})|(?<=\d)\\[,:](?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<!\\)\\(?:[,;:!> ]|(?:quad|qquad|displaystyle|textstyle|limits)(?![A-Za-z]))|~", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|textbf|textit|textrm|textnormal)(?![A-Za-z])", r"\\text"),
        (r"\\(?:le|ge)(qslant|q)(?![A-Za-z])", lambda match: match.group()[:3]),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\?\$", ""),
        (r"\\%", "%"),
        (r"\\(?:mathrm|text|rm)\s*\{\s*([ije])\s*\}", r" \1 "),  # a number or variable, not a unit
        (r"\\text\s*\{\s*(-?\d[^{}]*)\}", r"\1"),  # \text{5 cm}
        (r"\{\s*,\s*\}", ","),
        (r",?\s*\\text\s*\{\s*(?:and|or)\s*\}\s*|,?\s+(?:and|or)\s+|;", ","),
    )
]
_SUPERFLUOUS_BRACES = re.compile(r"(?<=[_^])\{(\w)\}")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # not the one in `1 1/2`


def clean(text: str) -> str:
    """Remove what does not change the meaning: spacing, sizes, dollars, invisible characters, second names of signs."""
    if not text.isascii():
        text = "".join(c for c in text.translate(_SYMBOLS) if unicodedata.category(c) not in ("Cf", "Co", "Cn", "Cs"))
    text = "".join(c if c.isprintable() else " " for c in text)
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    return " ".join(text.split()).rstrip(". \\")


def squeeze(text: str) -> str:
    """Return clean text without spaces and needless braces: equal for two texts that are the same."""
    return _SUPERFLUOUS_BRACES.sub(r"\1", _SPACE.sub("", text))


def split(text: str, separator: str) -> list[str]:
    """Split clean text at the separators outside all brackets; [text] if brackets do not match or a piece is empty."""
    pieces, depth, start = [], 0, 0
    for token in re.finditer(r"\\[{}]|\\[A-Za-z]+|\\.|=+|[()\[\]{},]", text):
        found = "=" if token.group()[0] == "=" else token.group()
        if found in ("(", "[", "{", r"\{"):
            depth += 1
        elif found in (")", "]", "}", r"\}"):
            depth -= 1
            if depth < 0:
                return [text]
        elif found == separator and depth == 0:
            pieces.append(text[start : token.start()].strip())
            start = token.end()
    pieces.append(text[start:].strip())
    return [text] if depth or not all(pieces) else pieces
