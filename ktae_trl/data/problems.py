"""Datasets of problems with known answers, turned into TRL's `prompt` and `solution`.

load (Hub, file, folder) -> problems and gold answers of each row -> prompts, as conversations -> limit on lengths
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.compute
from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk

from ktae_trl.arguments import NotFoundError, UserError, nearest
from ktae_trl.data import files as data_files
from ktae_trl.grading import INSTRUCTIONS, gradable
from ktae_trl.grading.golds import gold_answers, is_prose
from ktae_trl.prompts import (
    AUTO,
    SYSTEM_PROMPT_HELP,
    Conversation,
    check_template,
    conversation,
    instruction,
    token_ids,
)

logger = logging.getLogger(__name__)

BOXED_SYSTEM_PROMPT = INSTRUCTIONS["boxed"]

# Arguments of reward functions: a column of such a name would collide with what TRL hands over, or not arrive.
_RESERVED = {
    *("prompts", "completion", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments", "answer_format", "opened_think"),
}
_IMAGES = ("image", "images")  # columns from which TRL takes images


@dataclass
class DataArguments:
    """Which problems to train and evaluate on, and how to ask them."""

    dataset_name: str = field(
        metadata={"help": "Hub dataset id, or a local .jsonl, .json, .csv or .parquet file, or a save_to_disk folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split of a Hub dataset or folder; a part of any as 'train[:1000]'."}
    )
    dataset_filter: dict | str | None = field(
        default=None,
        metadata={
            "help": "Train on the rows whose columns have one of these values only, such as '{\"level\": [3, 4, 5]}'; "
            "null for all rows."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out problems, in the same forms. Default: no evaluation."}
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "Their configuration. Default: dataset_config, if it is the same dataset."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of the held-out problems."})
    eval_size: int | None = field(default=None, metadata={"help": "Use the first so many held-out problems."})
    problem_column: str = field(
        default="problem",
        metadata={"help": "Column with the problem, a text or a list of chat messages. Nested: 'extra_info.problem'."},
    )
    answer_column: str = field(
        default="answer",
        metadata={
            "help": "Column with the answer, a list of accepted answers, or a solution that ends with the answer; "
            "nested as 'reward_model.ground_truth'."
        },
    )
    eval_problem_column: str | None = field(
        default=None, metadata={"help": "problem_column of the held-out problems. Default: the same."}
    )
    eval_answer_column: str | None = field(
        default=None, metadata={"help": "answer_column of the held-out problems. Default: the same."}
    )
    system_prompt: str | None = field(default=AUTO, metadata={"help": SYSTEM_PROMPT_HELP})
    system_prompt_in_user: bool = field(
        default=False,
        metadata={"help": "Put it at the head of the problem: for models without a system role, such as Gemma."},
    )
    max_prompt_length: int | None = field(
        default=1024, metadata={"help": "Leave out prompts of more tokens. Default 1024; null for no limit."}
    )

    def __post_init__(self):
        if isinstance(self.dataset_filter, str):  # from the command line
            try:
                self.dataset_filter = json.loads(self.dataset_filter)
            except json.JSONDecodeError as error:
                raise UserError(f"dataset_filter is not JSON: {error}: {self.dataset_filter}") from None
        chosen = self.dataset_filter
        if chosen is not None and not (isinstance(chosen, dict) and all(isinstance(v, list) for v in chosen.values())):
            raise UserError(f"dataset_filter maps columns to lists of values, as in {{level: [3, 4, 5]}}, not {chosen}")
        self.system_prompt = self.system_prompt or None


# Loading


def load(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Load a dataset from the Hub or from local files.

    Args:
        name: Hub id, or the path of a JSON Lines, JSON, CSV or Parquet file (`.gz` too; see `data_files.read`) or of a
            `save_to_disk` folder.
        config: of a Hub dataset.
        split: of a Hub dataset or of a saved `DatasetDict`, or a part of it, such as `train[:100]`. A file, or a folder
            with a single dataset, is one split of any name.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: an empty or malformed file (with the number of the bad line), or an unknown split.
    """
    path = Path(name)
    ending = data_files.ending(path)
    if path.is_dir():
        saved = load_from_disk(name)
        dataset = _part(dict(saved) if isinstance(saved, DatasetDict) else saved, split, name)
    elif ending in data_files.ENDINGS:
        dataset = _part(data_files.read(path), split, name)
    elif path.is_file() or ending in data_files.NOT_READ:
        known = ", ".join(data_files.ENDINGS)
        raise UserError(f"{name} has a format that is not read. Known endings: {known}, also with .gz")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise NotFoundError(
            f"{name} is neither a data file ({', '.join(data_files.ENDINGS)}) nor a folder (looked in {Path.cwd()})"
        )
    else:
        dataset = load_dataset(name, config, split=split)
        if mixed := [column for column, feature in dataset.features.items() if "Json(" in str(feature)]:
            logger.warning(
                "%s: columns that mix types (%s) are read as JSON by `datasets`: a text such as '[1, 2]' becomes a "
                "list. If it matters for problems or answers, download the file and name it as dataset_name",
                name,
                ", ".join(mixed),
            )
    if len(dataset) == 0:
        raise UserError(f"{name} holds no problems")
    return dataset


