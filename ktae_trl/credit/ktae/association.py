"""Association between the presence of a token and a correct answer, for every possible 2 x 2 table of counts.

A token that occurs in `a` of the `n_right` correct and `b` of the `n_wrong` wrong rollouts gives the table
`[[a, b], [n_right - a, n_wrong - b]]`. A split `(n_right, n_wrong)` has only `(n_right + 1) (n_wrong + 1)` such tables,
so both measures are computed once per split and looked up for each token.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

# Two tables count as equally likely if their probabilities agree to this relative tolerance. It is far above the
# rounding error of lgamma (1e-13) and below the closest two unequal probabilities of groups of up to 64 rollouts.
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
        n_right, n_wrong: number of correct and of wrong rollouts, at least 0 each.

    Returns:
        `(n_right + 1, n_wrong + 1)` float64 on the CPU. p is exactly 1 where no other table is more likely.
    """
    a, b = _table_counts(n_right, n_wrong)
    log_tables = _log_binomial(n_right, a) + _log_binomial(n_wrong, b)
    probability = (log_tables - _log_binomial(n_right + n_wrong, a + b)).exp()

    # Row k, column a of `weights` holds the probability of the table with a + b = k. Impossible tables have 0.
    k = torch.arange(n_right + n_wrong + 1)[:, None]
    column = torch.arange(n_right + 1)[None, :]
    other = k - column
    possible = (other >= 0) & (other <= n_wrong)
    weights = torch.where(possible, probability[column, other.clamp(0, n_wrong)], 0.0)

    # In ascending order, the p of a table is the running sum up to the last table that ties with it.
    weights, order = weights.sort(dim=1)
    running = weights.cumsum(dim=1)
    last = n_right
    tie_ends = torch.ones_like(possible)
    tie_ends[:, :-1] = weights[:, 1:] > weights[:, :-1] * (1 + _TIE)
    ends = torch.where(tie_ends, torch.arange(last + 1), last).flip(1).cummin(dim=1).values.flip(1)
    p = running.gather(1, ends) / running[:, -1:]  # the total is 1 up to rounding
    p = torch.where(ends == last, 1.0, p)  # exactly 1 where all tables are summed
    p = torch.empty_like(p).scatter_(1, order, p)
    return p[(a + b).long(), a.long().expand(-1, n_wrong + 1)]


@lru_cache(maxsize=4096)
def information_gain_table(n_right: int, n_wrong: int) -> Tensor:
    """Return the information gain for every `(a, b)`: the mutual information of correctness and presence, in bits.

        IG = H(Y) - (a + b) / G H(Y | present) - (c + d) / G H(Y | absent),
        c = n_right - a, d = n_wrong - b, G = n_right + n_wrong

    Source: the authors' code of KTAE (arXiv 2505.16826).

    Args:
        n_right, n_wrong: number of correct and of wrong rollouts, at least 0 each.

    Returns:
        `(n_right + 1, n_wrong + 1)` float64 on the CPU, at least 0. It is 0 for a token that occurs in all rollouts or
        in none.
    """
    a, b = _table_counts(n_right, n_wrong)
    total = max(n_right + n_wrong, 1)

    def entropy(x: Tensor, y: Tensor) -> Tensor:
        """Entropy in bits of two classes with `x` and `y` members, weighted by their share of all rollouts."""
        n = (x + y).clamp(min=1)
        return (torch.special.entr(x / n) + torch.special.entr(y / n)) / math.log(2) * (x + y) / total

    whole = entropy(*(torch.tensor(n, dtype=torch.float64) for n in (n_right, n_wrong)))
    return (whole - entropy(a, b) - entropy(n_right - a, n_wrong - b)).clamp(min=0.0)
