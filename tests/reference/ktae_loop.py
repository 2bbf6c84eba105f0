"""KTAE written out slowly from the paper's formulas: one group, one rollout, one token at a time, in float64.

Shares nothing with `ktae_trl.credit` but the formulas. Fisher's test is SciPy's.
"""

import math
from collections import Counter
from functools import cache

import numpy as np
from scipy.stats import fisher_exact


@cache
def fisher_p(a: int, b: int, c: int, d: int) -> float:
    return float(fisher_exact([[a, b], [c, d]])[1])


def entropy(*counts: float) -> float:
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n)


def strength(a: int, b: int, c: int, d: int, fisher_weight: float, ig_weight: float) -> float:
    p = fisher_p(a, b, c, d)
    fisher = 0.0 if p > 1 - 1e-12 else math.exp(-2 * p)
    group = a + b + c + d
    gain = entropy(a + c, b + d)
    if a + b:
        gain -= (a + b) / group * entropy(a, b)
    if c + d:
        gain -= (c + d) / group * entropy(c, d)
    return (fisher_weight * fisher + ig_weight * gain) / (fisher_weight + ig_weight)


def token_strength(token, right: list[list[int]], wrong: list[list[int]], fisher_weight, ig_weight) -> float:
    """S of `token` in a group whose voters are the token lists `right` and `wrong`."""
    a, b = sum(token in r for r in right), sum(token in r for r in wrong)
    if not right or not wrong or a + b == 0:
        return 0.0
    return strength(a, b, len(right) - a, len(wrong) - b, fisher_weight, ig_weight)


def value(token, right: list[list[int]], wrong: list[list[int]], fisher_weight, ig_weight, tf_weight) -> float:
    """K of `token` in a group whose voters are the token lists `right` and `wrong`."""
    a, b = sum(token in r for r in right), sum(token in r for r in wrong)
    if not right or not wrong or a + b == 0:
        return 0.0
    s = token_strength(token, right, wrong, fisher_weight, ig_weight)
    lengths = sum(map(len, right)), sum(map(len, wrong))
    tf = []
    for side, length in zip((right, wrong), lengths, strict=True):
        f = sum(Counter(r)[token] for r in side) / length
        tf.append(3 * f / (f + 2 * (0.5 + 0.5 * length / np.mean(lengths))))
    ratio = tf[0] / (tf[1] + 1e-5) - tf[1] / (tf[0] + 1e-5)
    d = math.asin(math.sqrt(a / len(right))) - math.asin(math.sqrt(b / len(wrong))) + tf_weight * ratio
    return 2 / (1 + math.exp(-min(max(s * d, -700), 700))) - 1


def key_token_values(ids, mask, correct, *, fisher_weight=1.0, ig_weight=1.0, tf_weight=1.0, **options) -> np.ndarray:
    """Values of every position of (P, G, T) arrays."""
    return of_tokens(lambda *group: value(*group, fisher_weight, ig_weight, tf_weight), ids, mask, correct, **options)


def key_token_strengths(ids, mask, correct, *, fisher_weight=1.0, ig_weight=1.0, **options) -> np.ndarray:
    """Strengths of every position of (P, G, T) arrays."""
    return of_tokens(lambda *group: token_strength(*group, fisher_weight, ig_weight), ids, mask, correct, **options)


def importance_weights(ids, mask, correct, beta=1.0, **options) -> np.ndarray:
    """Weights of every position of (P, G, T) arrays; 1 where nothing is trained."""
    strengths, weights = key_token_strengths(ids, mask, correct, **options), np.ones(np.shape(ids))
    for p, g in np.ndindex(strengths.shape[:2]):
        trained = [t for t, m in enumerate(np.asarray(mask[p][g]).tolist()) if m]
        total = sum(1 + beta * strengths[p, g, t] for t in trained)
        for t in trained:
            weights[p, g, t] = (1 + beta * strengths[p, g, t]) * len(trained) / total
    return weights


def of_tokens(measure, ids, mask, correct, *, leave_one_out=False, scored=None, ignore_ids=()) -> np.ndarray:
    """`measure(token, right, wrong)` at every position of (P, G, T) arrays."""
    ids, mask, correct = np.asarray(ids), np.asarray(mask).astype(bool), np.asarray(correct).astype(bool)
    scored = np.ones_like(correct) if scored is None else np.asarray(scored).astype(bool)
    values = np.zeros(ids.shape)
    for p, group in enumerate(ids):
        tokens = [list(map(int, row[m])) for row, m in zip(group, mask[p], strict=True)]
        votes = [bool(t) and bool(s) for t, s in zip(tokens, scored[p], strict=True)]
        for i, row in enumerate(tokens):
            if not votes[i]:
                continue
            others = [j for j in range(len(tokens)) if votes[j] and not (leave_one_out and j == i)]
            right = [tokens[j] for j in others if correct[p, j]]
            wrong = [tokens[j] for j in others if not correct[p, j]]
            known = {t: 0.0 if t in ignore_ids else measure(t, right, wrong) for t in set(row)}
            values[p, i, mask[p, i]] = [known[t] for t in row]
    return values
