"""Forms of credit that the learning benchmark compares and the package does not offer, as credit methods by name.

`register()` makes them known to `KTAEGRPOConfig(credit=NAME)` in this process.
"""

import torch
from torch import Tensor

from ktae_trl.credit import METHODS
from ktae_trl.credit.combine import Credit, Rollouts
from ktae_trl.credit.ktae import values as ktae
from ktae_trl.credit.ktae.association import fisher_p_table, information_gain_table


def scaled(rollouts: Rollouts, args, policy) -> Credit:
    """GRPO with advantages as large in the mean as KTAE's (`multiply`) here: A' = A mean|A_KTAE| / mean|A|.

    What KTAE gains over this, it does not gain by their size. (Adam hardly minds that, so this is close to GRPO.)
    """
    credit = ktae.assign(rollouts, args, policy)
    size = "ktae/advantage_ratio"
    larger, plain = credit.stats[size]
    ratio = torch.where(plain > 0, larger / plain.clamp(min=1e-12), 1.0)
    return Credit(ratio.expand_as(credit.values), "scale", {size: credit.stats[size]})


def shuffled(rollouts: Rollouts, args, policy) -> Credit:
    """KTAE with the labels of each group in random order: the same class splits, no information."""
    order = torch.rand(rollouts.correct_PG.shape, device=rollouts.correct_PG.device).argsort(1)
    return ktae.assign(rollouts._replace(correct_PG=rollouts.correct_PG.gather(1, order)), args, policy)


def centred(rollouts: Rollouts, args, policy) -> Credit:
    """KTAE less its mean over each rollout's tokens: within a rollout credit moves, none is added."""
    values, mask = ktae.assign(rollouts, args, policy).values, rollouts.own_rows(rollouts.mask_PGT)
    mean = (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return _credit(rollouts, args, (values - mean).clamp(-1, 1) * mask)


def supported(rollouts: Rollouts, args, policy) -> Credit:
    """KTAE with K = 0 for tokens that fewer than two rollouts of the group have."""
    return _dense_credit(rollouts, args, min_support=2)


def smoothed(rollouts: Rollouts, args, policy) -> Credit:
    """KTAE whose term frequencies count each token once more on each side, in the place of the 1e-5 of the ratio."""
    return _dense_credit(rollouts, args, smoothing=1.0)


def _credit(rollouts: Rollouts, args, values: Tensor) -> Credit:
    """Return these values of the own rollouts with metrics as those of KTAE."""
    r = rollouts
    table = ktae.key_token_table(r.ids_PGT, r.mask_PGT, r.correct_PG, scored=r.scored_PG, ignore_ids=r.special_ids)
    return Credit(values, args.ktae_combine, ktae._stats(rollouts, table, values, args.ktae_combine))


def _dense_credit(rollouts: Rollouts, args, **variant) -> Credit:
    values = torch.stack(
        [
            dense_values(*group, special_ids=rollouts.special_ids, **variant)
            for group in zip(rollouts.ids_PGT, rollouts.mask_PGT, rollouts.correct_PG, rollouts.scored_PG, strict=True)
        ]
    )
    return _credit(rollouts, args, rollouts.own_rows(values))


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
    """Return K of one group, (G, T), by tables as large as its largest id; without a variant, `key_token_values`'s."""
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
    METHODS.update(
        {
            "scaled": scaled,
            "shuffled": shuffled,
            "centred": centred,
            "supported": supported,
            "smoothed": smoothed,
        }
    )
