"""The dry run (`--dry_run true`): what a run would do. It needs no GPU and loads no weights."""

import asyncio
import dataclasses
import importlib.util
import inspect
import math
import statistics
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from accelerate import init_empty_weights
from datasets import Dataset
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState
from trl import ModelConfig
from trl.trainer.utils import get_callable_name

from ktae_trl.arguments import UserError, loading, model_path, pip_install
from ktae_trl.config import KTAEGRPOConfig
from ktae_trl.data.columns import column_values, original_column
from ktae_trl.grading import gradable, write_answer
from ktae_trl.grading.golds import describe
from ktae_trl.prompts import texts as rendered
from ktae_trl.prompts import token_ids
from ktae_trl.rewards import bind, checked
from ktae_trl.rollouts.verdicts import AUTO, correctness_index
from ktae_trl.training.batches import Batches

GIB = 2**30
_PLAIN = bool | int | float | str | list | dict | None
# Fields that describe this command, not the run, or that transformers sets from others.
_NOT_SHOWN = {"dry_run", "all", "dataloader_pin_memory", "disable_tqdm", "do_eval", "pad_to_multiple_of"}
_EMPTY = (None, "", "none", [])  # such as report_to, of which transformers makes a list
_PACKAGE = Path(__file__).parents[1]


class DataStatistics(NamedTuple):
    """Statistics of a set of prompts."""

    prompts: int
    tokens: list[int]  # minimum, median, 95th percentile and maximum
    repeated: int  # prompts that are equal to an earlier one
    unscorable: int  # prompts without an answer that the grader can parse


def data_statistics(dataset: Dataset, tokenizer, template_kwargs: dict | None = None) -> DataStatistics:
    """Measure the lengths of prompts in tokens; count repeated prompts and those that cannot be graded."""
    lengths = [len(ids) for ids in token_ids(dataset["prompt"][:], tokenizer, template_kwargs)]
    quantiles = statistics.quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else lengths * 19
    return DataStatistics(
        prompts=len(dataset),
        tokens=[min(lengths), round(statistics.median(lengths)), round(quantiles[-1]), max(lengths)],
        repeated=len(dataset) - len({str(prompt) for prompt in dataset["prompt"]}),
        unscorable=gradable(dataset["solution"][:]).count(False),
    )


class ModelSize(NamedTuple):
    """The number of parameters of a model, counted without loading its weights."""

    total: int
    largest_layer: int  # parameters of the largest module, without those of its submodules, as DeepSpeed counts
    dtype: torch.dtype | None  # in which the model was saved


