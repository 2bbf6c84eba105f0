"""Benchmarks as data: where the problems are, which columns they have, and how a model is asked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ktae_trl.arguments import NotFoundError, UserError, nearest
from ktae_trl.data.columns import column_values
from ktae_trl.data.loading import load
from ktae_trl.grading import gradable
from ktae_trl.grading.golds import gold_answers
from ktae_trl.prompts import TEMPLATES, Conversation, check_template, conversation, texts, token_ids


@dataclass(frozen=True)
class Benchmark:
    """One entry of `benchmarks:` in a config; only `name` and `dataset` must be given."""

    name: str
    dataset: str  # Hub id, or a local .jsonl, .json, .csv or .parquet file
    config: str | None = None
    split: str = "test"
    problem: str = "problem"  # column names; of a nested column as a dotted path
    answer: str = "answer"  # see `grading.golds.gold_answers`
    id: str | None = None  # default: the number of the row


class Problem(NamedTuple):
    benchmark: str
    id: str
    text: str
    answers: tuple[str, ...]
    messages: Conversation | None = None  # if the dataset holds it as chat messages, of which `text` is the last


def parse_benchmarks(entries: Sequence[dict], only: Sequence[str] | None = None) -> list[Benchmark]:
    """Read the `benchmarks:` of a config, all of them or those named in `only`.

    Raises:
        UserError: an entry with an unknown or a missing key, two of one name, or a name in `only` that is not there.
    """
    known = [field.name for field in fields(Benchmark)]
    benchmarks: dict[str, Benchmark] = {}
    for number, entry in enumerate(entries or [], 1):
        if not isinstance(entry, dict):
            raise UserError(f"benchmarks, entry {number}: expected name, dataset ..., not {entry!r}")
        for key in entry:
            if key not in known:
                raise UserError(f"benchmarks, entry {number}: unknown key {key!r}{nearest(key, known)}")
        for key in ("name", "dataset"):
            if not entry.get(key):
                raise UserError(f"benchmarks, entry {number}: {key!r} is missing")
        name = str(entry["name"])
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"benchmarks, entry {number}: {name!r} cannot name a file; use letters, digits and ._+-")
        if name in benchmarks:
            raise UserError(f"benchmarks: two are named {name!r}")
        benchmarks[name] = Benchmark(**(entry | {"name": name}))
    if not benchmarks:
        raise UserError("The config names no benchmarks. See configs/eval/math.yaml for the form")
    for name in only or []:
        if name not in benchmarks:
            raise UserError(
                f"There is no benchmark {name!r}{nearest(name, benchmarks)}. There are: {', '.join(benchmarks)}"
            )
    return [benchmark for name, benchmark in benchmarks.items() if not only or name in only]


def load_problems(benchmark: Benchmark, folder: str | None = None, limit: int | None = None) -> list[Problem]:
    """Load a benchmark's problems from where it says, or from `folder/NAME.jsonl` (`id`, `problem`, `answers`).

    Args:
        limit: only the first so many.

    Raises:
        NotFoundError: the file is not there.
        UserError: no problem in it, a column that is missing, two problems of one id, or one without text or answer,
            or with a value that is neither.
    """
    if folder is not None:
        benchmark = Benchmark(benchmark.name, str(Path(folder) / f"{benchmark.name}.jsonl"), answer="answers", id="id")
        if not Path(folder).is_dir():
            raise NotFoundError(f"There is no folder {folder} (benchmark_folder, looked in {Path.cwd()})")
    where = f"benchmark {benchmark.name!r} ({benchmark.dataset})"
    advice = "Set problem, answer and id in its entry" if folder is None else "A file needs id, problem and answers"
    rows = load(benchmark.dataset, benchmark.config, benchmark.split)
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    try:
        asked, golds = column_values(rows, benchmark.problem), column_values(rows, benchmark.answer)
        ids = column_values(rows, benchmark.id) if benchmark.id else range(len(rows))
    except ValueError as error:
        raise UserError(f"{where}: {error}. {advice}") from None
    problems: dict[str, Problem] = {}
    for number, (text, gold, name) in enumerate(zip(asked, golds, ids, strict=True), 1):
        if name is None:
            raise UserError(f"{where}, row {number}: no id")
        name = str(name)
        if text == "" or text is None:
            raise UserError(f"{where}, problem {name!r}: no text")
        try:
            messages, answers = conversation(text), tuple(gold_answers(gold))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}, problem {name!r} (row {number}): {error}") from None
        if not answers:
            raise UserError(f"{where}, problem {name!r}: no answer")
        if name in problems:
            raise UserError(f"{where}: two problems have the id {name!r}")
        own = None if isinstance(text, str) else messages
        problems[name] = Problem(benchmark.name, name, messages[-1]["content"], answers, own)
    return list(problems.values())


def unscorable(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems none of whose answers can be parsed; they are left out of all figures."""
    verdicts = gradable([problem.answers for problem in problems])
    return [problem for problem, verdict in zip(problems, verdicts, strict=True) if not verdict]


def prompts(
    problems: Sequence[Problem],
    template: str,
    system: str | None,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict | None = None,
    *,
    system_in_user: bool = False,
    examples: Sequence[dict[str, str]] = (),
) -> tuple[list[str], list[list[int]]]:
    """Return each problem's prompt as text and as token ids.

    Args:
        template_kwargs, system_in_user, examples: of `chat` only: see `prompts.texts` and `prompts.conversation`.

    Raises:
        UserError: an unknown template, one that cannot say what is asked of it, or `chat` with a tokenizer whose chat
            template is missing, refuses, or leaves something out.
    """
    if template not in TEMPLATES:
        raise UserError(f"Unknown prompt {template!r}{nearest(template, TEMPLATES)}. There are: {', '.join(TEMPLATES)}")
    if template != "chat":
        if template_kwargs or system_in_user or examples:
            raise UserError(
                "chat_template_kwargs, system_prompt_in_user and few_shot are for the model's own chat template "
                f"(prompt: chat), not for prompt: {template}"
            )
        if long := [problem for problem in problems if problem.messages and len(problem.messages) > 1]:
            raise UserError(
                f"benchmark {long[0].benchmark!r}, problem {long[0].id!r} has several chat messages, which need "
                f"prompt: chat, not {template}"
            )
        rendered = [TEMPLATES[template].fill(problem.text, system) for problem in problems]
        return rendered, tokenizer(rendered)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path} has no chat template. Set prompt to one of: "
            f"{', '.join(name for name in TEMPLATES if name != 'chat')}"
        )
    asked = [
        conversation(problem.messages or problem.text, system, in_user=system_in_user, examples=examples)
        for problem in problems
    ]
    check_template(asked, tokenizer, template_kwargs)
    return texts(asked, tokenizer, template_kwargs), token_ids(asked, tokenizer, template_kwargs)
