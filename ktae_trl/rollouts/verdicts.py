"""Which rollouts are right: the one place that turns a correctness reward into verdicts."""

import math
from typing import NamedTuple

from torch import Tensor

from ktae_trl.arguments import UserError, nearest

AUTO = "auto"


class Verdicts(NamedTuple):
    """What a correctness reward says about the rollouts of P groups of G."""

    correct_PG: Tensor  # bool: the rollout is right
    scored_PG: Tensor  # bool: it could be judged

    @property
    def informative(self) -> Tensor:
        """Return which groups have right and wrong rollouts."""
        return (self.correct_PG & self.scored_PG).any(1) & (~self.correct_PG & self.scored_PG).any(1)

    def metrics(self) -> dict[str, float]:
        """Return the shares of rollouts that were judged and, of these, that are right (NaN if none was judged)."""
        right, judged = (self.correct_PG & self.scored_PG).sum(), self.scored_PG.sum()
        return {
            "correctness/right": (right / judged).item(),
            "correctness/judged": (judged / self.scored_PG.numel()).item(),
        }


def verdicts(reward_PG: Tensor, threshold: float | str) -> Verdicts:
    """Say which rollouts are right: those whose reward is above the threshold.

    Args:
        reward_PG: (P, G) float32, NaN where the reward function gave none.
        threshold: a number, or `"auto"` for the mean reward of the rollout's own group.

    A rollout without a reward is not scored. With `"auto"` neither is one in a group whose rewards are all equal (or of
    which one is infinite): such a group has no right and no wrong rollouts. What is not scored is not correct.
    """
    if threshold != AUTO:
        return Verdicts(reward_PG > threshold, ~reward_PG.isnan())
    reward_PG = reward_PG.double()  # so that the mean of equal rewards is exactly that reward
    mean_P1 = reward_PG.nanmean(1, keepdim=True)
    correct_PG = reward_PG > mean_P1
    return Verdicts(correct_PG, ~reward_PG.isnan() & mean_P1.isfinite() & correct_PG.any(1, keepdim=True))


def read_threshold(value: float | str) -> float | str:
    """Return `correctness_threshold` as a number or `"auto"`; the command line gives words.

    Raises:
        ValueError: it is neither.
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
    """Return which of the reward functions says what is right: the one that is named, else the first.

    Raises:
        ValueError: none of them, or more than one, has this name.
    """
    if wanted is None:
        return 0
    if wanted not in names:
        raise UserError(
            f"correctness_reward={wanted!r} is none of the reward functions{nearest(wanted, names)}. "
            f"There are: {', '.join(names)}"
        )
    if names.count(wanted) > 1:
        raise UserError(
            f"correctness_reward={wanted!r} is the name of {names.count(wanted)} reward functions. There are: "
            f"{', '.join(names)}. Give each a name of its own (its __name__, as in `def name`)"
        )
    return names.index(wanted)
