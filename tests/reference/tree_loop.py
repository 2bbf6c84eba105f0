"""Tree sampling by recursion over nodes, for tests: one number and one segment at a time."""

import math
from dataclasses import dataclass, field


@dataclass
class Node:
    """A segment with what was sampled below it; the root has no tokens. A leaf has a reward, None if unscorable."""

    tokens: list[int]
    children: list["Node"] = field(default_factory=list)
    reward: float | None = None
    advantage: float = 0.0

    def value(self) -> float | None:
        if not self.children:
            return self.reward
        known = [value for child in self.children if (value := child.value()) is not None]
        return sum(known) / len(known) if known else None


def compare(node: Node, min_spread: float, normalizer: str) -> None:
    """Set the advantages of all nodes below."""
    known = [value for child in node.children if (value := child.value()) is not None]
    if known and max(known) > min(known) and max(known) - min(known) >= min_spread - 1e-9:
        mean = sum(known) / len(known)
        scale = {
            "bernoulli": math.sqrt(mean * (1 - mean)),
            "std": math.sqrt(sum((value - mean) ** 2 for value in known) / max(len(known) - 1, 1)) + 1e-4,
            "none": 1.0,
        }[normalizer]
        for child in node.children:
            if child.value() is not None:
                child.advantage = (child.value() - mean) / scale
    for child in node.children:
        compare(child, min_spread, normalizer)


def nodes(node: Node, before: tuple[int, ...] = ()) -> list[tuple[tuple[int, ...], Node]]:
    """Return all nodes below with the tokens that come before each."""
    found = []
    for child in node.children:
        found += [(before, child), *nodes(child, before + tuple(child.tokens))]
    return found


def rows(node: Node, size: int) -> list[list[tuple[Node, bool]]]:
    """Return the rows of a tree whose leaves should fill `size` rows: the nodes of each, and whether it trains them."""
    if not node.children:
        return [[] for _ in range(size)]
    found = []
    for child in node.children:
        below = rows(child, size // len(node.children))
        found += [[(child, i == 0), *row] for i, row in enumerate(below)]
    return found
