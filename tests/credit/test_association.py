from itertools import pairwise
from math import comb

import numpy as np
import pytest
from scipy.stats import fisher_exact
from sklearn.metrics import mutual_info_score

from ktae_trl.credit.ktae.association import _TIE, fisher_p_table, information_gain_table

SPLITS_TO_16 = [(t, n - t) for n in range(1, 17) for t in range(n + 1)]


def scipy_p(n_right: int, n_wrong: int, a: int, b: int) -> float:
    return fisher_exact([[a, b], [n_right - a, n_wrong - b]])[1]


@pytest.mark.parametrize(("n_right", "n_wrong"), SPLITS_TO_16)
def test_fisher_equals_scipy_for_every_table(n_right, n_wrong):
    expected = [[scipy_p(n_right, n_wrong, a, b) for b in range(n_wrong + 1)] for a in range(n_right + 1)]
    np.testing.assert_allclose(fisher_p_table(n_right, n_wrong), expected, rtol=1e-12)


@pytest.mark.parametrize("group", [32, 64])
def test_fisher_equals_scipy_for_a_sample_of_large_groups(group):
    rng = np.random.default_rng(group)
    for n_right in rng.integers(1, group, 12):
        n_wrong = group - n_right
        table = fisher_p_table(int(n_right), int(n_wrong))
        for a, b in zip(rng.integers(0, n_right + 1, 40), rng.integers(0, n_wrong + 1, 40), strict=True):
            assert table[a, b].item() == pytest.approx(scipy_p(n_right, n_wrong, a, b), rel=1e-11)


def test_very_large_groups_stay_finite():
    table = fisher_p_table(700, 800)
    assert table.isfinite().all()
    assert table[300, 400].item() == pytest.approx(scipy_p(700, 800, 300, 400), rel=1e-8)


def test_p_is_exactly_one_where_no_table_is_more_likely():
    """The official code tests p != 1.0 on a rounded sum and so gives tokens without association a weight."""
    for n_right, n_wrong in [*SPLITS_TO_16, (20, 12), (32, 32)]:
        table = fisher_p_table(n_right, n_wrong)
        for a in range(n_right + 1):
            for b in range(n_wrong + 1):
                k = a + b
                weights = [comb(n_right, x) * comb(n_wrong, k - x) for x in range(k + 1)]  # comb is 0 past its end
                is_mode = comb(n_right, a) * comb(n_wrong, b) == max(weights)
                assert (table[a, b].item() == 1.0) == is_mode


def test_tolerance_of_ties_lies_between_rounding_and_the_closest_unequal_tables():
    """Exact integers up to groups of 64: no two unequal weights are nearer than 1e-4, so 1e-10 confuses none."""
    closest = 1.0
    for group in range(2, 65):
        for n_right in range(1, group):
            for k in range(group + 1):
                low, high = max(0, k - group + n_right), min(n_right, k)
                weights = sorted({comb(n_right, a) * comb(group - n_right, k - a) for a in range(low, high + 1)})
                closest = min(closest, *((y - x) / x for x, y in pairwise(weights)), 1.0)
    assert closest > 1e-4 > _TIE > 1e-12


@pytest.mark.parametrize(("n_right", "n_wrong"), [(1, 1), (3, 5), (8, 8), (15, 1), (20, 44)])
def test_information_gain_equals_scikit_learn(n_right, n_wrong):
    table = information_gain_table(n_right, n_wrong)
    labels = [1] * n_right + [0] * n_wrong
    for a in range(n_right + 1):
        for b in range(n_wrong + 1):
            present = [1] * a + [0] * (n_right - a) + [1] * b + [0] * (n_wrong - b)
            bits = mutual_info_score(labels, present) / np.log(2)
            assert table[a, b].item() == pytest.approx(bits, abs=1e-12)


def test_information_gain_is_one_bit_for_a_perfect_sign_and_never_negative():
    assert information_gain_table(8, 8)[8, 0].item() == pytest.approx(1.0, abs=1e-15)
    assert all((information_gain_table(t, 16 - t) >= 0).all() for t in range(17))
