"""TreeRPO: segments of sampled trees are compared with their siblings (arXiv 2506.05183).

The prompt is the root of a tree. N segments of at most L tokens are sampled from every node, down to depth D. A segment
that ends the text is a leaf, even above depth D. A leaf has value 1 if its answer is correct, else 0. The value of any
other node is the mean of its children's values.

The G = N^D rollouts of a prompt are the paths to the leaves, in order. Tokens [(d - 1) L, d L) of a rollout are its
node at depth d. The rollouts that share this node are a block of N^(D - d) consecutive rollouts. The first of them
trains the node's tokens; in the others they are context only. A text that ended early fills all rollouts of its block.

A tree of depth 1 gives GRPO's advantages only with `tree_normalizer: std`.

The paper was not read in full, and its code was not available for comparison. Known departures: N = 2 by default
(published: N = 8, D = 3 and L = 384), and tokens saved by texts that end early are not spent on other nodes. Which
statistic of the sibling values the published minimum spread of 0.1 applies to is not known: see `tree_spread`.
"""

import math
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ktae_trl.arguments import UserError
from ktae_trl.credit.method import Card, Credit, Groups, Method, Samples, Settings

NORMALIZERS = {
    "bernoulli": lambda mean, std: (mean * (1 - mean)).sqrt(),
    "std": lambda mean, std: std + 1e-4,
    "none": lambda mean, std: torch.ones_like(mean),
}
SPREADS = ("range", "std")
_LOSSES = ("dapo", "bnpo", "dr_grpo")
# Keys of `generation_kwargs` that override the segment length or would apply to each segment separately.
_PER_SEGMENT = {
    "max_length",
    "max_new_tokens",
    "max_tokens",
    "min_length",
    "min_new_tokens",
    "min_tokens",
    "structured_outputs",
}
_ROUNDING = 1e-6  # so that .3 - .2 in float32 counts as a spread of .1


class Shape(NamedTuple):
    """The shape of a prompt's tree."""

    branching: int  # N
    depth: int  # D
    segment_tokens: int  # L

    @classmethod
    def of(cls, config) -> "Shape":
        """Return the shape that a `KTAEGRPOConfig` describes."""
        segment_tokens = config.tree_segment_tokens
        if segment_tokens is None:
            segment_tokens = config.max_completion_length // config.tree_depth
        return cls(config.tree_branching, config.tree_depth, segment_tokens)

    def block(self, depth: int) -> int:
        """Return how many rollouts share a node at this depth (1 below the root, D at the leaves)."""
        return self.branching ** (self.depth - depth)


def node_values(leaves_PG: Tensor, branching: int) -> list[Tensor]:
    """Compute the value of every node from the leaves below it.

        v(leaf) = 1 if its answer is correct, else 0
        v(node) = mean of v over its children that have a value

    A text that ended early fills all rows of its block, and their mean is its own value. Source: arXiv 2506.05183.

    Args:
        leaves_PG: (P, N^D) float, values of the leaves, NaN if the answer could not be graded.
        branching: N.

    Returns:
        The values at depths 0 to D, (P, N^depth) each. NaN if no leaf below the node could be graded.
    """
    values = [leaves_PG]
    while values[0].shape[1] > 1:
        values.insert(0, values[0].unflatten(1, (-1, branching)).nanmean(-1))
    return values


def sibling_advantages(values: Tensor, min_spread: float, normalizer: str, spread: str = "range") -> Tensor:
    """Compute the advantage of nodes relative to their siblings.

        A = (v - mu) / n,  n = sqrt(mu (1 - mu)) (bernoulli) | sigma + 1e-4 (std) | 1 (none)

    mu and sigma (unbiased, as in TRL) are the mean and standard deviation of the siblings that have a value. Dividing
    by sigma would put {.49, .49, .51, .51} as far apart as {0, 0, 1, 1}. On one tree of depth 1, `std` is GRPO's
    formula; `bernoulli` is sqrt(N / (N - 1)) times as large.

    Source: arXiv 2506.05183. The formula of `bernoulli` was checked neither against the paper's text nor its code.

    Args:
        values: (..., N) values of sibling nodes, NaN for nodes without a value.
        min_spread: siblings get advantages only if the spread of their values is at least this.
        normalizer: a key of `NORMALIZERS`.
        spread: "range", the largest minus the smallest value, or "std", which is sigma.

    Returns:
        (..., N) float32. 0 for a node without a value, and for siblings with a spread below `min_spread` or with equal
        values. This includes siblings of which only one has a value.
    """
    known = ~values.isnan()
    size = values.masked_fill(~known, -torch.inf).amax(-1) - values.masked_fill(~known, torch.inf).amin(-1)
    mean = values.nanmean(-1, keepdim=True)
    count = known.sum(-1, keepdim=True)
    std = ((values - mean).square().nanmean(-1, keepdim=True) * (count / (count - 1))).sqrt()
    # Without a value the range is -inf, and sigma NaN. With one, the range is 0.
    signal = (size > 0) & ((std.squeeze(-1) if spread == "std" else size) >= min_spread - _ROUNDING)
    advantages = (values - mean) / NORMALIZERS[normalizer](mean, std)
    return torch.where(signal[..., None] & known, advantages, 0.0)


