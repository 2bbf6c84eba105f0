"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a batch of groups that have right and wrong rollouts.

A group whose rollouts are all right, or all wrong, has no advantages to learn from. Such prompts are replaced by the
next ones of the training set until the batch is full.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ktae_trl.rollouts.verdicts import Verdicts


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
    rollouts: list[dict]  # (B,) this process's rollouts
    rewards: Tensor  # (P G, reward functions) of all processes
    verdicts: Verdicts


class Selection(NamedTuple):
    """The groups of a batch, from one or more generations."""

    generations: list[Generation]
    groups: list[int]  # (P,) numbers of the chosen groups, counted through the generations

    @property
    def indices(self) -> list[int]:
        """Return the numbers of the chosen prompts in the training set."""
        drawn = [index for generation in self.generations for index in generation.indices]
        return [drawn[group] for group in self.groups]

    @property
    def rewards(self) -> Tensor:
        """Return the rewards of the chosen rollouts of all processes, (P G, reward functions)."""
        rewards = torch.cat([generation.rewards for generation in self.generations])
        return rewards.unflatten(0, (-1, self.generations[0].verdicts.correct_PG.shape[1]))[self.groups].flatten(0, 1)

    @property
    def filled(self) -> int:
        """Return how many of the chosen groups are not informative."""
        return len(self.groups) - int(self._informative[self.groups].sum())

    def rollouts(self, process_index: int) -> list[dict]:
        """Spread the chosen groups over the processes again, in order; return this process's rollouts. Collective."""
        B = len(self.generations[0].rollouts)
        P, G = self.generations[0].verdicts.correct_PG.shape
        begin = process_index * B
        own = []  # (place in the batch, rollout), for the chosen ones that this process generated
        for place, group in enumerate(self.groups):
            generation, number = divmod(group, P)
            rollouts = self.generations[generation].rollouts
            rows = range(max(number * G, begin), min(number * G + G, begin + B))
            own += [(place * G + row - number * G, rollouts[row - begin]) for row in rows]
        placed = sorted(gather_object(own), key=lambda pair: pair[0])
        return [rollout for _, rollout in placed[begin : begin + B]]

    def metrics(self) -> dict[str, float]:
        """Return what it took to fill the batch; README's table of metrics says what each means."""
        correct, scored = (
            torch.cat([getattr(generation.verdicts, name) for generation in self.generations])
            for name in ("correct_PG", "scored_PG")
        )
        right, wrong = correct & scored, ~correct & scored
        return {
            "dynamic_sampling/generations": len(self.generations),
            "dynamic_sampling/informative_groups": self._informative.float().mean().item(),
            "dynamic_sampling/all_right": (right.any(1) & ~wrong.any(1)).float().mean().item(),
            "dynamic_sampling/all_wrong": (wrong.any(1) & ~right.any(1)).float().mean().item(),
            "dynamic_sampling/accuracy": (right.sum() / scored.sum()).item(),
            "dynamic_sampling/surplus": int(self._informative.sum()) + self.filled - len(self.groups),
            "dynamic_sampling/filled": self.filled / len(self.groups),
        }

    @property
    def _informative(self) -> Tensor:
        return torch.cat([generation.verdicts.informative for generation in self.generations]).cpu()


def sample(
    roll_out: Callable[[Sequence[int]], Generation], stream: PromptStream, groups: int, max_generations: int
) -> Selection:
    """Generate until there are `groups` informative groups, at most `max_generations` times.

    The first informative ones are chosen, in the order of the stream; those left over were made by the same policy, but
    the next batch is trained after it has changed, so they are dropped. If there are too few, the first of the others
    fill the batch.

    Every process draws the same prompts and sees the rewards of all, so all come to the same decisions.

    Args:
        roll_out: generates and grades a group for each of these prompts (numbers in the training set). Collective.
        stream: where the prompts come from.
        groups: P, groups of a batch and of each generation.
        max_generations: at least 1.
    """
    generations: list[Generation] = []
    found = 0
    while found < groups and len(generations) < max_generations:
        generations.append(roll_out(stream.take(groups)))
        found += int(generations[-1].verdicts.informative.sum())
    informative = torch.cat([generation.verdicts.informative for generation in generations])
    first = torch.argsort(~informative, stable=True)[:groups]  # informative ones before the others
    return Selection(generations, sorted(first.tolist()))
