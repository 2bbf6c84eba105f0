"""Combine rollout advantages with token values."""

import torch
from torch import Tensor

HOW = {
    "multiply": lambda advantages_B1, values_BT: advantages_B1 + advantages_B1.abs() * values_BT,
    "add": lambda advantages_B1, values_BT: advantages_B1 + values_BT,
    "scale": lambda advantages_B1, values_BT: advantages_B1 * values_BT,
    "replace": lambda advantages_B1, values_BT: values_BT,
}


def combine(advantages: Tensor, credit: Tensor, how: str) -> Tensor:
    """Compute the advantage A' of each token from the advantage A of its rollout and the value of the token.

        multiply   A' = A (1 + sign(A) K) = A + |A| K    signed values K in [-1, 1] (KTAE)
        add        A' = A + K                            signed values K (KTAE as in the authors' code)
        scale      A' = A w                              weights w >= 0 (OAR, KTAE's importance)
        replace    A' = v                                values v that are advantages (tree sampling)

    With `multiply` the factor of A lies in [0, 2], so A' never has the opposite sign of A, and A = 0 gives A' = 0.
    `add` can change the sign, and can give a rollout with A = 0 nonzero token advantages.

    Args:
        advantages: (B,) advantage of each rollout.
        credit: (B, T) value of each token.
        how: "multiply", "add", "scale" or "replace".

    Returns:
        (B, T) in the dtype of `credit`, without gradient.

    Raises:
        ValueError: `how` is unknown, or the shapes do not match.
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
