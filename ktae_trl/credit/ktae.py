"""KTAE: the key-token value of every token from the right and wrong rollouts of its group (arXiv 2505.16826).

Everything is counted from one sort of the ids of each group, which lays the occurrences of a token side by side, those
of one rollout together. There is no loop over groups, rollouts or tokens, and nothing is as large as a vocabulary.

Where this departs from the official code, which has faults (README, "Departures"): p is exact, p = 1 gives F = 0, the
weights arrive, and every end-of-sequence id counts as special.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ktae_trl.credit.association import fisher_p_table, information_gain_table
from ktae_trl.credit.combine import Credit, Rollouts, combine

_TF_SATURATION = 2.0  # k1 of the paper's BM25-like term frequency
_TF_LENGTH = 0.5  # b0
_TF_EPSILON = 1e-5
_SATURATED = 0.9  # |K| above this is reported as saturated
_SILENCED = 1e-3  # so is a token that keeps less than this share of its rollout's advantage


class KeyTokenTable(NamedTuple):
    """Values per position, and the counts behind them per distinct token of each group with right and wrong rollouts.

    U is the number of (group, token) pairs that occur. c and d of the 2 x 2 table are `n_right[group] - a` and
    `n_wrong[group] - b`.
    """

    values: Tensor  # (P, G, T) float32: K
    n_right: Tensor  # (P,) int64: right rollouts that vote
    n_wrong: Tensor  # (P,) int64
    group: Tensor  # (U,) int32
    token: Tensor  # (U,) dtype of the ids
    a: Tensor  # (U,) int32: right rollouts with the token
    b: Tensor  # (U,) int32: wrong rollouts with the token
    p: Tensor  # (U,) float32: Fisher's p-value
    F: Tensor  # (U,) float32: Fisher association
    IG: Tensor  # (U,) float32: information gain, bits
    D: Tensor  # (U,) float32: direction


def key_token_values(
    ids: Tensor,
    mask: Tensor,
    correct: Tensor,
    *,
    fisher_weight: float = 1.0,
    ig_weight: float = 1.0,
    tf_weight: float = 1.0,
    leave_one_out: bool = False,
    scored: Tensor | None = None,
    ignore_ids: Iterable[int] = (),
) -> Tensor:
    """Return K of every token, (P, G, T) float32: the `values` of `key_token_table`, which explains the arguments."""
    return key_token_table(
        ids,
        mask,
        correct,
        fisher_weight=fisher_weight,
        ig_weight=ig_weight,
        tf_weight=tf_weight,
        leave_one_out=leave_one_out,
        scored=scored,
        ignore_ids=ignore_ids,
    ).values


@torch.no_grad()
def key_token_table(
    ids: Tensor,
    mask: Tensor,
    correct: Tensor,
    *,
    fisher_weight: float = 1.0,
    ig_weight: float = 1.0,
    tf_weight: float = 1.0,
    leave_one_out: bool = False,
    scored: Tensor | None = None,
    ignore_ids: Iterable[int] = (),
) -> KeyTokenTable:
    """Compute the key-token value K of every token and the statistics behind it.

        F = exp(-2 p), 0 where p = 1                     p: Fisher's exact test on presence x correctness
        S = (h1 F + h2 IG) / (h1 + h2)                   strength
        TF_s = (k1 + 1) f_s / (f_s + k1 (1 - b0 + b0 len_s / mean len)),  k1 = 2, b0 = 0.5
        D = asin sqrt(a / N_T) - asin sqrt(b / N_F) + h3 (TF_T / (TF_F + 1e-5) - TF_F / (TF_T + 1e-5))
        K = 2 sigmoid(S D) - 1

    Presence (a right, b wrong rollouts) is counted once per rollout; f_s is the share of the token in the tokens of
    side s, T right or F wrong, and len_s the number of those tokens. Source: arXiv 2505.16826.

    Args:
        ids: (P, G, T) integer token ids of G rollouts for each of P prompts, below the largest value of their dtype.
        mask: (P, G, T) bool or 0/1; what is 0 is neither counted nor valued.
        correct: (P, G) bool or 0/1, whether the rollout's answer is right.
        fisher_weight, ig_weight: h1 and h2, at least 0 and not both 0.
        tf_weight: h3, at least 0.
        leave_one_out: value each rollout's tokens by the other G - 1 rollouts, so that it does not vote for itself.
        scored: (P, G) bool or 0/1; a rollout that could not be scored neither votes nor gets values.
        ignore_ids: ids with K = 0 (padding, end of sequence). They count in the length of their side.

    The memory needed beside the input is at most ten times that of int64 `ids` (13 times with `leave_one_out`), which
    it comes near only if hardly any token occurs twice.

    Returns:
        A `KeyTokenTable`; `values` lie in [-1, 1] on the device of `ids`. They are 0 where masked, in a group whose
        voters are all right or all wrong, for a token that (leaving the rollout out) no voter has, and in a rollout
        that does not vote because its mask is empty or it is not scored.

    Raises:
        TypeError: `ids` is not an integer tensor.
        ValueError: shapes that do not fit, weights that are negative, not finite or both 0.
    """
    _check(ids, mask, correct, scored, fisher_weight, ig_weight, tf_weight)
    P, G, T = ids.shape
    mask, correct = mask.bool(), correct.bool()
    votes = mask.any(-1) if scored is None else mask.any(-1) & scored.bool()
    right, wrong = votes & correct, votes & ~correct  # (P, G)
    n_right, n_wrong = right.sum(1), wrong.sum(1)  # (P,)

    counted = mask & (votes & (n_right > 0)[:, None] & (n_wrong > 0)[:, None])[..., None]
    for special in ignore_ids:
        counted &= ids != special
    lengths = mask.sum(-1)
    length_right, length_wrong = (lengths * right).sum(1), (lengths * wrong).sum(1)  # (P,)
    runs, tokens, pairs, splits = _count(ids, counted, right, n_right, n_wrong)
    del counted
    if not leave_one_out:
        del pairs
    group, a, b = tokens.group, tokens.a, tokens.b

    tables = _Tables(splits, leave_one_out, G, fisher_weight, ig_weight, ids.device)

    def direction(cell, length_right, length_wrong, where, count_right, count_wrong) -> Tensor:
        """D of runs with these counts; `where` numbers the entry of the two lengths that belongs to each."""
        norms = _tf_norms(length_right.view(-1), length_wrong.view(-1))
        tf_right, tf_wrong = (
            (_TF_SATURATION + 1) * n / (n + norm.index_select(0, where))
            for n, norm in zip((count_right, count_wrong), norms, strict=True)
        )
        ratio = tf_right / (tf_wrong + _TF_EPSILON) - tf_wrong / (tf_right + _TF_EPSILON)
        return tables.presence.index_select(0, cell).add_(ratio, alpha=tf_weight)

    cell = tables.cell(n_right, n_wrong, group, a, b)
    D = direction(cell, length_right, length_wrong, group, tokens.count_right, tokens.count_wrong)
    if leave_one_out:
        # The same per pair: the rollout's own presence and tokens leave the counts of its side.
        own_right, own_wrong = pairs.right.int(), (~pairs.right).int()
        cell_W = tables.cell(
            n_right[:, None] - right.int(),
            n_wrong[:, None] - wrong.int(),
            pairs.rollout,
            a.index_select(0, pairs.token) - own_right,
            b.index_select(0, pairs.token) - own_wrong,
        )
        D_W = direction(
            cell_W,
            length_right[:, None] - lengths * right,
            length_wrong[:, None] - lengths * wrong,
            pairs.rollout,
            tokens.count_right.index_select(0, pairs.token) - pairs.count * own_right,
            tokens.count_wrong.index_select(0, pairs.token) - pairs.count * own_wrong,
        )
        values = _unsort(_key_value(tables.strength.index_select(0, cell_W), D_W), runs.new_pair, runs)
    else:
        values = _unsort(_key_value(tables.strength.index_select(0, cell), D), runs.new_token, runs)

    p, fisher, gain = (table.index_select(0, cell) for table in (tables.p, tables.fisher, tables.gain))
    return KeyTokenTable(values.view(P, G, T), n_right, n_wrong, group, tokens.id, a, b, p, fisher, gain, D)


class _Tokens(NamedTuple):
    """One entry per distinct token of each group, (U,) in the order of the sort."""

    group: Tensor
    id: Tensor
    a: Tensor  # right rollouts with it
    b: Tensor
    count_right: Tensor  # occurrences in right rollouts
    count_wrong: Tensor


class _Pairs(NamedTuple):
    """One entry per pair of a token and a rollout that has it, (W,) in the order of the sort."""

    token: Tensor  # numbers the entry of _Tokens
    rollout: Tensor  # numbered through all groups
    right: Tensor  # bool: it is a right one
    count: Tensor  # occurrences of the token in it


class _Runs(NamedTuple):
    """The positions of each group in the order of the sort, P * G * T in a row; those not counted end each group."""

    order: Tensor  # (P, G * T): where each came from in its group
    counted: Tensor  # bool
    new_token: Tensor  # bool: the first of a run of equal ids
    new_pair: Tensor  # bool: the first of a run of equal ids from one rollout


def _count(
    ids: Tensor, counted: Tensor, right: Tensor, n_right: Tensor, n_wrong: Tensor
) -> tuple[_Runs, _Tokens, _Pairs, set[tuple[int, int]]]:
    """Sort each group and count its tokens per side and per rollout; also return the class splits there are."""
    P, G, T = ids.shape
    # The sort is stable, so the occurrences of an id in one rollout stay together.
    last_id = torch.iinfo(ids.dtype).max
    sorted_ids, order = ids.masked_fill(~counted, last_id).view(P, G * T).sort(dim=1, stable=True)
    rollout = order.div(max(T, 1), rounding_mode="floor").int()
    is_counted = sorted_ids != last_id
    new_token, new_pair = is_counted.clone(), is_counted.clone()
    new_token[:, 1:] &= sorted_ids[:, 1:] != sorted_ids[:, :-1]
    new_pair[:, 1:] &= new_token[:, 1:] | (rollout[:, 1:] != rollout[:, :-1])
    runs = _Runs(order, *(x.view(-1) for x in (is_counted, new_token, new_pair)))

    # The only wait for the device: how many tokens and pairs there are, and which class splits.
    sizes = torch.stack([new_token.sum(), new_pair.sum()])
    host = torch.cat([n_right, n_wrong, sizes]).tolist()
    splits, (n_tokens, n_pairs) = set(zip(host[:P], host[P : 2 * P], strict=True)), host[2 * P :]

    start = torch.nonzero_static(runs.new_pair, size=n_pairs).squeeze(1).int()
    pair_is_new = runs.new_token.index_select(0, start)
    first = torch.nonzero_static(pair_is_new, size=n_tokens).squeeze(1).int()
    token_id = sorted_ids.view(-1).index_select(0, start.index_select(0, first))
    del sorted_ids  # as large as all that follows

    first_rollout = torch.arange(0, P * G, G, device=ids.device, dtype=torch.int32)[:, None]
    rollout = rollout.add_(first_rollout).view(-1).index_select(0, start)
    group_end = torch.arange(P, device=ids.device) * (G * T) + counted.sum((1, 2))
    end = torch.minimum(
        F.pad(start[1:], (0, 1), value=P * G * T), group_end.int().repeat_interleave(G).index_select(0, rollout)
    )
    count, pair_right = end - start, right.view(-1).index_select(0, rollout)

    bounds = F.pad(first, (0, 1), value=n_pairs)

    def total(x_W: Tensor) -> Tensor:
        return F.pad(x_W.cumsum(0, dtype=torch.int32), (1, 0)).index_select(0, bounds).diff()

    a, count_right = total(pair_right), total(count * pair_right)
    tokens = _Tokens(
        group=rollout.index_select(0, first) // G,
        id=token_id,
        a=a,
        b=bounds.diff() - a,
        count_right=count_right,
        count_wrong=total(count) - count_right,
    )
    number = pair_is_new.cumsum(0, dtype=torch.int32).sub_(1)
    return runs, tokens, _Pairs(number, rollout, pair_right, count), splits


def _unsort(run_values: Tensor, new_run: Tensor, runs: _Runs) -> Tensor:
    """Give each position the value of its run, 0 where it is not counted, in the order before the sort."""
    if len(run_values) == 0:
        return torch.zeros(runs.order.shape, device=run_values.device)
    run = new_run.cumsum(0, dtype=torch.int32).sub_(1).clamp_(min=0)  # a group may begin with none
    values = run_values.index_select(0, run).mul_(runs.counted).view_as(runs.order)
    return torch.empty_like(values).scatter_(1, runs.order, values)


def _key_value(strength: Tensor, direction: Tensor) -> Tensor:
    return torch.tanh(strength.mul_(direction).div_(2))  # = 2 sigmoid(S D) - 1


def _tf_norms(length_right: Tensor, length_wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Return per side k1 (1 - b0 + b0 len / mean len) len, so that TF = (k1 + 1) n / (n + norm) for n occurrences.

    At least 1, which changes nothing where there are tokens and keeps TF finite (0) where there are none.
    """
    mean = (length_right + length_wrong).clamp(min=1) / 2
    return tuple(
        (_TF_SATURATION * (1 - _TF_LENGTH + _TF_LENGTH * length / mean) * length).clamp(min=1)
        for length in (length_right, length_wrong)
    )


