"""Key-token values from earlier generations (`ktae_memory`): which tokens went with correct answers, over all groups.

One group has few rollouts, so K of a single group is mostly noise. Here the evidence of many groups is added up. Each
group is compared only with what is expected in it, so problems of different difficulty do not mix: d / var is Peto's
estimate of a log odds ratio over 2 x 2 tables (Yusuf et al. 1985, Prog. Cardiovasc. Dis. 27:335), here with a prior.
K is Yule's Q of it. It measures the size of an association, so it does not grow with the number of groups, as a test
statistic would. Its use for token credit is this package's own idea.

The evidence is a tensor (2, V): for each token id its surplus in correct rollouts, and the variance of this surplus.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ktae_trl.credit.ktae.values import key_token_table

PRIOR = 1.0  # added to the variance, so that a token seen in few groups has K near 0; a group of 8 has 0.25 to 0.57


def evidence(
    ids: Tensor,
    mask: Tensor,
    correct: Tensor,
    size: int,
    *,
    scored: Tensor | None = None,
    ignore_ids: Iterable[int] = (),
    weight_P: Tensor | None = None,
) -> Tensor:
    """Return the surplus of each token in the correct rollouts of its groups, and its variance, (2, size) float32.

        d_v   = sum over groups of (a - N_T n / N),  n = a + b
        var_v = sum over groups of N_T N_F n (N - n) / (N^2 (N - 1))

    N_T of the N rollouts of a group that vote are correct and N_F wrong, and the token is in a of the correct and b of
    the wrong ones. If the labels of a group say nothing about its texts, a is hypergeometric: d has mean 0 and this
    variance. A token that all rollouts of a group have, and a group with one side only, add nothing.

    Args:
        ids, mask, correct, scored, ignore_ids: see `key_token_table`.
        size: above all ids.
        weight_P: (P,) weight of each group, by default 1.
    """
    table = key_token_table(ids, mask, correct, scored=scored, ignore_ids=ignore_ids)
    group, token, a, b = table.group.long(), table.token.long(), table.a.float(), table.b.float()
    n_right, n_wrong = table.n_right[group].float(), table.n_wrong[group].float()
    n, N = a + b, n_right + n_wrong
    added = torch.stack([a - n_right * n / N, n_right * n_wrong * n * (N - n) / (N.square() * (N - 1))])
    if weight_P is not None:
        added *= weight_P[group]
    return added.new_zeros(2, size).index_add_(1, token, added)


def later(evidence_2V: Tensor, new_2V: Tensor, memory: float) -> Tensor:
    """Return the evidence after another generation: what came before counts `memory` times as much."""
    return memory * evidence_2V + new_2V


def values(evidence_2V: Tensor, ids: Tensor) -> Tensor:
    """Return K of each id, in the shape of `ids`, float32 in (-1, 1).

        K = 2 sigmoid(d / (var + 1)) - 1 = (OR - 1) / (OR + 1),  OR = exp(d / (var + 1)): the odds ratio

    It is 0 for a token without evidence.
    """
    surplus_V, variance_V = evidence_2V
    return torch.tanh(surplus_V / (variance_V + PRIOR) / 2)[ids.long()]
