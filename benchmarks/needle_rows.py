"""The methods that the needle benchmark compares: rollouts -> token advantages.

To add a method, write a function of `Rollouts` that returns advantages (S, G, T), and name it in `ROWS`. A group is a
prompt of the package's functions, so the S groups are passed as (P, G, T).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from variants import Smoothed, Supported, dense_values

from ktae_trl.credit import gtpo as gtpo_credit
from ktae_trl.credit import otb as otb_credit
from ktae_trl.credit.combine import combine
from ktae_trl.credit.ktae import memory
from ktae_trl.credit.ktae.values import importance_weights, key_token_strengths, key_token_values
from ktae_trl.credit.method import both_sides
from ktae_trl.credit.tree import Shape, advantages_by_depth, token_advantages

MEMORY = 0.9  # `ktae_memory`


class Rollouts(NamedTuple):
    """One group of G rollouts of each of S policies."""

    ids_SGT: Tensor
    mask_SGT: Tensor  # bool: trained tokens; not all in trees, whose rollouts share tokens
    decides_T: Tensor  # bool: the tokens that matter
    success_SGK: Tensor  # bool: whether each step succeeded
    order_SG: Tensor  # random numbers, to shuffle the labels
    logps_STGV: Tensor | None = None  # log-probabilities of all tokens at each position, -inf for those not allowed

    @property
    def correct_SG(self) -> Tensor:  # noqa: N802
        return self.success_SGK.all(-1)

    @property
    def advantages_SG(self) -> Tensor:  # noqa: N802
        """Return GRPO's rollout advantages, as TRL computes them from rewards of 0 and 1."""
        return standardized(self.correct_SG.float())

    @property
    def logps_SGT(self) -> Tensor:  # noqa: N802
        """Return the log-probability of each token."""
        return self.logps_STGV.gather(-1, self.ids_SGT.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)

    @property
    def entropies_SGT(self) -> Tensor:  # noqa: N802
        """Return the entropy of the distribution at each position, in nats."""
        return torch.special.entr(self.logps_STGV.exp()).sum(-1).transpose(1, 2)

    @property
    def squares_SGT(self) -> Tensor:  # noqa: N802
        """Return the sum of the squared probabilities at each position."""
        return (2 * self.logps_STGV).exp().sum(-1).transpose(1, 2)


def standardized(rewards_SG: Tensor) -> Tensor:
    """Return (r - mean) / (std + 1e-4) over each group, with the unbiased standard deviation, as TRL does."""
    return (rewards_SG - rewards_SG.mean(1, keepdim=True)) / (rewards_SG.std(1, keepdim=True) + 1e-4)


def combined(rollouts: Rollouts, values_SGT: Tensor, how: str) -> Tensor:
    """Return the package's combination of rollout advantages and token values, (S, G, T)."""
    return combine(rollouts.advantages_SG.flatten(), values_SGT.flatten(0, 1), how).view_as(values_SGT)


def grpo(rollouts: Rollouts) -> Tensor:
    return rollouts.advantages_SG[..., None].expand(rollouts.ids_SGT.shape)


def ktae(rollouts: Rollouts, how: str, *, leave_one_out: bool = False, shuffled: bool = False) -> Tensor:
    """KTAE with `ktae_combine` "multiply" or "add"; `shuffled`: with the labels of each group in random order."""
    correct_SG = rollouts.correct_SG
    if shuffled:
        correct_SG = correct_SG.gather(1, rollouts.order_SG.argsort(1))
    values = key_token_values(rollouts.ids_SGT, rollouts.mask_SGT, correct_SG, leave_one_out=leave_one_out)
    return combined(rollouts, values, how)


def without_term_frequencies(rollouts: Rollouts) -> Tensor:
    """KTAE with `ktae_tf_weight` 0."""
    values = key_token_values(rollouts.ids_SGT, rollouts.mask_SGT, rollouts.correct_SG, tf_weight=0.0)
    return combined(rollouts, values, "multiply")


def dense(rollouts: Rollouts, variant: dict[str, float]) -> Tensor:
    """KTAE with a variant of the formula, see variants.py."""
    graded_SG = torch.ones_like(rollouts.correct_SG)
    groups = zip(rollouts.ids_SGT, rollouts.mask_SGT, rollouts.correct_SG, graded_SG, strict=True)
    return combined(rollouts, torch.stack([dense_values(*group, **variant) for group in groups]), "multiply")


def by_step(rollouts: Rollouts) -> Tensor:
    """KTAE in which a token in one step of the completion and the same token in another step are different tokens."""
    T, K = rollouts.ids_SGT.shape[2], rollouts.success_SGK.shape[2]
    step_T = torch.arange(T) * K // T
    ids_SGT = rollouts.ids_SGT * K + step_T
    return combined(rollouts, key_token_values(ids_SGT, rollouts.mask_SGT, rollouts.correct_SG), "multiply")


