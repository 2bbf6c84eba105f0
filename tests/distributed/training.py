"""One process of a training for the tests beside this file: a crew's job, or `training.py SETTINGS.json FOLDER`.

Writes, per process, what it is, the token credit and the advantages of every generation and the final weights; and
saves the model.
"""

import contextlib
import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig

from ktae_trl import tiny
from ktae_trl.training.held_out import held_out_accuracy
from tests.distributed import cpu
from tests.rollouts.test_dynamic_sampling import third, two_thirds
from tests.trainers import around, make_trainer, prompts, replay, watch_batches
from tests.training.test_guard import poison


def right_on_the_first(completions, **kwargs):
    """Groups on the first process have right and wrong answers, those on the others are all wrong."""
    first = PartialState().process_index == 0
    return [float(first and i % 2) for i in range(len(completions))]


def watch_calls(trainer, grow: bool, end_at_once: int | None) -> list[int]:
    """Collect how many texts the model continues in each call.

    With `grow`, continuations depend on the text and on which of its continuations they are, so one process and two see
    the same; those of the process `end_at_once` end at once.
    """
    calls = []

    def spy(generate, prompt_ids, *arguments, **more):
        calls.append(len(prompt_ids))
        if grow:
            seen = Counter()
            return [continuation(trainer, ids, seen) for ids in prompt_ids], None
        completion_ids, logprobs = generate(prompt_ids, *arguments, **more)
        if trainer.accelerator.process_index == end_at_once:
            completion_ids = [[trainer.processing_class.eos_token_id] for _ in completion_ids]
        return completion_ids, logprobs

    around(trainer, "sampling", spy)
    return calls


def continuation(trainer, ids: list[int], seen: Counter) -> list[int]:
    seen[tuple(ids)] += 1
    rng = random.Random(f"{ids} {seen[tuple(ids)]}")
    tokens = [rng.randrange(3, 40) for _ in range(trainer.generation_config.max_new_tokens)]
    return (
        tokens if rng.random() < 0.7 else [*tokens[: rng.randrange(len(tokens))], trainer.processing_class.eos_token_id]
    )


def by_tokens(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


REWARDS = {"third": third, "two_thirds": two_thirds, "right_on_the_first": right_on_the_first, "by_tokens": by_tokens}


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    """Return the weights, put together where they are spread over processes (ZeRO-3, FSDP2)."""
    weights = dict(trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters())
    together = contextlib.nullcontext()
    if trainer.is_deepspeed_enabled:
        import deepspeed

        together = deepspeed.zero.GatheredParameters(list(weights.values()))
    with together:
        whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in weights.items()}
        return {name: p.detach().clone() for name, p in whole.items()}


def main(settings: dict, folder: str, checkpoint: str | None = None) -> None:
    folder, settings = Path(folder), {**settings, **cpu.fsdp_settings()}
    if settings.pop("replay"):
        settings["rollout_func"] = replay
    if "lora" in settings:
        settings["peft_config"] = LoraConfig(**settings.pop("lora"))
    if made_up := settings.pop("reward", None):
        settings["reward_funcs"] = REWARDS[made_up]
    grow, end_at_once = settings.pop("grow", False), settings.pop("end_at_once", None)
    data = prompts(settings.pop("prompts"))
    data = data.to_iterable_dataset() if settings.pop("stream", False) else data
    poisoned = settings.pop("poison", None)
    trainer = make_trainer(folder, train_dataset=data, **settings)
    if poisoned and trainer.accelerator.process_index == 1:
        poison(trainer, *poisoned)
    batches = watch_batches(trainer)
    calls = watch_calls(trainer, grow, end_at_once)
    trainer.train(resume_from_checkpoint=checkpoint)
    accelerator = trainer.accelerator
    held_out = {"greedy": None}  # made-up rewards depend on the place of a rollout, or on training problems
    if not made_up:
        held_out = held_out_accuracy(trainer, prompts(21, tiny.HELD_OUT), samples=1, batch_size=8)._asdict()
    trainer.save_model(str(folder / "model"))
    torch.save(
        {
            "processes": accelerator.num_processes,
            "distributed_type": str(accelerator.distributed_type.value),
            "wrapped": type(trainer.model_wrapped).__name__,
            "gradient_checkpointing": accelerator.unwrap_model(trainer.model_wrapped).is_gradient_checkpointing,
            "credits": [batch["credit"].clone() for batch in batches],
            "advantages": [batch["advantages"].clone() for batch in batches],
            "calls": calls,
            "held_out": held_out,
            "weights": whole_weights(trainer),
            "metrics": [entry for entry in trainer.state.log_history if "loss" in entry],
        },
        folder / f"process_{accelerator.process_index}.pt",
    )
    accelerator.wait_for_everyone()
    accelerator.free_memory()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
    PartialState().destroy_process_group()
