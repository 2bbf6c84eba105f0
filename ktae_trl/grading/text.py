r"""Clean the text of answers: remove LaTeX that does not change their meaning, and split it at separators."""

import re
from functools import lru_cache

from ktae_trl.grading import signs, units

SEPARATORS = (",", r"\land", r"\lor")  # a comma, "and", "or"
_SMALL_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen
    seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: number for number, word in enumerate(_SMALL_NUMBERS.split())}
_NUMBER_WORDS |= {word: 10 * number for number, word in enumerate(_TENS.split(), start=2)}
_FIRST_NUMBER = re.compile(rf"(?:{'|'.join(_NUMBER_WORDS)})(?![a-z])", re.IGNORECASE)
_PARTS = {"half": 2, "halves": 2}
for _i, _part in enumerate(["third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"], start=3):
    _PARTS |= {_part: _i, _part + "s": _i}
_PARTS |= {"quarter": 4, "quarters": 4}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MULTIPLIERS = {
    **{word + ending: scale for word, scale in _SCALES.items() for ending in ("", "s")},
    **{"dozen": 12, "k": 1000, "K": 1000, "mil": 1000, "Million": 10**6, "Millionen": 10**6, "Milliarden": 10**9},
    **{
        "millones": 10**6,
        "millionen": 10**6,
        "millón": 10**6,
        "十": 10,
        "百": 100,
        "千": 1000,
        "万": 10**4,
        "亿": 10**8,
    },
}
_CONNECTIVE = (
    r"\\text\s*+\{\s*+(?i:so|thus|hence|therefore|then)\s*+[,:]?\s*+\}|\\(?:therefore|implies|Rightarrow)(?![A-Za-z])"
)
_LEAD = (
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|our|my)\s+)?(?:(?:final|correct|right)\s+)?"
    r"(?:answer|solution|result)\s*+(?::|=|is:?|are:?)"
)
_WRAPPERS = (
    r"\*\*(?P<stars>[^*]+)\*\*",
    r"\*(?P<star>[^*]+)\*", r"__(?P<underscores>[^_]+)__", r"`(?P<quotes>[^`]+)`",
    r"\\\[(?P<display>.+)\\\]", r"\\\((?P<inline>.+)\\\)",
    r"\\text\s*+\{\s*+(?i:" + _LEAD + r")\s*+\}(?P<text_lead>.+)",
    r"(?i:" + _LEAD + r")\s*+(?P<lead>.+)",
    rf"(?:{_CONNECTIVE})\s*+(?P<connective>.+)",
)  # fmt: skip
_WRAPPED = re.compile("|".join(_WRAPPERS), re.DOTALL)
_CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\s+", " "),
        (
            r"(?:\\left\s*+)?\\\{\s*+\\begin\s*+\{(array|aligned|matrix)\}(?:\s*+\{[lcr ]*\})?"
            r"((?:(?!\\\{\s*+\\begin).)*?)\\end\s*+\{\1\}"
            r"(?:\s*+\\right\s*+\.)?",
            r"\\begin{cases}\2\\end{cases}",
        ),
        (r"\\(?:mathbf|boldsymbol|bm)\s*+\{\s*+\\?([ijk])(?:math)?\s*+\}", r"\\hat \1 "),  # unit vectors
        (r"(?<!\\)\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
        (
            r"(?<!\\)\\(?:(?:text)?color\s*+\{[^{}]*\}|(?:mathbf|boldsymbol|bm|bf|boxed|fbox|underline|mathit|mathsf"
            r"|mathtt|large|Large|huge|ensuremath|displaystyle|textstyle|limits|tfrac(?=\s*+\\))(?![A-Za-z]))",
            " ",
        ),
        (r"(?<![\d.,])(\d{1,3})((?:(?: ?\\[,;: !]| |~) ?\d{3})+)(?![\d,])", lambda m: _joined(m)),
        (r"(?<=\d),\\! ?(?=\d{3})|(?<=\d)\{,\}(?=\d{3}(?!\d))|(?<=\d)\\[,:](?=\d{3}(?!\d))", ""),  # thousands
        (r"(?<=\d)\{,\}(?=\d)", "."),
        (r"(?<!\\)\\(?:[,;:!> ]|(?:quad|qquad)(?![A-Za-z]))|~", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:mbox|textbf|textit|textrm|textnormal|textsf|texttt|emph)(?![A-Za-z])", r"\\text"),
        (r"\\(?:le|ge)(qslant|q)(?![A-Za-z])", lambda match: match.group()[:3]),
        (r"\\neq(?![A-Za-z])|\\not\s*+=", r"\\ne "),
        (r"\\(?:varnothing|O)(?![A-Za-z])|\\\{\s*+\\\}|\\text\s*+\{\s*+(?:the )?empty set\s*+\}", r"\\emptyset "),
        (r"\\degrees?(?![A-Za-z])|(?<=[\dA-Za-z})])\s*+\\text\s*+\{\s*+degrees?\s*+\}", r"^\\circ "),
        (r"_\s*+\{\s*+\\(?:text|mathrm|rm)\s*+\{?\s*+(\w+)\s*+\}?\s*+\}", r"_{\1}"),
        (r"\\overline\s*+(\d)", r"\\overline{\1}"),
        (r"\\rightarrow(?![A-Za-z])|\\longrightarrow(?![A-Za-z])", r"\\to "),
        (r"\\backslash(?![A-Za-z])", r"\\setminus "),
        (r"(\\text\s*+\{\s*+(?:hundred|[a-z]*thousand|[mbt]r?illion|dozen))\s+(?=[A-Za-z])", r"\1}\\text{ "),
        (r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})*,0\d\d(?:,\d{3})*(?![\d,])", lambda m: m.group().replace(",", "")),
        (r"\\(?:mathrm|text|rm)\s*+\{\s*+d\s*+\}(?=\s*+(?:[\\A-Za-z]|\^))", "d"),
        (r"\\text\s*+\{\s*+[.,]?\s*+\}$|^\s*+=(?!=)", ""),
        (r"^\s*+\\text\s*+\{\s*+[A-Za-z][A-Za-z ]{2,}:\s*+\}(?=.)", ""),  # \text{Speed: }60
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\(?:l|r)?vert(?![A-Za-z])", "|"),
        (r"\\(?:dots|cdots|dotsc|dotsb)(?![A-Za-z])|(?<!\.)\.\.\.(?!\.)", r"\\ldots "),
        (r"\\vee(?![A-Za-z])", r"\\lor"),
        (r"\\wedge(?![A-Za-z])", r"\\land"),
        (r"(?<!\\)\$", ""),
        (r"\\%|\\text\s*+\{\s*+(?:percent|%|\\%)\s*+\}|(?<=\d) ?percent\b", "%"),
        (r"\\(?:mathrm|text|rm)\s*+\{\s*+([ije])\s*+\}", r" \1 "),  # a number or variable, not a unit
        (r"\\(?:text|mathrm)\s*+\{\s*+(-?\d[^{}]*)\}", r"\1"),  # \text{5 cm}
        (r"\{\s*+,\s*+\}", ","),
        (r"\\(?:mathbb|Bbb)\s*+\{?\s*+([RZNQC])\s*+\}?|\\R(?![A-Za-z])", lambda m: rf"\mathbb{{{m[1] or 'R'}}}"),
        (
            r"\\text\s*+\{\s*+all (?:the )?(?:real numbers|reals)\s*+\}|(?<![\w\\])all (?:real numbers|reals)",
            r"\\mathbb{R}",
        ),
        (
            r"\(\s*+(?:\\text\s*+\{\s*+mod\s*+\}|\\bmod|\\mod|\\mathrm\s*+\{\s*+mod\s*+\}|(?<![A-Za-z])mod)\s*+([^()]+)\)",
            r"\\pmod{\1}",
        ),
        (r"\\pmod\s*+(\d|[A-Za-z])", r"\\pmod{\1}"),
        (
            r"\\bmod(?![A-Za-z])\s*+(\d+|[A-Za-z])$|\\mod(?![A-Za-z])\s*+\{?(\d+|[A-Za-z])\}?$",
            lambda m: rf"\pmod{{{m[1] or m[2]}}}",
        ),
        (
            r"\\(?:text|mathrm)\s*+\{[^{}]*(?<![A-Za-z])(?:and|or)(?![A-Za-z])[^{}]*\}",
            lambda m: _conjunctions(m.group()),
        ),
        (
            r"\\text\s*+\{(\s*+[A-Z](?:\s*+,\s*+[A-Z])+\s*+)\}",
            lambda m: re.sub("[A-Z]", r"\\text{\g<0>}", m[1]),
        ),  # A, B
        (r"(?:,|(?<![\s,]))\s++(and|or)\s++", lambda m: rf"\l{m[1].replace('and', 'and')} "),
        (r",\s*+(?=\\(?:land|lor)(?![A-Za-z]))", ""),
        (r";", ","),
        (r"(?<=\.)(\d*)\s*+\((\d+)\)", r"\1\\overline{\2}"),  # 0.(3)
        (
            r"(?<=\.)(\d*)\\dot\s*+\{?(\d)\}?(?:(\d*)\\dot\s*+\{?(\d)\}?)?",
            lambda m: rf"{m[1]}\overline{{{m[2]}{m[3] or ''}{m[4] or ''}}}",
        ),
        (r"(?<=\{)\s*+([1-9]\d{0,2}(?:,\d{3})+)\s*+(?=\})", lambda m: m[1].replace(",", "")),  # \frac{1,200}{7}
    )
]
_CONJUNCTION = re.compile(r"(?:(?:(?<!\s)\s++)?+,\s*+|(?<![\s,])\s++)?+(?<![A-Za-z])(and|or)(?![A-Za-z])\s*+")
_TAKES = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1}
_ARGUMENTS = re.compile(r"\\[A-Za-z]+|\\.|\s+|.", re.DOTALL)
_BRACKETS = re.compile(r"\\[{}]|\\(?:begin|end)\s*+\{[^{}]*\}|\\[A-Za-z]+|\\.|=+|[()\[\]{},]")
_OPENING, _CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")
_SUPERFLUOUS_BRACES = re.compile(r"(?<=[_^])\{(\w)\}")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # not the one in `1 1/2`