def model_size(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSize:
    """Count the parameters of a model from its configuration. No weights are loaded."""
    with loading(f"The configuration of {name!r}", by="model_name_or_path"):
        config = AutoConfig.from_pretrained(model_path(name), revision=revision, trust_remote_code=trust_remote_code)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    layers = (sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    total = sum(p.numel() for p in model.parameters())
    return ModelSize(total, max(layers), config.dtype)


def memory_table(size: ModelSize, gpus: int) -> list[tuple[str, float, float]]:
    """Estimate the memory for weights, gradients and Adam's states on one machine, in GiB per GPU and of main memory.

    The estimators are DeepSpeed's, for full fine-tuning in mixed precision. "DDP" is ZeRO-2 on one GPU, where nothing
    is sharded; FSDP2 shards what ZeRO-3 shards. Activations, a reference model and vLLM need memory in addition. (TRL
    computes log-probabilities in tiles, so the logits of a whole batch are never in memory.)

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2

    layer, where = size.largest_layer, {"num_gpus_per_node": gpus}
    cpu_gpu = {
        "DDP": (0, zero2(size.total, cpu_offload=False)[1]),
        "ZeRO-2": zero2(size.total, **where, cpu_offload=False),
        "ZeRO-2, optimizer off-loaded": zero2(size.total, **where, cpu_offload=True),
        "ZeRO-3, FSDP2": zero3(size.total, layer, **where, cpu_offload=False, cpu_offload_params=False)[:2],
        "ZeRO-3, all off-loaded": zero3(size.total, layer, **where, cpu_offload=True, cpu_offload_params=True)[:2],
    }
    return [(name, gpu / GIB, cpu / GIB) for name, (cpu, gpu) in cpu_gpu.items()]


def show(
    run,
    args: KTAEGRPOConfig,
    model: ModelConfig,
    reward_funcs: Sequence[Callable],
    train: Dataset,
    held_out: Dataset | None,
    tokenizer,
) -> None:
    """Print the first prompt, its rewards, the batches, the data, the memory, and the settings.

    Raises:
        UserError: there are too few prompts; or a reward function failed, which is raised after everything is printed.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.rule("The first prompt, as the model reads it", align="left")
    (prompt,) = rendered(train["prompt"][:1], tokenizer, args.chat_template_kwargs)
    console.print(prompt)
    console.print(f"\nGold answer: {gold_answer(train, run.answer_column)}")

    console.rule("Its rewards", align="left")
    failures = show_rewards(console, reward_funcs, args, train, tokenizer)

    started = args.world_size
    processes = started if started > 1 else run.num_processes or 1
    batches = Batches.of(args, processes)
    console.rule("Batches", align="left")
    if processes != started:
        console.print(f"For {processes} processes (num_processes in the recipe). This command started {started}.")
    _show_batches(console, batches, args, len(train))

    console.rule("Data", align="left")
    table = Table("", "prompts", "min", "median", "95%", "max", "repeated", "not gradable")
    for name, dataset in (("training", train), ("held out", held_out)):
        if dataset is not None:
            measured = data_statistics(dataset, tokenizer, args.chat_template_kwargs)
            cells = [measured.prompts, *measured.tokens, measured.repeated, measured.unscorable]
            table.add_row(name, *(f"{cell:,}" for cell in cells))
    console.print(table, soft_wrap=False)
    console.print("The lengths (min to max) are those of the prompts, in tokens.")
    if held_out is not None:
        both = {str(prompt) for prompt in train["prompt"]} & {str(prompt) for prompt in held_out["prompt"]}
        console.print(f"Prompts in both sets: {len(both):,}")
        gold = gold_answer(held_out, run.eval_answer_column or run.answer_column)
        console.print(f"Gold answer of the first held-out problem: {gold}")

    console.rule("Memory", align="left")
    _show_memory(console, args, model, processes)

    which = "all" if run.all else "those that differ from their defaults; --all true shows all"
    console.rule(f"Settings ({which})", align="left")
    console.print(yaml.safe_dump(resolved(run, args, model, everything=run.all), sort_keys=True).rstrip())
    if failures:
        raise UserError(". ".join(failures))


def gold_answer(dataset: Dataset, answer_column: str) -> str:
    """Return the accepted answers of the first row, and where in the data they were found."""
    first = dataset.select([0])
    (value,) = column_values(first, original_column(first, answer_column))
    how = {"value": "the value"}.get(describe(value), describe(value))
    return f"{' | '.join(first['solution'][0])}   ({how} in the column {answer_column})"


def show_rewards(
    console: Console, reward_funcs: Sequence[Callable], args: KTAEGRPOConfig, dataset: Dataset, tokenizer
) -> list[str]:
    """Print what each reward function returns for three made-up completions of the first problem.

    Returns:
        A line for each function that failed, with its error.
    """
    row = dataset[0]
    ends = [write_answer(answer, args.answer_format) for answer in (row["solution"][0], _other(row["solution"]))]
    texts = [*(f"So we have the answer.\n{end}" for end in ends), "So we have no answer."]
    names = [get_callable_name(function) for function in reward_funcs]
    table, failures, found = Table("reward function", "correct answer", "wrong answer", "no answer"), [], {}
    for function, name in zip(reward_funcs, names, strict=True):
        try:
            bound = bind(function, answer_format=args.answer_format, opened_think=False)
            found[name] = call(checked(bound, name, args.reward_timeout), [row] * len(texts), texts, tokenizer)
            table.add_row(name, *("None" if value is None else f"{value:g}" for value in found[name]))
        except Exception as error:  # the function is the user's
            failures.append(_failure(name, error))
            table.add_row(name, *["fails"] * len(texts))
    console.print(f"Three made-up completions: one ends with {ends[0]}, one with {ends[1]}, one has no answer.")
    console.print(table, soft_wrap=False)
    correctness = names[correctness_index(names, args.correctness_reward)]
    threshold = args.correctness_threshold
    above = "the mean of their group" if threshold == AUTO else f"{threshold:g}"
    console.print(f"Correct rollouts: those with {correctness} above {above} (correctness_threshold: {threshold}).")
    if correctness in found and not _tells_apart(*found[correctness][:2], threshold):
        console.print(f"{correctness} does not distinguish the correct answer from the wrong one. Is this intended?")
    return failures


def _tells_apart(right: float | None, wrong: float | None, threshold: float | str) -> bool:
    if right is None or wrong is None:
        return False
    return right > wrong if threshold == AUTO else right > threshold >= wrong


def _failure(name: str, error: Exception) -> str:
    """Return what a reward function raised, and where in the user's code."""
    if isinstance(error, UserError):  # names the function
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[0] != "<"]
    own = frames and not Path(frames[-1].filename).is_relative_to(_PACKAGE)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if own else ""
    return f"The reward function {name!r} fails: {type(error).__name__}: {' '.join(str(error).split())}{where}"


def _other(answers: list[str]) -> str:
    return next(number for number in ("-987654321", "-123456789") if number not in answers)


def call(function: Callable, rows: list[dict], texts: list[str], tokenizer) -> list:
    """Call a reward function, asynchronous or not, with the arguments that TRL gives it in training."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    values = function(
        prompts=[row["prompt"] for row in rows],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=tokenizer(texts)["input_ids"],
        trainer_state=TrainerState(),
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        **columns,
    )
    return asyncio.run(values) if inspect.iscoroutine(values) else values


def resolved(run, args: KTAEGRPOConfig, model: ModelConfig, *, everything: bool = False) -> dict:
    """Return the settings of a run by name.

    Args:
        everything: include settings that have their default value.
    """
    # Of these two, TRL computes one from the other, for the processes of this command.
    computed = {"steps_per_generation" if args.fixed_generation_batch else "generation_batch_size"}
    if args.steps_per_generation == args.gradient_accumulation_steps:
        computed.add("steps_per_generation")
    hidden = computed if everything else computed | _NOT_SHOWN
    settings = {}
    for part in (run, model, args):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            value = getattr(value, "value", value)  # of transformers' enumerations
            differs = value != default and not (value in _EMPTY and default in _EMPTY)
            if field.name not in hidden and (everything or differs) and isinstance(value, _PLAIN):
                settings[field.name] = "(not shown)" if value and field.name.endswith("token") else value
    return settings


def _show_batches(console: Console, batches: Batches, args: KTAEGRPOConfig, prompts: int) -> None:
    batches.check_prompts(prompts)
    per_epoch = batches.steps_per_epoch(prompts)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    table = Table(Column(no_wrap=True), "prompts", "rollouts", "tokens, at most", "optimizer steps")
    for name, rollouts, optimizer_steps in (
        ("a generation", batches.rollouts, batches.steps),
        ("an optimizer step", batches.rollouts_per_step, 1),
        ("an epoch", prompts // batches.prompts * batches.rollouts, per_epoch),
        ("the run", steps / batches.steps * batches.rollouts, steps),
    ):
        cells = (rollouts / batches.num_generations, rollouts, rollouts * args.max_completion_length)
        table.add_row(name, *(f"{cell:,.0f}" for cell in cells), f"{optimizer_steps:,g}")
    console.print(table, soft_wrap=False)
    console.print(f"{batches}. The tokens are those of completions.")
    if args.dynamic_sampling:
        console.print(
            f"With dynamic_sampling, a batch takes at most {args.dynamic_sampling_max_batches} times these rollouts, "
            "in generations of at most this size. An epoch's number of optimizer steps then uses more prompts than the "
            "dataset has."
        )


def _show_memory(console: Console, args: KTAEGRPOConfig, model: ModelConfig, processes: int) -> None:
    size = model_size(model.model_name_or_path, model.model_revision, args.trust_remote_code)
    console.print(f"{model.model_name_or_path}: {size.total:,} parameters.")
    if model.use_peft:
        width = 0.5 if model.load_in_4bit else 1 if model.load_in_8bit else _width(model.dtype, size.dtype)
        frozen = size.total * width / GIB
        console.print(f"Frozen weights: {frozen:.1f} GiB per GPU. The adapter and its optimizer states are small.")
    elif importlib.util.find_spec("deepspeed") is None:
        console.print(f"The memory estimate needs DeepSpeed: {pip_install('deepspeed')}")
    else:
        table = Table("full fine-tuning, GiB", "per GPU", "main memory", title_justify="left")
        for name, gpu, cpu in memory_table(size, processes):
            table.add_row(name, f"{gpu:.3g}", f"{cpu:.3g}")
        console.print(table, soft_wrap=False)
        console.print(
            f"Weights, gradients and Adam's states on {processes} GPU{'s' * (processes > 1)} of one machine "
            "(DeepSpeed's estimators)."
        )
        if processes > 1 and args.gradient_accumulation_steps > 1:
            console.print(
                "During gradient accumulation, FSDP2 keeps all gradients on each GPU: "
                f"{2 * size.total / GIB:.3g} GiB more."
            )
    console.print("In addition, per GPU:")
    if args.beta and not model.use_peft:
        reference = size.total * _width(model.dtype, size.dtype) / GIB
        console.print(f"  reference model (beta > 0): up to {reference:.1f} GiB, sharded under ZeRO-3")
    if args.use_vllm and args.vllm_mode == "colocate":
        console.print(f"  vLLM: {args.vllm_gpu_memory_utilization:.0%} of the GPU (vllm_gpu_memory_utilization)")
    console.print(
        f"  activations of {args.per_device_train_batch_size} rollouts (per_device_train_batch_size): not estimated. "
        "They depend on the lengths and on gradient checkpointing"
    )


def _width(asked: str | None, saved: torch.dtype | None) -> int:
    """Return the bytes of a parameter, for the `dtype` of the settings and that of the saved model."""
    dtype = saved if asked in (None, "auto") else getattr(torch, asked)
    return (dtype or torch.float32).itemsize
