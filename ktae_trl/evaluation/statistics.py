"""Accuracy with its uncertainty. The problem is the unit: several samples of one problem are one observation.

All intervals are 95%. They say how far the figure would move with other problems of the same kind (and other samples);
they say nothing about other kinds of problems.
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
_AT_ONCE = 1_000_000  # problems times resamples: bounds the memory


class Estimate(NamedTuple):
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """How much B is above A on the same problems, with a 95% interval and a two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def share(values: Sequence[float], samples: int) -> Estimate:
    """Return the mean of per-problem shares in [0, 1] with its interval over problems.

    Wilson's score interval (1927). With only zeros and ones it is that of so many observations. With shares of several
    samples it is taken at an effective number of observations (Korn and Graubard 1998),

        n = p (1 - p) / Var(mean) * (z / t)^2,   Var(mean) from the spread between problems, t with P - 1 degrees,

    so that the samples of one problem count as one cluster; n is at most `samples` for each problem, as many as there
    would be if problems did not differ at all.

    Args:
        samples: independent samples behind each value: n for a share of n samples, n // k for pass@k and maj@k.

    Raises:
        UserError: no problem.
    """
    x = np.asarray(values, float)
    if not len(x):
        raise UserError("There is no problem to average over")
    p = float(x.mean())
    if np.isin(x, (0.0, 1.0)).all():
        return wilson(p, len(x))
    variance = float(x.var(ddof=1)) / len(x) if len(x) > 1 else 0.0
    n = min(len(x) * samples, p * (1 - p) / variance if variance else math.inf)
    return wilson(p, n * (Z / stats.t.ppf(0.975, len(x) - 1)) ** 2 if len(x) > 1 else 1)


def wilson(p: float, n: float) -> Estimate:
    """Return Wilson's score interval of a share `p` of `n` independent observations."""
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the unweighted mean of independent estimates (papers' "average" over benchmarks) with its interval.

    Limits by the method of variance estimates recovery (Zou and Donner 2008): each part's distance to its limit is
    added in squares, so that the mean inherits their skewness.
    """
    k = len(estimates)
    value = sum(e.value for e in estimates) / k
    below = math.sqrt(sum((e.value - e.low) ** 2 for e in estimates)) / k
    above = math.sqrt(sum((e.high - e.value) ** 2 for e in estimates)) / k
    return Estimate(value, value - below, value + above)


def independent_difference(a: Estimate, b: Estimate) -> Estimate:
    """Return b - a for results on independent problems or without per-problem results, Newcombe's (1998) interval."""
    value = b.value - a.value
    low = value - math.hypot(b.value - b.low, a.high - a.value)
    return Estimate(value, low, value + math.hypot(b.high - b.value, a.value - a.low))


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Return the chance that at least one of k samples is right, 1 - C(n-c, k) / C(n, k).

    The unbiased estimate of Chen et al. (2021), section 2.1, for one problem with c right of n samples.

    Raises:
        UserError: k is above n or below 1.
    """
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} needs between 1 and n samples; there are n = {samples}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at_k(verdicts: Sequence[bool], extracted: Sequence[str | None], k: int) -> float:
    """Return the chance that the most frequent answer of k samples is right, for one problem.

    The mean over disjoint blocks of k samples. Right samples are one answer, wrong ones are the same answer if they are
    equal as text or number (y + 2 and 2 + y are two, so that maj@k errs on the high side); a sample without an answer
    has no vote; a tie counts by the share of right answers in it.
    """
    if not 1 <= k <= len(verdicts):
        raise UserError(f"maj@{k} needs between 1 and n samples; there are n = {len(verdicts)}")
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
    """Return how much B is above A on the same problems, the mean over strata (benchmarks) of the mean difference.

    The interval is a percentile bootstrap over problems (within each stratum). The p-value is that of the test that
    flips, problem by problem, which model a result belongs to: exact where all differences have one size (one sample
    each in one stratum: McNemar's exact test) or at most 13 are not zero, else with 10,000 random flips, (hits + 1) /
    (flips + 1).

    Args:
        strata: per benchmark the per-problem figures of A and of B, in the same order.
    """
    differences = [np.asarray(b, float) - np.asarray(a, float) for a, b in strata]
    options = {"n_resamples": RESAMPLES, "batch": max(1, _AT_ONCE // sum(map(len, differences))), "rng": seed}
    low, high = stats.bootstrap(
        [np.resize(d, max(len(d), 2)) for d in differences],  # SciPy refuses a single problem; two alike vary no more
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
            lambda x, axis: np.abs(x.sum(axis)).round(12),  # rounded, so that equal sums count as equal
            permutation_type="samples",
            alternative="greater",
            **options,
        ).pvalue
    return Difference(float(weighted.sum()), float(low), float(high), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979): significant ones keep the family's error at the level."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, float)[order] * factors))
    result = np.empty(len(p_values))
    result[order] = corrected
    return [float(p) for p in result]