@lru_cache(maxsize=1024)
def clean(text: str) -> str:
    """Remove what does not change the meaning: spacing, sizes, colours, wrappers and alternative names of symbols.

    Thousands are joined (`10 000`), arguments get braces (`\\frac\\pi6`), number words (`eleven`) become digits, and
    "and" and "or" become `\\land` and `\\lor`, which separate the elements of a list as commas do.
    """
    if not text.isascii():
        text = signs.in_latex(text)
    text = "".join(c if c.isprintable() else " " for c in text).strip()
    text = _in_digits(_unwrapped(text))
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    text = signs.plain_mathematics(text)
    text = _with_arguments(text) if "{" in text or "\\" in text else text
    text = " ".join(text.split()).strip(", ").rstrip(". \\,")
    return _in_digits(text)


def _unwrapped(text: str) -> str:
    """Remove what encloses or introduces a whole answer: bold, display brackets, "The answer is"."""
    for _ in range(4):
        match = _WRAPPED.fullmatch(text)
        if not match:
            break
        text = next(group for group in match.groups() if group).strip()
    return text


def _joined(match: re.Match) -> str:
    return match[1] + re.sub(r"\D", "", match[2])


def _conjunctions(group: str) -> str:
    r"""Write `\text{A and B}` as `\text{A}\land \text{B}`."""
    command, _, words = group[:-1].partition("{")
    if _words_value(words) is not None:
        return group
    pieces = _CONJUNCTION.split(words)
    written = [rf"{command}{{{piece}}}" if i % 2 == 0 else rf"\l{piece} " for i, piece in enumerate(pieces) if piece]
    return "".join(written)


