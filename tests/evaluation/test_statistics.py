"""Against SciPy, statsmodels, slow loops and simulation."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from ktae_trl.evaluation.statistics import (
    Estimate,
    holm,
    independent_difference,
    majority_at_k,
    mean_of,
    paired_difference,
    pass_at_k,
    share,
    wilson,
)

counts = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts)
def test_one_sample_a_problem_gives_wilson_intervals(count):
    right, n = count
    estimate = share([1.0] * right + [0.0] * (n - right), 1)
    assert estimate.value == pytest.approx(right / n)
    assert estimate[1:] == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-9)
    ours = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert estimate[1:] == pytest.approx((ours.low, ours.high), abs=1e-9)


def test_samples_of_one_problem_are_no_independent_observations():
    rng = np.random.default_rng(0)
    right = (rng.random((100, 8)) < rng.random((100, 1))).astype(float)
    clustered, naive = share(right.mean(1), 8), share(right.ravel(), 1)
    one_each = share(right[:, 0], 1)
    assert clustered.value == pytest.approx(naive.value)
    assert naive.high - naive.low < clustered.high - clustered.low < one_each.high - one_each.low
    copied = share(np.repeat(right[:, :1], 8, axis=1).mean(1), 8)  # eight copies of a sample are worth one
    assert copied == one_each


@pytest.mark.parametrize(
    ("problems", "samples", "k", "difficulty"),
    [
        (30, 1, 1, (0.6, 0.9)),
        (30, 8, 1, (0.6, 0.9)),
        (200, 4, 1, (0.6, 0.9)),
        (10, 8, 1, (0.3, 0.6)),
        (30, 16, 1, (1e6, 1e6)),  # problems of the same difficulty
        (30, 16, 8, (2, 2)),
        (83, 8, 4, (3, 1)),
    ],
)
def test_the_intervals_cover(problems, samples, k, difficulty):
    """Problems drawn anew 1,500 times: 95 of 100 intervals of avg@n and pass@k hold the truth (or a few more)."""
    rng = np.random.default_rng(1)
    truth = float(np.mean(1 - (1 - rng.beta(*difficulty, 10**6)) ** k))
    chances = rng.beta(*difficulty, (1500, problems))
    table = np.array([pass_at_k(c, samples, k) for c in range(samples + 1)])
    intervals = [share(table[right], samples // k) for right in rng.binomial(samples, chances)]
    covered = np.mean([e.low <= truth <= e.high for e in intervals])
    assert 0.935 < covered < 0.99


def test_degenerate_shares():
    assert share([1.0] * 30, 8) == pytest.approx((1.0, *proportion_confint(30, 30, method="wilson")))
    assert share([0.0] * 30, 8).low == 0
    nearly = share([0.5] * 29 + [0.5001], 2)  # no spread seen: at most as many observations as samples
    assert share([0.5] * 30, 2) == pytest.approx(nearly, abs=1e-4)
    assert share([0.5] * 30, 2).high - 0.5 > wilson(0.5, 60).high - 0.5
    assert share([0.5], 2).high - 0.5 > 0.3
    with pytest.raises(ValueError, match="there are no problems"):
        share([], 1)


def test_the_mean_of_benchmarks_covers():
    rng = np.random.default_rng(2)
    truths = [(30, 0.25), (83, 0.6), (500, 0.8)]
    hits = 0
    for _ in range(2000):
        estimate = mean_of([wilson(rng.binomial(n, p) / n, n) for n, p in truths])
        hits += estimate.low <= sum(p for _, p in truths) / 3 <= estimate.high
    assert 0.93 < hits / 2000 < 0.97


@given(counts, counts)
def test_independent_differences_are_newcombe_s(a, b):
    difference = independent_difference(wilson(a[0] / a[1], a[1]), wilson(b[0] / b[1], b[1]))
    expected = confint_proportions_2indep(*b, *a, method="newcomb", compare="diff")
    assert difference.value == pytest.approx(b[0] / b[1] - a[0] / a[1])
    assert difference[1:] == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(case):
    right, n, k = case
    subsets = list(combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(right, n, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_k_above_n():
    with pytest.raises(ValueError, match=r"k of pass@k must be between 1 and the number of samples \(4\), not 5"):
        pass_at_k(1, 4, 5)
    with pytest.raises(ValueError, match=r"k of maj@k .* \(4\), not 5"):
        majority_at_k([True] * 4, ["1"] * 4, 5)


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"),
    [
        (["1", "1", "2"], "1", 3, 1),
        (["2", "1", "2"], "1", 3, 0),
        (["1", "2"], "1", 2, 0.5),  # a tie
        (["1", "2", "3"], "1", 3, 1 / 3),
        (["1", "2", "2.0", "1", "\\frac{4}{2}"], "1", 5, 0),  # 2, 2.0 and 4/2 are one answer
        ([None, None, "1"], "1", 3, 1),  # no answer, no vote
        ([None, None], "1", 2, 0),
        (["1", "1", "2", "2"], "1", 2, 0.5),  # two blocks
        (["1", "2", "2"], "1", 1, 1 / 3),
    ],
)
def test_majority(answers, right, k, expected):
    assert majority_at_k([a == right for a in answers], answers, k) == pytest.approx(expected)


def test_right_samples_are_one_answer_however_written():
    assert majority_at_k([True, True, False, False, False], ["x+1", "1+x", "x", "y", "z"], 5) == 1


def samples(n: int, effect: float, several: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    difficulty = rng.random((n, 1)) * 0.7
    return tuple((rng.random((n, several)) < difficulty + e).mean(1) for e in (0, effect))


@pytest.mark.parametrize("seed", range(4))
def test_one_sample_each_is_mcnemar_s_exact_test(seed):
    a, b = samples(60, 0.1, 1, seed)
    table = [[np.sum((a == x) & (b == y)) for y in (1, 0)] for x in (1, 0)]
    assert paired_difference([(a, b)]).p == pytest.approx(mcnemar(table, exact=True).pvalue)


def exact_p(a: np.ndarray, b: np.ndarray, several: int) -> float:
    """The p-value of all flips, by the distribution of a sum of integers with random signs."""
    sizes = np.abs(np.rint((b - a) * several)).astype(int)
    chances = np.ones(1)
    for size in sizes:
        longer = np.zeros(len(chances) + 2 * size)
        longer[: len(chances)] += chances / 2
        longer[2 * size :] += chances / 2
        chances = longer
    sums = np.abs(np.arange(len(chances)) - sizes.sum())
    return chances[sums >= abs(np.rint((b - a) * several).sum())].sum()


def bootstrap(*differences: np.ndarray) -> np.ndarray:
    """The interval by 100,000 resamples of each benchmark."""
    rng = np.random.default_rng(7)
    means = [np.array([d[rng.integers(len(d), size=(1000, len(d)))].mean(1) for _ in range(100)]) for d in differences]
    return np.quantile(np.mean(means, axis=0), [0.025, 0.975])


@pytest.mark.parametrize(("problems", "several"), [(6, 2), (11, 6), (13, 6), (13, 7)])
def test_the_p_value_of_few_problems_is_exact(problems, several):
    for seed in range(20):
        a, b = samples(problems, 0.1, several, seed)
        assert paired_difference([(a, b)]).p == pytest.approx(exact_p(a, b, several), abs=1e-12)


def test_sums_that_are_equal_but_for_rounding_count_as_equal():
    """The sum seen is the least there can be (one sample of 24 on 300 problems), so no flip has a smaller one."""
    a, b = samples(300, 0, 24, 74)
    assert abs(np.rint((b - a) * 24).sum()) == 1
    assert paired_difference([(a, b)]).p == 1


@pytest.mark.parametrize("seed", range(3))
def test_several_samples_agree_with_loops(seed):
    a, b = samples(80, 0.05, 6, seed)
    found = paired_difference([(a, b)])
    assert found.value == pytest.approx(np.mean(b - a))
    assert (found.low, found.high) == pytest.approx(bootstrap(b - a), abs=0.004)
    assert found.p == pytest.approx(exact_p(a, b, 6), abs=0.015)


def test_benchmarks_count_alike_whatever_their_size():
    """A mean of benchmarks with 20 and 400 problems."""
    small, large = samples(20, 0.2, 4, 5), samples(400, 0.0, 4, 6)
    found = paired_difference([small, large])
    differences = [b - a for a, b in (small, large)]
    assert found.value == pytest.approx(np.mean([d.mean() for d in differences]))
    assert (found.low, found.high) == pytest.approx(bootstrap(*differences), abs=0.002)


def test_a_single_problem_does_not_vary():
    """By itself, and as one benchmark of two."""
    one, other = (np.zeros(1), np.ones(1)), samples(50, 0.1, 4, 0)
    assert paired_difference([one]) == (1, 1, 1, 1)
    alone, both = paired_difference([other]), paired_difference([one, other])
    assert both[:3] == pytest.approx([(1 + x) / 2 for x in alone[:3]], abs=0.004)


def test_the_p_values_are_uniform_without_a_difference():
    p = [paired_difference([samples(15, 0, 3, seed), samples(25, 0, 3, 1000 + seed)], seed).p for seed in range(100)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_no_difference_at_all():
    a = np.array([1.0, 0.0, 1.0])
    assert paired_difference([(a, a)]) == (0, 0, 0, 1)


@pytest.mark.parametrize("number", [1, 2, 5, 20])
def test_holm(number):
    p_values = np.random.default_rng(number).random(number).round(1) / number  # with ties
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_an_estimate_is_a_tuple_for_json():
    assert list(Estimate(0.5, 0.4, 0.6)) == [0.5, 0.4, 0.6]
