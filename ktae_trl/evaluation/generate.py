"""Sample completions with vLLM or `transformers`. Both backends pass on completions as soon as they are generated."""

import asyncio
import json
import os
import signal
import zlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ktae_trl.arguments import UserError, loading
from ktae_trl.files.fingerprint import adapter_base


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of all completions."""

    temperature: float  # 0: greedy
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]


class Request(NamedTuple):
    benchmark: str
    id: str
    sample: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.benchmark, self.id, self.sample


class Completion(NamedTuple):
    text: str
    tokens: int  # number of generated tokens, including the end token
    truncated: bool  # reached max_new_tokens or the model's context length


Write = Callable[[list[tuple[Request, Completion]]], None]


def stop_token_ids(model: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]) -> tuple[int, ...]:
    """Return the ids of all tokens that end a completion.

    They are the tokenizer's end token, those of the model's generation config, and `ends`.

    Raises:
        UserError: The tokenizer's vocabulary lacks one of `ends`.
    """
    found = {tokenizer.eos_token_id}
    try:
        eos = GenerationConfig.from_pretrained(adapter_base(model) or model).eos_token_id
        found |= set(eos if isinstance(eos, list) else [eos])
    except OSError:
        pass  # many models have no generation config
    vocabulary = tokenizer.get_vocab()
    for end in ends:
        if end not in vocabulary:
            raise UserError(
                f"The tokenizer of {model} has no token {end}, which this prompt template needs. Set prompt: chat"
            )
        found.add(vocabulary[end])
    return tuple(sorted(found - {None}))


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or of an adapter's base model if the adapter has none.

    Raises:
        UserError: The tokenizer is missing or damaged.
    """
    base = adapter_base(model)
    with loading(f"The tokenizer of {model}", by="model_name_or_path"):
        try:
            return AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError):
            if base is None:
                raise
            return AutoTokenizer.from_pretrained(base)


def sample_with_transformers(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    sampling: Sampling,
    write: Write,
    *,
    batch_size: int,
    dtype: str,
) -> None:
    """Sample in batches of similar prompt length, on a GPU if one is available.

    Each sample has its own seed, so it depends on the rest of its batch only through rounding errors, which vary with
    the shape of the batch. In float32 they almost never change a token, in bfloat16 occasionally. Ctrl-C stops after
    the current batch.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with loading(f"The model {model}", by="model_name_or_path"):
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    network.to(device).eval()
    # `generate` takes unset values from the model's generation config, such as the top_p of an instruct model.
    network.generation_config = GenerationConfig()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    waiting = sorted(requests, key=lambda request: -len(request.prompt_ids))  # longest first: if it fits, all do
    with _ctrl_c_waits() as interrupted, torch.no_grad():
        for begin in range(0, len(waiting), batch_size):
            batch = waiting[begin : begin + batch_size]
            inputs = tokenizer.pad({"input_ids": [list(r.prompt_ids) for r in batch]}, return_tensors="pt").to(device)
            config = GenerationConfig(
                max_new_tokens=max(request.max_new_tokens for request in batch),
                eos_token_id=list(sampling.stop_token_ids),
                pad_token_id=tokenizer.pad_token_id,
                stop_strings=list(sampling.stop) or None,
                do_sample=False,  # `processors` draw the token and leave only that one
            )
            processors = _drawing(batch, sampling, config.max_new_tokens) if sampling.temperature > 0 else []
            output = network.generate(
                **inputs,
                generation_config=config,
                tokenizer=tokenizer,
                logits_processor=LogitsProcessorList(processors),
            )
            write(
                [
                    (request, _completion(ids[: request.max_new_tokens], tokenizer, sampling))
                    for request, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
                ]
            )
            if interrupted:
                raise KeyboardInterrupt


def _drawing(batch: Sequence[Request], sampling: Sampling, length: int) -> list[LogitsProcessor]:
    """Return the logits processors that draw a token: temperature, top-p, and each sample's own random numbers."""
    sources = [Random(json.dumps([sampling.seed, *request.key])) for request in batch]
    uniform_BT = torch.tensor([[source.random() for _ in range(length)] for source in sources], dtype=torch.float64)
    nucleus = [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return [TemperatureLogitsWarper(sampling.temperature), *nucleus, _Draw(uniform_BT)]


class _Draw(LogitsProcessor):
    """Keep one token of each row: the first whose cumulative probability exceeds the row's random number."""

    def __init__(self, uniform_BT: torch.Tensor):
        self.uniform_BT, self.drawn = uniform_BT, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform_B1 = self.uniform_BT[:, self.drawn, None].to(scores.device)
        self.drawn += 1
        # Single precision would lose the tail of a large vocabulary.
        cumulated_BV = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        if not cumulated_BV[:, -1].isfinite().all():
            raise UserError("The model's probabilities are NaN. Set dtype to bfloat16 or float32")
        chosen_B1 = torch.searchsorted(cumulated_BV, uniform_B1 * cumulated_BV[:, -1:], right=True)
        chosen_B1 = chosen_B1.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B1, 0.0)


