"""Complete the groups of a process's batch, which may be spread over several processes."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ktae_trl.credit.method import Groups
from ktae_trl.policy import whole
from ktae_trl.rollouts.verdicts import Verdicts


def whole_groups(
    batch: dict[str, Tensor],
    judged: Verdicts,
    rows: Sequence[dict[str, Any]],
    special_ids: tuple[int, ...],
    accelerator: Accelerator,
) -> Groups:
    """Return the groups of which this process holds rollouts, completed from other processes. Collective.

    Args:
        batch: TRL's batch of this process.
        judged: verdicts for the groups of all processes.
        rows: dataset row of each rollout of this process.
        special_ids: padding and every end-of-sequence id.
        accelerator: of the trainer.
    """
    ids = batch["completion_ids"].int()
    mask = batch["completion_mask"].bool()
    if "tool_mask" in batch:
        mask = mask & batch["tool_mask"].bool()
    B, G = len(ids), judged.correct_PG.shape[1]
    if B % G:  # some groups are spread over processes
        ids, mask = (accelerator.pad_across_processes(x, dim=1) for x in (ids, mask.int()))
    ids_PGT, mask_PGT = (whole(x, G, accelerator) for x in (ids, mask))
    begin = accelerator.process_index * B
    first = begin // G
    correct_PG, scored_PG = (x[first : first + len(ids_PGT)] for x in judged)
    return Groups(
        ids_PGT=ids_PGT,
        mask_PGT=mask_PGT.bool(),
        correct_PG=correct_PG,
        scored_PG=scored_PG,
        advantages_B=batch["advantages"],
        prompt_ids_BL=batch["prompt_ids"],
        prompt_mask_BL=batch["prompt_mask"],
        lengths_B=batch["completion_mask"].sum(1),
        special_ids=special_ids,
        own=slice(begin - first * G, begin - first * G + B),
        rows=list(rows),
    )
