"""KTAE on a CPU, compiled by numba: group by group, tokens are counted, valued and written.

Import this module inside functions only: the CPU build of vLLM 0.31 cannot start its engine after numba was imported,
because it reads `__dict__` of every object, which is a function for llvmlite's handles.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ktae_trl.credit.ktae import direction as formulas

TOKEN, A, B, RIGHT, WRONG, ROLLOUT, OWN = range(7)  # columns of `Scratch.row`
_IGNORED = 2**31 - 1
_PLACES = 2**19  # larger or negative ids are renumbered first
_PART = 2**18  # least positions per thread: starting a thread takes a millisecond


class Voters(NamedTuple):
    """Who votes, for each group, (P, 1) each, or with leave-one-out for each rollout, (P, G) each."""

    first: np.ndarray  # int32: first cell of the split in the tables
    norm_right: np.ndarray  # float32, from `direction.tf_norms`
    norm_wrong: np.ndarray


class Tables(NamedTuple):
    """What depends only on the 2 x 2 counts, by cell. The cell of (a, b) is `first + a * width + b`."""

    strength: np.ndarray  # float32
    presence: np.ndarray  # float32
    width: int


class Scratch(NamedTuple):
    """Memory for the tokens of one group, used again for the next group."""

    place: (
        np.ndarray
    )  # by id: the index of its token over all groups, which is lower than this group's for other tokens
    row: np.ndarray  # (G * T, 8): the columns above for each token; 0 between groups
    at: np.ndarray  # (G, T): index of the token at each position, or -1
    some: np.ndarray  # (G * T,): indices of the tokens to value
    new: np.ndarray  # (G * T,): their values
    value: np.ndarray  # (G * T,): value of each token


def key_token_values(
    ids: Tensor,
    mask: Tensor,
    right: Tensor,
    wrong: Tensor,
    voters: Voters,
    tables: Tables,
    tf_weight: float | None,
    ignore_ids: list[int],
    *,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return the value of each position, and the counts of each token.

    Args:
        ids, mask, ignore_ids: see `values.key_token_table`.
        right, wrong: (P, G) bool, the rollouts that vote in groups with both sides.
        voters: see there. Their shape says whether a rollout votes for itself.
        tf_weight: h3, or None if the values are strengths.
        keep: whether to return counts.

    Returns:
        (P, G, T) float32. (U,) each: group, token, a, b, and the occurrences in correct and in wrong rollouts, int32
        but for the token, which has the dtype of the ids. Without `keep` U is 0.
    """
    P, G, T = ids.shape
    values = np.empty((P, G, T), np.float32)  # unlike PyTorch, NumPy asks for large pages, which cost less

    def fill_all(ids: Tensor, mask: Tensor, ignore_ids: list[int], places: int) -> list[np.ndarray | None]:
        arrays = [x.contiguous().numpy() for x in (ids, mask, right, wrong)]

        def fill_part(part: slice) -> np.ndarray | None:
            scratch = Scratch(
                np.zeros(places, np.int32),
                np.zeros((G * T, 8), np.int32),
                np.empty((G, T), np.int32),
                np.arange(G * T, dtype=np.int32),
                np.empty(G * T, np.float32),
                np.empty(G * T, np.float32),
            )
            scratch.place[[token for token in ignore_ids if 0 <= token < places]] = _IGNORED
            some = [x[part] for x in arrays]
            # An upper bound; memory that is not written to is not allocated.
            tokens = np.empty((6, some[0].size if keep else 0), np.int32)
            of_groups = Voters(*(x[part] for x in voters))
            strengths = tf_weight is None
            weight = 0.0 if strengths else float(tf_weight)
            U = fill(*some, of_groups, tables, weight, strengths, part.start, scratch, tokens, values[part])
            return None if U < 0 else tokens[:, :U]

        return on_threads(P, fill_part, _PART // max(G * T, 1))

    names = None
    parts = fill_all(ids, mask, ignore_ids, _PLACES)
    if any(part is None for part in parts):
        for token in ignore_ids:
            mask = mask & (ids != token)
        names, renumbered = ids.masked_fill(~mask, 0).unique(return_inverse=True)
        parts = fill_all(renumbered, mask, [], len(names))
    group, token, *counts = torch.from_numpy(np.concatenate(parts, axis=1))
    token = token.to(ids.dtype) if names is None else names.index_select(0, token)
    return torch.from_numpy(values), [group, token, *counts]


def on_threads(length: int, work: Callable[[slice], object], least: int) -> list:
    """Split `length` into even parts of at least `least`, run `work` on each in a thread, and return the results."""
    workers = max(1, min(torch.get_num_threads(), length // max(least, 1)))
    parts = [slice(*bounds) for bounds in pairwise(length * i // workers for i in range(workers + 1))]
    if workers == 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(workers) as threads:  # compiled code does not hold Python's lock
        return list(threads.map(work, parts))


# Compiled. Branches that the data make unpredictable, and calls, would take most of the time: so there are none inside
# the loops over positions and tokens. numpy's error model spares them the checks for a division by 0.

_compiled = njit(nogil=True, error_model="numpy")
_direction = _compiled(formulas.direction)


@_compiled
def lengths(mask):
    """Return the number of tokens of each rollout, (P, G) int32."""
    P, G, T = mask.shape
    result = np.zeros((P, G), np.int32)
    for p in range(P):
        for g in range(G):
            n = np.int32(0)
            for t in range(T):
                n += mask[p, g, t]
            result[p, g] = n
    return result


@_compiled
def fill(ids, mask, right, wrong, voters, tables, tf_weight, strengths, first_group, scratch, tokens, values):
    """Write the values of these groups to `values`, and the counts of each token to `tokens`, if it has columns.

    Returns:
        The number of tokens, or -1 if an id is negative or too large for `scratch.place`.
    """
    P, G, _ = ids.shape
    leave_one_out = voters.first.shape[1] > 1
    U = 0  # tokens of the groups so far
    for p in range(P):
        n = count(ids[p], mask[p], right[p], wrong[p], U + 1, scratch)
        if n < 0:
            return n
        for g in range(G):
            n_some = count_own(scratch.at[g], scratch) if leave_one_out else n
            if leave_one_out or g == 0:
                value(n_some, p, g, right, wrong, voters, tables, tf_weight, strengths, scratch)
            write(scratch.at[g], scratch.value, values[p, g])
        if tokens.shape[1]:
            tokens[0, U : U + n] = first_group + p
            for u in range(n):
                for column in range(5):
                    tokens[1 + column, U + u] = scratch.row[u, column]
        scratch.row[:n] = 0
        U += n
    return U


@_compiled
def count(ids, mask, right, wrong, before, scratch):
    """Count the tokens of one group in `scratch.row`, and note in `scratch.at` where they are. Return their number."""
    G, T = ids.shape
    place, row, at = scratch.place, scratch.row, scratch.at
    n = 0
    for g in range(G):
        if not (right[g] or wrong[g]):
            at[g] = -1
            continue
        presence, times = (A, RIGHT) if right[g] else (B, WRONG)
        for t in range(T):
            at[g, t] = -1
            if not mask[g, t]:
                continue
            token = ids[g, t]
            if token < 0 or token >= len(place):
                return -1
            if place[token] == _IGNORED:
                continue
            u = place[token] - before
            is_new = u < 0
            u = n if is_new else u
            n += is_new
            place[token] = before + u
            row[u, TOKEN] = token
            row[u, presence] += row[u, ROLLOUT] != g + 1
            row[u, ROLLOUT] = g + 1
            row[u, times] += 1
            at[g, t] = u
    return n


@_compiled
def count_own(at, scratch):
    """Count the tokens of one rollout in `scratch.row`, and list them in `scratch.some`. Return their number."""
    n = 0
    for u in at:
        if u >= 0:
            scratch.some[n] = u
            n += scratch.row[u, OWN] == 0
            scratch.row[u, OWN] += 1
    return n


@_compiled
def value(n, p, g, right, wrong, voters, tables, tf_weight, strengths, scratch):
    """Value the first n tokens of `scratch.some`; with leave-one-out, without the votes of rollout g."""
    leave_one_out = voters.first.shape[1] > 1
    own_right, own_wrong = leave_one_out and right[p, g], leave_one_out and wrong[p, g]
    first, norm_right, norm_wrong = voters.first[p, g], voters.norm_right[p, g], voters.norm_wrong[p, g]
    for i in range(n):
        token = scratch.row[scratch.some[i]]
        cell = first + (token[A] - own_right) * tables.width + token[B] - own_wrong
        x = tables.strength[cell]
        if not strengths:
            count_right, count_wrong = token[RIGHT] - own_right * token[OWN], token[WRONG] - own_wrong * token[OWN]
            x *= _direction(tables.presence[cell], tf_weight, count_right, count_wrong, norm_right, norm_wrong) / 2
        scratch.new[i] = x
        token[OWN] = 0
    if not strengths:
        for i in range(n):
            scratch.new[i] = tanh(scratch.new[i])
    for i in range(n):
        scratch.value[scratch.some[i]] = scratch.new[i]


@_compiled
def tanh(x):
    """Return tanh x = (e^2x - 1) / (e^2x + 1) with e^2x = (e^(x/32))^64, to 1e-8: faster than a call of tanh."""
    y = min(abs(x), 10.0) / 32
    e = 1 + y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7 * (1 + y / 8)))))))
    for _ in range(6):
        e *= e
    return np.copysign((e - 1) / (e + 1), x)


@_compiled
def write(at, value, values):
    """Write the value of the token at each position, and 0 where there is none."""
    for t in range(len(at)):
        values[t] = value[at[t]] if at[t] >= 0 else np.float32(0)
