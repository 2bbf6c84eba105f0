"""Credit methods for the learning benchmark that are not part of the package.

After `register()`, `KTAEGRPOConfig(credit=NAME)` accepts them in this process.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ktae_trl.credit import METHODS
from ktae_trl.credit.ktae.association import fisher_p_table, information_gain_table
from ktae_trl.credit.ktae.method import KTAE, sums
from ktae_trl.credit.method import Credit, Groups


class Scaled(KTAE):
    """GRPO with advantages scaled to the mean size of KTAE's (`multiply`): A' = A mean|A_KTAE| / mean|A|.

    A gain of KTAE over this method is not due to the size of its advantages. Adam is nearly invariant to that size, so
    this method is close to GRPO.
    """

    name = "scaled"

    def __init__(self, settings, tools):
        super().__init__(settings, tools)
        self.how = "scale"

    def credit(self, groups: Groups) -> Credit:
        credit = super().credit(groups)
        size = "ktae/advantage_ratio"
        larger, plain = credit.sums[size]
        ratio = torch.where(plain > 0, larger / plain.clamp(min=1e-12), 1.0)
        return Credit(ratio.expand_as(credit.values_BT), {size: credit.sums[size]})


class Shuffled(KTAE):
    """KTAE with shuffled labels in each group: the same numbers of correct and wrong rollouts, but no information."""

    name = "shuffled"

    def credit(self, groups: Groups) -> Credit:
        order = torch.rand(groups.correct_PG.shape, device=groups.correct_PG.device).argsort(1)
        return super().credit(groups._replace(correct_PG=groups.correct_PG.gather(1, order)))


class Centred(KTAE):
    """KTAE minus its mean over each rollout's tokens: credit moves within a rollout, but none is added."""

    name = "centred"

    def credit(self, groups: Groups) -> Credit:
        values, mask = super().credit(groups).values_BT, groups.mask_BT
        mean = (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        return _credit(groups, self.how, (values - mean).clamp(-1, 1) * mask)


class Dense(KTAE):
    """KTAE computed with tables over the vocabulary, with a variant of the formula."""

    variant: ClassVar[dict[str, float]]

    def credit(self, groups: Groups) -> Credit:
        some = zip(groups.ids_PGT, groups.mask_PGT, groups.correct_PG, groups.scored_PG, strict=True)
        values = [dense_values(*group, special_ids=groups.special_ids, **self.variant) for group in some]
        return _credit(groups, self.how, groups.own_rows(torch.stack(values)))


class Supported(Dense):
    """KTAE with K = 0 for tokens that occur in fewer than two rollouts of the group."""

    name = "supported"
    variant = {"min_support": 2}


class Smoothed(Dense):
    """KTAE with add-one smoothing: each side counts each token once more, instead of the 1e-5 in the ratio."""

    name = "smoothed"
    variant = {"smoothing": 1.0}


def _credit(groups: Groups, how: str, values_BT: Tensor) -> Credit:
    """Return the credit of this process's rollouts, with KTAE's metrics."""
    return Credit(values_BT, sums(groups, values_BT, how))


def dense_values(
    ids_GT: Tensor,
    mask_GT: Tensor,
    correct_G: Tensor,
    scored_G: Tensor,
    *,
    special_ids: tuple[int, ...] = (),
    min_support: int = 1,
    smoothing: float = 0.0,
) -> Tensor:
    """Return K of one group, (G, T), from tables as large as its largest id.

    With the default `min_support` and `smoothing`, it equals `key_token_values`.
    """
    votes = mask_GT.any(1) & scored_G
    right, wrong = votes & correct_G, votes & ~correct_G
    n_right, n_wrong = int(right.sum()), int(wrong.sum())
    if not (n_right and n_wrong):
        return torch.zeros(ids_GT.shape, device=ids_GT.device)
    count_GV = torch.zeros(len(ids_GT), int(ids_GT.max()) + 1, device=ids_GT.device)
    count_GV.scatter_add_(1, ids_GT.long(), mask_GT.float())
    sides = [count_GV[side] for side in (right, wrong)]
    a, b = ((side > 0).sum(0) for side in sides)
    lengths = [side.sum() for side in sides]
    tf = []
    for side, length in zip(sides, lengths, strict=True):
        f = (side.sum(0) + smoothing) / length
        tf.append(3 * f / (f + 2 * (0.5 + 0.5 * length / (sum(lengths) / 2))))
    epsilon = 0.0 if smoothing else 1e-5
    direction = (a / n_right).sqrt().asin() - (b / n_wrong).sqrt().asin()
    direction += tf[0] / (tf[1] + epsilon) - tf[1] / (tf[0] + epsilon)
    p, gain = (
        table(n_right, n_wrong)[a.cpu(), b.cpu()].to(a.device) for table in (fisher_p_table, information_gain_table)
    )
    strength = (torch.where(p == 1, 0.0, torch.exp(-2 * p)) + gain) / 2
    values = torch.tanh(strength * direction / 2).float() * (a + b >= max(min_support, 1))
    values[[special for special in special_ids if special < len(values)]] = 0
    return values[ids_GT.long()] * (mask_GT & votes[:, None])


def register() -> None:
    METHODS.update({method.name: method for method in (Scaled, Shuffled, Centred, Supported, Smoothed)})