class Remembering:
    """KTAE with `ktae_memory`. One object per training: it remembers the groups of earlier steps."""

    def __init__(self, how: str):
        self.how, self.evidence_2N = how, None

    def __call__(self, rollouts: Rollouts) -> Tensor:
        S, V = len(rollouts.ids_SGT), rollouts.logps_STGV.shape[-1]
        ids_SGT = rollouts.ids_SGT + V * torch.arange(S)[:, None, None]  # each policy has its own evidence
        if self.evidence_2N is None:
            self.evidence_2N = torch.zeros(2, S * V)
        mixed_S11 = both_sides(rollouts.mask_SGT, rollouts.correct_SG)[:, None, None]
        values = memory.values(self.evidence_2N, ids_SGT) * mixed_S11
        new_2N = memory.evidence(ids_SGT, rollouts.mask_SGT, rollouts.correct_SG, S * V)
        self.evidence_2N = memory.later(self.evidence_2N, new_2N, MEMORY)
        return combined(rollouts, values, self.how)


def importance(rollouts: Rollouts, *, leave_one_out: bool = False) -> Tensor:
    """KTAE with `ktae_combine` "importance"."""
    strengths = key_token_strengths(
        rollouts.ids_SGT, rollouts.mask_SGT, rollouts.correct_SG, leave_one_out=leave_one_out
    )
    weights = importance_weights(strengths.flatten(0, 1), rollouts.mask_SGT.flatten(0, 1), beta=1.0)
    return combined(rollouts, weights.view_as(strengths), "scale")


def tree(rollouts: Rollouts) -> Tensor:
    """TreeRPO with two segments per node, three levels, and one step of the completion per segment."""
    K, T = rollouts.success_SGK.shape[2], rollouts.ids_SGT.shape[2]
    shape = Shape(2, K, T // K)
    nodes = advantages_by_depth(rollouts.correct_SG.float(), shape.branching, 0.1, "bernoulli")
    return token_advantages(nodes, shape, T) * rollouts.mask_SGT


def gtpo(rollouts: Rollouts) -> Tensor:
    """GTPO with `gtpo_normalize` "group"."""
    graded_SG = torch.ones_like(rollouts.correct_SG)
    return gtpo_credit.token_advantages(rollouts.entropies_SGT, rollouts.mask_SGT, rollouts.correct_SG, graded_SG)


def otb(rollouts: Rollouts) -> Tensor:
    """OTB, the optimal token baseline."""
    energies = otb_credit.energies(rollouts.logps_SGT.exp(), rollouts.squares_SGT, rollouts.mask_SGT)
    return otb_credit.token_advantages(rollouts.advantages_SG, energies, rollouts.mask_SGT)


def oracle(rollouts: Rollouts) -> Tensor:
    """GRPO's advantage on the tokens that matter, 0 on all others."""
    return grpo(rollouts) * rollouts.decides_T


def oracle_steps(rollouts: Rollouts) -> Tensor:
    """On each decision, the advantage of its own step: the reward is the success of this step alone."""
    success_SGK = rollouts.success_SGK.float()
    S, G, T = rollouts.ids_SGT.shape
    advantages = torch.zeros(S, G, T)
    advantages[..., rollouts.decides_T] = standardized(success_SGK)
    return advantages


def anti_oracle(rollouts: Rollouts) -> Tensor:
    """GRPO's advantage on all tokens but those that matter."""
    return grpo(rollouts) * ~rollouts.decides_T


class Row(NamedTuple):
    """A method: its token advantages, and whether rollouts are sampled as trees."""

    advantages: Callable[[Rollouts], Tensor]
    tree: bool = False
    remembers: bool = False  # `advantages` is a class; each training has an object of it

    def begin(self) -> Callable[[Rollouts], Tensor]:
        """Return the function of token advantages for one training."""
        return self.advantages() if self.remembers else self.advantages


ROWS = {
    "grpo": Row(grpo),
    "multiply": Row(partial(ktae, how="multiply")),
    "add": Row(partial(ktae, how="add")),
    "importance": Row(importance),
    "multiply_loo": Row(partial(ktae, how="multiply", leave_one_out=True)),
    "add_loo": Row(partial(ktae, how="add", leave_one_out=True)),
    "importance_loo": Row(partial(importance, leave_one_out=True)),
    "multiply_no_tf": Row(without_term_frequencies),
    "multiply_supported": Row(partial(dense, variant=Supported.variant)),
    "multiply_smoothed": Row(partial(dense, variant=Smoothed.variant)),
    "multiply_by_step": Row(by_step),
    "multiply_memory": Row(partial(Remembering, "multiply"), remembers=True),
    "add_memory": Row(partial(Remembering, "add"), remembers=True),
    "gtpo": Row(gtpo),
    "otb": Row(otb),
    "tree": Row(tree, tree=True),
    "multiply_shuffled": Row(partial(ktae, how="multiply", shuffled=True)),
    "add_shuffled": Row(partial(ktae, how="add", shuffled=True)),
    "oracle": Row(oracle),
    "oracle_steps": Row(oracle_steps),
    "anti_oracle": Row(anti_oracle),
}
