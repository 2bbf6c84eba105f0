"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): batches of groups with correct and wrong rollouts.

In a group whose rollouts are all correct or all wrong, the correctness reward gives no advantages. Such prompts are
replaced by the next prompts of the training set until the batch is full. A group with correct and wrong rollouts is
called informative.

With `dynamic_sampling_reuse`, surplus informative groups are kept for the next batch. They were then sampled by the
policy of one optimizer step before, so the loss needs the log-probabilities of that policy (`OLDER`).
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ktae_trl import trl_seam
from ktae_trl.arguments import UserError
from ktae_trl.rewards import SHAPING
from ktae_trl.rollouts.verdicts import Verdicts

logger = logging.getLogger(__name__)


class PromptStream:
    """The order in which prompts are drawn: consecutive permutations of the training set.

    The permutations are those of TRL's `RepeatSampler` with the same seed. TRL starts a new permutation when less than
    a batch is left of the current one. Here the rest is drawn first, so that no prompt is repeated before all others
    were drawn.

    A prompt whose last two groups were all correct is skipped in the next `skip_solved` passes and then drawn again. So
    every prompt is drawn at least once in `skip_solved` + 1 passes.

    Attributes:
        position: number of prompts passed so far, drawn or skipped.
        skipped: number of prompts skipped so far.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True, skip_solved: int = 0):
        self.size, self.seed, self.shuffle, self.skip_solved = size, seed, shuffle, skip_solved
        self.position = self.skipped = 0
        # Prompts whose last group was all correct: how often each is still skipped (0 after the first such group).
        self._solved: dict[int, int] = {}
        self._restart()

    def take(self, n: int) -> list[int]:
        """Draw the next `n` prompts and return their indices in the training set."""
        taken = []
        while len(taken) < n:
            epoch, begin = divmod(self.position, self.size)
            for index in self._permutation(epoch)[begin:]:
                if len(taken) == n:
                    break
                self.position += 1
                if self._solved.get(index, 0):
                    self._solved[index] -= 1
                    self.skipped += 1
                else:
                    taken.append(index)
        return taken

    def note(self, indices: list[int], all_right: list[bool]) -> None:
        """Note for each drawn prompt whether its rollouts were all correct."""
        if not self.skip_solved:
            return
        for index, solved in zip(indices, all_right, strict=True):
            if solved:
                self._solved[index] = self.skip_solved if index in self._solved else 0
            else:
                self._solved.pop(index, None)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        stream = {"position": self.position, "size": self.size, "seed": self.seed, "shuffle": self.shuffle}
        return stream | {"skipped": self.skipped, "solved": dict(self._solved)}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the state of a checkpoint, which must have the same prompts in the same order.

        Without `skip_solved`, and in a checkpoint of an earlier version, no prompt is known to be solved.
        """
        self.position, self.skipped = state["position"], state.get("skipped", 0)
        self._solved = dict(state.get("solved", {})) if self.skip_solved else {}

    def _permutation(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(self.size)
        if epoch < self._drawn - 1:
            self._restart()
        while self._drawn <= epoch:
            self._order = torch.randperm(self.size, generator=self._generator).tolist()
            self._drawn += 1
        return self._order

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._drawn = 0  # permutations drawn so far


class Generation(NamedTuple):
    """G rollouts for each of N prompts. Each process has some of the N G rollouts, with the number of each."""

    indices: list[int]  # (N,) indices of the prompts in the training set
    rollouts: list[tuple[int, dict]]  # this process's: number among the N G, and rollout with its `completion_ids`
    rewards: Tensor  # (N G, reward functions) of all processes
    verdicts: Verdicts  # of N groups


class Batch(NamedTuple):
    """The chosen groups, spread in order over the processes: B rollouts on each."""

    rows: list[dict[str, Any]]  # (B,) rows of the training set
    rollouts: list[dict]  # (B,) as returned by `Generate`
    rewards: Tensor  # (P G, reward functions) of all processes
    metrics: dict[str, float]  # see `docs/reference/metrics.md`
    state: dict[str, float]  # metrics that are logged as they are, without a mean over steps


Generate = Callable[[list[dict[str, Any]]], list[dict]]
Grade = Callable[[list[dict[str, Any]], list[dict]], tuple[Tensor, Verdicts]]
Keep = Callable[[list[dict]], None]

OLDER = "older_logps"  # field of a kept rollout and of a batch


_FORGETS = 0.5  # weight of earlier batches in the share of informative groups: it changes as the model learns


def groups_to_generate(missing: int, informative: float, generated: float, most: int, unit: int = 1) -> int:
    """Return how many groups to generate so that probably `missing` of them are informative.

    The number of informative groups among n new ones has a beta-binomial distribution, if every share of informative
    groups was equally likely before the first group. With N = `generated`, it has

        mean      n p,  p = (informative + 1) / (N + 2)
        variance  n p (1 - p) (N + 2 + n) / (N + 3)

    The result is the smallest n with mean - standard deviation >= `missing`, so that about five of six such generations
    are large enough; rounded up to a multiple of `unit`, and at most `most`.

    Args:
        missing: number of informative groups that a batch lacks, at least 1.
        informative, generated: of the groups generated so far. Both may be weighted counts.
        most: maximum result, a multiple of `unit`.
        unit: the result is a multiple of it.
    """
    share = (informative + 1) / (generated + 2)
    for n in range(missing, most):
        variance = n * share * (1 - share) * (generated + 2 + n) / (generated + 3)
        if n * share - math.sqrt(variance) >= missing:
            return min(-(-n // unit) * unit, most)
    return most


class DynamicSampling:
    """Fills batches with informative groups from one stream of prompts.

    Every process draws the same prompts and sees the rewards of all processes, so all make the same decisions.

    Args:
        dataset: the training set. Its rows are copied, because a reward function may change them.
        generate: returns a rollout for each row of this process, a dict with its `completion_ids`. Collective.
        grade: returns the rewards (P G, reward functions) of all processes' rollouts, and their verdicts. Collective.
        groups: P, the number of groups in a batch, and the maximum in a generation.
        num_generations: G, the number of rollouts in a group.
        max_batches: at most `max_batches` P groups are generated for one batch.
        keep: called with this process's rollouts of the groups that are kept for the next batch, to add what the loss
            needs. Collective. None: surplus groups are dropped.
        seed, shuffle, skip_solved: for the stream.
        process_index, num_processes: index of this process, and number of processes.
    """

    def __init__(
        self,
        dataset: Sequence[dict[str, Any]],
        generate: Generate,
        grade: Grade,
        *,
        groups: int,
        num_generations: int,
        max_batches: int,
        seed: int,
        keep: Keep | None = None,
        shuffle: bool = True,
        skip_solved: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.dataset, self.generate, self.grade, self.keep = dataset, generate, grade, keep
        self.groups, self.num_generations, self.max_batches = groups, num_generations, max_batches
        self.process_index, self.num_processes = process_index, num_processes
        self.stream = PromptStream(len(dataset), seed, shuffle, skip_solved)
        self.informative = self.generated = 0.0  # numbers of groups so far, those of earlier batches weighted
        self.kept: Generation | None = None  # surplus groups of the last batch: fewer than P, all informative
        # Every process must generate equally many rollouts: whole groups, if a whole batch has whole groups on each.
        whole = groups % num_processes == 0
        self._unit = num_processes if whole else num_processes // math.gcd(num_generations, num_processes)
        self._warned_of_filling = False

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the kept groups. It is the same on all processes."""
        return self.stream.state() | {"informative": self.informative, "generated": self.generated}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the state of a checkpoint, which must have the same prompts in the same order.

        A checkpoint of an earlier version has no numbers of groups. They then count from 0. There are no kept groups
        until `restore_kept`.
        """
        self.stream.restore(state)
        self.kept = None
        self.informative, self.generated = state.get("informative", 0.0), state.get("generated", 0.0)

    def kept_groups(self) -> dict[str, Any] | None:
        """Return the kept groups for a checkpoint, with this process's rollouts, as plain values and tensors."""
        if self.kept is None:
            return None
        indices, rollouts, rewards, judged = self.kept
        plain = json.dumps(rollouts, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
        return {"indices": indices, "rollouts": json.loads(plain), "rewards": rewards, **judged._asdict()}

    def restore_kept(self, groups: dict[str, Any] | None) -> None:
        """Take up the kept groups of a checkpoint of as many processes. All processes must, or none."""
        if groups is not None and self.keep is not None:
            rollouts = [(number, rollout) for number, rollout in groups["rollouts"]]
            judged = Verdicts(groups["correct_PG"], groups["scored_PG"])
            self.kept = Generation(groups["indices"], rollouts, groups["rewards"], judged)

    def batch(self, step: int) -> Batch:
        """Generate until there are P informative groups, at most `max_batches` P groups. Collective.

        Each generation has as many groups as the batch probably still needs, at most P (`groups_to_generate`).

        The kept groups and the first informative ones are chosen, in the order of the stream, P in all. If there are
        fewer, the first other groups fill the batch. Surplus informative groups are kept for the next batch, or dropped
        without `keep`: the policy will have changed by the next batch.

        Args:
            step: number of optimizer steps so far, for warnings.
        """
        begin, skipped = self.stream.position, self.stream.skipped
        kept = [] if self.kept is None else [self.kept]
        reused = sum(len(groups.indices) for groups in kept)
        generations: list[Generation] = []
        self.informative, self.generated = self.informative * _FORGETS, self.generated * _FORGETS
        missing, allowed = self.groups - reused, self.max_batches * self.groups
        while missing > 0 and allowed > 0:
            most = min(self.groups, allowed)
            size = groups_to_generate(missing, self.informative, self.generated, most, self._unit)
            generations.append(self._generation(self.stream.take(size)))
            found = int(generations[-1].verdicts.informative.sum())
            self.informative, self.generated = self.informative + found, self.generated + size
            missing, allowed = missing - found, allowed - size
        informative = torch.cat([groups.verdicts.informative for groups in kept + generations]).cpu()
        order = torch.argsort(~informative, stable=True)  # informative first
        chosen, others = order[: self.groups].sort().values, order[self.groups :]
        filled = self.groups - int(informative[chosen].sum())
        selected = _select(kept + generations, chosen.tolist(), self.num_generations)
        surplus = _select(kept + generations, others[informative[others]].tolist(), self.num_generations)
        self.kept = surplus if self.keep is not None and surplus.indices else None
        if self.kept is not None:
            self.keep([rollout for _, rollout in self.kept.rollouts])
        rollouts, tokens = self._spread(selected, generations, kept)
        self._warn(step, begin, filled, sum(len(groups.indices) for groups in generations))
        return Batch(
            rows=self._rows(selected.indices),
            rollouts=rollouts,
            rewards=selected.rewards,
            metrics=_metrics(generations, self.groups)
            | tokens
            | {
                "dynamic_sampling/surplus": len(surplus.indices),
                "dynamic_sampling/reused": reused,
                "dynamic_sampling/filled": filled / self.groups,
                "dynamic_sampling/skipped": self.stream.skipped - skipped,
            },
            state={
                "dynamic_sampling/prompts": self.stream.position - self.stream.skipped,
                "dynamic_sampling/epoch": self.stream.position / self.stream.size,
            },
        )

    def _generation(self, indices: list[int]) -> Generation:
        rows = self._rows(indices)
        rollouts = self.generate(rows)
        rewards, judged = self.grade(rows, rollouts)
        self.stream.note(indices, judged.all_right.tolist())
        begin = self.process_index * len(rollouts)
        return Generation(indices, list(enumerate(rollouts, begin)), rewards, judged)

    def _rows(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the dataset row of each rollout that this process generates for these prompts."""
        G, B = self.num_generations, len(indices) * self.num_generations // self.num_processes
        own = [indices[row // G] for row in range(self.process_index * B, (self.process_index + 1) * B)]
        once = {index: self.dataset[index] for index in dict.fromkeys(own)}
        return [copy.deepcopy(once[index]) for index in own]

    def _spread(
        self, chosen: Generation, generations: list[Generation], earlier: list[Generation]
    ) -> tuple[list[dict], dict[str, float]]:
        """Redistribute the chosen groups over the processes, in order. Collective.

        Args:
            chosen: the batch.
            generations: all that was generated for it.
            earlier: the groups that were kept for it, which are all chosen.

        Returns:
            This process's rollouts, and the metrics of tokens.
        """
        own = [sum(map(_tokens, part)) for part in (generations, earlier, [self.kept] if self.kept is not None else [])]
        of_all = gather_object([(chosen.rollouts, own)])
        placed = sorted((pair for pairs, _ in of_all for pair in pairs), key=lambda pair: pair[0])
        trained = sum(len(rollout["completion_ids"]) for _, rollout in placed)
        generated, reused, kept = map(sum, zip(*(tokens for _, tokens in of_all), strict=True))
        B = self.groups * self.num_generations // self.num_processes
        return [rollout for _, rollout in placed[self.process_index * B :][:B]], {
            "dynamic_sampling/discarded_tokens": 1 - (trained - reused + kept) / generated,
            "dynamic_sampling/tokens_per_trained": generated / trained,
        }

    def _warn(self, step: int, begin: int, filled: int, generated: int) -> None:
        stream = self.stream
        if self.process_index != 0:
            return
        if stream.position // stream.size > begin // stream.size:
            logger.warning(
                "Dynamic sampling has drawn all %d training prompts by optimizer step %d and starts pass %d over them.",
                *(stream.size, step, stream.position // stream.size + 1),
            )
        if filled and not self._warned_of_filling:
            self._warned_of_filling = True
            logger.warning(
                "Dynamic sampling found only %d of %d groups with both correct and wrong rollouts among %d generated "
                "groups (the limit, dynamic_sampling_max_batches x %d) and filled the batch with other groups. The "
                "problems may be too easy or too hard for the model: see the metrics dynamic_sampling/filled, "
                "all_right and all_wrong. This warning is shown once.",
                *(self.groups - filled, self.groups, generated, self.groups),
            )


def _select(generations: list[Generation], chosen: list[int], G: int) -> Generation:
    """Return the chosen groups, numbered by their place among the chosen ones.

    Args:
        chosen: numbers of groups, in the order of all generations.
        G: number of rollouts in a group.
    """
    place_of = {group: place for place, group in enumerate(chosen)}
    rollouts, before = [], 0
    for generation in generations:
        for number, rollout in generation.rollouts:
            group, member = divmod(before + number, G)
            if group in place_of:
                rollouts.append((place_of[group] * G + member, rollout))
        before += len(generation.indices) * G
    indices = [index for generation in generations for index in generation.indices]
    rewards = torch.cat([generation.rewards for generation in generations])
    return Generation(
        [indices[group] for group in chosen],
        rollouts,
        rewards.unflatten(0, (-1, G))[chosen].flatten(0, 1),
        Verdicts(*(torch.cat(parts)[chosen] for parts in zip(*(g.verdicts for g in generations), strict=True))),
    )


def _tokens(generation: Generation) -> int:
    """Return the number of tokens of this process's rollouts."""
    return sum(len(rollout["completion_ids"]) for _, rollout in generation.rollouts)


def _metrics(generations: list[Generation], groups: int) -> dict[str, float]:
    judged = Verdicts(*(torch.cat(parts) for parts in zip(*(g.verdicts for g in generations), strict=True)))
    return {
        "dynamic_sampling/generations": len(generations),
        "dynamic_sampling/groups_per_needed": len(judged.correct_PG) / groups,
        "dynamic_sampling/informative_groups": judged.informative.float().mean().item(),
        "dynamic_sampling/all_right": judged.all_right.float().mean().item(),
        "dynamic_sampling/all_wrong": judged.all_wrong.float().mean().item(),
        "dynamic_sampling/accuracy": judged.metrics()["correctness/right"],
    }


def in_trainer(trainer, judged: Callable[[Tensor], Verdicts]) -> DynamicSampling:
    """Create the dynamic sampling of a `KTAEGRPOTrainer`.

    Args:
        trainer: the trainer, initialized except for its dataloaders.
        judged: maps the rewards (P G, reward functions) of all processes' rollouts to verdicts.

    Raises:
        UserError: the run's dataset or reward functions are not supported.
    """
    _check(trainer)

    def generate(rows: list[dict[str, Any]]) -> list[dict]:
        made = trl_seam.generate(trainer, [row["prompt"] for row in rows])
        if made.images is not None:
            raise UserError("dynamic_sampling does not support prompts with images. Set dynamic_sampling: false")
        for name, values in made.extra_fields.items():  # from a rollout_func, for the reward functions
            for i, row in enumerate(rows):
                if not isinstance(values, list):
                    row[name] = values
                elif i < len(values):
                    row[name] = values[i]
        return [
            {
                "prompt_ids": made.prompt_ids[i],
                "completion_ids": made.completion_ids[i],
                "logprobs": made.logprobs and made.logprobs[i],
                "env_mask": made.mask and made.mask[i],
                "completion": made.completions[i],
            }
            for i in range(len(rows))
        ]

    def grade(rows: list[dict[str, Any]], rollouts: list[dict]) -> tuple[Tensor, Verdicts]:
        completions = [rollout.pop("completion") for rollout in rollouts]
        completion_ids = [rollout["completion_ids"] for rollout in rollouts]
        rewards, columns = trl_seam.grade(trainer, rows, completions, completion_ids)
        for name, values in columns.items():
            if len(values) != len(rows):
                raise UserError(
                    f"A reward function logged {len(values)} values of {name!r} for {len(rows)} completions. Log one "
                    "value for each completion"
                )
        for i, rollout in enumerate(rollouts):
            rollout["columns"] = {name: values[i] for name, values in columns.items()}
        return rewards, judged(rewards)

    def keep(rollouts: list[dict]) -> None:
        if trl_seam.corrects_sampling(trainer):  # by the log-probabilities of vLLM, which the rollouts have
            return
        ids = ([rollout[name] for rollout in rollouts] for name in ("prompt_ids", "completion_ids"))
        for rollout, logps_T in zip(rollouts, trainer.token_credit.tools.log_probabilities(*ids), strict=True):
            rollout[OLDER] = logps_T

    args, accelerator = trainer.args, trainer.accelerator
    return DynamicSampling(
        trainer.train_dataset,
        generate,
        grade,
        groups=args.generation_batch_size // trainer.num_generations,
        num_generations=trainer.num_generations,
        max_batches=args.dynamic_sampling_max_batches,
        seed=args.seed,
        shuffle=trainer.shuffle_dataset,
        keep=keep if args.dynamic_sampling_reuse else None,
        skip_solved=args.dynamic_sampling_skip_solved,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def older_logps(rollouts: list[dict], ids_BT: Tensor) -> dict[str, Tensor]:
    """Return the field `OLDER` of a batch: the log-probabilities of the policy that sampled kept rollouts.

    Args:
        rollouts: of this process, B.
        ids_BT: token ids of their completions, padded on the right.

    Returns:
        (B, T) float32, NaN for rollouts that were not kept and for padding. Nothing if no rollout was kept.
    """
    if not any(OLDER in rollout for rollout in rollouts):
        return {}
    logps_BT = torch.full(ids_BT.shape, torch.nan, device=ids_BT.device)
    for logps_T, rollout in zip(logps_BT, rollouts, strict=True):
        own = rollout.get(OLDER, ())
        logps_T[: len(own)] = torch.tensor(own)
    return {OLDER: logps_BT}


def _check(trainer) -> None:
    data, names, named = trainer.train_dataset, trainer.reward_func_names, trainer.args.correctness_reward
    if not isinstance(data, Dataset):
        raise UserError(
            f"dynamic_sampling needs a dataset with random access, not of type {type(data).__name__}. Load the dataset "
            "without streaming"
        )
    if named is None and len(names) > 1:
        problem = f"There are several ({', '.join(names)}). Set correctness_reward to one of them"
    elif (named or names[0]) in SHAPING:
        problem = (
            f"{named or names[0]!r} does not check answers. Add one such as math_accuracy to reward_funcs, and set "
            "correctness_reward to it"
        )
    else:
        problem = None
    if problem:
        raise UserError(f"dynamic_sampling needs a reward function that decides which rollouts are correct. {problem}")
    if trainer.tools or trainer.environment_factories or {"image", "images"} & set(data.column_names):
        raise UserError("dynamic_sampling does not support tools, environments or images. Set dynamic_sampling: false")
    trl_seam.need("dynamic_sampling", trainer)
    if trainer.args.dynamic_sampling_reuse:
        trl_seam.need("dynamic_sampling_reuse", trainer)
