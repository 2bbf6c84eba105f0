"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a batch of groups that have right and wrong rollouts.

A group whose rollouts are all right, or all wrong, has no advantages to learn from. Such prompts are replaced by the
next ones of the training set until the batch is full.
"""

import copy
import logging
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
    """The order in which prompts are drawn: permutations of the training set, one after another, without a gap.

    They are those of TRL's `RepeatSampler` with the same seed, which begins a new one when less than a batch is left of
    the old. Here the rest comes first, so that no prompt comes again before all others. A place in the stream is one
    number, `position`: how many prompts were drawn.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.position = 0
        self._restart()

    def take(self, n: int) -> list[int]:
        """Draw the next `n` prompts: their numbers in the training set."""
        taken = []
        while len(taken) < n:
            epoch, begin = divmod(self.position, self.size)
            part = self._permutation(epoch)[begin : begin + n - len(taken)]
            taken += part
            self.position += len(part)
        return taken

    def state(self) -> dict[str, int]:
        """Return what a checkpoint holds of the stream."""
        return {"position": self.position, "size": self.size, "seed": self.seed, "shuffle": self.shuffle}

    def restore(self, state: dict[str, int]) -> None:
        """Resume at the place of a checkpoint, whose prompts and order must be those of this stream."""
        self.position = state["position"]

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        if epoch < self._drawn - 1:
            self._restart()
        while self._drawn <= epoch:
            self._order = torch.randperm(self.size, generator=self._generator).tolist()
            self._drawn += 1
        return self._order

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._drawn = 0  # permutations so far


class Generation(NamedTuple):
    """Rollouts of P prompts, G of each; a process has B = P G / processes of them, in the order of all processes."""

    indices: list[int]  # (P,) numbers of the prompts in the training set
    rollouts: list[dict]  # (B,) this process's rollouts, each with its `completion_ids`
    rewards: Tensor  # (P G, reward functions) of all processes
    verdicts: Verdicts


class Batch(NamedTuple):
    """Chosen groups, spread over the processes in order: a process has B rollouts of them."""

    rows: list[dict[str, Any]]  # (B,) of the training set
    rollouts: list[dict]  # (B,) as they were generated
    rewards: Tensor  # (P G, reward functions) of all processes
    metrics: dict[str, float]  # what it took to fill the batch; README's table of metrics says what each means
    state: dict[str, float]  # metrics that say where the run is, of which there is no mean


Generate = Callable[[list[dict[str, Any]]], list[dict]]
Grade = Callable[[list[dict[str, Any]], list[dict]], tuple[Tensor, Verdicts]]


