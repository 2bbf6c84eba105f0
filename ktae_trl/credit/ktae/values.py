"""KTAE: key-token values from the correct and wrong rollouts of a group (arXiv 2505.16826).

The tokens of a group are counted, each distinct token is valued once, and the values are copied to the positions: on a
CPU with numba installed by a compiled loop (`loops`), otherwise by PyTorch, for all groups together (`counting`).

The formulas are those of the authors' code (xiaolizh1/KTAE). According to notes on the paper, which were not checked
against its text, the paper has K = sigmoid((h1 F + h2 IG) D) - 1/2 and uses the probability of a single table in F.

Departures from the authors' code (docs/methods/ktae.md): p is exact, p = 1 gives F = 0, the weights in the config take
effect, and K is 0 for every end-of-sequence id.
"""

import math
from collections.abc import Iterable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ktae_trl.credit.ktae.association import fisher_p_table, information_gain_table
from ktae_trl.credit.ktae.counting import Counts, count
from ktae_trl.credit.ktae.direction import direction, tf_norms

NUMBA = find_spec("numba") is not None  # on a CPU, `loops` is used in place of `counting`


class KeyTokenTable(NamedTuple):
    """Values for each position, and the statistics of each distinct token of a group with correct and wrong rollouts.

    U is the number of (group, token) pairs that occur. Their order is arbitrary. c and d of the 2 x 2 table are
    `n_right[group] - a` and `n_wrong[group] - b`.
    """

    values: Tensor  # (P, G, T) float32: K
    n_right: Tensor  # (P,) int64: correct rollouts that vote
    n_wrong: Tensor  # (P,) int64: wrong rollouts that vote
    group: Tensor  # (U,) int32
    token: Tensor  # (U,) dtype of the ids
    a: Tensor  # (U,) int32: correct rollouts with the token
    b: Tensor  # (U,) int32: wrong rollouts with the token
    p: Tensor  # (U,) float32: Fisher's p-value
    F: Tensor  # (U,) float32: Fisher association
    IG: Tensor  # (U,) float32: information gain in bits
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
    """Return K of every token, (P, G, T) float32. See `key_token_table` for the formula and the arguments."""
    weights = (fisher_weight, ig_weight, tf_weight)
    return _value(ids, mask, correct, scored, weights, leave_one_out, ignore_ids, keep=False).values