def _completion(ids: list[int], tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Completion:
    """Cut a row of generated tokens (and padding) at its end token or first stop string."""

    def decode(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True)

    end = next((i + 1 for i, token in enumerate(ids) if token in sampling.stop_token_ids), len(ids))
    text = decode(end)
    if stops := [text.index(stop) + len(stop) for stop in sampling.stop if stop in text]:
        kept = text[: min(stops)]
        return Completion(kept, bisect_left(range(end), True, key=lambda n: decode(n).startswith(kept)), False)
    return Completion(text, end, not ids or ids[end - 1] not in sampling.stop_token_ids)


@contextmanager
def _ctrl_c_waits():
    """Yield a list to which the first Ctrl-C appends an entry; the second Ctrl-C interrupts.

    If the process ignores Ctrl-C, as in a script's background job, it keeps ignoring it. The other signals that
    `like_ctrl_c` treats as Ctrl-C interrupt at once.
    """
    marks: list[bool] = []
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield marks
        return

    def first(number, frame):
        if number != signal.SIGINT:
            raise KeyboardInterrupt
        print("\nStopping after the current batch (press Ctrl-C again to stop at once)", flush=True)
        marks.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield marks
    finally:
        signal.signal(signal.SIGINT, before)


def sample_with_vllm(
    model: str,
    requests: Sequence[Request],
    sampling: Sampling,
    write: Write,
    *,
    dtype: str,
    options: dict,
) -> None:
    """Sample with vLLM's asynchronous engine, which supports tensor and data parallelism.

    Each sample has its own seed, so it depends on the other samples only through rounding errors.

    Args:
        options: Options of vLLM's engine, such as `tensor_parallel_size`, `data_parallel_size` or
            `gpu_memory_utilization`.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # at INFO the start-up log is very long
    from vllm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    base = adapter_base(model)
    adapter = None
    if base is not None:
        options = {"enable_lora": True, "max_lora_rank": _lora_rank(model)} | options
        adapter = LoRARequest("adapter", 1, model)
    engine_args = AsyncEngineArgs(model=base or model, dtype=dtype, seed=sampling.seed, **options)

    async def one(engine, number: int, request: Request) -> None:
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=request.max_new_tokens,
            seed=zlib.crc32(json.dumps([sampling.seed, *request.key]).encode()) if sampling.temperature > 0 else None,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            include_stop_str_in_output=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        async for result in engine.generate(prompt, parameters, str(number), lora_request=adapter):
            output = result.outputs[0]
        completion = Completion(output.text, len(output.token_ids), output.finish_reason == "length")
        write([(request, completion)])

    async def all_of_them() -> None:
        # A terminal sends Ctrl-C to the engine's processes too. They inherit this mask, so only this process stops
        # them. The resource tracker unblocks the signal when it starts, so it must be running before.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            engine = AsyncLLMEngine.from_engine_args(engine_args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        tasks = [asyncio.create_task(one(engine, i, request)) for i, request in enumerate(requests)]
        try:
            await asyncio.gather(*tasks)  # asyncio's handler cancels it on Ctrl-C
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            engine.shutdown()

    asyncio.run(all_of_them())


def _lora_rank(folder: str) -> int:
    """Return the smallest LoRA rank that vLLM supports and that is large enough for an adapter.

    Raises:
        UserError: The adapter is not a LoRA adapter, or its rank is too high.
    """
    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UserError(f"vLLM supports only LoRA adapters, not {config.get('peft_type')}. Set backend: transformers")
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    allowed = (8, 16, 32, 64, 128, 256, 320, 512)
    if rank > allowed[-1]:
        raise UserError(f"vLLM supports LoRA ranks up to {allowed[-1]}, not {rank}. Set backend: transformers")
    return next(r for r in allowed if r >= rank)


def context_length(model: str) -> int | None:
    """Return the model's context length in tokens, or None if its config does not define it."""
    with loading(f"The config of {model}", by="model_name_or_path"):
        config = AutoConfig.from_pretrained(adapter_base(model) or model)
    return getattr(config.get_text_config(), "max_position_embeddings", None)
