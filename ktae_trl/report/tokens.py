"""Display tokens: their strings, invisible characters made visible, and the colour of their values. Without HTML."""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# Invisible characters outside Unicode's categories of controls and formats, and the variation selectors.
_INVISIBLE = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0x180B, 0x1810)}
_INVISIBLE |= {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
_CONTROLS = "NUL SOH STX ETX EOT ENQ ACK BEL BS TAB LF VT FF CR SO SI"
_CONTROLS += " DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US"
_NAMES = {
    **dict(enumerate(_CONTROLS.split())), 0x7F: "DEL", 0x85: "NEL",
    0xA0: "NBSP", 0xAD: "SHY", 0x61C: "ALM", 0x200B: "ZWSP", 0x200C: "ZWNJ", 0x200D: "ZWJ", 0x200E: "LRM",
    0x200F: "RLM", 0x202A: "LRE", 0x202B: "RLE", 0x202C: "PDF", 0x202D: "LRO", 0x202E: "RLO", 0x2060: "WJ",
    0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xFEFF: "BOM",
}  # fmt: skip
_UNSEEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}

# Background, positive and negative colour, for light (False) and dark (True) pages. Blue and orange are distinguishable
# with all common kinds of colour blindness. Black (dark: white) text has a contrast of at least 4.5 on all of them.
_SCALES = {
    False: ((255, 255, 255), (96, 165, 246), (245, 145, 40)),
    True: ((24, 27, 32), (28, 92, 168), (160, 78, 0)),
}
_AMOUNTS = {False: (64, 190, 150), True: (0, 110, 82)}  # the colour of numbers without a sign, such as an entropy


def visible(text: str) -> str:
    """Return `text` with all invisible characters made visible, so that it cannot hide or reorder anything.

    A newline becomes `↵` and a newline, a tab `⇥` and a tab. Other control characters, invisible characters, those that
    change the writing direction, and lone surrogates become names: `⟨NUL⟩`, `⟨RLM⟩`, `⟨U+D800⟩`. (Many fonts lack
    symbols for control characters.) A combining mark at the beginning gets a `◌` to combine with. Spaces stay.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = "".join(map(_visible_character, text))
    return f"◌{shown}" if unicodedata.category(shown[0])[0] == "M" else shown


@lru_cache(maxsize=4096)
def _visible_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return {"\n": "↵\n", "\t": "⇥\t"}[character]
    unseen = unicodedata.category(character) in _UNSEEN_CATEGORIES and character != " "
    if unseen or code in _INVISIBLE:
        return f"⟨{_NAMES.get(code, f'U+{code:04X}')}⟩"
    return character


def label(text: str) -> str:
    """Return `text` made visible and on one line, for a single token, as in a table."""
    return one_line(visible(text))


def one_line(shown: str) -> str:
    """Return the result of `visible` on one line, with `␣` for spaces."""
    return shown.replace("\n", "").replace("\t", "").replace(" ", "␣")


def colour(value: float, dark: bool = False) -> tuple[int, int, int]:
    """Return the background colour of a token with this value, as RGB with components up to 255.

    Positive values are blue, negative ones orange, and 0 has the background of the page (white, or near black if
    `dark`). Values are clipped to [-1, 1], and NaN counts as 0. Black text (white if `dark`) has a contrast of at least
    4.5 on it.
    """
    ground, positive, negative = _SCALES[dark]
    value = 0.0 if value != value else max(-1.0, min(1.0, value))
    end = positive if value > 0 else negative
    return tuple(round(a + abs(value) * (b - a)) for a, b in zip(ground, end, strict=True))


def amount(value: float, dark: bool = False) -> tuple[int, int, int]:
    """Return the background colour of a token with a number in [0, 1] that is neither for nor against it: green."""
    return tuple(round(a + value * (b - a)) for a, b in zip(_SCALES[dark][0], _AMOUNTS[dark], strict=True))


def shade(value: float | None, how: str, most: float) -> float:
    """Return a token's credit on the colour scale: negative is against the token, positive for it, 0 has no effect.

    Args:
        value: As in `Credit.values`; None without credit.
        how: As in `Credit.how`.
        most: The largest |value| of the group, by which the values of `replace` are divided.
    """
    if value is None:
        return 0.0
    return {"scale": value - 1, "replace": value / (most or 1.0)}.get(how, value)


def token_strings(ids: Iterable[int], tokenizer) -> dict[int, str]:
    """Return the text of each distinct token id, with the leading space that it has inside a text.

    All ids are decoded in one batch, each after the text `a`, which is then removed: without it, SentencePiece
    tokenizers drop the leading space. If an id is only a part of a character or has no text, the result is the
    tokenizer's own piece (`Ġâ`, `<0xE2>`). An id beyond the vocabulary becomes `⟨id 151999⟩`.

    Args:
        ids: Token ids, possibly repeated.
        tokenizer: A transformers tokenizer.
    """
    distinct = list(dict.fromkeys(int(i) for i in ids))
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, *texts = tokenizer.batch_decode([anchor, *([*anchor, i] for i in distinct)], **options)
    strings = {}
    for i, text in zip(distinct, texts, strict=True):
        own = text[len(before) :] if text.startswith(before) else ""
        if not own or "\ufffd" in own:
            own = tokenizer.convert_ids_to_tokens(i) or f"⟨id {i}⟩"
        strings[i] = own
    return strings
