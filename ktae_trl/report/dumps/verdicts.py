"""Decide which rollouts are correct: by a verdict in the file, by the number that the user chose, or by the reward."""

import numpy as np

from ktae_trl.arguments import UserError, nearest
from ktae_trl.report.dumps.rollout import Rollout

_SHOWN = 8  # values of a distribution


class UndecidedError(UserError):
    """It is unknown which number says whether a rollout is correct. This is no fault of one row."""


def deciding(rollout: Rollout, correct: str | None = None) -> tuple[str, float]:
    """Return the name and the value of what says whether a rollout is correct. NaN: not known, or still to be graded.

    Args:
        correct: The user's choice among the rewards. Default: as the format says.

    Raises:
        UndecidedError: There are several numbers, and none is chosen.
        UserError: The chosen number is missing, or nothing says whether the rollout is correct.
    """
    if correct is not None:
        if correct not in rollout.rewards:
            raise UserError(
                f"there is no number {correct!r}{nearest(correct, rollout.rewards)} (--correct). Numbers: "
                f"{', '.join(rollout.rewards) or 'none'}"
            )
        name, value = correct, rollout.rewards[correct]
    elif rollout.decides is not None:
        name, value = rollout.decides
    elif rollout.answers is not None:
        name, value = "correct", None
    elif rollout.rewards:
        raise UndecidedError(
            "It is unknown which number says whether a rollout is correct. Choose one with --correct NAME: "
            f"{', '.join(rollout.rewards)}"
        )
    else:
        raise UserError("nothing says whether it is correct")
    return name, float("nan") if value is None else value


def threshold_of(values: np.ndarray, name: str, threshold: float | None = None) -> float:
    """Return the number above which a value says that a rollout is correct.

    This is `threshold` or, without one, the lower of two values, and 0.5 for truth values (0 and 1).

    Raises:
        UserError: There are more than two values, or only one, and no threshold. The message shows their distribution.
    """
    if threshold is not None:
        return threshold
    found, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    if set(found.tolist()) <= {0.0, 1.0}:
        return 0.5
    if len(found) == 2:
        return float(found[0])
    often = np.sort(np.argsort(-counts, kind="stable")[:_SHOWN])
    shown = ", ".join(f"{found[i]:g} ({counts[i]:,} times)" for i in often)
    rest = f", and {len(found) - len(often):,} others from {found[0]:g} to {found[-1]:g}" * (len(found) > len(often))
    what = f"has {len(found):,} values" if len(found) > 1 else "is always the same"
    raise UserError(
        f"It is unknown which rollouts are correct: {name} {what}: {shown}{rest}. Give --threshold X: a rollout is "
        f"correct if its {name} is above X. Or choose another number with --correct NAME"
    )
