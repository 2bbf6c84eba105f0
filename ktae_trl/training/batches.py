"""Batch sizes: the prompts, rollouts and optimizer steps of a generation."""

import math
from typing import NamedTuple

from ktae_trl.arguments import UserError
from ktae_trl.config import KTAEGRPOConfig


class Batches(NamedTuple):
    """The prompts and rollouts of a generation and of an optimizer step, over all processes.

    A generation is the set of rollouts that are sampled at once. Several optimizer steps can train on it.
    """

    processes: int
    per_device: int  # rollouts in a forward pass of one process
    accumulated: int  # forward passes in an optimizer step
    steps_per_generation: int  # forward passes in one iteration over the rollouts of a generation
    num_iterations: int  # iterations over the rollouts of a generation
    num_generations: int  # rollouts per prompt

    @classmethod
    def of(cls, args: KTAEGRPOConfig, processes: int) -> "Batches":
        """Return the batches of a run with this number of processes."""
        steps = args.steps_per_generation
        if args.fixed_generation_batch:
            steps = args.generation_batch_size // (args.per_device_train_batch_size * processes)
        return cls(
            processes,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            steps,
            args.num_iterations,
            args.num_generations,
        )

    @property
    def rollouts(self) -> int:
        """Return the rollouts of a generation."""
        return self.per_device * self.processes * self.steps_per_generation

    @property
    def prompts(self) -> int:
        """Return the prompts of a generation."""
        return self.rollouts // self.num_generations

    @property
    def rollouts_per_step(self) -> int:
        """Return the rollouts of an optimizer step."""
        return self.per_device * self.processes * self.accumulated

    @property
    def steps(self) -> float:
        """Return the optimizer steps that train on a generation."""
        return self.steps_per_generation * self.num_iterations / self.accumulated

    def steps_per_epoch(self, prompts: int) -> int:
        """Return the optimizer steps of one pass over a number of prompts. TRL uses whole generations only."""
        return math.ceil(prompts // self.prompts * self.steps_per_generation * self.num_iterations / self.accumulated)

    def check_prompts(self, prompts: int) -> None:
        """Raise a UserError if there are fewer prompts than one generation takes. TRL would train nothing."""
        if prompts < self.prompts:
            raise UserError(
                f"The training set has {prompts:,} prompts, fewer than one generation needs: {self}. "
                "Use more prompts, or a smaller per_device_train_batch_size or steps_per_generation"
            )

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' * (self.processes > 1)}"
        return (
            f"{self.per_device} rollouts x {processes} x {self.steps_per_generation} steps_per_generation = "
            f"{self.rollouts:,} rollouts per generation ({self.rollouts / self.num_generations:,g} prompts x "
            f"{self.num_generations}), {self.rollouts_per_step:,} per optimizer step"
        )


def check_processes(args: KTAEGRPOConfig, expected: int | None, program: str = "train.py") -> str | None:
    """Return a warning if a run has another number of processes than its recipe is written for.

    Args:
        expected: the recipe's `num_processes`; None accepts any number.
        program: what the user called, for the message.

    Raises:
        UserError: one process sees several GPUs, which TRL does not support.
    """
    here = args.world_size
    if args.n_gpu > 1:
        raise UserError(
            f"One process sees {args.n_gpu} GPUs, which TRL does not support (torch's DataParallel). To use one GPU, "
            f"set CUDA_VISIBLE_DEVICES=0. To use all, run accelerate launch --num_processes {args.n_gpu}"
        )
    if expected in (None, here):
        return None
    wanted, found = Batches.of(args, expected), Batches.of(args, here)
    warning = (
        f"This recipe is written for {expected} process{'es' * (expected > 1)} (num_processes), but {here} "
        f"{'were' if here > 1 else 'was'} started.\n"
        f"  written for: {wanted}\n  started:     {found}\n"
    )
    flags = {
        "--num_processes": here,
        "--gradient_accumulation_steps": args.gradient_accumulation_steps * expected / here,
    }
    if not args.fixed_generation_batch:
        flags["--steps_per_generation"] = args.steps_per_generation * expected / here
    if all(float(value).is_integer() for value in flags.values()):
        words = " ".join(f"{name} {value:.0f}" for name, value in flags.items())
        return f"{warning}  To keep the batch sizes, add to the {program} command: {words}"
    return f"{warning}  To keep the batch sizes, change per_device_train_batch_size as well."
