"""GTPO's advantages of one group, one token at a time, for tests: plain lists, nothing shared with the package."""

import math
import statistics


def token_advantages(
    entropies: list[list[float]],
    mask: list[list[bool]],
    correct: list[bool | None],
    alpha1: float = 1.0,
    alpha2: float = 0.1,
    together: bool = False,
    floor: float = 1e-3,
) -> list[list[float]]:
    """Return the advantage of each token of a group; `correct` is None for a rollout that could not be graded."""
    G, T = len(mask), len(mask[0])
    rewards = {}  # (rollout, position) -> r~
    for t in range(T):
        right = [i for i in range(G) if correct[i] is True and mask[i][t]]
        wrong = [i for i in range(G) if correct[i] is False and mask[i][t]]
        for i in right:
            share = (entropies[i][t] + floor) / math.fsum(entropies[k][t] + floor for k in right)
            rewards[i, t] = alpha1 + alpha2 * share * len(right)
        for i in wrong:
            share = 1 / (entropies[i][t] + floor) / math.fsum(1 / (entropies[k][t] + floor) for k in wrong)
            rewards[i, t] = -alpha1 - alpha2 * share * len(wrong)
    advantages = [[0.0] * T for _ in range(G)]
    if len({correct[i] for i, _ in rewards}) < 2:
        return advantages
    for sides in [{True, False}] if together else [{True}, {False}]:
        some = {place: reward for place, reward in rewards.items() if correct[place[0]] in sides}
        mean, std = statistics.fmean(some.values()), statistics.pstdev(some.values())
        for (i, t), reward in some.items():
            advantages[i][t] = (reward - mean) / std if std > 1e-9 else 0.0
    return advantages
