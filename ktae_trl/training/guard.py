"""What is not finite (NaN, infinite): a step is skipped, weights are never saved, rewards are refused."""

import logging
import math
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ktae_trl.arguments import UserError

IN_A_ROW = 3  # skipped steps that end a training: the next ones would be no better
logger = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """Training cannot go on with these weights or gradients. Raised by all processes alike."""


class Guard:
    """Decides in a training which optimizer steps are taken.

    Args:
        says_so: whether this process warns of a step that is skipped.

    Attributes:
        skipped: steps that were skipped so far.
    """

    def __init__(self, says_so: bool = True):
        self.says_so = says_so
        self.skipped = 0
        self._in_a_row = 0

    def allows(self, step: int, grad_norm: float | None) -> bool:
        """Return whether a step can be taken with a gradient of this norm; None if DeepSpeed was told not to take it.

        Raises:
            NotFiniteError: it is the last of `IN_A_ROW` steps that cannot.
        """
        if grad_norm is None or math.isfinite(grad_norm := float(grad_norm)):
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise NotFiniteError(
                f"{IN_A_ROW} steps in a row ({step - IN_A_ROW + 1} to {step}) had a loss or a gradient that is not "
                f"finite (gradient norm {grad_norm}). They were skipped, and the weights are as before. Look at the "
                "rewards of the last steps; lower max_grad_norm, or start a new run from the model of a checkpoint "
                "(--model_name_or_path) with a lower learning_rate, which a resumed run does not take up"
            )
        if self.says_so:
            logger.warning(
                "Step %d was skipped: its loss or its gradient is not finite (gradient norm %s). After %d such steps "
                "in a row training stops.",
                *(step, grad_norm, IN_A_ROW),
            )
        return False


def or_nan(loss: Tensor) -> Tensor:
    """Return the loss as it is; one that is not finite gets gradients of NaN.

    So the norm of the gradients, which all processes share, tells of the loss of any of them.
    """
    return loss * torch.where(loss.isfinite(), loss.new_ones(()), math.nan)


def check_weights(model: nn.Module, what: str) -> bool:
    """Return whether all trained weights that this process holds are finite; one warning names the first that is not.

    Args:
        what: what is not saved if they are not.
    """
    trained = [(name, _own_part(p)) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return True
    # A sum is not finite if one of its terms is not, and takes a twentieth of the time of `isfinite`. It may overflow,
    # so it only says where to look. The device is waited for once.
    first = trained[0][1].device  # a model may lie on several
    sums = torch.stack([weights.sum(dtype=torch.float32).to(first) for _, weights in trained]).tolist()
    suspects = [part for part, total in zip(trained, sums, strict=True) if not math.isfinite(total)]
    bad = [name for name, weights in suspects if not weights.isfinite().all()]
    if bad:
        logger.warning("%s is not saved: %d weights are not finite, the first is %s.", what, len(bad), bad[0])
    return not bad


def require_finite(model: nn.Module, what: object, step: int, *, together: bool) -> None:
    """Raise NotFiniteError instead of saving weights that are not finite.

    Args:
        what: is to be saved.
        step: of the optimizer, for the message.
        together: all processes ask, so that all raise it; each may hold a part of its own (ZeRO-3, FSDP).
    """
    finite = check_weights(model, str(what))
    if together:
        finite = all(gather_object([finite]))
    if not finite:
        raise NotFiniteError(
            f"at step {step} some weights are not finite. Start a new run from the model of an earlier checkpoint "
            "(--model_name_or_path) with a lower learning_rate"
        )


def _own_part(parameter: nn.Parameter) -> Tensor:
    """Return the weights that this process holds: all, or its shard (ZeRO-3, FSDP)."""
    shard = getattr(parameter, "ds_tensor", parameter)
    return shard.to_local() if hasattr(shard, "to_local") else shard


def check_rewards(rewards: Tensor, names: Sequence[str]) -> None:
    """Refuse infinite rewards, which make NaN of the advantages of their group.

    Args:
        rewards: (rollouts, reward functions), NaN where a function gave none.

    Raises:
        ValueError: with the name of the function.
    """
    bad = rewards.isinf().nonzero().tolist()
    if bad:
        row, function = bad[0]
        raise UserError(
            f"The reward function {names[function]!r} returned {rewards[row, function].item()} for rollout {row} of "
            f"{len(rewards)}: a reward must be finite, or None where there is none"
        )