def _part(saved: Dataset | dict[str, Dataset], split: str, name: str) -> Dataset:
    """Return the split, or the part of one, that `split` asks for."""
    try:
        asked = ReadInstruction.from_spec(split)
    except ValueError:
        raise UserError(f"{split!r} is no split of {name}. Write train, train[:100] or train[10%:20%]") from None
    if isinstance(saved, Dataset):
        saved = {split.partition("[")[0]: saved}
    try:
        parts = asked.to_absolute({split_name: len(dataset) for split_name, dataset in saved.items()})
    except ValueError:
        raise UserError(f"{name} has no split {split!r}. There are: {', '.join(saved)}") from None
    return concatenate_datasets([saved[part.splitname].select(range(part.from_, part.to)) for part in parts])


# Rows as prompts


def to_prompts(
    dataset: Dataset,
    *,
    problem_column: str = "problem",
    answer_column: str = "answer",
    system_prompt: str | None = AUTO,
    system_prompt_in_user: bool = False,
    answer_format: str = "boxed",
    gradable_only: bool = True,
    rows: Sequence[int] | None = None,
) -> Dataset:
    """Turn problems and answers into TRL's columns `prompt` (a conversation) and `solution` (a list of texts).

    The columns of the dataset stay, for reward functions that use them; a warning names those that get another name,
    because TRL or this function uses theirs (`solution` becomes `data_solution`), and those without an image. Rows
    without a problem or an answer, or with an answer that cannot be graded, are left out; warnings say how many were.

    Args:
        problem_column, answer_column: names; a field of a nested column as a dotted path. For the values, see
            `prompts.conversation` and `grading.golds.gold_answers`.
        system_prompt, system_prompt_in_user: see `prompts.conversation`. "auto" asks for an answer in `answer_format`.
        answer_format: that of the run (`KTAEGRPOConfig.answer_format`).
        gradable_only: leave out answers on which `math_accuracy` has no verdict. False for a reward function that has.
        rows: take only the rows of these numbers.

    Raises:
        ValueError: a column that is not there, a value (with its row) that is no problem or no answer, or no row left.
    """
    taken = range(len(dataset)) if rows is None else rows
    system_prompt = instruction(system_prompt, answer_format)
    try:
        problems, golds = column_values(dataset, problem_column), column_values(dataset, answer_column)
    except ValueError as error:
        raise UserError(f"{error}. Set problem_column and answer_column") from None
    prompts: dict[int, Conversation] = {}
    for row in taken:
        try:
            golds[row] = gold_answers(golds[row])
            if not isinstance(problems[row], str) or problems[row].strip():
                prompts[row] = conversation(problems[row], system_prompt, in_user=system_prompt_in_user)
        except (TypeError, ValueError) as error:
            raise UserError(f"row {row + 1} ({problem_column}, {answer_column}): {error}") from None
    kept = _count([row for row in prompts if golds[row]], len(taken), "no problem or answer")
    if gradable_only:
        kept = _gradable_rows(kept, golds)
    if system_prompt and (own := sum(_has_system(problems[row]) for row in kept)):
        logger.warning("%d of %d problems have a system prompt of their own: they do not get ours", own, len(kept))
    whole = _out_of_the_way(dataset, problem_column, answer_column)
    there = set(kept)
    whole = whole.add_column("prompt", [prompts.get(row) for row in range(len(dataset))])
    whole = whole.add_column("solution", [golds[row] if row in there else None for row in range(len(dataset))])
    return whole.select(kept)


