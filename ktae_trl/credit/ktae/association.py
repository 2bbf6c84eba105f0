"""How strongly the presence of a token goes with a right answer: tables over every possible 2 x 2 count.

A token that occurs in `a` of the `n_right` right and `b` of the `n_wrong` wrong rollouts gives the table
`[[a, b], [n_right - a, n_wrong - b]]`. There are only `(n_right + 1) (n_wrong + 1)` of these, so both measures are
computed once per class split and looked up per token.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

# Two tables are equally likely if their probabilities agree to this relative tolerance. It lies far above the
# rounding of lgamma (1e-13) and below the closest two unequal probabilities of groups up to 64 (a test counts both).
_TIE = 1e-10


def _table_counts(n_right: int, n_wrong: int) -> tuple[Tensor, Tensor]:
    a = torch.arange(n_right + 1, dtype=torch.float64)[:, None]
    b = torch.arange(n_wrong + 1, dtype=torch.float64)[None, :]
    return a, b


def _log_binomial(n: Tensor | float, k: Tensor) -> Tensor:
    n = torch.as_tensor(n, dtype=torch.float64)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


@lru_cache(maxsize=4096)
def fisher_p_table(n_right: int, n_wrong: int) -> Tensor:
    """Return the two-sided p-value of Fisher's exact test for every `(a, b)`.

        p(a, b) = sum of P(a', b') over the tables with a' + b' = a + b and P(a', b') <= P(a, b),
        P(a, b) = C(n_right, a) C(n_wrong, b) / C(n_right + n_wrong, a + b)

    Source: the definition of `scipy.stats.fisher_exact(..., alternative="two-sided")`, ties included.

    Args:
        n_right, n_wrong: rollouts on each side, both at least 0.

    Returns:
        `(n_right + 1, n_wrong + 1)` float64 on the CPU. Where no table is more likely, p is exactly 1.
    """
    a, b = _table_counts(n_right, n_wrong)
    log_tables = _log_binomial(n_right, a) + _log_binomial(n_wrong, b)
    probability = (log_tables - _log_binomial(n_right + n_wrong, a + b)).exp()

    # Row k of `weights` holds the tables with a + b = k, column a; columns that no table has weigh nothing.
    k = torch.arange(n_right + n_wrong + 1)[:, None]
    column = torch.arange(n_right + 1)[None, :]
    other = k - column
    possible = (other >= 0) & (other <= n_wrong)
    weights = torch.where(possible, probability[column, other.clamp(0, n_wrong)], 0.0)

    # Sorted upwards, a table's p is the running sum at the last table that ties with it.
    weights, order = weights.sort(dim=1)
    running = weights.cumsum(dim=1)
    last = n_right
    tie_ends = torch.ones_like(possible)
    tie_ends[:, :-1] = weights[:, 1:] > weights[:, :-1] * (1 + _TIE)
    ends = torch.where(tie_ends, torch.arange(last + 1), last).flip(1).cummin(dim=1).values.flip(1)
    p = running.gather(1, ends) / running[:, -1:]  # the sum of all is 1 but for rounding
    p = torch.where(ends == last, 1.0, p)  # no rounding where the sum is over everything
    p = torch.empty_like(p).scatter_(1, order, p)
    return p[(a + b).long(), a.long().expand(-1, n_wrong + 1)]


@lru_cache(maxsize=4096)
def information_gain_table(n_right: int, n_wrong: int) -> Tensor:
    """Return the mutual information of correctness and presence, in bits, for every `(a, b)`.

        IG = H(Y) - (a + b) / G H(Y | present) - (c + d) / G H(Y | absent)

    Source: KTAE (arXiv 2505.16826).

    Returns:
        `(n_right + 1, n_wrong + 1)` float64 on the CPU, at least 0; 0 for a token that all or no rollouts have.
    """
    a, b = _table_counts(n_right, n_wrong)
    total = max(n_right + n_wrong, 1)

    def entropy(x: Tensor, y: Tensor) -> Tensor:
        """Entropy in bits of two classes of `x` and `y` members, times the share of all rollouts that these are."""
        n = (x + y).clamp(min=1)
        return (torch.special.entr(x / n) + torch.special.entr(y / n)) / math.log(2) * (x + y) / total

    whole = entropy(*(torch.tensor(n, dtype=torch.float64) for n in (n_right, n_wrong)))
    return (whole - entropy(a, b) - entropy(n_right - a, n_wrong - b)).clamp(min=0.0)
