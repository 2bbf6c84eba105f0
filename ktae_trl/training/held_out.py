"""Accuracy on held-out problems: completions from `transformers`, judged by the run's own correctness reward."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.models import unwrap_model_for_generation

from ktae_trl.files.writing import replace_json
from ktae_trl.prompts import token_ids
from ktae_trl.rollouts.verdicts import AUTO, verdicts
from ktae_trl.training.console import say, shows_bars

BEFORE = "held_out_before.json"  # in the folder of the run


class Accuracy(NamedTuple):
    """Share of correct answers, of one greedy completion per problem and of several sampled at temperature 1.

    With `correctness_threshold: auto`, which compares the rollouts of a group, it is the mean reward instead. It is
    None if no completion could be judged.
    """

    greedy: float | None
    sampled: float | None
    samples: int  # per problem
    reward: str = "math_accuracy"  # the correctness reward
    threshold: float | str = 0.0
    unscored: int = 0  # completions that could not be judged and are left out

    @property
    def what(self) -> str:
        """Return what was measured, such as `accuracy by math_accuracy`."""
        return measured(self.reward, self.threshold)

    @property
    def figures(self) -> tuple[str, str]:
        """Return the greedy and the sampled figure as they are printed."""
        return tuple(
            "not scored" if value is None else f"{value:.3f}" if self.threshold == AUTO else f"{value:.1%}"
            for value in (self.greedy, self.sampled)
        )

    def __str__(self) -> str:
        greedy, sampled = self.figures
        left_out = f"; completions excluded because they have no score: {self.unscored}" if self.unscored else ""
        return f"greedy {greedy}, sampled {sampled} ({self.samples} per problem at temperature 1){left_out}"


def held_out_accuracy(trainer, dataset: Dataset, *, samples: int, batch_size: int) -> Accuracy:
    """Measure the trainer's model on `dataset` with the run's own correctness reward and threshold. Collective.

    The model must be prepared for training (from `on_train_begin` on), so that it has the device and the precision that
    it is trained with. The random state is restored afterwards: measuring does not change the training that follows.
    Completions without a reward (None or NaN) are left out and counted.

    Args:
        dataset: has the column `prompt` and the columns that the reward function takes.
        samples: completions per problem at temperature 1.
        batch_size: completions that each process generates at once.
    """
    accelerator, args = trainer.accelerator, trainer.args
    threshold = args.correctness_threshold
    rank, world = accelerator.process_index, accelerator.num_processes
    # With ZeRO-3 and FSDP all processes must make the same number of calls: repeat the last problem to fill the shares.
    share = -(-len(dataset) // world)
    mine = [dataset[min(rank * share + i, len(dataset) - 1)] for i in range(share)]
    unwrapped = unwrap_model_for_generation(
        trainer.model_wrapped,
        accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    )
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    means, unscored = [], 0
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(rank)
        generated = []
        with trainer.compute_loss_context_manager(), unwrapped as model:
            for greedy, n in ((True, 1), (False, samples)):
                rows = [row for row in mine for _ in range(n)]
                completion_ids = generate(
                    model,
                    trainer.processing_class,
                    [row["prompt"] for row in rows],
                    greedy=greedy,
                    max_new_tokens=args.max_completion_length,
                    eos_token_ids=trainer.eos_token_ids,
                    batch_size=batch_size,
                    template_kwargs=trainer.chat_template_kwargs,
                    progress=accelerator.is_main_process,
                )
                generated.append((rows, completion_ids))
        for rows, completion_ids in generated:
            reward = trainer.judge(rows, completion_ids)[: len(rows) // share * len(dataset)]  # without repeats
            judged = ~reward.isnan()
            value = reward if threshold == AUTO else verdicts(reward[None], threshold).correct_PG[0]
            means.append(value[judged].double().mean().item() if judged.any() else None)
            unscored += int((~judged).sum())
    return Accuracy(*means, samples, trainer.correctness_reward, threshold, unscored)


def measured(reward: str, threshold: float | str) -> str:
    """Return the name of what was measured, such as `accuracy by my_verdict (threshold 0.5)`."""
    if threshold == AUTO:
        return f"mean reward by {reward}"
    return f"accuracy by {reward}" + (f" (threshold {threshold:g})" if threshold else "")


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
) -> list[list[int]]:
    """Complete each conversation, at temperature 1 unless `greedy`, in batches of prompts of similar length.

    Returns:
        The token ids of each completion, in the order of the prompts, with the end-of-sequence id if it ended.
    """
    prompt_ids = token_ids(prompts, tokenizer, template_kwargs)
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        **({"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    )
    was_training, own_settings = model.training, model.generation_config
    # `generate` would fill gaps in ours from the model's own configuration, such as the top_p of an instruct model.
    model.generation_config = GenerationConfig()
    model.eval()
    completions: list[list[int]] = [[]] * len(prompt_ids)
    shown = progress and shows_bars()
    for begin in tqdm(range(0, len(order), batch_size), desc="held-out", disable=not shown, leave=False):
        rows = order[begin : begin + batch_size]
        batch = {"input_ids": [prompt_ids[i] for i in rows]}
        batch = tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**batch, generation_config=config)
        for i, ids in zip(rows, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(ids, 1) if token in eos_token_ids), len(ids))
            completions[i] = ids[:end]
    model.train(was_training)
    model.generation_config = own_settings
    return completions


class HeldOutAccuracy(TrainerCallback):
    """Measures the accuracy before training, once the model is prepared. A resumed run keeps its first figures."""

    def __init__(self, trainer, samples: int):
        self.trainer, self.samples = trainer, samples
        self.before: Accuracy | None = None

    @property
    def what(self) -> str:
        """Return what is measured, such as `accuracy by math_accuracy`."""
        return measured(self.trainer.correctness_reward, self.trainer.args.correctness_threshold)

    def measure(self, when: str = "before") -> Accuracy:
        """Measure the model as it is now, `when` ("before" or "after") training. Collective."""
        self._say(f"\nMeasuring the held-out {self.what} on {len(self.trainer.eval_dataset)} problems {when} training")
        return held_out_accuracy(
            self.trainer,
            self.trainer.eval_dataset,
            samples=self.samples,
            batch_size=self.trainer.args.per_device_eval_batch_size,
        )

    def problems(self) -> str:
        """Return a hash of what is measured: the problems, their answers, and the number of samples."""
        rows = self.trainer.eval_dataset.select_columns(["prompt", "solution"]).to_list()
        return hashlib.sha256(
            json.dumps([rows, self.samples, self.trainer.args.answer_format], default=str).encode()
        ).hexdigest()[:16]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.before = self.measure()
        else:
            self.before = self.of_this_run(Path(self.trainer.resumed_from))
        if self.before and state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            kept = {"accuracy": self.before, "problems": self.problems()}
            replace_json(Path(args.output_dir, BEFORE), kept)
        self._say(f"Held-out {self.what} before training: {self.before or 'not measured'}\n")

    def _say(self, text: str) -> None:
        if self.trainer.accelerator.is_main_process:
            say(text)

    def of_this_run(self, checkpoint: Path) -> Accuracy | None:
        """Return what the run that saved `checkpoint` measured before training, if it measured the same."""
        file = checkpoint.parent / BEFORE
        if not file.exists():
            return None
        try:
            kept = json.loads(file.read_text())
        except ValueError:
            kept = None
        if not isinstance(kept, dict) or kept["problems"] != self.problems():
            self._say(f"{file} is not used: it was measured on other held-out problems or with other settings")
            return None
        before, args = Accuracy(*kept["accuracy"]), self.trainer.args
        if (before.reward, before.threshold) != (self.trainer.correctness_reward, args.correctness_threshold):
            self._say(f"{file} is not used: it has the {before.what}, which this run does not measure")
            return None
        return before