class DynamicSampling:
    """Fills batches with informative groups, from one stream of prompts.

    Every process draws the same prompts and sees the rewards of all, so all come to the same decisions.

    Args:
        dataset: the training set; its rows are copied, for a reward function may change them.
        generate: makes a rollout for each row of this process: a dict with its `completion_ids`. Collective.
        grade: the rewards (P G, reward functions) of all processes' rollouts, and what they say. Collective.
        groups: P, groups of a batch and of each generation.
        num_generations: G, rollouts of a group.
        max_batches: generations for one batch at most.
        seed, shuffle: of the stream.
        process_index, num_processes: of this process, and how many there are.
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
        shuffle: bool = True,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.dataset, self.generate, self.grade = dataset, generate, grade
        self.groups, self.num_generations, self.max_batches = groups, num_generations, max_batches
        self.process_index, self.num_processes = process_index, num_processes
        self.stream = PromptStream(len(dataset), seed, shuffle)
        self._warned_of_filling = False

    def state(self) -> dict[str, int]:
        """Return what a checkpoint holds."""
        return self.stream.state()

    def restore(self, state: dict[str, int]) -> None:
        """Resume where a checkpoint was, whose prompts and order must be those of this run."""
        self.stream.restore(state)

    def batch(self, step: int) -> Batch:
        """Generate until there are P informative groups, at most `max_batches` times. Collective.

        The first informative ones are chosen, in the order of the stream; those left over were made by the same policy,
        but the next batch is trained after it has changed, so they are dropped. If there are too few, the first of the
        others fill the batch.

        Args:
            step: optimizer steps so far, for warnings.
        """
        begin = self.stream.position
        generations: list[Generation] = []
        found = 0
        while found < self.groups and len(generations) < self.max_batches:
            generations.append(self._generation(self.stream.take(self.groups)))
            found += int(generations[-1].verdicts.informative.sum())
        informative = torch.cat([generation.verdicts.informative for generation in generations]).cpu()
        chosen = torch.argsort(~informative, stable=True)[: self.groups].sort().values.tolist()  # informative first
        filled = self.groups - int(informative[chosen].sum())
        rollouts, discarded = self._spread(generations, chosen)
        drawn = [index for generation in generations for index in generation.indices]
        rewards = torch.cat([generation.rewards for generation in generations])
        self._warn(step, begin, filled, len(generations))
        return Batch(
            rows=self._rows([drawn[group] for group in chosen]),
            rollouts=rollouts,
            rewards=rewards.unflatten(0, (-1, self.num_generations))[chosen].flatten(0, 1),
            metrics=_metrics(generations, informative, filled, self.groups)
            | {"dynamic_sampling/discarded_tokens": discarded},
            state={
                "dynamic_sampling/prompts": self.stream.position,
                "dynamic_sampling/epoch": self.stream.position / self.stream.size,
            },
        )

    def _generation(self, indices: list[int]) -> Generation:
        rows = self._rows(indices)
        rollouts = self.generate(rows)
        return Generation(indices, rollouts, *self.grade(rows, rollouts))

    def _rows(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return a row for each rollout of this process, of groups for these prompts."""
        G, B = self.num_generations, len(indices) * self.num_generations // self.num_processes
        own = [indices[row // G] for row in range(self.process_index * B, (self.process_index + 1) * B)]
        once = {index: self.dataset[index] for index in dict.fromkeys(own)}
        return [copy.deepcopy(once[index]) for index in own]

    def _spread(self, generations: list[Generation], chosen: list[int]) -> tuple[list[dict], float]:
        """Spread the chosen groups over the processes again, in order. Collective.

        Returns:
            This process's rollouts, and the share of the generated tokens that are in no chosen group.
        """
        P, G, B = self.groups, self.num_generations, len(generations[0].rollouts)
        begin = self.process_index * B
        own = []  # (place in the batch, rollout), for the chosen ones that this process generated
        for place, group in enumerate(chosen):
            generation, number = divmod(group, P)
            rollouts = generations[generation].rollouts
            rows = range(max(number * G, begin), min(number * G + G, begin + B))
            own += [(place * G + row - number * G, rollouts[row - begin]) for row in rows]
        generated = sum(len(rollout["completion_ids"]) for each in generations for rollout in each.rollouts)
        of_all = gather_object([(own, generated)])
        placed = sorted((pair for pairs, _ in of_all for pair in pairs), key=lambda pair: pair[0])
        kept = sum(len(rollout["completion_ids"]) for _, rollout in placed)
        return [rollout for _, rollout in placed[begin : begin + B]], 1 - kept / sum(tokens for _, tokens in of_all)

    def _warn(self, step: int, begin: int, filled: int, generations: int) -> None:
        stream = self.stream
        if self.process_index != 0:
            return
        if stream.position // stream.size > begin // stream.size:
            logger.warning(
                "Dynamic sampling has drawn all %d training prompts at optimizer step %d and begins anew: pass %d.",
                *(stream.size, step, stream.position // stream.size + 1),
            )
        if filled and not self._warned_of_filling:
            self._warned_of_filling = True
            logger.warning(
                "Dynamic sampling found %d informative groups of %d in %d generations (the most that "
                "dynamic_sampling_max_batches allows) and filled the batch with groups that are all right or all "
                "wrong, which teach nothing. The problems may be too easy or too hard for the model: see the metrics "
                "dynamic_sampling/filled, all_right and all_wrong. This is said once.",
                *(self.groups - filled, self.groups, generations),
            )


def _metrics(generations: list[Generation], informative: Tensor, filled: int, groups: int) -> dict[str, float]:
    correct, scored = (
        torch.cat([getattr(generation.verdicts, name) for generation in generations])
        for name in ("correct_PG", "scored_PG")
    )
    right, wrong = correct & scored, ~correct & scored
    return {
        "dynamic_sampling/generations": len(generations),
        "dynamic_sampling/informative_groups": informative.float().mean().item(),
        "dynamic_sampling/all_right": (right.any(1) & ~wrong.any(1)).float().mean().item(),
        "dynamic_sampling/all_wrong": (wrong.any(1) & ~right.any(1)).float().mean().item(),
        "dynamic_sampling/accuracy": (right.sum() / scored.sum()).item(),
        "dynamic_sampling/surplus": int(informative.sum()) + filled - groups,
        "dynamic_sampling/filled": filled / groups,
    }


def in_trainer(trainer, judged: Callable[[Tensor], Verdicts]) -> DynamicSampling:
    """Return the dynamic sampling of a `KTAEGRPOTrainer`.

    Args:
        judged: what the rewards (P G, reward functions) of all processes' rollouts say.

    Raises:
        UserError: the run's data or rewards do not go with it.
    """
    _check(trainer)

    def generate(rows: list[dict[str, Any]]) -> list[dict]:
        made = trl_seam.generate(trainer, [row["prompt"] for row in rows])
        if made.images is not None:
            raise UserError("dynamic_sampling does not go with images, which some prompts hold")
        for name, values in made.extra_fields.items():  # of a rollout_func, for the reward functions
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
                    f"A reward function logged {len(values)} values of {name!r} for {len(rows)} completions"
                )
        for i, rollout in enumerate(rollouts):
            rollout["columns"] = {name: values[i] for name, values in columns.items()}
        return rewards, judged(rewards)

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
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def _check(trainer) -> None:
    data, names, named = trainer.train_dataset, trainer.reward_func_names, trainer.args.correctness_reward
    if not isinstance(data, Dataset):
        raise UserError(
            f"dynamic_sampling draws prompts by their number, which a {type(data).__name__} does not have: "
            "load the dataset without streaming"
        )
    if named is None and len(names) > 1:
        problem = f"There are several: {', '.join(names)}. Set correctness_reward"
    elif (named or names[0]) in SHAPING:
        problem = f"{named or names[0]!r} only shapes the reward. Add one such as math_accuracy, and name it"
    else:
        problem = None
    if problem:
        raise UserError(f"dynamic_sampling needs a reward function that says which rollouts are right. {problem}")
    if trainer.tools or trainer.environment_factories or {"image", "images"} & set(data.column_names):
        raise UserError("dynamic_sampling does not go with tools, environments or images")
    trl_seam.need("dynamic_sampling", trainer)