def column_values(dataset: Dataset, path: str) -> list:
    """Return the values of a column, or of a field of a nested one, named by a dotted path (None where it is missing).

    Raises:
        ValueError: no such column or field.
    """
    name, *fields = [path] if path in dataset.column_names else path.split(".")
    if name not in dataset.column_names:
        raise UserError(
            f"The dataset has no column {name!r}{nearest(name, dataset.column_names)}. "
            f"There are: {', '.join(dataset.column_names)}"
        )
    values = dataset[name][:]
    for field_name in fields:
        there = dict.fromkeys(key for value in values if isinstance(value, dict) for key in value)
        if field_name not in there:
            raise UserError(
                f"The column {name!r} has no field {field_name!r}{nearest(field_name, there)} (column {path!r}). "
                f"There are: {', '.join(there) or 'none'}"
            )
        values = [value.get(field_name) if isinstance(value, dict) else None for value in values]
    return values


def original_column(dataset: Dataset, path: str) -> str:
    """Return where `to_prompts` has left the column of the data that had this name."""
    name, dot, fields = path.partition(".")
    return f"data_{name}{dot}{fields}" if f"data_{name}" in dataset.column_names else path


def _gradable_rows(rows: list[int], golds: list[list[str]]) -> list[int]:
    def keep(wanted: list[bool], reason: str) -> list[int]:
        kept = [row for row, good in zip(rows, wanted, strict=True) if good]
        example = next((golds[row][0] for row, good in zip(rows, wanted, strict=True) if not good), "")
        return _count(kept, len(rows), f"{reason}, such as {example!r:.100}")

    rows = keep(
        [not all(map(is_prose, golds[row])) for row in rows],
        "answers in prose, without a last line ####, a box, or 'The answer is ...' at their end",
    )
    return keep(gradable([golds[row] for row in rows]), "answers that cannot be graded")


def _has_system(problem: str | list[dict]) -> bool:
    return isinstance(problem, list) and problem[0]["role"] == "system"


def _out_of_the_way(dataset: Dataset, problem_column: str, answer_column: str) -> Dataset:
    """Make room for the columns `prompt` and `solution`, and for what TRL hands to reward functions."""
    if problem_column == "prompt":
        dataset = dataset.remove_columns("prompt")
    return free_names(dataset, {"prompt", "solution"} | _RESERVED, silent={answer_column})


def free_names(dataset: Dataset, taken: set[str] = _RESERVED, silent: Iterable[str] = ()) -> Dataset:
    """Give the columns whose names are taken others (`data_NAME`), and remove those of images that hold none.

    A column of such a name would collide with what TRL hands to reward functions, or never arrive there. A warning
    names the columns, but those in `silent`.
    """
    for name in _IMAGES:
        if name in dataset.column_names and not any(_has_image(dataset, name)):
            dataset = dataset.remove_columns(name)
    renamed = {name: f"data_{name}" for name in dataset.column_names if name in taken}
    if told := {old: new for old, new in renamed.items() if old not in silent}:
        logger.warning(
            "Columns whose names are taken (by TRL, or by the prompts and gold answers) get others: %s",
            ", ".join(f"{old} is now {new}" for old, new in told.items()),
        )
    return dataset.rename_columns(renamed)


def with_free_names(dataset):
    """Return a dataset, or several by name, with `free_names`; a stream, or None, stays as it is."""
    if isinstance(dataset, dict):
        return {name: with_free_names(part) for name, part in dataset.items()}
    return free_names(dataset) if isinstance(dataset, Dataset) else dataset


def _has_image(dataset: Dataset, column: str) -> list[bool]:
    """Return for each row whether it has an image or a list of images; none is decoded."""
    values = dataset.with_format("arrow")[column][:]
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        return [bool(length) for length in pyarrow.compute.list_value_length(values).to_pylist()]
    return values.is_valid().to_pylist()