def key_token_strengths(
    ids: Tensor,
    mask: Tensor,
    correct: Tensor,
    *,
    fisher_weight: float = 1.0,
    ig_weight: float = 1.0,
    leave_one_out: bool = False,
    scored: Tensor | None = None,
    ignore_ids: Iterable[int] = (),
) -> Tensor:
    """Return the strength S of every token, (P, G, T) float32 in [0, 1].

    See `key_token_table` for the formula and the arguments. S does not depend on `tf_weight`. It is 0 in all the cases
    listed there in which K is 0.
    """
    weights = (fisher_weight, ig_weight, None)
    return _value(ids, mask, correct, scored, weights, leave_one_out, ignore_ids, keep=False).values


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

        F = exp(-2 p), 0 where p = 1                     p: Fisher's exact test, two-sided, of presence and correctness
        S = (h1 F + h2 IG) / (h1 + h2)                   strength; IG: information gain in bits
        TF_s = (k1 + 1) f_s / (f_s + k1 (1 - b0 + b0 len_s / mean len)),  k1 = 2, b0 = 0.5
        D = asin sqrt(a / N_T) - asin sqrt(b / N_F) + h3 (TF_T / (TF_F + 1e-5) - TF_F / (TF_T + 1e-5))
        K = 2 sigmoid(S D) - 1

    N_T of the rollouts are correct and N_F wrong. The token occurs in a of the correct and b of the wrong rollouts,
    counted once per rollout. f_s is the share of the token among the tokens of side s (T correct, F wrong), and len_s
    is the number of those tokens. A rollout votes, that is, enters these counts, if it is scored and its mask is not
    empty.

    Source: the authors' code (xiaolizh1/KTAE) of arXiv 2505.16826.

    Args:
        ids: (P, G, T) integer token ids of G rollouts for each of P prompts, below the largest value of their dtype.
        mask: (P, G, T) bool or 0/1. Tokens with 0 are not counted and get K = 0.
        correct: (P, G) bool or 0/1, whether the rollout's answer is correct.
        fisher_weight, ig_weight: h1 and h2, at least 0 and not both 0.
        tf_weight: h3, at least 0.
        leave_one_out: compute each rollout's values from the other G - 1 rollouts, so that it does not vote for itself.
        scored: (P, G) bool or 0/1, whether the rollout could be scored.
        ignore_ids: ids with K = 0 (padding, end of sequence). They do count in the length of their side.

    Memory in addition to the input is at most 18 times that of int64 `ids` (22 times with `leave_one_out`). It comes
    close to this only if hardly any token occurs twice. The compiled loop needs less, and up to 2 MiB per thread.

    Returns:
        A `KeyTokenTable`. Its `values` lie in [-1, 1], on the device of `ids`. They are 0 for masked tokens, in a group
        whose voting rollouts are all correct or all wrong, and in a rollout that does not vote. With `leave_one_out`
        they are also 0 for a token that occurs in no other voting rollout, and if the other voting rollouts are all
        correct or all wrong.

    Raises:
        TypeError: `ids` is not an integer tensor.
        ValueError: shapes do not match, or a weight is negative or not finite, or `fisher_weight` and `ig_weight` are
            both 0.
    """
    weights = (fisher_weight, ig_weight, tf_weight)
    return _value(ids, mask, correct, scored, weights, leave_one_out, ignore_ids, keep=True)


def importance_weights(strength_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """Convert strengths to weights with mean 1 over each rollout's trained tokens.

        w_t = (1 + beta S_t) / mean over the rollout's trained tokens of (1 + beta S)

    The weights keep the sign and the mean size of a rollout's advantage, whatever the labels are. They do not depend on
    the side of a token: a token that is typical of the other side gains weight too.

    Args:
        strength_BT: (B, T) S of each token, at least 0, from `key_token_strengths`.
        mask_BT: (B, T) bool, the trained tokens.
        beta: at least 0.

    Returns:
        (B, T) float32. The weight is 1 for all other tokens, for all tokens if `beta` is 0, and for all tokens of a
        rollout whose S are all equal.
    """
    raw_BT = 1 + beta * strength_BT
    mean_B1 = (raw_BT * mask_BT).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return torch.where(mask_BT, raw_BT / mean_B1, 1.0)


@torch.no_grad()
def _value(ids, mask, correct, scored, weights, leave_one_out, ignore_ids, *, keep: bool) -> KeyTokenTable:
    """Return the table. Without `keep`, the statistics of the tokens are empty.

    If the last of the weights, h3, is None, nothing needs a direction: the values are S, and `keep` must be false.
    """
    _check(ids, mask, correct, scored, *weights)
    mask, correct, ignore_ids = mask.bool(), correct.bool(), list(ignore_ids)
    by_loop = NUMBA and ids.device.type == "cpu"
    lengths = _lengths(mask) if by_loop else mask.sum(-1, dtype=torch.int32)
    votes = lengths > 0 if scored is None else (lengths > 0) & scored.bool()
    sides = _Sides(votes & correct, votes & ~correct, lengths)
    n_right, n_wrong = sides.sizes()
    how = _by_loop if by_loop else _by_sort
    values, columns = how(ids, mask, sides, weights, leave_one_out, ignore_ids, keep)
    columns = columns if keep else [values.new_empty(0)] * 8
    return KeyTokenTable(values, n_right, n_wrong, *columns)


class _Sides(NamedTuple):
    """The correct and the wrong rollouts of P groups."""

    right: Tensor  # (P, G) bool: votes and is correct
    wrong: Tensor  # (P, G) bool: votes and is wrong
    lengths: Tensor  # (P, G) tokens of each rollout

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Return the number of rollouts on each side, (P,) each."""
        return self.right.sum(1), self.wrong.sum(1)

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Return the number of tokens on each side, (P,) each."""
        return (self.lengths * self.right).sum(1), (self.lengths * self.wrong).sum(1)

    def of_others(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return both numbers for the other rollouts of the group, (P, G) each."""
        both = (self.right, self.wrong)
        sizes = [n[:, None] - side.int() for n, side in zip(self.sizes(), both, strict=True)]
        return sizes, [n[:, None] - self.lengths * side for n, side in zip(self.tokens(), both, strict=True)]

    def voting(self) -> Tensor:
        """Return the rollouts that vote in a group with both sides, (P, G) bool."""
        return (self.right | self.wrong) & (self.right.any(1) & self.wrong.any(1))[:, None]


