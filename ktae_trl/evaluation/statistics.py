"""Confidence intervals and tests for accuracy. The unit is the problem: its samples count as one cluster.

All intervals are 95% confidence intervals. They cover the choice of problems of the same kind and of samples. They do
not cover other kinds of problems.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ktae_trl.arguments import UserError
from ktae_trl.grading.answers import settle

Z = stats.norm.ppf(0.975)
RESAMPLES = 10_000
_AT_ONCE = 1_000_000  # problems times resamples per batch: limits the memory


class Estimate(NamedTuple):
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference B - A on the same problems, with its 95% interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def share(values: Sequence[float], samples: int) -> Estimate:
    """Return the mean of per-problem shares in [0, 1] with its interval over problems.

    This is Wilson's score interval (1927). If all shares are 0 or 1, the number of observations is the number of
    problems. Otherwise it is an effective number (Korn and Graubard 1998) that treats the samples of a problem as one
    cluster:

        n = p (1 - p) / Var(mean) * (z / t)^2

    with Var(mean) estimated from the spread between the P problems, and t with P - 1 degrees of freedom. n is at most
    P * `samples`, which it would be if all problems were equally hard.

    Args:
        values: One share per problem.
        samples: Number of independent samples behind each share: n for a share of n samples, n // k for pass@k and
            maj@k.

    Raises:
        UserError: `values` is empty.
    """
    x = np.asarray(values, float)
    if not len(x):
        raise UserError("Cannot average: there are no problems")
    p = float(x.mean())
    if np.isin(x, (0.0, 1.0)).all():
        return wilson(p, len(x))
    variance = float(x.var(ddof=1)) / len(x) if len(x) > 1 else 0.0
    n = min(len(x) * samples, p * (1 - p) / variance if variance else math.inf)
    return wilson(p, n * (Z / stats.t.ppf(0.975, len(x) - 1)) ** 2 if len(x) > 1 else 1)


def wilson(p: float, n: float) -> Estimate:
    """Return a share `p` of `n` independent observations with Wilson's score interval."""
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the unweighted mean of independent estimates (the "average" over benchmarks in papers) with its interval.

    The interval uses the method of variance estimates recovery (Zou and Donner 2008): the squared distances from each
    estimate to its limit are added, separately for both limits, so the interval keeps the skewness of its parts.
    """
    k = len(estimates)
    value = sum(e.value for e in estimates) / k
    below = math.sqrt(sum((e.value - e.low) ** 2 for e in estimates)) / k
    above = math.sqrt(sum((e.high - e.value) ** 2 for e in estimates)) / k
    return Estimate(value, value - below, value + above)


def independent_difference(a: Estimate, b: Estimate) -> Estimate:
    """Return b - a with Newcombe's (1998) interval, for independent problems or without per-problem results."""
    value = b.value - a.value
    low = value - math.hypot(b.value - b.low, a.high - a.value)
    return Estimate(value, low, value + math.hypot(b.high - b.value, a.value - a.low))


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Return the probability that at least one of k samples of a problem is correct.

    pass@k = 1 - C(n - c, k) / C(n, k), for c correct samples of n. This is the unbiased estimate of Chen et al. (2021),
    section 2.1.

    Raises:
        UserError: k is below 1 or above n.
    """
    if not 1 <= k <= samples:
        raise UserError(f"k of pass@k must be between 1 and the number of samples ({samples}), not {k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at_k(verdicts: Sequence[bool], extracted: Sequence[str | None], k: int) -> float:
    """Return the probability that the most frequent answer of k samples of a problem is correct.

    It is the mean over disjoint blocks of k samples. All correct samples count as one answer. Wrong samples count as
    the same answer if they are equal as text or as numbers: y + 2 and 2 + y are different, so maj@k is biased upwards.
    Samples without an answer have no vote. A tie counts as the share of correct answers among the tied ones.

    Raises:
        UserError: k is below 1 or above the number of samples.
    """
    if not 1 <= k <= len(verdicts):
        raise UserError(f"k of maj@k must be between 1 and the number of samples ({len(verdicts)}), not {k}")
    blocks = range(0, len(verdicts) - k + 1, k)
    return float(np.mean([_majority(verdicts[i : i + k], extracted[i : i + k]) for i in blocks]))


def _majority(verdicts: Sequence[bool], extracted: Sequence[str | None]) -> float:
    right = sum(verdicts)
    wrong: dict[str, int] = {}
    for verdict, answer in zip(verdicts, extracted, strict=True):
        if not verdict and answer is not None:
            same = answer if answer in wrong else next((w for w in wrong if settle(w, answer)), answer)
            wrong[same] = wrong.get(same, 0) + 1
    most = max([right, *wrong.values()])
    return (right == most) / ((right == most) + sum(count == most for count in wrong.values())) if most else 0.0


def paired_difference(strata: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Difference:
    """Return the difference B - A on the same problems: the mean over strata (benchmarks) of the mean difference.

    The interval is a percentile bootstrap over the problems of each stratum. The p-value comes from a paired
    permutation test, which swaps the results of A and B problem by problem. It is exact if all nonzero differences have
    the same size (with one sample per problem and one stratum, this is McNemar's exact test) or if at most 13
    differences are nonzero. Otherwise it uses 10,000 random permutations: p = (hits + 1) / (permutations + 1).

    Args:
        strata: For each benchmark, the per-problem results of A and of B in the same order.
        seed: Seed of the bootstrap and the permutations.
    """
    differences = [np.asarray(b, float) - np.asarray(a, float) for a, b in strata]
    options = {"n_resamples": RESAMPLES, "batch": max(1, _AT_ONCE // sum(map(len, differences))), "rng": seed}
    low, high = stats.bootstrap(
        [np.resize(d, max(len(d), 2)) for d in differences],  # SciPy needs two; duplicates of one do not vary
        lambda *parts, axis: sum(part.mean(axis) for part in parts) / len(parts),
        method="percentile",
        **options,
    ).confidence_interval

    weighted = np.concatenate([d / (len(d) * len(strata)) for d in differences])
    changed = weighted[np.abs(weighted) > 1e-12]
    sizes = np.abs(changed)
    if not len(changed):
        p = 1.0
    elif sizes.max() - sizes.min() < 1e-12:
        p = stats.binomtest(int((changed > 0).sum()), len(changed)).pvalue
    else:
        p = stats.permutation_test(
            (changed,),
            lambda x, axis: np.abs(x.sum(axis)).round(12),  # rounded so that equal sums compare as equal
            permutation_type="samples",
            alternative="greater",
            **options,
        ).pvalue
    return Difference(float(weighted.sum()), float(low), float(high), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values with Holm's (1979) correction, which controls the family-wise error rate."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, float)[order] * factors))
    result = np.empty(len(p_values))
    result[order] = corrected
    return [float(p) for p in result]
