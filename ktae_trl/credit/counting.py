"""Count the tokens of groups: in how many right and wrong rollouts each occurs, and how often.

On a CPU a compiled loop does it in one pass; elsewhere, one sort of the ids of each group. Both give the same counts
(a test compares them); the order of the tokens differs.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor


class Pairs(NamedTuple):
    """One entry per pair of a token and a rollout that has it, (W,)."""

    token: Tensor  # int32: entry of the token
    rollout: Tensor  # int32: rollouts are numbered through all groups
    count: Tensor  # int32: occurrences of the token in it


class Counts(NamedTuple):
    """One entry per distinct token of each group, (U,)."""

    group: Tensor  # int32
    token: Tensor  # dtype of the ids
    a: Tensor  # int32: right rollouts with it
    b: Tensor  # int32: wrong ones
    count_right: Tensor  # int32: occurrences in right rollouts
    count_wrong: Tensor
    pairs: Pairs | None
    # (P * G * T,) int32: each position's entry, from 1 on, among the pairs if they were asked for, else among the
    # tokens; 0 where nothing is counted.
    entry: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """Give each position the value of its entry, 0 where nothing is counted."""
        return F.pad(values, (1, 0)).index_select(0, self.entry)


def count(ids: Tensor, counted: Tensor, right: Tensor, *, pairs: bool) -> Counts:
    """Count what is marked as `counted` (P, G, T) of `ids` (P, G, T).

    Args:
        right: (P, G) bool, the side of each rollout.
        pairs: whether to count per rollout as well.
    """
    how = _count_by_loop if ids.device.type == "cpu" else _count_by_sort
    return how(ids, counted, right, pairs)


# A compiled loop

_TABLE = 2**22  # ids from here on, or below 0, are renumbered first
_PART = 2**16  # positions that are worth a thread
_GROUP, _TOKEN, _A, _B, _RIGHT, _WRONG, _ROLLOUT, _PAIR = range(8)  # columns of a token's row
_OF_TOKEN, _OF_ROLLOUT, _COUNT = range(3)  # columns of a pair's row


@njit(nogil=True)
def _fill(ids, counted, right, rows, first_group, tokens, pairs, entry):
    """Fill the rows of `tokens` and, unless there is no room, of `pairs`, and `entry`, for these groups.

    `rows` has a place for every id; what an earlier group left there is below the group's first row. Returns how many
    rows of each there are, or -1 for an id that has no place.
    """
    P, G, T = ids.shape
    U = W = 0
    for p in range(P):
        first = U
        for g in range(G):
            times, presence = (_RIGHT, _A) if right[p, g] else (_WRONG, _B)
            for t in range(T):
                entry[p, g, t] = 0
                if not counted[p, g, t]:
                    continue
                token = ids[p, g, t]
                if token < 0 or token >= len(rows):
                    return -1, -1
                u = rows[token]
                if u < first:
                    u = U
                    U += 1
                    rows[token] = u
                    tokens[u, :] = 0
                    tokens[u, _GROUP] = first_group + p
                    tokens[u, _TOKEN] = token
                    tokens[u, _ROLLOUT] = -1
                tokens[u, times] += 1
                if tokens[u, _ROLLOUT] != g:
                    tokens[u, _ROLLOUT] = g
                    tokens[u, presence] += 1
                    if len(pairs):
                        tokens[u, _PAIR] = W
                        pairs[W, _OF_TOKEN] = u
                        pairs[W, _OF_ROLLOUT] = (first_group + p) * G + g
                        pairs[W, _COUNT] = 0
                        W += 1
                if len(pairs):
                    pairs[tokens[u, _PAIR], _COUNT] += 1
                    entry[p, g, t] = tokens[u, _PAIR] + 1
                else:
                    entry[p, g, t] = u + 1
    return U, W


@njit(nogil=True)
def _shift(entry, by):
    flat = entry.reshape(-1)
    for i in range(len(flat)):
        if flat[i]:
            flat[i] += by


def _count_by_loop(ids: Tensor, counted: Tensor, right: Tensor, with_pairs: bool) -> Counts:
    P, G, T = ids.shape
    # Room for the worst case; the system gives memory only where it is written.
    tokens = np.empty((ids.numel(), 8), np.int32)
    pairs = np.empty((ids.numel() if with_pairs else 0, 3), np.int32)
    entry = np.empty((P, G, T), np.int32)
    workers = max(1, min(torch.get_num_threads(), P, ids.numel() // _PART))
    parts = [range(*bounds) for bounds in pairwise(P * i // workers for i in range(workers + 1))]

    def fill(ids: Tensor, places: int) -> list[tuple[int, int]]:
        arrays = [x.contiguous().numpy() for x in (ids, counted, right)]

        def fill_part(part: range) -> tuple[int, int]:
            some, room = slice(part.start, part.stop), slice(part.start * G * T, part.stop * G * T)
            rows = np.full(places, -1, np.int32)
            return _fill(*(x[some] for x in arrays), rows, part.start, tokens[room], pairs[room], entry[some])

        return list(threads.map(fill_part, parts))

    with ThreadPoolExecutor(workers) as threads:  # compiled code does not hold Python's lock
        names = None
        sizes = fill(ids, min(max(int(ids.max()) + 1, 1), _TABLE) if ids.numel() else 1)
        if (-1, -1) in sizes:
            names, renumbered = ids.masked_fill(~counted, 0).unique(return_inverse=True)
            sizes = fill(renumbered, len(names))
        before_U, before_W = np.cumsum([(0, 0), *sizes], axis=0)[:-1].T
        before = before_W if with_pairs else before_U
        list(threads.map(lambda part, by: _shift(entry[part.start : part.stop], by) if by else None, parts, before))

    def columns(rows: np.ndarray, which: int) -> list[Tensor]:
        filled = [rows[part.start * G * T :][: size[which]] for part, size in zip(parts, sizes, strict=True)]
        return list(torch.from_numpy(np.concatenate(filled).T.copy()))

    group, token, a, b, count_right, count_wrong, *_ = columns(tokens, 0)
    of_rollout = None
    if with_pairs:
        of_rollout = Pairs(*columns(pairs, 1))
        of_rollout.token.add_(torch.from_numpy(before_U).int().repeat_interleave(torch.tensor([W for _, W in sizes])))
    token = token.to(ids.dtype) if names is None else names.index_select(0, token)
    return Counts(group, token, a, b, count_right, count_wrong, of_rollout, torch.from_numpy(entry).view(-1))


# A sort


def _count_by_sort(ids: Tensor, counted: Tensor, right: Tensor, with_pairs: bool) -> Counts:
    P, G, T = ids.shape
    # The sort is stable, so the occurrences of an id in one rollout stay together.
    last_id = torch.iinfo(ids.dtype).max
    sorted_ids, order = ids.masked_fill(~counted, last_id).view(P, G * T).sort(dim=1, stable=True)
    rollout = order.div(max(T, 1), rounding_mode="floor").int()
    is_counted = sorted_ids != last_id
    new_token, new_pair = is_counted.clone(), is_counted.clone()
    new_token[:, 1:] &= sorted_ids[:, 1:] != sorted_ids[:, :-1]
    new_pair[:, 1:] &= new_token[:, 1:] | (rollout[:, 1:] != rollout[:, :-1])
    n_tokens, n_pairs = torch.stack([new_token.sum(), new_pair.sum()]).tolist()  # waits for the device

    start = torch.nonzero_static(new_pair.view(-1), size=n_pairs).squeeze(1).int()
    pair_is_new = new_token.view(-1).index_select(0, start)
    first = torch.nonzero_static(pair_is_new, size=n_tokens).squeeze(1).int()
    token = sorted_ids.view(-1).index_select(0, start.index_select(0, first))
    del sorted_ids  # as large as all that follows
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
    return Counts(
        group=rollout.index_select(0, first) // G,
        token=token,
        a=a,
        b=bounds.diff() - a,
        count_right=count_right,
        count_wrong=total(times) - count_right,
        pairs=Pairs(pair_is_new.cumsum(0, dtype=torch.int32) - 1, rollout, times) if with_pairs else None,
        entry=torch.empty_like(run).scatter_(1, order, run).view(-1),  # in the order before the sort
    )
