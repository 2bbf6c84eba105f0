"""Planning n-grams token by token: characters and bytes one at a time, every n-gram at every character."""

SEPARATORS = " \u00a0"


def is_letter(text: str, i: int) -> bool:
    return 0 <= i < len(text) and text[i].isalpha()


def in_name(text: str, i: int) -> bool:
    return 0 <= i < len(text) and (text[i].isalnum() or text[i] == "_")


def word_at(text: str, i: int) -> str | None:
    """The word that begins at a character, as it stands there, or None."""
    if not is_letter(text, i) or in_name(text, i - 1) or (i and text[i - 1] == "\\"):
        return None
    if i >= 2 and text[i - 1] in "'\u2019" and in_name(text, i - 2):
        return None  # inside of a word
    end = i
    while is_letter(text, end) or (end < len(text) and text[end] in "'\u2019" and is_letter(text, end + 1)):
        end += 1
    return None if in_name(text, end) else text[i:end]


def end_of(text: str, i: int, words: list[str]) -> int | None:
    """Where an n-gram ends that begins at a character, or None if it does not."""
    for place, word in enumerate(words):
        if place:
            i += text[i : i + 1] == ","
            start = i
            while i < len(text) and text[i] in SEPARATORS:
                i += 1
            if i == start:
                return None
        there = word_at(text, i)
        if there is None or there.lower().replace("\u2019", "'") != word:
            return None
        i += len(there)
    return i


def characters(text: str, ngrams) -> set[int]:
    """The characters of a text that belong to an n-gram."""
    found = set()
    for ngram in ngrams:
        for i in range(len(text)):
            end = end_of(text, i, ngram.split())
            found |= set(range(i, end)) if end else set()
    return found


def planning(pieces: list[bytes], ngrams) -> list[bool]:
    """Which tokens have a byte of a character of an n-gram, from the bytes of each token."""
    text = b"".join(pieces).decode()
    owners = [i for i, piece in enumerate(pieces) for _ in piece]  # of each byte
    own, at = set(), 0
    inside = characters(text, ngrams)
    for i, character in enumerate(text):
        size = len(character.encode())
        if i in inside:
            own |= set(owners[at : at + size])
        at += size
    return [i in own for i in range(len(pieces))]
