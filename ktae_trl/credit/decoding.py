"""The text of sampled tokens, and which characters of it each token adds."""

from bisect import bisect_left
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream

from ktae_trl.arguments import UserError


class Decoded(NamedTuple):
    """The text of some tokens. Token i adds the characters from `ends[i]` to `ends[i + 1]`."""

    text: str
    ends: list[int]  # 0, then the length of the text after each token

    def tokens(self, begin: int, end: int) -> range:
        """Return the tokens that hold a character from `begin` to `end`, which must be a later place.

        A character that is split into several tokens is added by the last of them, and held by all.
        """
        first = bisect_left(self.ends, begin)
        return range(first if self.ends[first] == begin else first - 1, bisect_left(self.ends, end))


def decoded(ids: list[int], tokenizer: Any) -> Decoded:
    """Decode tokens as they were sampled, which may differ from how the tokenizer would split the text.

    Special tokens have no text. Bytes that form no character are replaced by U+FFFD.

    Args:
        ids: token ids.
        tokenizer: a fast tokenizer.
    """
    stream, chunks, ends = DecodeStream(skip_special_tokens=True), [], [0]
    for token in ids:
        try:
            chunk = stream.step(tokenizer.backend_tokenizer, token)
        except Exception:  # bytes that form no character; tokenizers raises a plain Exception
            stream = DecodeStream(skip_special_tokens=True)
            chunk = stream.step(tokenizer.backend_tokenizer, token)
        chunks.append(chunk or "")  # "" inside a character
        ends.append(ends[-1] + len(chunks[-1]))
    return Decoded("".join(chunks), ends)


def need_fast(tokenizer: Any, method: str) -> None:
    """Check that `decoded` can decode with this tokenizer.

    Args:
        method: the credit method that needs it, for the message.

    Raises:
        UserError: it is a slow tokenizer.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{method} needs the character offsets of a fast tokenizer, but {type(tokenizer).__name__} is a slow "
            "one. Load the fast tokenizer (use_fast=True, or a tokenizer.json), or use another method, such as "
            "credit: ktae"
        )