class _Tables:
    """What depends on the 2 x 2 counts only, for every class split that occurs: cells of flat float32 tables.

    A split with an empty side, which leave-one-out can reach, has 0 in all of its cells, and so have tokens that no
    voter has (a = b = 0, except p = 1): their strength is 0.
    """

    def __init__(self, splits: set[tuple[int, int]], leave_one_out: bool, G: int, h1: float, h2: float, device):
        wanted = {(t, f) for t, f in splits if t and f}
        if leave_one_out:
            wanted |= {(t - 1, f) for t, f in wanted if t > 1} | {(t, f - 1) for t, f in wanted if f > 1}
        self.width = G + 1
        number = torch.zeros(self.width, self.width, dtype=torch.int32)
        tables = torch.zeros(5, len(wanted) + 1, self.width, self.width)  # split 0: an empty side
        for i, (t, f) in enumerate(sorted(wanted), 1):
            number[t, f] = i
            p, gain = fisher_p_table(t, f), information_gain_table(t, f)
            fisher = torch.exp(-2 * p).masked_fill_(p == 1, 0.0)
            strength = (h1 * fisher + h2 * gain) / (h1 + h2)
            share = [torch.linspace(0, 1, n + 1, dtype=torch.float64).sqrt().asin() for n in (t, f)]
            presence = share[0][:, None] - share[1][None, :]
            for table, values in zip(tables, (p, fisher, gain, strength, presence), strict=True):
                table[i, : t + 1, : f + 1] = values
        self.number = number.to(device, non_blocking=True)
        self.p, self.fisher, self.gain, self.strength, self.presence = tables.flatten(1).to(device, non_blocking=True)

    def cell(self, n_right: Tensor, n_wrong: Tensor, where: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the cell of `(a, b)` in the split that `where` numbers."""
        first = self.number[n_right, n_wrong].view(-1) * self.width**2
        return first.index_select(0, where).add_(a, alpha=self.width).add_(b)


def assign(rollouts: Rollouts, args, policy) -> Credit:
    """Give the rollouts their key-token values as `args` (a `KTAEGRPOConfig`) says; the trainer's entrance."""
    table = key_token_table(
        rollouts.ids_PGT,
        rollouts.mask_PGT,
        rollouts.correct_PG,
        fisher_weight=args.ktae_fisher_weight,
        ig_weight=args.ktae_ig_weight,
        tf_weight=args.ktae_tf_weight,
        leave_one_out=args.ktae_leave_one_out,
        scored=rollouts.scored_PG,
        ignore_ids=rollouts.special_ids,
    )
    values = rollouts.own_rows(table.values)
    return Credit(values, args.ktae_combine, _stats(rollouts, table, values, args.ktae_combine))


def _stats(rollouts: Rollouts, table: KeyTokenTable, values: Tensor, how: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of this process's rollouts as sums; README's table of metrics says what each means."""
    mask, correct, scored = map(
        rollouts.own_rows, (rollouts.mask_PGT, rollouts.correct_PG[..., None], rollouts.scored_PG[..., None])
    )
    advantages = combine(rollouts.advantages_B, values, how).abs()
    before = rollouts.advantages_B.abs()[:, None].expand_as(advantages)
    informative = rollouts.own_rows(
        ((table.n_right > 0) & (table.n_wrong > 0))[:, None, None].expand_as(rollouts.correct_PG[..., None])
    )
    valued = mask & informative  # elsewhere all K are 0

    def mean(x: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
        over = over.expand_as(x)
        return (x * over).sum(), over.sum()

    return {
        "ktae/value_right": mean(values, valued & scored & correct),
        "ktae/value_wrong": mean(values, valued & scored & ~correct),
        "ktae/abs_value": mean(values.abs(), valued),
        "ktae/saturated": mean((values.abs() > _SATURATED).float(), valued),
        "ktae/zero_factor": mean((advantages <= _SILENCED * before).float(), mask & (before > 0)),
        "ktae/advantage_ratio": ((advantages * mask).sum(), (before * mask).sum()),
        "ktae/informative_groups": mean(informative[:, 0].float(), torch.ones_like(mask[:, 0])),
    }


def check_weights(fisher_weight: float, ig_weight: float, tf_weight: float) -> None:
    """Raise a ValueError that names the weight which is negative or not finite, or if both of the strength are 0."""
    weights = {"fisher_weight": fisher_weight, "ig_weight": ig_weight, "tf_weight": tf_weight}
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"KTAE's {name} must be a finite number of at least 0, not {weight}")
    if fisher_weight + ig_weight == 0:
        raise ValueError("KTAE's fisher_weight and ig_weight are both 0: at least one must be positive")


def _check(ids, mask, correct, scored, fisher_weight, ig_weight, tf_weight) -> None:
    if ids.dim() != 3:
        raise ValueError(f"ids must have shape (prompts, rollouts, tokens), not {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers, not {ids.dtype}")
    shapes = {"mask": (mask, ids.shape), "correct": (correct, ids.shape[:2])}
    if scored is not None:
        shapes["scored"] = (scored, ids.shape[:2])
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} to fit ids of shape {tuple(ids.shape)}, "
                f"not {tuple(tensor.shape)}"
            )
    if ids.numel() >= 2**31:
        raise ValueError(f"ids has {ids.numel()} tokens, more than fit 31 bits: split the batch by prompts")
    check_weights(fisher_weight, ig_weight, tf_weight)
