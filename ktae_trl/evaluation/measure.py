"""Measure one model: load problems, sample completions, grade them, write the summary."""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from ktae_trl.arguments import UserError
from ktae_trl.data.few_shot import worked_examples
from ktae_trl.evaluation import summary
from ktae_trl.evaluation.generate import (
    Completion,
    Request,
    Sampling,
    context_length,
    load_tokenizer,
    sample_with_transformers,
    sample_with_vllm,
    stop_token_ids,
)
from ktae_trl.evaluation.samples import Store, read_settings, safe_name
from ktae_trl.evaluation.settings import EvalArguments
from ktae_trl.evaluation.tasks import Benchmark, Problem, load_problems, parse_benchmarks, prompts, unscorable
from ktae_trl.files.fingerprint import fingerprint, is_old, model_folder
from ktae_trl.preflight import check_model
from ktae_trl.prompts import TEMPLATES

# Settings that do not change a sample. Those of _ASKED are saved with the samples, those of _NOT_WRITTEN are not.
_ASKED = {"model_name_or_path", "model_revision", "benchmark_folder", "limit", "samples", "answer_format"}
_NOT_WRITTEN = {"only", "k", "output_dir", "benchmarks", "batch_size", "grading_budget"}
# Options of vLLM that affect its speed, not its samples.
_FREE_VLLM_OPTIONS = {
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization", "max_model_len",
    "max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager",
    "swap_space", "cpu_offload_gb",
}  # fmt: skip
_LOG_SECONDS = 60.0  # between two lines of progress in a file

logger = logging.getLogger(__name__)


def measure(args: EvalArguments, config: str = "default") -> None:
    """Measure a model and write the results.

    Args:
        config: The name of the config, used for the default output folder.

    Raises:
        UserError: Settings, data or the model cannot be used, or the folder holds samples of other settings.
        KeyboardInterrupt: Sampling was stopped. The samples generated so far are in the folder.
    """
    check_model(args.model_name_or_path, args.model_revision, "model_name_or_path")
    folder = Path(args.output_dir or _default_folder(args.model_name_or_path) / safe_name(config))
    benchmarks, wanted = parse_benchmarks(args.benchmarks), parse_benchmarks(args.benchmarks, args.only)
    # Benchmarks measured earlier stay in the summary.
    loaded = [b for b in benchmarks if b in wanted or (folder / f"{b.name}.jsonl").exists()]
    problems = {b.name: _load(b, args) for b in loaded}
    with rich.get_console().status("Reading the model's files"):
        model = str(model_folder(args.model_name_or_path, args.model_revision))
        mark = fingerprint(model)
    tokenizer, context = load_tokenizer(model), _context(args, model)
    sampling = _sampling(args, model, tokenizer)
    texts, requests = _ask(args, problems, tokenizer, context)
    settings = _settings(args, context, mark)
    store = Store(folder, settings, free=_ASKED | ({"seed", "top_p"} if args.temperature == 0 else set()))
    try:
        done = _done(store, texts, {request.key for request in requests})
        requests = _without_unfinished(wanted, store, requests, done)
        if short := [r for r in requests if r.max_new_tokens < args.max_new_tokens]:
            logger.warning(
                "%d of %d completions are limited to fewer than max_new_tokens (%d) tokens: prompt and completion must "
                "fit the model's context of %d tokens",
                *(len(short), len(requests), args.max_new_tokens, context),
            )
        began = time.monotonic()
        waiting = [request for request in requests if request.key not in done]
        _sample(args, model, tokenizer, sampling, waiting, len(requests), texts, store)
        seconds = time.monotonic() - began
        finished = []
        with rich.get_console().status("Grading"):
            for name in dict.fromkeys(request.benchmark for request in requests):
                golds = {problem.id: problem.answers for problem in problems[name]}
                rows = store.finish(name, golds, args.samples, args.answer_format, args.grading_budget)
                finished.append(summary.results(name, rows))
    finally:
        store.close()

    figures = summary.summarise(finished, args.k) | {
        "datasets": {
            b.name: {"dataset": b.dataset, "config": b.config, "split": b.split}
            for b in benchmarks
            if b.name in {result.name for result in finished}
        },
        "model": args.model_name_or_path,
        "settings": settings,
        "new_samples": len(waiting),
        "sampling_seconds": round(seconds, 1),
    }
    summary.finish(folder, figures, args.model_name_or_path)


