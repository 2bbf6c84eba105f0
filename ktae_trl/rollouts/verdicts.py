"""Convert the correctness reward to verdicts: which rollouts are correct."""

import math
from typing import NamedTuple

from torch import Tensor

from ktae_trl.arguments import UserError, nearest

AUTO = "auto"


class Verdicts(NamedTuple):
    """Verdicts for the rollouts of P groups of G."""

    correct_PG: Tensor  # bool: the rollout is correct
    scored_PG: Tensor  # bool: the rollout could be graded

    @property
    def informative(self) -> Tensor:
        """Return which groups have both correct and wrong rollouts, (P,)."""
        return (self.correct_PG & self.scored_PG).any(1) & (~self.correct_PG & self.scored_PG).any(1)

    @property
    def all_right(self) -> Tensor:
        """Return which groups have correct rollouts and no wrong ones, (P,)."""
        return (self.correct_PG & self.scored_PG).any(1) & ~(~self.correct_PG & self.scored_PG).any(1)

    @property
    def all_wrong(self) -> Tensor:
        """Return which groups have wrong rollouts and no correct ones, (P,)."""
        return (~self.correct_PG & self.scored_PG).any(1) & ~(self.correct_PG & self.scored_PG).any(1)

    def metrics(self) -> dict[str, float]:
        """Return the share of rollouts that were graded and, of these, the share that is correct (NaN if none was)."""
        right, judged = (self.correct_PG & self.scored_PG).sum(), self.scored_PG.sum()
        return {
            "correctness/right": (right / judged).item(),
            "correctness/judged": (judged / self.scored_PG.numel()).item(),
        }


def verdicts(reward_PG: Tensor, threshold: float | str) -> Verdicts:
    """Return which rollouts are correct: those with a correctness reward above the threshold.

    Args:
        reward_PG: (P, G) float32, NaN for rollouts without a reward.
        threshold: a number, or `"auto"` for the mean reward of the rollout's group.

    A rollout without a reward is not scored. With `"auto"`, neither are the rollouts of a group whose rewards are all
    equal or include an infinite one. Rollouts that are not scored are not correct.
    """
    if threshold != AUTO:
        return Verdicts(reward_PG > threshold, ~reward_PG.isnan())
    reward_PG = reward_PG.double()  # exact mean for equal rewards
    mean_P1 = reward_PG.nanmean(1, keepdim=True)
    correct_PG = reward_PG > mean_P1
    return Verdicts(correct_PG, ~reward_PG.isnan() & mean_P1.isfinite() & correct_PG.any(1, keepdim=True))


def read_threshold(value: float | str) -> float | str:
    """Return `correctness_threshold` as a number or `"auto"`. The command line passes strings.

    Raises:
        UserError: the value is neither.
    """
    if value == AUTO:
        return AUTO
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"correctness_threshold must be a number or {AUTO!r}, not {value!r}")
    return number


def correctness_index(names: list[str], wanted: str | None) -> int:
    """Return the index of the correctness reward: the function named `wanted`, or the first without a name.

    Raises:
        UserError: no function, or more than one, has this name.
    """
    if wanted is None:
        return 0
    if wanted not in names:
        raise UserError(
            f"correctness_reward={wanted!r} is not one of the reward functions{nearest(wanted, names)}. "
            f"Choose from: {', '.join(names)}"
        )
    if names.count(wanted) > 1:
        raise UserError(
            f"correctness_reward={wanted!r} is the name of {names.count(wanted)} reward functions "
            f"({', '.join(names)}). Give each function a different __name__"
        )
    return names.index(wanted)