def advantages_by_depth(
    leaves_PG: Tensor, branching: int, min_spread: float, normalizer: str, spread: str = "range"
) -> list[Tensor]:
    """Return the advantages of the nodes at depths 1 to D relative to their siblings, (P, N^depth) each."""
    return [
        sibling_advantages(values.unflatten(1, (-1, branching)), min_spread, normalizer, spread).flatten(1)
        for values in node_values(leaves_PG, branching)[1:]
    ]


def token_advantages(advantages: list[Tensor], shape: Shape, T: int) -> Tensor:
    """Return the advantage of each token's segment, (P, G, T), from the advantages of the nodes at depths 1 to D."""
    by_row = [nodes.repeat_interleave(shape.block(depth), 1) for depth, nodes in enumerate(advantages, 1)]
    segment = torch.arange(T, device=advantages[0].device) // shape.segment_tokens
    return torch.stack(by_row, -1)[..., segment.clamp(max=shape.depth - 1)]  # what follows is padding


def sampled_nodes(mask_PGT: Tensor, shape: Shape) -> list[Tensor]:
    """Return which nodes at depths 1 to D were sampled, that is, have a trained token, (P, N^depth) bool each."""
    P, _, T = mask_PGT.shape
    nodes = []
    for depth in range(1, shape.depth + 1):
        begin, block = (depth - 1) * shape.segment_tokens, shape.block(depth)
        sampled = mask_PGT[:, ::block, begin] if begin < T else mask_PGT.new_zeros(P, shape.branching**depth)
        nodes.append(sampled.bool())
    return nodes