def _default_folder(model: str) -> Path:
    """Return the default folder of a model's results, independent of how the model's path is written."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = Path(os.path.abspath(path))
        model = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    folder = Path("runs/eval") / safe_name(model)
    if (before := read_settings(folder)) and is_old(before.get("fingerprint")):
        logger.warning(
            "%s contains results of version 0.1, which did not check all of the model's weights. They are not used. "
            "Results are now in one subfolder per config",
            folder,
        )
    return folder


def _load(benchmark: Benchmark, args: EvalArguments) -> list[Problem]:
    problems = load_problems(benchmark, args.benchmark_folder, args.limit)
    hopeless = unscorable(problems)
    if len(hopeless) == len(problems):
        raise UserError(
            f"benchmark {benchmark.name!r}: none of its {len(problems)} gold answers can be parsed, such as "
            f"{hopeless[0].answers[0]!r}. Set answer in its entry to the column with the gold answers"
        )
    if hopeless:
        logger.warning(
            "%s: the gold answers of %d of %d problems cannot be parsed. These problems are excluded: %s",
            benchmark.name,
            len(hopeless),
            len(problems),
            "; ".join(f"{p.id}: {' | '.join(p.answers)}" for p in hopeless),
        )
    return problems


def _context(args: EvalArguments, model: str) -> int | None:
    limits = [context_length(model)]
    if args.backend == "vllm":
        limits.append(args.vllm_options.get("max_model_len"))
    return min((limit for limit in limits if limit), default=None)


def _sampling(args: EvalArguments, model: str, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    template = TEMPLATES[args.prompt]
    ends = stop_token_ids(model, tokenizer, template.ends)
    return Sampling(args.temperature, args.top_p, args.seed, template.stop, ends)


def _ask(
    args: EvalArguments,
    problems: dict[str, list[Problem]],
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
) -> tuple[dict[tuple[str, str], tuple[str, str]], list[Request]]:
    """Return the text and prompt of each problem, by benchmark and id, and one request per sample.

    `max_new_tokens` of a request is reduced where prompt and completion would exceed the model's context.
    """
    texts, requests = {}, []
    examples = worked_examples(args.few_shot, args.answer_format)
    for members in problems.values():
        rendered = prompts(
            members,
            args.prompt,
            args.system_prompt,
            tokenizer,
            args.chat_template_kwargs,
            system_in_user=args.system_prompt_in_user,
            examples=examples,
        )
        for problem, prompt, ids in zip(members, *rendered, strict=True):
            room = args.max_new_tokens if context is None else min(args.max_new_tokens, context - len(ids))
            if room < 1:
                raise UserError(
                    f"The prompt of {problem.benchmark}, problem {problem.id!r}, has {len(ids)} tokens; the model's "
                    f"context is {context}. Exclude the benchmark (--only), or raise max_model_len in vllm_options"
                )
            key = (problem.benchmark, problem.id)
            texts[key] = (problem.text, prompt)
            requests += [Request(*key, sample, tuple(ids), room) for sample in range(args.samples)]
    return texts, requests


def _settings(args: EvalArguments, context: int | None, mark: str) -> dict:
    """Return the settings to save: those that samples depend on (one set per folder), and those of `_ASKED`."""
    settings = {name: value for name, value in asdict(args).items() if name not in _NOT_WRITTEN | {"vllm_options"}}
    if args.backend == "vllm":
        settings["vllm_options"] = {n: value for n, value in args.vllm_options.items() if n not in _FREE_VLLM_OPTIONS}
    return settings | {"context": context, "fingerprint": mark}


def _done(store: Store, texts: dict, asked: set[tuple[str, str, int]]) -> set[tuple[str, str, int]]:
    """Return the keys of the requested samples that an earlier run with the same settings has generated."""
    done = set()
    for name in dict.fromkeys(benchmark for benchmark, _ in texts):
        for row in store.read(name):
            key = (name, row["id"], row["sample"])
            if key in asked and row["prompt"] != texts[key[:2]][1]:
                raise UserError(
                    f"The prompt of problem {row['id']!r} has changed since its samples in {store.path(name)} were "
                    "generated. Choose another output_dir, or move that file away"
                )
            done |= {key} & asked
    return done


def _without_unfinished(
    wanted: Sequence[Benchmark], store: Store, requests: list[Request], done: set[tuple[str, str, int]]
) -> list[Request]:
    """Return the requests without the benchmarks that `only` skips and that lack samples of these settings."""
    names = {benchmark.name for benchmark in wanted}
    missing = Counter(r.benchmark for r in requests if r.benchmark not in names and r.key not in done)
    for name, count in missing.items():
        logger.warning(
            "%s is not in the summary, because %d of the requested samples are missing in %s. To measure it too, run "
            "without --only",
            *(name, count, store.path(name)),
        )
    return [request for request in requests if request.benchmark not in missing]


def _sample(
    args: EvalArguments,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    waiting: list[Request],
    total: int,
    texts: dict[tuple[str, str], tuple[str, str]],
    store: Store,
) -> None:
    """Generate the samples of `waiting` and add each to the store as soon as it is generated."""
    if not waiting:
        print(f"All {total} samples are already in {store.folder}")
        return
    if there := total - len(waiting):
        print(f"{there} of {total} samples are already in {store.folder}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("samples", total=total, completed=there)
        log = _Log(total, there, silent=not progress.disable)

        def write(finished: list[tuple[Request, Completion]]) -> None:
            for request, completion in finished:
                store.add(request.benchmark, [_row(request, completion, *texts[request.benchmark, request.id])])
            progress.advance(bar, len(finished))
            log.advance(len(finished))

        if args.backend == "vllm":
            options = {"dtype": args.dtype, "options": args.vllm_options}
            sample_with_vllm(model, waiting, sampling, write, **options)
        else:
            batches = {"batch_size": args.batch_size, "dtype": args.dtype}
            sample_with_transformers(model, tokenizer, waiting, sampling, write, **batches)


class _Log:
    """Prints how many samples are there once a minute and at the end, in a file, where a bar cannot be redrawn."""

    def __init__(self, total: int, there: int, silent: bool):
        self.total, self.there, self.silent = total, there, silent
        self.begin = self.last = time.monotonic()

    def advance(self, count: int) -> None:
        self.there += count
        now = time.monotonic()
        due = now - self.last >= _LOG_SECONDS or self.there == self.total
        if due and not self.silent:
            self.last = now
            print(f"{self.there:,} of {self.total:,} samples after {(now - self.begin) / 60:.0f} min", flush=True)


def _row(request: Request, completion: Completion, problem: str, prompt: str) -> dict:
    return {
        "benchmark": request.benchmark,
        "id": request.id,
        "sample": request.sample,
        "problem": problem,
        "prompt": prompt,
        "completion": completion.text,
        "tokens": completion.tokens,
        "truncated": completion.truncated,
    }