def _statistics(tables: "_Tables", tf_weight: float, sides: _Sides, group, token, a, b, *occurrences) -> list[Tensor]:
    """Return the columns of the table for tokens with these counts."""
    cell = tables.cell(*sides.sizes(), group, a, b)
    D = _direction(tables, tf_weight, cell, group, sides.tokens(), occurrences)
    return [group, token, a, b, *(x.index_select(0, cell) for x in (tables.p, tables.fisher, tables.gain)), D]


# By a compiled loop


def _lengths(mask: Tensor) -> Tensor:
    from ktae_trl.credit.ktae import loops

    return torch.from_numpy(loops.lengths(mask.contiguous().numpy()))


def _by_loop(ids, mask, sides: _Sides, weights, leave_one_out: bool, ignore_ids: list[int], keep: bool):
    from ktae_trl.credit.ktae import loops

    voting, tf_weight = sides.voting(), weights[2]
    splits = set(zip(*(n.tolist() for n in sides.sizes()), strict=True))
    tables = _Tables(splits, leave_one_out, ids.shape[1], *weights[:2], ids.device)
    sizes, tokens = (
        sides.of_others() if leave_one_out else ([n[:, None] for n in x] for x in (sides.sizes(), sides.tokens()))
    )
    voters = loops.Voters(*(x.numpy() for x in (tables.first(*sizes), *tf_norms(*tokens))))
    cells = loops.Tables(tables.strength.numpy(), tables.presence.numpy(), tables.width)
    both = sides.right & voting, sides.wrong & voting
    values, counts = loops.key_token_values(ids, mask, *both, voters, cells, tf_weight, ignore_ids, keep=keep)
    return values, _statistics(tables, tf_weight, sides, *counts) if keep else None


# By sorting

_ROUND = 2**22  # positions per round on a CPU, so that rounds reuse memory


