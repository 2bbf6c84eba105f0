"""TreeRPO: segments are valued by the answers below them and compared with their siblings (arXiv 2506.05183).

A prompt is the root of a tree. From every node N segments of at most L tokens are sampled, down to depth D; a segment
that ends the text is a leaf before. The G = N^D rollouts of a prompt are the paths to the leaves, in order, so the tree
needs no other record: the tokens [(d - 1) L, d L) of rollout r are its node of depth d, and the N^(D - d) rollouts of
the block that r lies in share it. The first of them trains these tokens; in the others they are context. A text that
ended early fills its whole block.
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
_LOSSES = ("dapo", "bnpo", "dr_grpo")
# What `generation_kwargs` would take from the sampler, or do anew in each segment.
_PER_SEGMENT = {
    "max_length",
    "max_new_tokens",
    "max_tokens",
    "min_length",
    "min_new_tokens",
    "min_tokens",
    "structured_outputs",
}
_ROUNDING = 1e-6  # node values are fractions: .3 - .2 in float32 is still a spread of .1


class Shape(NamedTuple):
    """The tree of a prompt."""

    branching: int  # N
    depth: int  # D
    segment_tokens: int  # L

    @classmethod
    def of(cls, config) -> "Shape":
        """Return the tree that a `KTAEGRPOConfig` describes."""
        segment_tokens = config.tree_segment_tokens
        if segment_tokens is None:
            segment_tokens = config.max_completion_length // config.tree_depth
        return cls(config.tree_branching, config.tree_depth, segment_tokens)

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


def _sums(
    mask_PGT: Tensor, values_PGT: Tensor, advantages: list[Tensor], shape: Shape
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of this process's trees as sums; README's table of metrics says what each means."""
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

    A segment that holds an end-of-sequence id or fewer tokens than it could is the end of its text: nothing is sampled
    below, and the text stands in every row of its block.

    Args:
        prompt_ids: token ids of each row's prompt; the N^D rows of a prompt side by side.
        generate: samples one continuation, of at most so many tokens, of each of these token ids: the new ids, and
            their log-probabilities or None. It is called once per depth, if need be with no ids at all, so that all
            processes call it equally often.
        eos_ids: ids that end a text.

    Returns:
        A row per leaf. The first row of those that share a segment trains it; the log-probabilities stand in all.
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
    """Rollouts sampled as trees, whose segments are compared with their siblings."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: tree`.

        Parameters:
            tree_branching (`int`, *optional*, defaults to `2`):
                Segments sampled from each node.
            tree_depth (`int`, *optional*, defaults to `3`):
                Segments from the prompt to a leaf. `num_generations` must be `tree_branching ** tree_depth`.
            tree_segment_tokens (`int`, *optional*):
                Tokens of a segment at most. Defaults to `max_completion_length // tree_depth`.
            tree_min_spread (`float`, *optional*, defaults to `0.1`):
                Siblings whose values are all nearer than this are not trained apart: their advantages are 0.
            tree_normalizer (`str`, *optional*, defaults to `"bernoulli"`):
                What a segment's value, less the mean mu of its siblings, is divided by: `"bernoulli"`
                sqrt(mu (1 - mu)), `"std"` the siblings' standard deviation, as in GRPO, or `"none"`.
        """

        tree_branching: int = field(default=2, metadata={"help": "Segments sampled from each node of a tree."})
        tree_depth: int = field(
            default=3,
            metadata={"help": "Segments from the prompt to a leaf; num_generations is tree_branching ** tree_depth."},
        )
        tree_segment_tokens: int | None = field(
            default=None,
            metadata={"help": "Tokens of a segment at most. Defaults to max_completion_length // tree_depth."},
        )
        tree_min_spread: float = field(
            default=0.1, metadata={"help": "Siblings whose values are all nearer than this have no advantages."}
        )
        tree_normalizer: str = field(
            default="bernoulli",
            metadata={"help": "'bernoulli' (sqrt(mu (1 - mu))), 'std' (as in GRPO) or 'none'."},
        )

        def check(self) -> None:
            for name, least in (("tree_branching", 2), ("tree_depth", 1)):
                if getattr(self, name) < least:
                    raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
            if self.tree_normalizer not in NORMALIZERS:
                raise UserError(
                    f"tree_normalizer must be one of {', '.join(NORMALIZERS)}, not {self.tree_normalizer!r}"
                )
            if not 0 <= self.tree_min_spread <= 1:
                raise UserError(f"tree_min_spread must lie between 0 and 1, not at {self.tree_min_spread}")

    how = "replace"
    name = "tree"
    family = "tree"
    title = "TreeRPO (sampled trees)"
    card = Card(
        "TreeRPO",
        "Rollouts are sampled as trees, and the tokens of a segment get its own advantage: how right the answers below "
        "it are, against those of its siblings.",
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
        """Give the segments of sampled trees their advantages.

        Only whether answers are right counts: the rollout advantages, and with them `scale_rewards`, `reward_weights`
        and other rewards, are replaced.
        """
        settings, shape = self.settings, Shape.of(self.settings)
        leaves_PG = groups.correct_PG.float().masked_fill(~groups.scored_PG, torch.nan)
        advantages = advantages_by_depth(leaves_PG, shape.branching, settings.tree_min_spread, settings.tree_normalizer)
        values_PGT = token_advantages(advantages, shape, groups.mask_PGT.shape[2]) * groups.mask_PGT
        return Credit(groups.own_rows(values_PGT), _sums(groups.mask_PGT, values_PGT, advantages, shape))

    @classmethod
    def no_signal(cls, sums: dict[str, float], config: Any, first: str) -> str | None:
        signals = [total for name, total in sums.items() if name.startswith("tree/signal_depth_")]
        if any(signals) or not signals:
            return None
        return (
            f"No siblings in the trees of {first} differ by tree_min_spread ({config.tree_min_spread:g}), so that no "
            "segment is trained. Lower tree_min_spread."
        )

    @classmethod
    def check_run(cls, config: Any) -> None:
        check_run(config)


def check_run(args: Any) -> None:
    """Check what a tree asks of the run's other settings.

    Raises:
        ValueError: the leaves do not fill `num_generations`, the segments do not fit the completion, a process holds a
            part of a tree, or an option would not do what it says.
    """
    N, D, L = shape = Shape.of(args)
    rollouts, limit = args.num_generations, args.max_completion_length
    if rollouts != shape.block(0):
        below = max(1, math.floor(math.log(rollouts, N) + 1e-9))
        nearest = " or ".join(f"{N**d} (tree_depth={d})" for d in (below, below + 1))
        raise UserError(
            f"A tree has tree_branching ** tree_depth = {N} ** {D} = {N**D} leaves, which must be the rollouts of a "
            f"prompt, but num_generations={rollouts}. With this branching, the nearest are {nearest}"
        )
    if L < 1 or limit < D * L:
        raise UserError(
            f"tree_depth x tree_segment_tokens = {D} x {L} tokens do not fit max_completion_length={limit}: a segment "
            f"must have at least 1 token, and at most {limit // D}"
        )
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if rows % rollouts:
        raise UserError(
            f"The trees of a generation must lie whole on a process, but a process has {rows} rows "
            f"({args.per_device_train_batch_size} per_device_train_batch_size x {args.steps_per_generation} "
            f"steps_per_generation), which are no multiple of num_generations={rollouts}"
        )
    if args.loss_type not in _LOSSES:
        raise UserError(
            f"Tree sampling needs a loss that counts tokens, {', '.join(_LOSSES)}, not loss_type={args.loss_type!r}: a "
            "row holds the segments that it trains and, as context, those trained in other rows, so means over rows "
            "would weigh segments by chance"
        )
    if args.importance_sampling_level != "token":
        raise UserError(
            f"Tree sampling needs importance_sampling_level='token', not {args.importance_sampling_level!r}: a row "
            "trains a part of its tokens, so it has no ratio of its own"
        )
    if args.mask_truncated_completions:
        raise UserError(
            "mask_truncated_completions does not go with tree sampling: it would take whole rows from the training, "
            "and with them the segments of other leaves, which may have ended well"
        )
    if args.vllm_structured_outputs_regex is not None or not _PER_SEGMENT.isdisjoint(args.generation_kwargs or {}):
        raise UserError(
            "Tree sampling generates segment by segment: vllm_structured_outputs_regex, and in generation_kwargs "
            f"{', '.join(sorted(_PER_SEGMENT))}, would hold for each of them and not for the completion"
        )
