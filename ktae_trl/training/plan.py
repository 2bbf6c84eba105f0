"""What a run will do, before it is paid for: its batches, steps, data and memory (`train.py --dry_run true`)."""

import asyncio
import dataclasses
import importlib.util
import inspect
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import yaml
from accelerate import init_empty_weights
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from transformers import AutoConfig, AutoModelForCausalLM, TrainerState
from trl import GRPOConfig, ModelConfig
from trl.trainer.utils import get_callable_name

from ktae_trl.arguments import UserError, loading, model_path
from ktae_trl.config import KTAEGRPOConfig
from ktae_trl.data.columns import column_values, original_column
from ktae_trl.grading import gradable, write_answer
from ktae_trl.grading.golds import describe
from ktae_trl.prompts import texts, token_ids
from ktae_trl.rewards import bind, checked
from ktae_trl.rollouts.verdicts import AUTO, correctness_index
from ktae_trl.training.batches import Batches

GIB = 2**30
_PLAIN = bool | int | float | str | list | dict


class DataStatistics(NamedTuple):
    """What a set of prompts looks like."""

    prompts: int
    tokens: list[int]  # minimum, median, 95th percentile and maximum
    repeated: int  # prompts that occurred before
    unscorable: int  # none of whose answers the grader can read


def data_statistics(dataset: Dataset, tokenizer, template_kwargs: dict | None = None) -> DataStatistics:
    """Measure prompts in tokens, and count those that come twice or that cannot be graded."""
    lengths = [len(ids) for ids in token_ids(dataset["prompt"][:], tokenizer, template_kwargs)]
    quantiles = statistics.quantiles(lengths, n=20, method="inclusive") if len(lengths) > 1 else lengths * 19
    return DataStatistics(
        prompts=len(dataset),
        tokens=[min(lengths), round(statistics.median(lengths)), round(quantiles[-1]), max(lengths)],
        repeated=len(dataset) - len({str(prompt) for prompt in dataset["prompt"]}),
        unscorable=gradable(dataset["solution"][:]).count(False),
    )


class ModelSize(NamedTuple):
    """Parameters of a model, counted without its weights."""

    total: int
    largest_layer: int  # of the modules that hold parameters themselves, as DeepSpeed counts
    dtype: torch.dtype | None  # that it was saved in


