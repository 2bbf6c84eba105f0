"""How often is a model right on held-out problems? Sampling with `transformers`, grading with `grading`."""

from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.models import unwrap_model_for_generation

from ktae_trl.grading import grade_many


class Accuracy(NamedTuple):
    """Share of right answers: of the greedy completion, and of several sampled at temperature 1."""

    greedy: float
    sampled: float
    samples: int  # per problem

    def __str__(self) -> str:
        return f"greedy {self.greedy:6.1%}   sampled {self.sampled:6.1%} (mean of {self.samples} at temperature 1)"


def held_out_accuracy(trainer, dataset: Dataset, *, samples: int, batch_size: int) -> Accuracy:
    """Measure the trainer's model on `dataset` (columns `prompt` and `solution`), over all processes.

    The random state is put back afterwards, so that measuring does not change the training that follows. Problems
    that cannot be scored are left out.

    Args:
        samples: completions per problem at temperature 1.
        batch_size: completions generated at once by each process.
    """
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = dataset.select(range(rank, len(dataset), world))
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
    ):
        torch.manual_seed(rank)
        tokenizer, limit = trainer.processing_class, trainer.args.max_completion_length
        verdicts = {}
        for n, greedy in ((1, True), (samples, False)):
            texts = generate(
                *(model, tokenizer, [p for p in mine["prompt"] for _ in range(n)]),
                greedy=greedy,
                max_new_tokens=limit,
                batch_size=batch_size,
                progress=trainer.accelerator.is_main_process,
            )
            answers = [a for a in mine["solution"] for _ in range(n)]
            verdicts[greedy] = [v for v in gather_object(grade_many(texts, answers)) if v is not None]
    return Accuracy(*(sum(v) / max(len(v), 1) for v in (verdicts[True], verdicts[False])), samples)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    *,
    greedy: bool,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> list[str]:
    """Complete each conversation, at temperature 1 unless `greedy`; batches of similar length, results in order."""
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    ends = model.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else 1.0,
        top_k=None if greedy else 0,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    was_training = model.training
    model.eval()
    completions: list[str] = [""] * len(texts)
    for begin in tqdm(range(0, len(order), batch_size), desc="held-out", disable=not progress, leave=False):
        rows = order[begin : begin + batch_size]
        batch = tokenizer(
            [texts[i] for i in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_token_type_ids=False,
        ).to(model.device)
        output = model.generate(**batch, generation_config=config)
        decoded = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, decoded, strict=True):
            completions[i] = text
    model.train(was_training)
    return completions