def _by_sort(ids, mask, sides: _Sides, weights, leave_one_out: bool, ignore_ids: list[int], keep: bool):
    P, G, T = ids.shape
    voting = sides.voting()
    values = torch.empty(P, G, T, device=ids.device)
    columns, tables = [], None
    step = max(1, _ROUND // max(G * T, 1)) if ids.device.type == "cpu" else max(P, 1)
    for begin in range(0, max(P, 1), step):
        some = slice(begin, begin + step)
        of_some = _Sides(*(x[some] for x in sides))
        counted = mask[some] & voting[some, :, None]
        for special in ignore_ids:
            counted &= ids[some] != special
        sizes = torch.stack(of_some.sizes())
        counts, sizes = count(ids[some], counted, of_some.right, sizes, pairs=leave_one_out)
        splits = set(zip(*sizes, strict=True))
        if tables is None or not splits <= tables.splits:  # later rounds mostly have the same splits
            tables = _Tables(splits, leave_one_out, G, *weights[:2], ids.device)
        of_entries = (_values_of_pairs if leave_one_out else _values_of_tokens)(tables, weights[2], of_some, counts)
        counts.spread(of_entries, values[some])
        if keep:
            group, *others = _statistics(tables, weights[2], of_some, *counts[:6])
            columns.append((group + begin, *others))
    return values, list(map(torch.cat, zip(*columns, strict=True)))


def _values_of_tokens(tables: "_Tables", tf_weight: float | None, sides: _Sides, counts: Counts) -> Tensor:
    """Return K of each token of each group, or S if `tf_weight` is None."""
    cell = tables.cell(*sides.sizes(), counts.group, counts.a, counts.b)
    occurrences = (counts.count_right, counts.count_wrong)
    return _key_value(tables, tf_weight, cell, counts.group, sides.tokens(), occurrences)


def _values_of_pairs(tables: "_Tables", tf_weight: float | None, sides: _Sides, counts: Counts) -> Tensor:
    """Return K of each (token, rollout) pair, or S, with the rollout removed from the counts of its side."""
    token, rollout, own = counts.pairs
    own_right = sides.right.view(-1).index_select(0, rollout).int()
    own_sides = (own_right, 1 - own_right)

    def others(totals: tuple[Tensor, Tensor], times: Tensor | int) -> list[Tensor]:
        return [n.index_select(0, token) - mine * times for n, mine in zip(totals, own_sides, strict=True)]

    sizes, lengths = sides.of_others()
    cell = tables.cell(*sizes, rollout, *others((counts.a, counts.b), 1))
    return _key_value(tables, tf_weight, cell, rollout, lengths, others((counts.count_right, counts.count_wrong), own))


def _key_value(tables, tf_weight: float | None, cell: Tensor, where: Tensor, lengths, counts) -> Tensor:
    """Return K, or S if `tf_weight` is None. The arguments are those of `_direction`."""
    strength = tables.strength.index_select(0, cell)
    if tf_weight is None:
        return strength
    return torch.tanh(strength.mul_(_direction(tables, tf_weight, cell, where, lengths, counts)).div_(2))


def _direction(
    tables: "_Tables",
    tf_weight: float,
    cell: Tensor,
    where: Tensor,
    lengths: Iterable[Tensor],
    counts: Iterable[Tensor],
) -> Tensor:
    """Return D for counts of both sides. `where` is the index into `lengths` of each count."""
    norms = (norm.index_select(0, where) for norm in tf_norms(*(n.reshape(-1) for n in lengths)))
    return direction(tables.presence.index_select(0, cell), tf_weight, *counts, *norms)


class _Tables:
    """The statistics that depend only on the 2 x 2 counts: flat float32 tables with a cell for each split and (a, b).

    All cells of a split with an empty side, which leave-one-out can produce, are 0. The cell a = b = 0, a token that
    occurs in no voting rollout, is 0 too, except for p = 1.
    """

    def __init__(self, splits: set[tuple[int, int]], leave_one_out: bool, G: int, h1: float, h2: float, device):
        self.splits = splits
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
        """Return the cell of each `(a, b)`. `where` is the index of its split in `n_right` and `n_wrong`."""
        return self.first(n_right, n_wrong).view(-1).index_select(0, where).add_(a, alpha=self.width).add_(b)

    def first(self, n_right: Tensor, n_wrong: Tensor) -> Tensor:
        """Return the first cell of each split."""
        return self.number[n_right, n_wrong] * self.width**2


def check_weights(fisher_weight: float, ig_weight: float, tf_weight: float | None) -> None:
    """Raise a ValueError if a weight is negative or not finite, or if both weights of the strength are 0.

    `tf_weight` may be None, for values that do not depend on it.
    """
    weights = {"fisher_weight": fisher_weight, "ig_weight": ig_weight, "tf_weight": tf_weight}
    for name, weight in weights.items():
        if weight is not None and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"KTAE's {name} must be a finite number >= 0, not {weight}")
    if fisher_weight + ig_weight == 0:
        raise ValueError("KTAE's fisher_weight and ig_weight are both 0. Set at least one of them to a positive number")


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
                f"{name} must have shape {tuple(shape)} to match ids of shape {tuple(ids.shape)}, "
                f"not {tuple(tensor.shape)}"
            )
    if ids.numel() >= 2**31:
        raise ValueError(f"ids has {ids.numel()} tokens, but the limit is 2**31 - 1. Split the batch by prompts")
    check_weights(fisher_weight, ig_weight, tf_weight)