def model_size(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSize:
    """Count the parameters of a model from its configuration; no weights are loaded."""
    with loading(f"The configuration of {name!r}", by="model_name_or_path"):
        config = AutoConfig.from_pretrained(model_path(name), revision=revision, trust_remote_code=trust_remote_code)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    layers = (sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    total = sum(p.numel() for p in model.parameters())
    return ModelSize(total, max(layers), config.dtype)


def memory_table(size: ModelSize, gpus: int) -> list[tuple[str, float, float]]:
    """Estimate what weights, gradients and Adam's states need on one machine: GiB per GPU and of main memory.

    DeepSpeed's estimators for full fine-tuning in mixed precision. "DDP" is that of ZeRO-2 on one GPU, where nothing is
    shared; FSDP2 shards what ZeRO-3 shards. Activations, a reference model and vLLM come on top. (TRL computes
    log-probabilities tile by tile: there are no logits of a whole batch.)

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
    """Print the resolved settings, the arithmetic of the batches, the data, the rewards and the memory.

    Raises:
        ValueError: a reward function failed on the first rows; after everything has been printed.
    """
    console = Console(highlight=False)
    console.rule("Settings (all of GRPO's and ours; of the others, what is not a default)", align="left")
    console.print(yaml.safe_dump(resolved(run, args, model), sort_keys=True).rstrip(), markup=False, soft_wrap=True)

    started = args.world_size
    processes = started if started > 1 else run.num_processes or 1
    batches = Batches.of(args, processes)
    console.rule("Batches", align="left")
    if processes != started:
        console.print(f"For {processes} processes, as the recipe says (num_processes); this command started {started}.")
    _show_batches(console, batches, args, len(train))

    console.rule("Data", align="left")
    table = Table("", "prompts", "tokens: least", "median", "95%", "most", "repeated", "not gradable")
    for name, dataset in (("training", train), ("held out", held_out)):
        if dataset is not None:
            measured = data_statistics(dataset, tokenizer, args.chat_template_kwargs)
            cells = [measured.prompts, *measured.tokens, measured.repeated, measured.unscorable]
            table.add_row(name, *(f"{cell:,}" for cell in cells))
    console.print(table)
    if held_out is not None:
        both = {str(prompt) for prompt in train["prompt"]} & {str(prompt) for prompt in held_out["prompt"]}
        console.print(f"Prompts that are in both: {len(both):,}")

    console.rule("First problems, as the model reads them", align="left")
    show_problems(console, train, run.answer_column, tokenizer, args.chat_template_kwargs)
    if held_out is not None:
        console.rule("The first held-out problem", align="left")
        column = run.eval_answer_column or run.answer_column
        show_problems(console, held_out, column, tokenizer, args.chat_template_kwargs, number=1)

    console.rule("Rewards of made-up completions of the first problems", align="left")
    failures = show_rewards(console, reward_funcs, args, train, tokenizer)

    console.rule("Memory", align="left")
    _show_memory(console, args, model, processes)
    if failures:
        raise UserError(". ".join(failures))


def show_rewards(
    console: Console,
    reward_funcs: Sequence[Callable],
    args: KTAEGRPOConfig,
    dataset: Dataset,
    tokenizer,
    number: int = 3,
) -> list[str]:
    """Print what each reward function returns for a right and a wrong answer of the first rows.

    Returns:
        A line for each function that failed, with its error.
    """
    rows, texts, kinds = [], [], []
    for place, row in enumerate(dataset.select(range(min(number, len(dataset)))), 1):
        right, wrong = row["solution"][0], _other(row["solution"])
        for kind, answer in ((f"{place}, right answer", right), (f"{place}, wrong answer", wrong)):
            rows.append(row)
            texts.append(f"So we have the answer.\n{write_answer(answer, args.answer_format)}")
            kinds.append(kind)
    names = [get_callable_name(function) for function in reward_funcs]
    table, columns, failures = Table("problem", "the completion ends with", *names), [], []
    for function, name in zip(reward_funcs, names, strict=True):
        try:
            bound = bind(function, answer_format=args.answer_format, opened_think=False)
            values = call(checked(bound, name, args.reward_timeout), rows, texts, tokenizer)
            columns.append(["None" if value is None else f"{value:g}" for value in values])
        except Exception as error:  # whatever a user's function does
            failures.append(f"The reward function {name!r} fails: {type(error).__name__}: {error}")
            columns.append(["fails"] * len(rows))
    for kind, text, *cells in zip(kinds, texts, *columns, strict=True):
        table.add_row(kind, escape(text.splitlines()[-1]), *cells)
    console.print(table)
    for failure in failures:
        console.print(failure, markup=False, soft_wrap=True)
    correctness = names[correctness_index(names, args.correctness_reward)]
    threshold = args.correctness_threshold
    above = "the mean of the group" if threshold == AUTO else f"{threshold:g}"
    console.print(f"A rollout is right if {correctness} gives more than {above} (correctness_threshold: {threshold}).")
    return failures


def _other(answers: list[str]) -> str:
    return next(number for number in ("-987654321", "-123456789") if number not in answers)


def call(function: Callable, rows: list[dict], texts: list[str], tokenizer) -> list:
    """Call a reward function, asynchronous or not, as TRL does in training."""
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


def show_problems(
    console: Console,
    dataset: Dataset,
    answer_column: str,
    tokenizer,
    template_kwargs: dict | None = None,
    number: int = 3,
) -> None:
    """Print the first prompts in full, and their gold answers with what was found where in the answer column."""
    first = dataset.select(range(min(number, len(dataset))))
    column = original_column(first, answer_column)
    prompts = texts(first["prompt"][:], tokenizer, template_kwargs)
    for prompt, answers, value in zip(prompts, first["solution"], column_values(first, column), strict=True):
        console.print(prompt, markup=False, soft_wrap=True)
        how = {"value": "the value"}.get(describe(value), describe(value))
        console.print(
            f"-> gold answer: {' | '.join(answers)}   ({how} of {answer_column})\n", markup=False, soft_wrap=True
        )


def resolved(run, args: KTAEGRPOConfig, model: ModelConfig) -> dict:
    """Return the settings by name: all of GRPO's and ours, of the others those that are no defaults."""
    always = {*type(run).__dataclass_fields__, *KTAEGRPOConfig.__annotations__, *GRPOConfig.__annotations__}
    # For the processes of this command; the batches are shown for the run's.
    derived = "steps_per_generation" if args.fixed_generation_batch else "generation_batch_size"
    settings = {}
    for part in (run, model, args):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            shown = field.name in always or value != default
            value = getattr(value, "value", value)  # TrainingArguments' enumerations are strings
            if shown and field.name != derived and value != [] and isinstance(value, _PLAIN):
                settings[field.name] = value
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
    console.print(table)
    console.print(f"{batches}. Tokens are those of completions.")
    if args.dynamic_sampling:
        console.print(
            f"With dynamic_sampling, a batch takes up to {args.dynamic_sampling_max_batches} generations of this "
            "size, so that an epoch's optimizer steps draw more prompts than an epoch has."
        )


def _show_memory(console: Console, args: KTAEGRPOConfig, model: ModelConfig, processes: int) -> None:
    size = model_size(model.model_name_or_path, model.model_revision, args.trust_remote_code)
    console.print(f"{model.model_name_or_path}: {size.total:,} parameters.")
    if model.use_peft:
        width = 0.5 if model.load_in_4bit else 1 if model.load_in_8bit else _width(model.dtype, size.dtype)
        frozen = size.total * width / GIB
        console.print(f"Frozen weights: {frozen:.1f} GiB per GPU; the adapter and its states are small beside them.")
    elif importlib.util.find_spec("deepspeed") is None:
        console.print("The estimate needs DeepSpeed's: pip install 'ktae-trl[deepspeed]'")
    else:
        table = Table("full fine-tuning, GiB", "per GPU", "main memory", title_justify="left")
        for name, gpu, cpu in memory_table(size, processes):
            table.add_row(name, f"{gpu:.3g}", f"{cpu:.3g}")
        console.print(table)
        console.print(
            f"Weights, gradients and Adam's states on {processes} GPU{'s' * (processes > 1)} of one machine "
            "(DeepSpeed's estimators)."
        )
        if processes > 1 and args.gradient_accumulation_steps > 1:
            console.print(
                f"While it accumulates, FSDP2 holds all gradients on each GPU: {2 * size.total / GIB:.3g} GiB more."
            )
    console.print("On top of that, per GPU:")
    if args.beta and not model.use_peft:
        reference = size.total * _width(model.dtype, size.dtype) / GIB
        console.print(f"  reference model (beta > 0): up to {reference:.1f} GiB, shared out under ZeRO-3")
    if args.use_vllm and args.vllm_mode == "colocate":
        console.print(f"  vLLM: {args.vllm_gpu_memory_utilization:.0%} of the GPU (vllm_gpu_memory_utilization)")
    console.print(
        f"  activations of {args.per_device_train_batch_size} rollouts (per_device_train_batch_size), which depend on "
        "lengths and gradient checkpointing and are not estimated here"
    )


def _width(asked: str | None, saved: torch.dtype | None) -> int:
    dtype = saved if asked in (None, "auto") else getattr(torch, asked)
    return (dtype or torch.float32).itemsize
