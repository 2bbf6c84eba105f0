"""Direction of a token: whether it is typical of the correct or of the wrong rollouts.

PyTorch evaluates these formulas for tensors, and numba compiles `direction` for the loop on a CPU (`loops`).
"""

from torch import Tensor

_SATURATION = 2.0  # k1 of the BM25-like term frequency in the authors' code
_LENGTH = 0.5  # b0
_EPSILON = 1e-5


def tf_norms(length_right: Tensor, length_wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm k1 (1 - b0 + b0 len / mean len) len of each side.

    TF = (k1 + 1) n / (n + norm) for n occurrences. The norm is clamped to at least 1, which makes TF 0 instead of NaN
    on a side without tokens and changes nothing else.
    """
    mean = (length_right + length_wrong).clamp(min=1) / 2
    return tuple(
        (_SATURATION * (1 - _LENGTH + _LENGTH * length / mean) * length).clamp(min=1)
        for length in (length_right, length_wrong)
    )


def direction(presence, tf_weight, count_right, count_wrong, norm_right, norm_wrong):
    """Return D = presence + h3 (TF_T / (TF_F + 1e-5) - TF_F / (TF_T + 1e-5)), for tensors or for numbers.

    Args:
        presence: asin sqrt(a / N_T) - asin sqrt(b / N_F).
        tf_weight: h3.
        count_right, count_wrong: occurrences of the token on each side.
        norm_right, norm_wrong: the norms of its group, from `tf_norms`.
    """
    tf_right = (_SATURATION + 1) * count_right / (count_right + norm_right)
    tf_wrong = (_SATURATION + 1) * count_wrong / (count_wrong + norm_wrong)
    return presence + tf_weight * (tf_right / (tf_wrong + _EPSILON) - tf_wrong / (tf_right + _EPSILON))
