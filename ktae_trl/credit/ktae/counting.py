"""Count the tokens of each group with PyTorch: in how many correct and wrong rollouts a token occurs, and how often.

The ids of each group are sorted once. This is for GPUs, and for a CPU without numba (`loops`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """One entry for each pair of a token and a rollout that contains it, (W,) each."""

    token: Tensor  # int32: index of the token's entry in `Counts`
    rollout: Tensor  # int32: index of the rollout among the P * G
    count: Tensor  # int32: occurrences of the token in the rollout


class Counts(NamedTuple):
    """One entry for each distinct token of each group, (U,) each."""

    group: Tensor  # int32
    token: Tensor  # dtype of the ids
    a: Tensor  # int32: correct rollouts with the token
    b: Tensor  # int32: wrong rollouts with the token
    count_right: Tensor  # int32: occurrences in correct rollouts
    count_wrong: Tensor  # int32: occurrences in wrong rollouts
    pairs: Pairs | None
    # (P * G * T,) int32: 1 + the index of the entry of each position, in `pairs` if there are any, else in the tokens;
    # 0 for positions that are not counted.
    entry: Tensor

    def spread(self, values: Tensor, out: Tensor) -> None:
        """Write the value of each position's entry to `out`, and 0 for positions that are not counted."""
        torch.index_select(F.pad(values, (1, 0)), 0, self.entry, out=out.view(-1))


def count(ids: Tensor, counted: Tensor, right: Tensor, sizes: Tensor, *, pairs: bool) -> tuple[Counts, list[list[int]]]:
    """Count the tokens of each group.

    Args:
        ids: (P, G, T) integer token ids.
        counted: (P, G, T) bool, which positions to count.
        right: (P, G) bool, which rollouts are correct.
        sizes: (2, P) integers to copy to the host together with the number of tokens, so that a GPU synchronizes once.
        pairs: whether to count per rollout too.

    Returns:
        The counts, and `sizes` as lists.
    """
    P, G, T = ids.shape
    # A stable sort keeps the occurrences of an id in one rollout together.
    last_id = torch.iinfo(ids.dtype).max
    sorted_ids, order = ids.masked_fill(~counted, last_id).view(P, G * T).sort(dim=1, stable=True)
    rollout = order.div(max(T, 1), rounding_mode="floor").int()
    is_counted = sorted_ids != last_id
    new_token, new_pair = is_counted.clone(), is_counted.clone()
    new_token[:, 1:] &= sorted_ids[:, 1:] != sorted_ids[:, :-1]
    new_pair[:, 1:] &= new_token[:, 1:] | (rollout[:, 1:] != rollout[:, :-1])
    totals = torch.stack([new_token.sum(), new_pair.sum()])
    n_tokens, n_pairs, *sizes = torch.cat([totals, sizes.flatten()]).tolist()  # synchronizes with the device

    start = torch.nonzero_static(new_pair.view(-1), size=n_pairs).squeeze(1).int()
    pair_is_new = new_token.view(-1).index_select(0, start)
    first = torch.nonzero_static(pair_is_new, size=n_tokens).squeeze(1).int()
    token = sorted_ids.view(-1).index_select(0, start.index_select(0, first))
    del sorted_ids  # as large as everything below together
    first_rollout = torch.arange(0, P * G, G, device=ids.device, dtype=torch.int32)[:, None]
    rollout = rollout.add_(first_rollout).view(-1).index_select(0, start)
    group_end = torch.arange(P, device=ids.device) * (G * T) + counted.sum((1, 2))
    end = torch.minimum(
        F.pad(start[1:], (0, 1), value=P * G * T), group_end.int().repeat_interleave(G).index_select(0, rollout)
    )
    times, is_right = end - start, right.reshape(-1).index_select(0, rollout)
    bounds = F.pad(first, (0, 1), value=n_pairs)

    def total(x_W: Tensor) -> Tensor:
        return F.pad(x_W.cumsum(0, dtype=torch.int32), (1, 0)).index_select(0, bounds).diff()

    a, count_right = total(is_right), total(times * is_right)
    run = (new_pair if pairs else new_token).view(-1).cumsum(0, dtype=torch.int32).view_as(order) * is_counted
    counts = Counts(
        group=rollout.index_select(0, first) // G,
        token=token,
        a=a,
        b=bounds.diff() - a,
        count_right=count_right,
        count_wrong=total(times) - count_right,
        pairs=Pairs(pair_is_new.cumsum(0, dtype=torch.int32) - 1, rollout, times) if pairs else None,
        entry=torch.empty_like(run).scatter_(1, order, run).view(-1),  # back in the original order
    )
    return counts, [sizes[:P], sizes[P:]]
