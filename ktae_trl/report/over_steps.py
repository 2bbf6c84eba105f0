"""The tokens that are key most often over the groups of a run."""

from collections import Counter
from typing import Any

KEY = 0.5  # smallest |K| of a key token
FEWEST = 2  # rollouts that contain it
MOST = 100  # tokens in the table

RULE = (
    f"A token is key in a group if its |K| is at least {KEY} and at least {FEWEST} of the group's rollouts contain it. "
    f"The table has the tokens that are key in most groups of this page, at most {MOST}. Each number in the strip is "
    "the number of groups at that step, and its colour their mean K: blue for correct, orange for wrong rollouts. "
    "Click one to go to an example."
)

Token = tuple[int, str]  # id and displayed text


def keys_of(group: dict[str, Any]) -> dict[Token, float]:
    """Return K of the key tokens of a described group."""
    tokens = group["tokens"]
    columns = (tokens[name] for name in ("id", "text", "a", "b", "K"))
    return {
        (token, text): K
        for token, text, a, b, K in zip(*columns, strict=True)
        if isinstance(K, float) and abs(K) >= KEY and a + b >= FEWEST
    }


def over_steps(keys: list[dict[Token, float]]) -> dict[str, Any]:
    """Return the tokens that are key in most groups, and the groups.

    Args:
        keys: The key tokens of each group; empty for a group whose method has no K.

    Returns:
        `tokens` with their `id` and `text`, the most frequent first, and `found` with a triple for each key token of
        each group: the indices of the token and the group, and K.
    """
    counts = Counter(token for found in keys for token in found)
    tokens = [token for token, _ in counts.most_common(MOST)]
    number_of = {token: i for i, token in enumerate(tokens)}
    found = [
        (number_of[token], group, round(K, 3))
        for group, own in enumerate(keys)
        for token, K in own.items()
        if token in number_of
    ]
    return {"tokens": {"id": [i for i, _ in tokens], "text": [text for _, text in tokens]}, "found": found}
