"""The arithmetic of batches: prompts, rollouts and optimizer steps of a generation."""

import math
from typing import NamedTuple

from ktae_trl.arguments import UserError
from ktae_trl.config import KTAEGRPOConfig


class Batches(NamedTuple):
    """How many prompts and rollouts make a generation and an optimizer step, on all processes together."""

    processes: int
    per_device: int  # rollouts of a forward pass on one process
    accumulated: int  # forward passes of an optimizer step
    steps_per_generation: int  # forward passes that a generation's rollouts make, once through
    num_iterations: int  # times through
    num_generations: int  # rollouts of a prompt

    @classmethod
    def of(cls, args: KTAEGRPOConfig, processes: int) -> "Batches":
        """Return what `args` makes of so many processes."""
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
        """Return the optimizer steps that a generation serves."""
        return self.steps_per_generation * self.num_iterations / self.accumulated

    def steps_per_epoch(self, prompts: int) -> int:
        """Return the optimizer steps of a pass over so many prompts, as TRL counts: whole generations only."""
        return math.ceil(prompts // self.prompts * self.steps_per_generation * self.num_iterations / self.accumulated)

    def check_prompts(self, prompts: int) -> None:
        """Raise a ValueError if there are fewer prompts than one generation takes: TRL would train nothing."""
        if prompts < self.prompts:
            raise UserError(
                f"The training set has {prompts:,} prompts, fewer than one generation takes: {self}. "
                "Use more prompts, or a smaller per_device_train_batch_size or steps_per_generation"
            )

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' * (self.processes > 1)}"
        return (
            f"{self.per_device} rollouts x {processes} x {self.steps_per_generation} steps_per_generation = "
            f"{self.rollouts:,} rollouts a generation ({self.rollouts / self.num_generations:,g} prompts x "
            f"{self.num_generations}), {self.rollouts_per_step:,} an optimizer step"
        )


def check_processes(args: KTAEGRPOConfig, expected: int | None, program: str = "train.py") -> str | None:
    """Return a warning, with the arithmetic, if the run is not spread over processes as the recipe is written for.

    Raises:
        UserError: one process sees several GPUs, which TRL refuses.
    """
    here = args.world_size
    if args.n_gpu > 1:
        raise UserError(
            f"One process sees {args.n_gpu} GPUs, which TRL refuses (torch's DataParallel). For one "
            f"GPU, set CUDA_VISIBLE_DEVICES=0; for all, accelerate launch --num_processes {args.n_gpu}"
        )
    if expected in (None, here):
        return None
    wanted, found = Batches.of(args, expected), Batches.of(args, here)
    warning = (
        f"This recipe is written for {expected} processes (num_processes), but {here} were started.\n"
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
        return f"{warning}  To keep the batches, add behind {program}: {words}"
    return f"{warning}  To keep the batches, change per_device_train_batch_size as well."
