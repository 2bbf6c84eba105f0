"""How often is a model right on held-out problems? Sampling with `transformers`, grading with `grading`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from ktae_trl.grading import grade_many
from ktae_trl.prompts import token_ids


class Accuracy(NamedTuple):
    """Share of right answers: of the greedy completion, and of several sampled at temperature 1."""

    greedy: float
    sampled: float
    samples: int  # per problem

    def __str__(self) -> str:
        return f"greedy {self.greedy:6.1%}   sampled {self.sampled:6.1%} (mean of {self.samples} at temperature 1)"


def held_out_accuracy(trainer, dataset: Dataset, *, samples: int, batch_size: int) -> Accuracy:
    """Measure the trainer's model on `dataset` (columns `prompt` and `solution`), over all processes.

    The model must be prepared for training (from `on_train_begin` on), so that it is where and in the precision that it
    is trained. The random state is put back afterwards: measuring does not change the training that follows. Problems
    that cannot be scored are left out.

    Args:
        samples: completions per problem at temperature 1.
        batch_size: completions generated at once by each process.
    """
    accelerator, args = trainer.accelerator, trainer.args
    rank, world = accelerator.process_index, accelerator.num_processes
    # All processes must generate equally often (ZeRO-3, FSDP): the last problems are repeated to fill the shares.
    share = -(-len(dataset) // world)
    numbers = [min(rank * share + i, len(dataset) - 1) for i in range(share)]
    mine = dataset.select(numbers)
    unwrapped = unwrap_model_for_generation(
        trainer.model_wrapped,
        accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    )
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    means = []
    with torch.random.fork_rng(devices=devices), trainer.compute_loss_context_manager(), unwrapped as model:
        torch.manual_seed(rank)
        for greedy, n in ((True, 1), (False, samples)):
            texts = generate(
                model,
                trainer.processing_class,
                [prompt for prompt in mine["prompt"] for _ in range(n)],
                greedy=greedy,
                max_new_tokens=args.max_completion_length,
                eos_token_ids=trainer.eos_token_ids,
                batch_size=batch_size,
                template_kwargs=trainer.chat_template_kwargs,
                progress=accelerator.is_main_process,
            )
            verdicts = grade_many(texts, [answer for answer in mine["solution"] for _ in range(n)])
            pairs = [(number, verdicts[i * n : (i + 1) * n]) for i, number in enumerate(numbers)]
            by_problem = dict(gather_object(pairs))  # a repeated problem counts once
            scored = [v for problem in by_problem.values() for v in problem if v is not None]
            means.append(sum(scored) / max(len(scored), 1))
    return Accuracy(*means, samples)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    *,
    greedy: bool,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    batch_size: int,
    template_kwargs: dict | None = None,
    progress: bool = False,
) -> list[str]:
    """Complete each conversation, at temperature 1 unless `greedy`; batches of similar length, results in order."""
    ids = token_ids(prompts, tokenizer, template_kwargs)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        **({"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    was_training, own_settings = model.training, model.generation_config
    # What ours leaves open, `generate` would take from the model's own, such as the top_p of an instruct model.
    model.generation_config = GenerationConfig()
    model.eval()
    completions = [""] * len(ids)
    for begin in tqdm(range(0, len(order), batch_size), desc="held-out", disable=not progress, leave=False):
        rows = order[begin : begin + batch_size]
        batch = {"input_ids": [ids[i] for i in rows]}
        batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**batch, generation_config=config)
        decoded = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, decoded, strict=True):
            completions[i] = text
    model.train(was_training)
    model.generation_config = own_settings
    return completions
