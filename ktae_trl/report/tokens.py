"""How a token looks: its own string, what of it can be seen, and the colour of its value. Nothing here knows HTML."""

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# Characters without ink that Unicode does not file under controls or formats; the ranges of variation selectors too.
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

# Blue for positive, orange for negative: apart for all common kinds of colour blindness. On white and on dark ground,
# so that black or white text keeps a contrast of at least 4.5.
_SCALES = {
    False: ((255, 255, 255), (96, 165, 246), (245, 145, 40)),
    True: ((24, 27, 32), (28, 92, 168), (160, 78, 0)),
}


def visible(text: str) -> str:
    """Return `text` with everything that has no ink written out, so that it can neither hide nor reorder anything.

    A newline becomes `↵` and the newline, a tab `⇥` and the tab. Other control characters, invisible ones, those that
    turn the direction of writing, and lone surrogates become names: `⟨NUL⟩`, `⟨RLM⟩`, `⟨U+D800⟩` (many fonts lack the
    pictures of control characters). A combining mark in front has nothing to combine with and gets `◌`. Spaces stay.
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
    """Return `text` visible and on one line: a token by itself, as in a table."""
    return one_line(visible(text))


def one_line(shown: str) -> str:
    """Return what `visible` gave on one line, with `␣` for its spaces."""
    return shown.replace("\n", "").replace("\t", "").replace(" ", "␣")


def colour(value: float, dark: bool = False) -> tuple[int, int, int]:
    """Return the background of a token with this value, red, green and blue up to 255.

    Blue for positive, orange for negative, the ground (white; near black if `dark`) for 0; values beyond [-1, 1] count
    as these, NaN as 0. Black text on it (white if `dark`) has a contrast of 4.5 or more.
    """
    ground, positive, negative = _SCALES[dark]
    value = 0.0 if value != value else max(-1.0, min(1.0, value))
    end = positive if value > 0 else negative
    return tuple(round(a + abs(value) * (b - a)) for a, b in zip(ground, end, strict=True))


def shade(value: float | None, how: str, most: float) -> float:
    """Return how far, from -1 to 1, the credit of a token speaks against or for it: 0 for what changes nothing.

    Args:
        value: as in `Credit.values`; None without credit.
        how: as in `Credit.how`.
        most: the largest |value| beside it, to which the segment advantages of `replace` are compared.
    """
    if value is None:
        return 0.0
    return {"scale": value - 1, "replace": value / (most or 1.0)}.get(how, value)


def token_strings(ids: Iterable[int], tokenizer) -> dict[int, str]:
    """Return the text of each distinct id as it stands inside of a text, with its leading space.

    Decoded once each, all in one batch, behind an `a` whose text is then taken off: by itself a tokenizer of the
    SentencePiece kind would drop the space. An id that is only a part of a character, or has no text, gives the
    tokenizer's own piece (`Ġâ`, `<0xE2>`), one beyond the vocabulary `⟨id 151999⟩`.

    Args:
        ids: token ids, any number of times.
        tokenizer: of transformers.
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
