"""Load benchmarks and turn their problems into prompts."""

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
    """One entry of `benchmarks:` in a config. Only `name` and `dataset` are required."""

    name: str
    dataset: str  # Hub id or local .jsonl, .json, .csv or .parquet file
    config: str | None = None
    split: str = "test"
    problem: str = "problem"  # column, or dotted path of a nested column, like the next two
    answer: str = "answer"  # its values: see `grading.golds.gold_answers`
    id: str | None = None  # default: the row number


class Problem(NamedTuple):
    benchmark: str
    id: str
    text: str
    answers: tuple[str, ...]
    messages: Conversation | None = None  # if the dataset has chat messages; `text` is the last one


def parse_benchmarks(entries: Sequence[dict], only: Sequence[str] | None = None) -> list[Benchmark]:
    """Parse the `benchmarks:` of a config, either all or those named in `only`.

    Raises:
        UserError: An entry has an unknown key or lacks a required one, two entries have the same name, or `only` names
            an unknown benchmark.
    """
    known = [field.name for field in fields(Benchmark)]
    benchmarks: dict[str, Benchmark] = {}
    for number, entry in enumerate(entries or [], 1):
        if not isinstance(entry, dict):
            raise UserError(f"benchmarks, entry {number}: expected a mapping with name and dataset, not {entry!r}")
        for key in entry:
            if key not in known:
                raise UserError(f"benchmarks, entry {number}: unknown key {key!r}{nearest(key, known)}")
        for key in ("name", "dataset"):
            if not entry.get(key):
                raise UserError(f"benchmarks, entry {number}: {key!r} is missing")
        name = str(entry["name"])
        if not re.fullmatch(r"[\w.+-]+", name):
            raise UserError(f"benchmarks, entry {number}: name {name!r} may contain only letters, digits and ._+-")
        if name in benchmarks:
            raise UserError(f"benchmarks, entry {number}: the name {name!r} is already used. Rename one of the two")
        benchmarks[name] = Benchmark(**(entry | {"name": name}))
    if not benchmarks:
        raise UserError("The config has no benchmarks. See the list in configs/eval/math.yaml (ktae recipes eval/math)")
    for name in only or []:
        if name not in benchmarks:
            raise UserError(
                f"Unknown benchmark {name!r} in only{nearest(name, benchmarks)}. Choose from {', '.join(benchmarks)}"
            )
    return [benchmark for name, benchmark in benchmarks.items() if not only or name in only]


def load_problems(benchmark: Benchmark, folder: str | None = None, limit: int | None = None) -> list[Problem]:
    """Load the problems of a benchmark from its dataset, or from `folder/NAME.jsonl` (`id`, `problem`, `answers`).

    Args:
        limit: Load at most the first `limit` problems.

    Raises:
        NotFoundError: The file or folder does not exist.
        UserError: The dataset is empty or lacks a column, two problems have the same id, or a problem's text or answer
            is missing or has the wrong type.
    """
    if folder is not None:
        benchmark = Benchmark(benchmark.name, str(Path(folder) / f"{benchmark.name}.jsonl"), answer="answers", id="id")
        if not Path(folder).is_dir():
            raise NotFoundError(f"The folder {folder} (benchmark_folder) does not exist (looked in {Path.cwd()})")
    where = f"benchmark {benchmark.name!r} ({benchmark.dataset})"
    advice = (
        "Set problem, answer and id in its entry to the names of the columns"
        if folder is None
        else "The file needs the columns id, problem and answers"
    )
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
            raise UserError(f"{where}, row {number}: the id is missing")
        name = str(name)
        if text == "" or text is None:
            raise UserError(f"{where}, problem {name!r} (row {number}): the text is missing")
        try:
            messages, answers = conversation(text), tuple(gold_answers(gold))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}, problem {name!r} (row {number}): {error}") from None
        if not answers:
            raise UserError(f"{where}, problem {name!r} (row {number}): the answer is missing")
        if name in problems:
            raise UserError(f"{where}, row {number}: the id {name!r} is already used by another problem")
        own = None if isinstance(text, str) else messages
        problems[name] = Problem(benchmark.name, name, messages[-1]["content"], answers, own)
    return list(problems.values())


def unscorable(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems whose gold answers all fail to parse. They are excluded from the results."""
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
    """Return the prompt of each problem as text and as token ids.

    Args:
        template: A name in `TEMPLATES`; `chat` is the model's own chat template.
        template_kwargs, system_in_user, examples: For `chat` only: see `prompts.texts` and `prompts.conversation`.

    Raises:
        UserError: The template is unknown or does not support an argument, or the tokenizer's chat template is missing,
            raises an error, or drops a message.
    """
    if template not in TEMPLATES:
        names = ", ".join(TEMPLATES)
        raise UserError(f"Unknown prompt {template!r}{nearest(template, TEMPLATES)}. Choose one of {names}")
    if template != "chat":
        if template_kwargs or system_in_user or examples:
            raise UserError(
                "chat_template_kwargs, system_prompt_in_user and few_shot need the model's own chat template "
                f"(prompt: chat), not prompt: {template}"
            )
        if long := [problem for problem in problems if problem.messages and len(problem.messages) > 1]:
            raise UserError(
                f"benchmark {long[0].benchmark!r}, problem {long[0].id!r} has several chat messages, which prompt: "
                f"{template} does not support. Set prompt: chat"
            )
        rendered = [TEMPLATES[template].fill(problem.text, system) for problem in problems]
        return rendered, tokenizer(rendered)["input_ids"]
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path} has no chat template. Set prompt to one of "
            f"{', '.join(name for name in TEMPLATES if name != 'chat')}"
        )
    asked = [
        conversation(problem.messages or problem.text, system, in_user=system_in_user, examples=examples)
        for problem in problems
    ]
    check_template(asked, tokenizer, template_kwargs)
    return texts(asked, tokenizer, template_kwargs), token_ids(asked, tokenizer, template_kwargs)