def _in_digits(text: str) -> str:
    match = re.fullmatch(r"(?:\\text\s*+\{\s*+)?([A-Za-z][A-Za-z -]*?)(?<=\S)\s*+\}?", text)
    if not match or not _FIRST_NUMBER.match(match[1]):
        return text
    words = match[1].replace("-", " ").split()
    for end in range(len(words), 0, -1):
        value = _words_value(" ".join(words[:end]))
        if value is None:
            continue
        rest = words[end:]
        if not rest:
            return str(value)
        if len(rest) == 1 and rest[0].lower() in _PARTS:
            return rf"\frac{{{value}}}{{{_PARTS[rest[0].lower()]}}}"
        return rf"{value}\text{{ {' '.join(rest)}}}" if units.read(" ".join(rest)) else text
    return text


def _words_value(words: str) -> int | None:
    """Return the number written as "two hundred and five" or "twenty-one"; None for other words."""
    total, current, found = 0, 0, False
    for word in words.lower().replace("-", " ").split():
        if word in _NUMBER_WORDS:
            number = _NUMBER_WORDS[word]
            if found and current % 100 and not (current % 100 >= 20 and current % 10 == 0 and 0 < number < 10):
                return None
            current += number
        elif word == "hundred" and 0 < current < 100:
            current *= 100
        elif word in _SCALES and current:
            total, current = total + current * _SCALES[word], 0
        elif word != "and" or not found:
            return None
        found = True
    return total + current if found and words.split()[-1].lower() != "and" else None