def matching_rows(dataset: Dataset, values: dict[str, list]) -> list[int]:
    """Return the numbers of the rows that have, in each of these columns, one of its values.

    Raises:
        ValueError: a column that is not there, or no row is left (with the values that there are).
    """
    rows = list(range(len(dataset)))
    for column, wanted in values.items():
        if column not in dataset.column_names:
            raise UserError(
                f"dataset_filter: there is no column {column!r}{nearest(column, dataset.column_names)}. "
                f"There are: {', '.join(dataset.column_names)}. For all rows: --dataset_filter null"
            )
        found = dataset[column][:]
        there = list(dict.fromkeys(found[row] for row in rows))
        rows = [row for row in rows if found[row] in wanted]
        if not rows:
            raise UserError(f"dataset_filter: no row has {column} in {wanted}. There are: {str(there[:20])[1:-1]}")
    return rows


def keep_rows(dataset: Dataset, values: dict[str, list]) -> Dataset:
    """Keep the `matching_rows`."""
    return dataset.select(matching_rows(dataset, values))


def drop_long(
    dataset: Dataset, tokenizer, max_prompt_length: int | None, template_kwargs: dict | None = None
) -> Dataset:
    """Leave out prompts of more than `max_prompt_length` tokens; a warning says how many were.

    Args:
        template_kwargs: see `prompts.token_ids`.

    Raises:
        ValueError: no prompt is left.
    """
    if max_prompt_length is None:
        return dataset
    lengths = [len(ids) for ids in token_ids(dataset["prompt"][:], tokenizer, template_kwargs)]
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    return dataset.select(_count(kept, len(dataset), f"more than {max_prompt_length} tokens (max_prompt_length)"))


def load_prompts(
    arguments: DataArguments,
    tokenizer,
    template_kwargs: dict | None = None,
    *,
    answer_format: str = "boxed",
    gradable_only: bool = True,
) -> tuple[Dataset, Dataset | None]:
    """Return the training prompts and the held-out ones (None if the arguments name none).

    Args:
        tokenizer: of the model, which reads text: rows with images are left out.
        template_kwargs: for its chat template, as in training (`chat_template_kwargs`).
        answer_format: what the system prompt asks for, unless the arguments have one.
        gradable_only: see `to_prompts`.

    Raises:
        ValueError: what `load`, `to_prompts`, `check_template` and `drop_long` refuse, with the name of the dataset.
    """

    def prepare(name: str, config: str | None, split: str, problem: str, answer: str, values: dict) -> Dataset:
        dataset = load(name, config, split)
        try:
            prompts = to_prompts(
                dataset,
                problem_column=problem,
                answer_column=answer,
                system_prompt=arguments.system_prompt,
                answer_format=answer_format,
                system_prompt_in_user=arguments.system_prompt_in_user,
                gradable_only=gradable_only,
                rows=matching_rows(dataset, values),
            )
            prompts = _without_images(prompts)
            check_template(prompts["prompt"][:], tokenizer, template_kwargs)
            return drop_long(prompts, tokenizer, arguments.max_prompt_length, template_kwargs)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    name, held_out_name = arguments.dataset_name, arguments.eval_dataset_name
    config, split = arguments.dataset_config, arguments.dataset_split
    columns = arguments.problem_column, arguments.answer_column
    train = prepare(name, config, split, *columns, arguments.dataset_filter or {})
    if held_out_name is None:
        return train, None
    config = arguments.eval_dataset_config or (config if held_out_name == name else None)
    columns = arguments.eval_problem_column or columns[0], arguments.eval_answer_column or columns[1]
    held_out = prepare(held_out_name, config, arguments.eval_dataset_split, *columns, {})
    return train, held_out.select(range(min(arguments.eval_size or len(held_out), len(held_out))))


def _without_images(dataset: Dataset) -> Dataset:
    for name in _IMAGES:
        if name in dataset.column_names:
            kept = [row for row, image in enumerate(_has_image(dataset, name)) if not image]
            kept = _count(kept, len(dataset), f"they have an image (column {name!r}), and the prompts are text")
            dataset = dataset.remove_columns(name).select(kept)
    return dataset


def _count(kept: list[int], total: int, reason: str) -> list[int]:
    """Return the rows that are kept, with a warning of those that are not; raise ValueError if there is none."""
    if len(kept) < total:
        logger.warning("Left out %d of %d rows: %s", total - len(kept), total, reason)
    if not kept:
        raise UserError(f"No row is left of {total}: {reason}")
    return kept
