"""OTB's advantages of one group, one token at a time, for tests: from whole distributions over the vocabulary."""

import math
import statistics


def token_advantages(
    distributions: list[list[list[float]]], ids: list[list[int]], mask: list[list[bool]], returns: list[float]
) -> list[list[float]]:
    """Return the advantage of each token; `distributions[i][t]` are the probabilities from which `ids[i][t]` came."""
    G, T = len(mask), len(mask[0])
    energy = [[0.0] * T for _ in range(G)]
    for i in range(G):
        total = 0.0
        for t in range(T):
            if mask[i][t]:
                # The gradient of log pi(token) with respect to the logits is one-hot minus pi.
                gradient = [float(v == ids[i][t]) - p for v, p in enumerate(distributions[i][t])]
                total += math.fsum(x * x for x in gradient)
            energy[i][t] = total
    advantages = [[0.0] * T for _ in range(G)]
    for t in range(T):
        alive = [i for i in range(G) if mask[i][t]]
        if len(alive) == 1:
            baseline = statistics.fmean(returns)
        elif alive:
            weights = [energy[i][t] for i in alive]
            if math.fsum(weights) < 1e-12:
                weights = [1.0] * len(alive)
            baseline = math.fsum(returns[i] * w for i, w in zip(alive, weights, strict=True)) / math.fsum(weights)
        for i in alive:
            advantages[i][t] = returns[i] - baseline
    return advantages
