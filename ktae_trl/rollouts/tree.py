"""Tree sampling (TreeRPO, arXiv 2506.05183): rollouts of a prompt share their beginnings, as `credit.tree` lays out."""

import math
from collections.abc import Callable, Collection

from ktae_trl.arguments import UserError
from ktae_trl.credit.tree import NORMALIZERS, Shape

Generate = Callable[[list[list[int]], int], tuple[list[list[int]], list[list[float]] | None]]

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


def sample(prompt_ids: list[list[int]], generate: Generate, args, eos_ids: Collection[int]) -> dict[str, list | None]:
    """Sample a tree for each prompt, one depth after the other.

    A segment that holds an end-of-sequence id or fewer tokens than it could is the end of its text: nothing is sampled
    below, and the text stands in every row of its block.

    Args:
        prompt_ids: token ids of each row's prompt; the N^D rows of a prompt side by side.
        generate: samples one continuation, of at most so many tokens, of each of these token ids: the new ids, and
            their log-probabilities or None. It is called once per depth, if need be with no ids at all, so that all
            processes call it equally often.
        args: a `KTAEGRPOConfig`.
        eos_ids: ids that end a text.

    Returns:
        What a `rollout_func` of TRL returns, a row per leaf. `env_mask` is 1 in the first row of those that share a
        segment, so each is trained in one row; the log-probabilities stand in all.
    """
    shape = Shape.of(args)
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
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs, "env_mask": masks}


def check(args) -> None:
    """Check the settings (`args`, a `KTAEGRPOConfig` whose own are complete) that a tree depends on.

    Raises:
        ValueError: one is out of its range, the leaves do not fill `num_generations`, the segments do not fit the
            completion, a process holds a part of a tree, or an option would not do what it says.
    """
    for name, least in (("tree_branching", 2), ("tree_depth", 1)):
        if getattr(args, name) < least:
            raise UserError(f"{name} must be at least {least}, not {getattr(args, name)}")
    N, D, L = shape = Shape.of(args)
    rollouts, limit = args.num_generations, args.max_completion_length
    if args.tree_normalizer not in NORMALIZERS:
        raise UserError(f"tree_normalizer must be one of {', '.join(NORMALIZERS)}, not {args.tree_normalizer!r}")
    if not 0 <= args.tree_min_spread <= 1:
        raise UserError(f"tree_min_spread must lie between 0 and 1, not at {args.tree_min_spread}")
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
