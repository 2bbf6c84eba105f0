"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): batches of groups with correct and wrong rollouts.

In a group whose rollouts are all correct or all wrong, the correctness reward gives no advantages. Such prompts are
replaced by the next prompts of the training set until the batch is full. A group with correct and wrong rollouts is
called informative.
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
    """The order in which prompts are drawn: consecutive permutations of the training set.

    The permutations are those of TRL's `RepeatSampler` with the same seed. TRL starts a new permutation when less than
    a batch is left of the current one. Here the rest is drawn first, so that no prompt is repeated before all others
    were drawn. `position`, the number of prompts drawn so far, is the whole state of the stream.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True):
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.position = 0
        self._restart()

    def take(self, n: int) -> list[int]:
        """Draw the next `n` prompts and return their indices in the training set."""
        taken = []
        while len(taken) < n:
            epoch, begin = divmod(self.position, self.size)
            part = self._permutation(epoch)[begin : begin + n - len(taken)]
            taken += part
            self.position += len(part)
        return taken

    def state(self) -> dict[str, int]:
        """Return the state for a checkpoint."""
        return {"position": self.position, "size": self.size, "seed": self.seed, "shuffle": self.shuffle}

    def restore(self, state: dict[str, int]) -> None:
        """Resume from the state of a checkpoint, which must have the same prompts in the same order."""
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
        self._drawn = 0  # permutations drawn so far


class Generation(NamedTuple):
    """G rollouts for each of P prompts, spread in order over the processes: B = P G / processes on each."""

    indices: list[int]  # (P,) indices of the prompts in the training set
    rollouts: list[dict]  # (B,) this process's rollouts, each with its `completion_ids`
    rewards: Tensor  # (P G, reward functions) of all processes
    verdicts: Verdicts


class Batch(NamedTuple):
    """The chosen groups, spread in order over the processes: B rollouts on each."""

    rows: list[dict[str, Any]]  # (B,) rows of the training set
    rollouts: list[dict]  # (B,) as returned by `Generate`
    rewards: Tensor  # (P G, reward functions) of all processes
    metrics: dict[str, float]  # see `docs/reference/metrics.md`
    state: dict[str, float]  # metrics that are logged as they are, without a mean over steps


Generate = Callable[[list[dict[str, Any]]], list[dict]]
Grade = Callable[[list[dict[str, Any]], list[dict]], tuple[Tensor, Verdicts]]


class DynamicSampling:
    """Fills batches with informative groups from one stream of prompts.

    Every process draws the same prompts and sees the rewards of all processes, so all make the same decisions.

    Args:
        dataset: the training set. Its rows are copied, because a reward function may change them.
        generate: returns a rollout for each row of this process, a dict with its `completion_ids`. Collective.
        grade: returns the rewards (P G, reward functions) of all processes' rollouts, and their verdicts. Collective.
        groups: P, the number of groups in a batch and in each generation.
        num_generations: G, the number of rollouts in a group.
        max_batches: maximum number of generations for one batch.
        seed, shuffle: for the stream.
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
        """Return the state for a checkpoint."""
        return self.stream.state()

    def restore(self, state: dict[str, int]) -> None:
        """Resume from the state of a checkpoint, which must have the same prompts in the same order."""
        self.stream.restore(state)

    def batch(self, step: int) -> Batch:
        """Generate until there are P informative groups, at most `max_batches` times. Collective.

        The first P informative groups are chosen, in the order of the stream. If there are fewer, the first other
        groups fill the batch. Surplus groups are dropped: the policy will have changed by the next batch.

        Args:
            step: number of optimizer steps so far, for warnings.
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
        """Return the dataset row of each rollout that this process generates for these prompts."""
        G, B = self.num_generations, len(indices) * self.num_generations // self.num_processes
        own = [indices[row // G] for row in range(self.process_index * B, (self.process_index + 1) * B)]
        once = {index: self.dataset[index] for index in dict.fromkeys(own)}
        return [copy.deepcopy(once[index]) for index in own]

    def _spread(self, generations: list[Generation], chosen: list[int]) -> tuple[list[dict], float]:
        """Redistribute the chosen groups over the processes, in order. Collective.

        Returns:
            This process's rollouts, and the share of the generated tokens that are discarded.
        """
        P, G, B = self.groups, self.num_generations, len(generations[0].rollouts)
        begin = self.process_index * B
        own = []  # (place in the batch, rollout) of each chosen rollout that this process generated
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
                "Dynamic sampling has drawn all %d training prompts by optimizer step %d and starts pass %d over them.",
                *(stream.size, step, stream.position // stream.size + 1),
            )
        if filled and not self._warned_of_filling:
            self._warned_of_filling = True
            logger.warning(
                "Dynamic sampling found only %d of %d groups with both correct and wrong rollouts in %d generations "
                "(the limit of dynamic_sampling_max_batches) and filled the batch with other groups. The problems may "
                "be too easy or too hard for the model: see the metrics dynamic_sampling/filled, all_right and "
                "all_wrong. This warning is shown once.",
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
