"""Measure the cost of safe checkpoints: sealing and checking a checkpoint, and the checks for NaN and infinity.

python benchmarks/checkpoint_safety.py [--gigabytes 3] [--folder FOLDER]
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktae_trl import KTAEGRPOConfig, KTAEGRPOTrainer, tiny
from ktae_trl.data import load, to_prompts
from ktae_trl.files import checkpoints
from ktae_trl.rewards import math_accuracy
from ktae_trl.training.guard import Guard, check_weights, or_nan


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def of_a_checkpoint(folder: Path, gigabytes: float) -> None:
    """Time a checkpoint with one third weights and two thirds Adam moments, as in float32 training."""
    checkpoint = folder / "checkpoint-1"
    checkpoints.begin(checkpoint)
    n = round(gigabytes * 1e9 / 4)
    parts = {"model.safetensors": torch.randn(n // 3), "optimizer.pt": torch.randn(n - n // 3)}
    write = sum(seconds(lambda n=name, p=part: torch.save(p, checkpoint / n)) for name, part in parts.items())
    seal = seconds(lambda: checkpoints.seal(checkpoint))
    check = seconds(lambda: print(checkpoints.problem(checkpoint) or "whole"))
    sizes = seconds(lambda: checkpoints.problem(checkpoint, hashes=False))
    print(f"{gigabytes:g} GB: write {write:.1f} s, seal {seal:.1f} s, check {check:.1f} s, sizes {sizes * 1e3:.1f} ms")
    weights = torch.nn.ParameterList([parts["model.safetensors"]])
    finite = statistics.median(seconds(lambda: check_weights(weights, "")) for _ in range(5))
    print(f"weights of {gigabytes / 3:.1f} GB finite? {finite * 1e3:.0f} ms, {finite / write:.1%} of the writing")


def of_a_step(folder: Path) -> None:
    """Time the checks of a step separately, and the steps of a small training run: 8 prompts x 8 rollouts."""
    args = KTAEGRPOConfig(
        str(folder / "run"),
        max_steps=20,
        per_device_train_batch_size=64,
        max_completion_length=64,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = KTAEGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32),
        reward_funcs=math_accuracy,
        args=args,
        train_dataset=to_prompts(load(str(tiny.TRAIN))),
        processing_class=AutoTokenizer.from_pretrained(tiny.MODEL),
    )
    step = trainer.train().metrics["train_runtime"] / args.max_steps
    guard, norm = Guard(), torch.tensor(1.0)

    def checks() -> None:
        loss = torch.ones((), requires_grad=True)
        or_nan(loss).backward()
        guard.allows(1, norm)

    def without() -> None:
        torch.ones((), requires_grad=True).backward()

    def cost(function: Callable[[], object]) -> float:
        return min(seconds(lambda: [function() for _ in range(200)]) / 200 for _ in range(5))

    extra = cost(checks) - cost(without)
    print(f"training step: {step * 1e3:.0f} ms; its checks: {extra * 1e6:.0f} us, {extra / step:.4%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        of_a_checkpoint(work, options.gigabytes)
        of_a_step(work)
    finally:
        shutil.rmtree(work)