def _with_arguments(text: str) -> str:
    r"""Put braces around the arguments of `\frac`, `\binom` and `\sqrt`, and remove braces that group nothing."""
    written, open_braces, wanting, previous = [], [], [], ""
    option = False
    for token in _ARGUMENTS.findall(text):
        if token.isspace():
            written.append(token)
            continue
        waits = bool(wanting) and wanting[-1][1] == len(open_braces)
        if option or (waits and token == "[" and previous == r"\sqrt"):
            option = token != "]"
            written.append(token)
        elif token == "{":
            needless = not waits and (
                previous in ("", "(", "[", "{", r"\{", ",", "=", "+", "-", "*", "/", "<", ">", "|", "&")
            )
            open_braces.append((len(written), needless))
            written.append("" if needless else token)
        elif token == "}":
            if not open_braces:
                return text
            _, needless = open_braces.pop()
            written.append("" if needless else token)
            while wanting and wanting[-1][1] == len(open_braces) and not needless:
                wanting[-1][0] -= 1
                if wanting[-1][0]:
                    break
                wanting.pop()
            if needless:
                token = previous
        elif waits and token not in _TAKES and (token.isalnum() or (token[0] == "\\" and token[1:].isalpha())):
            written.append(f"{{{token}}}")
            wanting[-1][0] -= 1
            if not wanting[-1][0]:
                wanting.pop()
        else:
            if waits:
                wanting.pop()  # \frac\sqrt2 3 is left unchanged
            written.append(token)
            if token in _TAKES:
                wanting.append([_TAKES[token], len(open_braces)])
        previous = token
    return text if open_braces else "".join(written)


def squeeze(text: str) -> str:
    """Return clean text without spaces and unnecessary braces, so that equivalent texts become equal strings."""
    return _SUPERFLUOUS_BRACES.sub(r"\1", _SPACE.sub("", text))


def split(text: str, *separators: str) -> list[str]:
    """Split clean text at separators outside brackets; return [text] if brackets do not match or a piece is empty."""
    pieces, depth, start = [], 0, 0
    for token in _BRACKETS.finditer(text):
        found = "=" if token.group()[0] == "=" else token.group()
        if found in _OPENING or found.startswith(r"\begin"):
            depth += 1
        elif found in _CLOSING or found.startswith(r"\end"):
            depth -= 1
            if depth < 0:
                return [text]
        elif depth == 0 and found in separators:
            pieces.append(text[start : token.start()].strip())
            start = token.end()
    pieces.append(text[start:].strip())
    return [text] if depth or not all(pieces) else pieces