def _sums(
    mask_PGT: Tensor, values_PGT: Tensor, advantages: list[Tensor], shape: Shape
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of this process's trees as (numerator, denominator). See `docs/reference/metrics.md`."""
    nodes = sampled_nodes(mask_PGT, shape)
    N, prompts = shape.branching, mask_PGT.new_tensor(len(mask_PGT), dtype=torch.long)
    sums = {}
    for depth, (sampled, values) in enumerate(zip(nodes, advantages, strict=True), 1):
        siblings = sampled.unflatten(1, (-1, N)).any(-1)
        signal = (values != 0).unflatten(1, (-1, N)).any(-1)
        sums[f"tree/signal_depth_{depth}"] = (siblings & signal).sum(), siblings.sum()

    parents = [*(below.unflatten(1, (-1, N)).any(-1) for below in nodes[1:]), torch.zeros_like(nodes[-1])]
    endings = torch.stack([(sampled & ~parent).sum() for sampled, parent in zip(nodes, parents, strict=True)])
    depths = torch.arange(1, shape.depth + 1, device=endings.device)
    sums["tree/ending_depth"] = (endings * depths).sum(), endings.sum()

    generated_T = mask_PGT.sum((0, 1))
    depth_T = (torch.arange(len(generated_T), device=depths.device) // shape.segment_tokens + 1).clamp(max=shape.depth)
    rows_T = shape.branching ** (shape.depth - depth_T)
    sums["tree/generated_tokens"] = generated_T.sum(), prompts
    sums["tree/row_tokens"] = (generated_T * rows_T).sum(), prompts
    sums["tree/trained_share"] = (values_PGT != 0).sum(), generated_T.sum()
    return sums


# Sampling

Generate = Callable[[list[list[int]], int], tuple[list[list[int]], list[list[float]] | None]]


def sample(prompt_ids: list[list[int]], generate: Generate, shape: Shape, eos_ids: Collection[int]) -> Samples:
    """Sample a tree for each prompt, one depth after the other.

    A segment that ends with an end-of-sequence id, or has fewer tokens than allowed, ends its text. Nothing is sampled
    below it, and the text is copied to every row of its block.

    Args:
        prompt_ids: token ids of each row's prompt. The N^D rows of a prompt are consecutive.
        generate: maps prefixes (token ids) and a maximum number of new tokens to one continuation of each prefix and
            its log-probabilities (or None). It is called once per depth, with no prefixes if all texts have ended, so
            that all processes call it equally often.
        shape: the tree.
        eos_ids: end-of-sequence ids.

    Returns:
        One row per leaf. A shared segment is trained in the first of its rows; its log-probabilities are in all.
    """
    rows = range(len(prompt_ids))
    completions: list[list[int]] = [[] for _ in rows]
    logprobs: list[list[float]] | None = [[] for _ in rows]
    masks: list[list[int]] = [[] for _ in rows]
    ended = [False for _ in rows]
    for depth in range(1, shape.depth + 1):
        block = shape.block(depth)
        growing = [row for row in rows[::block] if not ended[row]]
        segments, scores = generate([prompt_ids[row] + completions[row] for row in growing], shape.segment_tokens)
        logprobs = None if scores is None else logprobs
        for i, (first, segment) in enumerate(zip(growing, segments, strict=True)):
            for row in range(first, first + block):
                completions[row] += segment
                masks[row] += [int(row == first)] * len(segment)
                ended[row] = len(segment) < shape.segment_tokens or segment[-1] in eos_ids
                if logprobs is not None:
                    logprobs[row] += scores[i]
    return Samples(completions, logprobs, masks)


class TreeRPO(Method):
    """Rollouts are sampled as trees, and segments are compared with their siblings."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: tree`.

        Parameters:
            tree_branching (`int`, *optional*, defaults to `2`):
                Number of segments sampled from each node.
            tree_depth (`int`, *optional*, defaults to `3`):
                Number of segments from the prompt to a leaf. `num_generations` must be `tree_branching ** tree_depth`.
            tree_segment_tokens (`int`, *optional*):
                Maximum number of tokens in a segment. Defaults to `max_completion_length // tree_depth`.
            tree_min_spread (`float`, *optional*, defaults to `0.1`):
                Siblings get advantages only if the spread of their values (`tree_spread`) is at least this.
            tree_spread (`str`, *optional*, defaults to `"range"`):
                Measure of spread to which `tree_min_spread` applies: `"range"` is the largest minus the smallest value
                of the siblings, `"std"` their sample standard deviation, which is smaller.
            tree_normalizer (`str`, *optional*, defaults to `"bernoulli"`):
                Divisor of the difference between a segment's value and the mean mu of the siblings' values:
                `"bernoulli"` is sqrt(mu (1 - mu)),
                `"std"` the standard deviation of the siblings, as in GRPO, and `"none"` is 1.
        """

        tree_branching: int = field(default=2, metadata={"help": "Number of segments sampled from each node."})
        tree_depth: int = field(
            default=3,
            metadata={"help": "Segments from the prompt to a leaf. num_generations = tree_branching ** tree_depth."},
        )
        tree_segment_tokens: int | None = field(
            default=None,
            metadata={"help": "Maximum tokens in a segment. Defaults to max_completion_length // tree_depth."},
        )
        tree_min_spread: float = field(
            default=0.1,
            metadata={"help": "Siblings get advantages only if the spread of their values is at least this."},
        )
        tree_spread: str = field(
            default="range",
            metadata={"help": "Measure of spread for tree_min_spread: 'range' (largest minus smallest) or 'std'."},
        )
        tree_normalizer: str = field(
            default="bernoulli",
            metadata={"help": "Divisor of advantages: 'bernoulli' (sqrt(mu (1 - mu))), 'std' (as in GRPO) or 'none'."},
        )

        def check(self) -> None:
            for name, least in (("tree_branching", 2), ("tree_depth", 1)):
                if getattr(self, name) < least:
                    raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
            if self.tree_normalizer not in NORMALIZERS:
                raise UserError(
                    f"tree_normalizer must be one of {', '.join(NORMALIZERS)}, not {self.tree_normalizer!r}"
                )
            if self.tree_spread not in SPREADS:
                raise UserError(f"tree_spread must be one of {', '.join(SPREADS)}, not {self.tree_spread!r}")
            if not 0 <= self.tree_min_spread <= 1:
                raise UserError(f"tree_min_spread must be between 0 and 1, not {self.tree_min_spread}")

    how = "replace"
    name = "tree"
    family = "tree"
    title = "TreeRPO (sampled trees)"
    card = Card(
        "TreeRPO",
        "Rollouts are sampled as trees. Each token gets the advantage of its segment: the share of correct answers "
        "below the segment, compared with its sibling segments.",
        ("treerpo",),
        {
            "title": "TreeRPO: Tree Relative Policy Optimization",
            "id": "2506.05183",
            "citation": textwrap.dedent("""\
                @article{yang2025treerpo,
                    title   = {{TreeRPO: Tree Relative Policy Optimization}},
                    author  = {Zhicheng Yang and Zhijiang Guo and Yinya Huang and Xiaodan Liang and Yiwei Wang
                               and Jing Tang},
                    journal = {arXiv preprint arXiv:2506.05183},
                    year    = 2025,
                }"""),
        },
    )
    value = "segment advantage v"
    columns = {
        "tokens": ("tree/generated_tokens", "{:.0f}", "mean number of tokens generated for a prompt"),
        "A≠0": ("tree/trained_share", "{:.0%}", "share of generated tokens whose advantage is not 0"),
    }
    panels = {
        "Shares": ["tree/signal_*", "tree/trained_share"],
        "Tokens of a tree": ["tree/generated_tokens", "tree/row_tokens"],
    }
    shares_tokens = True

    def sample(self, prompts: list[list[int]]) -> Samples:
        """Sample a tree for each prompt."""
        return sample(prompts, self.tools.generate, Shape.of(self.settings), self.tools.eos_ids)

    def credit(self, groups: Groups) -> Credit:
        """Compute the segment advantages of the sampled trees.

        They depend only on which answers are correct. They replace the rollout advantages, so `scale_rewards`,
        `reward_weights` and other reward functions have no effect.
        """
        settings, shape = self.settings, Shape.of(self.settings)
        leaves_PG = groups.correct_PG.float().masked_fill(~groups.scored_PG, torch.nan)
        advantages = advantages_by_depth(
            leaves_PG, shape.branching, settings.tree_min_spread, settings.tree_normalizer, settings.tree_spread
        )
        values_PGT = token_advantages(advantages, shape, groups.mask_PGT.shape[2]) * groups.mask_PGT
        return Credit(groups.own_rows(values_PGT), _sums(groups.mask_PGT, values_PGT, advantages, shape))

    @classmethod
    def no_signal(cls, sums: dict[str, float], config: Any, first: str) -> str | None:
        signals = [total for name, total in sums.items() if name.startswith("tree/signal_depth_")]
        if any(signals) or not signals:
            return None
        return (
            f"No siblings in the trees of {first} differ by at least tree_min_spread ({config.tree_min_spread:g}, "
            f"tree_spread: {config.tree_spread}), so no segment is trained. Lower tree_min_spread."
        )

    @classmethod
    def check_run(cls, config: Any) -> None:
        check_run(config)


def check_run(args: Any) -> None:
    """Check that the other settings of the run are compatible with trees.

    Raises:
        UserError: the number of leaves is not `num_generations`, the segments do not fit in the completion, a process
            would hold part of a tree, or a setting is not supported with trees.
    """
    N, D, L = shape = Shape.of(args)
    rollouts, limit = args.num_generations, args.max_completion_length
    if rollouts != shape.block(0):
        below = max(1, math.floor(math.log(rollouts, N) + 1e-9))
        nearest = " or ".join(f"{N**d} (tree_depth={d})" for d in (below, below + 1))
        raise UserError(
            f"A tree has tree_branching ** tree_depth = {N} ** {D} = {N**D} leaves, but num_generations={rollouts}. "
            f"Set num_generations to the number of leaves. With tree_branching={N} the nearest are {nearest}"
        )
    if L < 1 or limit < D * L:
        raise UserError(
            f"tree_depth x tree_segment_tokens = {D} x {L} tokens do not fit in max_completion_length={limit}. Set "
            f"tree_segment_tokens to at least 1 and at most {limit // D}, or raise max_completion_length"
        )
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if rows % rollouts:
        raise UserError(
            f"Each process must generate complete trees, but a process has {rows} rows "
            f"({args.per_device_train_batch_size} per_device_train_batch_size x {args.steps_per_generation} "
            f"steps_per_generation). Set them so that their product is a multiple of num_generations={rollouts}"
        )
    if args.loss_type not in _LOSSES:
        raise UserError(
            f"Tree sampling needs a token-level loss, not loss_type={args.loss_type!r}: a row trains only some of its "
            "tokens, so a mean over each row would weight segments unequally. Set loss_type to one of "
            f"{', '.join(_LOSSES)}"
        )
    if args.importance_sampling_level != "token":
        raise UserError(
            f"Tree sampling needs importance_sampling_level='token', not {args.importance_sampling_level!r}: a row "
            "trains only some of its tokens, so it has no ratio for the whole row. Set it to token"
        )
    if args.mask_truncated_completions:
        raise UserError(
            "mask_truncated_completions is not supported with tree sampling: it would remove whole rows from the "
            "training, including segments that they share with rows that are not truncated. Set it to false"
        )
    if args.vllm_structured_outputs_regex is not None or not _PER_SEGMENT.isdisjoint(args.generation_kwargs or {}):
        raise UserError(
            "Tree sampling generates segment by segment, so vllm_structured_outputs_regex and, in generation_kwargs, "
            f"{', '.join(sorted(_PER_SEGMENT))} would apply to each segment instead of the completion. Remove them"
        )
