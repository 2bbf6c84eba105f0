"""What a credit method is given, what it returns, and how its values meet the rollout advantages."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rollouts(NamedTuple):
    """The whole groups of which a process holds at least one rollout, in the order of generation.

    P prompts, G rollouts each, T tokens at most. A process may hold a part of its first and last group only: `own`
    picks its B rollouts from the P * G.
    """

    ids_PGT: Tensor  # token ids
    mask_PGT: Tensor  # bool: tokens that are trained on (not padding, not tool output)
    correct_PG: Tensor  # bool: the final answer is right
    scored_PG: Tensor  # bool: the final answer could be judged
    advantages_B: Tensor  # rollout advantages of the own rollouts
    prompt_ids_BL: Tensor  # token ids of the own rollouts' prompts, padded on the left
    prompt_mask_BL: Tensor  # 1 where there is a prompt token
    lengths_B: Tensor  # tokens of the own rollouts, trained on or not
    special_ids: tuple[int, ...]  # padding and every end-of-sequence id
    own: slice

    def own_rows(self, x: Tensor) -> Tensor:
        """Turn (P, G, ...) into the (B, ...) of this process."""
        return x.flatten(0, 1)[self.own]


class Credit(NamedTuple):
    """What a credit method says about each token of this process's rollouts."""

    values: Tensor  # (B, T) float32, meaning as `how` says
    how: str  # one of HOW
    # Metric name -> (numerator, denominator), both 0-d. Processes are pooled by summing each before dividing.
    stats: dict[str, tuple[Tensor, Tensor]]


HOW = {
    "multiply": lambda advantages_B1, values_BT: advantages_B1 + advantages_B1.abs() * values_BT,
    "add": lambda advantages_B1, values_BT: advantages_B1 + values_BT,
    "scale": lambda advantages_B1, values_BT: advantages_B1 * values_BT,
    "replace": lambda advantages_B1, values_BT: values_BT,
}


def combine(advantages: Tensor, credit: Tensor, how: str) -> Tensor:
    """Give each token its advantage A' from its rollout's advantage A and its credit.

        multiply   A' = A (1 + sign(A) K) = A + |A| K    signed values K in [-1, 1] (KTAE)
        add        A' = A + K                            signed values K (KTAE as published)
        scale      A' = A w                              weights w >= 0 (OAR)
        replace    A' = v                                the values are advantages (tree sampling)

    `multiply` keeps the factor in [0, 2]: it never turns the sign of the rollout advantage, and a rollout with
    advantage 0 stays at 0. `add` can do both.

    Args:
        advantages: (B,) advantage of each rollout.
        credit: (B, T) value of each token.
        how: one of the four.

    Returns:
        (B, T) in the dtype of `credit`, without gradient.

    Raises:
        ValueError: unknown `how`, or shapes that do not fit.
    """
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(HOW)}, not {how!r}")
    if advantages.dim() != 1 or credit.dim() != 2 or len(advantages) != len(credit):
        raise ValueError(
            "combine needs advantages of shape (B,) and credit of shape (B, T), "
            f"not {tuple(advantages.shape)} and {tuple(credit.shape)}"
        )
    with torch.no_grad():
        return HOW[how](advantages.to(credit.dtype).unsqueeze(1), credit)
