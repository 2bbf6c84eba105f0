"""TreeRPO: segments are valued by the answers below them and compared with their siblings (arXiv 2506.05183).

A prompt is the root of a tree. From every node N segments of at most L tokens are sampled, down to depth D; a segment
that ends the text is a leaf before. The G = N^D rollouts of a prompt are the paths to the leaves, in order, so the tree
needs no other record: the tokens [(d - 1) L, d L) of rollout r are its node of depth d, and the N^(D - d) rollouts of
the block that r lies in share it. The first of them trains these tokens; in the others they are context. A text that
ended early fills its whole block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ktae_trl.credit.combine import Credit, Rollouts

NORMALIZERS = {
    "bernoulli": lambda mean, std: (mean * (1 - mean)).sqrt(),
    "std": lambda mean, std: std + 1e-4,
    "none": lambda mean, std: torch.ones_like(mean),
}
_ROUNDING = 1e-6  # node values are fractions: .3 - .2 in float32 is still a spread of .1


class Shape(NamedTuple):
    """The tree of a prompt."""

    branching: int  # N
    depth: int  # D
    segment_tokens: int  # L

    @classmethod
    def of(cls, args) -> "Shape":
        """Return the tree that `args` (a `KTAEGRPOConfig`) describes."""
        segment_tokens = args.tree_segment_tokens
        if segment_tokens is None:
            segment_tokens = args.max_completion_length // args.tree_depth
        return cls(args.tree_branching, args.tree_depth, segment_tokens)

    def block(self, depth: int) -> int:
        """Return how many rollouts share a node of this depth (1 below the root, D at the leaves)."""
        return self.branching ** (self.depth - depth)


def node_values(leaves_PG: Tensor, branching: int) -> list[Tensor]:
    """Value every node by the leaves below it.

        v(node) = mean of v over its children that have one;  v(leaf) = whether its answer is right

    Source: arXiv 2506.05183. A text that ended early stands in each row of its block, whose mean is its own value.

    Args:
        leaves_PG: (P, N^D) float: values of the leaves, NaN where the answer could not be judged.
        branching: N.

    Returns:
        The values at depth 0 to D, (P, N^depth) each; NaN where no leaf below could be judged.
    """
    values = [leaves_PG]
    while values[0].shape[1] > 1:
        values.insert(0, values[0].unflatten(1, (-1, branching)).nanmean(-1))
    return values


def sibling_advantages(values: Tensor, min_spread: float, normalizer: str) -> Tensor:
    """Compare nodes with their siblings.

        A = (v - mu) / n,  n = sqrt(mu (1 - mu)) (bernoulli) | sigma + 1e-4 (std) | 1 (none)

    mu and sigma (unbiased, as in TRL) are those of the siblings that have a value. Source: arXiv 2506.05183, for whose
    values between 0 and 1 dividing by sigma would make {.49, .49, .51, .51} as far apart as {0, 0, 1, 1}. The formula
    of `bernoulli` was not checked against the authors' code.

    Args:
        values: (..., N) values of sibling nodes, NaN for those without one.
        min_spread: siblings whose largest and smallest value are nearer than this have no advantages.
        normalizer: one of NORMALIZERS.

    Returns:
        (..., N) float32; 0 for a node without a value, and for siblings that are too near or all equal, those with a
        single value among them.
    """
    known = ~values.isnan()
    spread = values.masked_fill(~known, -torch.inf).amax(-1) - values.masked_fill(~known, torch.inf).amin(-1)
    signal = (spread > 0) & (spread >= min_spread - _ROUNDING)  # -inf if no sibling has a value
    mean = values.nanmean(-1, keepdim=True)
    count = known.sum(-1, keepdim=True)
    std = ((values - mean).square().nanmean(-1, keepdim=True) * (count / (count - 1))).sqrt()
    advantages = (values - mean) / NORMALIZERS[normalizer](mean, std)
    return torch.where(signal[..., None] & known, advantages, 0.0)


def advantages_by_depth(leaves_PG: Tensor, branching: int, min_spread: float, normalizer: str) -> list[Tensor]:
    """Return the advantage of each node among its siblings, at depth 1 to D: (P, N^depth) each."""
    return [
        sibling_advantages(values.unflatten(1, (-1, branching)), min_spread, normalizer).flatten(1)
        for values in node_values(leaves_PG, branching)[1:]
    ]


def token_advantages(advantages: list[Tensor], shape: Shape, T: int) -> Tensor:
    """Give each token the advantage of its segment: (P, G, T), from those of the nodes at depth 1 to D."""
    by_row = [nodes.repeat_interleave(shape.block(depth), 1) for depth, nodes in enumerate(advantages, 1)]
    segment = torch.arange(T, device=advantages[0].device) // shape.segment_tokens
    return torch.stack(by_row, -1)[..., segment.clamp(max=shape.depth - 1)]  # what lies beyond is padding


def sampled_nodes(mask_PGT: Tensor, shape: Shape) -> list[Tensor]:
    """Return which nodes of depth 1 to D were sampled, (P, N^depth) bool each: those that are trained somewhere."""
    P, _, T = mask_PGT.shape
    nodes = []
    for depth in range(1, shape.depth + 1):
        begin, block = (depth - 1) * shape.segment_tokens, shape.block(depth)
        sampled = mask_PGT[:, ::block, begin] if begin < T else mask_PGT.new_zeros(P, shape.branching**depth)
        nodes.append(sampled.bool())
    return nodes


def assign(rollouts: Rollouts, args, policy) -> Credit:
    """Give the segments of sampled trees their advantages as `args` (a `KTAEGRPOConfig`) says; the trainer's entrance.

    Only whether answers are right counts: the rollout advantages, and with them `scale_rewards`, `reward_weights` and
    other rewards, are replaced.
    """
    shape = Shape.of(args)
    leaves_PG = rollouts.correct_PG.float().masked_fill(~rollouts.scored_PG, torch.nan)
    advantages = advantages_by_depth(leaves_PG, shape.branching, args.tree_min_spread, args.tree_normalizer)
    values_PGT = token_advantages(advantages, shape, rollouts.mask_PGT.shape[2]) * rollouts.mask_PGT
    stats = _stats(rollouts.mask_PGT, values_PGT, advantages, shape)
    return Credit(rollouts.own_rows(values_PGT), "replace", stats)


def _stats(
    mask_PGT: Tensor, values_PGT: Tensor, advantages: list[Tensor], shape: Shape
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of this process's trees as sums; README's table of metrics says what each means."""
    nodes = sampled_nodes(mask_PGT, shape)
    N, prompts = shape.branching, mask_PGT.new_tensor(len(mask_PGT), dtype=torch.long)
    stats = {}
    for depth, (sampled, values) in enumerate(zip(nodes, advantages, strict=True), 1):
        siblings = sampled.unflatten(1, (-1, N)).any(-1)
        signal = (values != 0).unflatten(1, (-1, N)).any(-1)
        stats[f"tree/signal_depth_{depth}"] = (siblings & signal).sum(), siblings.sum()

    parents = [*(below.unflatten(1, (-1, N)).any(-1) for below in nodes[1:]), torch.zeros_like(nodes[-1])]
    endings = torch.stack([(sampled & ~parent).sum() for sampled, parent in zip(nodes, parents, strict=True)])
    depths = torch.arange(1, shape.depth + 1, device=endings.device)
    stats["tree/ending_depth"] = (endings * depths).sum(), endings.sum()

    generated_T = mask_PGT.sum((0, 1))
    depth_T = (torch.arange(len(generated_T), device=depths.device) // shape.segment_tokens + 1).clamp(max=shape.depth)
    rows_T = shape.branching ** (shape.depth - depth_T)
    stats["tree/generated_tokens"] = generated_T.sum(), prompts
    stats["tree/row_tokens"] = (generated_T * rows_T).sum(), prompts
    stats["tree/trained_share"] = (values_PGT != 0).sum(), generated_T.sum()
    return stats
