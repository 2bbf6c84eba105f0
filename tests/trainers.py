"""Small trainings for tests: the offline model on a few problems, with sampled or replayed rollouts."""

import json
import random

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktae_trl import KTAEGRPOConfig, KTAEGRPOTrainer, tiny
from ktae_trl.config import with_settings_of
from ktae_trl.data import to_prompts
from ktae_trl.rewards import math_accuracy
from ktae_trl.tiny import task

SETTINGS = {
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 32,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
}


def prompts(n: int = 16, path=tiny.TRAIN) -> Dataset:
    rows = [json.loads(line) for line in path.read_text().splitlines()[:n]]
    return to_prompts(Dataset.from_list(rows))


def make_trainer(output_dir, *, trainer=KTAEGRPOTrainer, config=KTAEGRPOConfig, **settings):
    """Build a trainer; keywords that are no field of the config go to the trainer."""
    credit = settings.get("credit", "none")
    fields = (with_settings_of(config, credit) if config is KTAEGRPOConfig else config).__dataclass_fields__
    args = config(output_dir=str(output_dir), **{**SETTINGS, **{k: v for k, v in settings.items() if k in fields}})
    arguments = {
        "model": AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32),
        "reward_funcs": math_accuracy,
        "train_dataset": prompts(),
        "processing_class": AutoTokenizer.from_pretrained(tiny.MODEL),
        **{k: v for k, v in settings.items() if k not in fields},
    }
    return trainer(args=args, **arguments)


# Where tests look into a training. TRL's names of these methods stand here only.
HOOKS = {
    "batch": "_generate_and_score_completions",  # rows of a dataset -> a batch
    "generation": "_generate",  # prompts -> what the model, or a rollout_func, makes of them
    "sampling": "_generate_single_turn",  # token ids of prompts -> those of completions, and log-probabilities
    "loss": "_compute_loss",  # model, batch -> loss
}


def hook(owner, what: str):
    return getattr(owner, HOOKS[what])


def around(owner, what: str, instead, patch=setattr) -> None:
    """Call `instead` with the original method of a trainer, or of a class of trainers, and its arguments."""
    original = hook(owner, what)
    patch(owner, HOOKS[what], lambda *arguments, **more: instead(original, *arguments, **more))


def watch_batches(trainer) -> list[dict]:
    """Collect the batch of each generation."""
    batches = []

    def keep(original, rows):
        batches.append(original(rows))
        return batches[-1]

    around(trainer, "batch", keep)
    return batches


def first_batch(trainer) -> dict:
    trainer.model.train()  # in evaluation there is no credit
    return hook(trainer, "batch")(list(next(iter(trainer.get_train_dataloader()))))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def other_model(folder) -> str:
    """Save a model like the offline one with other weights; return where it is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return str(folder)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two sets of weights."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def replay(prompts: list, trainer) -> dict:
    """A `rollout_func` whose rollouts depend on the problem and their place in the group only.

    So one process and two see the same rollouts. Careful, forgetful and guessing solutions of unequal length, some cut
    off.
    """
    tokenizer, G = trainer.processing_class, trainer.num_generations
    begin = trainer.accelerator.process_index * len(prompts)
    prompt_ids, completion_ids = [], []
    for row, prompt in enumerate(prompts, begin):
        problem = prompt[-1]["content"]
        rng = random.Random(f"{problem} {row % G}")
        text = task.solution(problem, rng.choice(list(task.HABITS)), rng)
        ids = tokenizer(text)["input_ids"][: trainer.max_completion_length]
        if len(ids) < trainer.max_completion_length:
            ids.append(tokenizer.eos_token_id)
        completion_ids.append(ids)
        prompt_ids.append(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}
