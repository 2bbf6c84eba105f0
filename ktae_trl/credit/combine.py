"""How the values of tokens meet the rollout advantages."""

import torch
from torch import Tensor

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
