"""Count the tokens of each group: in how many correct and wrong rollouts a token occurs, and how often.

On a CPU with numba installed, a compiled loop counts in one pass. Otherwise the ids of each group are sorted once. Both
ways give the same counts, with the tokens in a different order.

The compiled loops are imported inside functions because the CPU build of vLLM 0.31 cannot start its engine after numba
was imported: it reads `__dict__` of every object, which is a function for llvmlite's handles.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUMBA = find_spec("numba") is not None


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
        values = F.pad(values, (1, 0))
        if NUMBA and values.device.type == "cpu":
            from ktae_trl.credit.ktae import loops

            arrays = [x.view(-1).numpy() for x in (self.entry, values, out)]
            _on_threads(len(self.entry), lambda part: loops.look_up(arrays[0][part], arrays[1], arrays[2][part]), _PART)
        else:
            torch.index_select(values, 0, self.entry, out=out.view(-1))


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
    how = _count_by_loop if NUMBA and ids.device.type == "cpu" else _count_by_sort
    return how(ids, counted, right, sizes, pairs)


# A compiled loop

_TABLE = 2**22  # larger or negative ids are renumbered first
_PART = 2**18  # least positions per thread: starting a thread takes a millisecond


def _on_threads(length: int, work: Callable[[slice], object], least: int) -> list:
    """Split `length` into even parts of at least `least`, run `work` on each in a thread, and return the results."""
    workers = max(1, min(torch.get_num_threads(), length // max(least, 1)))
    parts = [slice(*bounds) for bounds in pairwise(length * i // workers for i in range(workers + 1))]
    if workers == 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(workers) as threads:  # compiled code does not hold Python's lock
        return list(threads.map(work, parts))


def _count_by_loop(ids: Tensor, counted: Tensor, right: Tensor, sizes: Tensor, with_pairs: bool):
    from ktae_trl.credit.ktae import loops

    P, G, T = ids.shape
    entry = np.empty((P, G, T), np.int32)

    def fill(ids: Tensor, places: int) -> list[tuple[np.ndarray, np.ndarray, slice]]:
        arrays = [x.contiguous().numpy() for x in (ids, counted, right)]

        def fill_part(part: slice) -> tuple[np.ndarray, np.ndarray, slice]:
            some = [x[part] for x in arrays]
            room = some[0].size  # an upper bound; memory that is not written to is not allocated
            rows, row = np.full(places, -1, np.int32), np.empty((G * T, 8), np.int32)
            tokens, pairs = np.empty((loops.KEPT, room), np.int32), np.empty((3, room if with_pairs else 0), np.int32)
            U, W = loops.fill(*some, part.start, rows, row, tokens, pairs, entry[part])
            return None if U < 0 else (tokens[:, :U], pairs[:, :W], part)

        return _on_threads(P, fill_part, _PART // max(G * T, 1))

    names = None
    parts = fill(ids, min(max(int(ids.max()) + 1, 1), _TABLE) if ids.numel() else 1)
    if None in parts:
        names, renumbered = ids.masked_fill(~counted, 0).unique(return_inverse=True)
        parts = fill(renumbered, len(names))
    before_U = before_W = 0
    for tokens, pairs, part in parts:
        if before_U:
            loops.shift(entry[part].reshape(-1), before_W if with_pairs else before_U)
            pairs[loops.OF_TOKEN] += before_U
        before_U, before_W = before_U + tokens.shape[1], before_W + pairs.shape[1]
    token, group, a, b, count_right, count_wrong = torch.from_numpy(np.concatenate([p[0] for p in parts], axis=1))
    of_rollout = Pairs(*torch.from_numpy(np.concatenate([p[1] for p in parts], axis=1))) if with_pairs else None
    token = token.to(ids.dtype) if names is None else names.index_select(0, token)
    counts = Counts(group, token, a, b, count_right, count_wrong, of_rollout, torch.from_numpy(entry).view(-1))
    return counts, sizes.tolist()


# A sort


def _count_by_sort(ids: Tensor, counted: Tensor, right: Tensor, sizes: Tensor, with_pairs: bool):
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
    run = (new_pair if with_pairs else new_token).view(-1).cumsum(0, dtype=torch.int32).view_as(order) * is_counted
    counts = Counts(
        group=rollout.index_select(0, first) // G,
        token=token,
        a=a,
        b=bounds.diff() - a,
        count_right=count_right,
        count_wrong=total(times) - count_right,
        pairs=Pairs(pair_is_new.cumsum(0, dtype=torch.int32) - 1, rollout, times) if with_pairs else None,
        entry=torch.empty_like(run).scatter_(1, order, run).view(-1),  # back in the original order
    )
    return counts, [sizes[:P], sizes[P:]]
