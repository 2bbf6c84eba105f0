"""Guards against NaN and infinite values: skips optimizer steps, refuses to save weights, rejects rewards."""

import logging
import math
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ktae_trl.arguments import UserError

IN_A_ROW = 3  # training ends after this many consecutive skipped steps
logger = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """Training cannot continue with these weights or gradients. Raised on all processes."""


class Guard:
    """Decides which optimizer steps are taken.

    Args:
        says_so: whether this process logs a warning for each skipped step.

    Attributes:
        skipped: number of steps skipped so far.
    """

    def __init__(self, says_so: bool = True):
        self.says_so = says_so
        self.skipped = 0
        self._in_a_row = 0

    def allows(self, step: int, grad_norm: float | None) -> bool:
        """Return whether to take a step with this gradient norm (None if DeepSpeed is configured not to compute it).

        Raises:
            NotFiniteError: this is the last of `IN_A_ROW` consecutive non-finite steps.
        """
        if grad_norm is None or math.isfinite(grad_norm := float(grad_norm)):
            self._in_a_row = 0
            return True
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise NotFiniteError(
                f"{IN_A_ROW} steps in a row ({step - IN_A_ROW + 1} to {step}) had a non-finite loss or gradient "
                f"(gradient norm {grad_norm}). They were skipped and did not change the weights. Check the rewards of "
                "the last steps. Then lower max_grad_norm, or start a new run from a checkpoint's model "
                "(--model_name_or_path) with a lower learning_rate, which a resumed run would ignore"
            )
        if self.says_so:
            logger.warning(
                "Step %d was skipped: its loss or gradient is not finite (gradient norm %s). Training stops after %d "
                "such steps in a row.",
                *(step, grad_norm, IN_A_ROW),
            )
        return False


def or_nan(loss: Tensor) -> Tensor:
    """Return the loss unchanged, but make its gradients NaN if it is not finite.

    The gradient norm, which all processes share, then reveals a non-finite loss on any process.
    """
    return loss * torch.where(loss.isfinite(), loss.new_ones(()), math.nan)


def check_weights(model: nn.Module, what: str) -> bool:
    """Return whether all trained weights on this process are finite. If not, a warning names the first parameter.

    Args:
        what: what will not be saved in that case, for the warning.
    """
    trained = [(name, _own_part(p)) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return True
    # A sum takes a twentieth of the time of `isfinite`, and is not finite if one of its terms is not. It can also
    # overflow, so it only selects the tensors to check. The device is synchronised once.
    first = trained[0][1].device  # a model may be spread over several devices
    sums = torch.stack([weights.sum(dtype=torch.float32).to(first) for _, weights in trained]).tolist()
    suspects = [part for part, total in zip(trained, sums, strict=True) if not math.isfinite(total)]
    bad = [name for name, weights in suspects if not weights.isfinite().all()]
    if bad:
        logger.warning("%s was not saved. Parameters that are not finite: %d, the first is %s.", what, len(bad), bad[0])
    return not bad


def require_finite(model: nn.Module, what: object, step: int, *, together: bool) -> None:
    """Raise NotFiniteError if any trained weight is not finite. Called before saving.

    Args:
        what: what would be saved, for the warning.
        step: optimizer step, for the message.
        together: whether all processes call this, so that all of them raise the error. With ZeRO-3 and FSDP each
            process holds only a part of the weights.
    """
    finite = check_weights(model, str(what))
    if together:
        finite = all(gather_object([finite]))
    if not finite:
        raise NotFiniteError(
            f"some weights are not finite at step {step}. Start a new run from the model of an earlier checkpoint "
            "(--model_name_or_path) with a lower learning_rate"
        )


def _own_part(parameter: nn.Parameter) -> Tensor:
    """Return the part of a parameter on this process: all of it, or a shard (ZeRO-3, FSDP)."""
    shard = getattr(parameter, "ds_tensor", parameter)
    return shard.to_local() if hasattr(shard, "to_local") else shard


def check_rewards(rewards: Tensor, names: Sequence[str]) -> None:
    """Reject infinite rewards, which would turn the advantages of their group into NaN.

    Args:
        rewards: (rollouts, reward functions); NaN where a function returned None.
        names: of the reward functions.

    Raises:
        UserError: a reward is infinite.
    """
    bad = rewards.isinf().nonzero().tolist()
    if bad:
        row, function = bad[0]
        raise UserError(
            f"The reward function {names[function]!r} returned {rewards[row, function].item()} for rollout {row} of "
            f"{len(rewards)}. Return a finite number, or None if there is no reward"
        )
