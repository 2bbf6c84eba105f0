"""Datasets of problems with known answers, turned into TRL's `prompt` and `solution`."""

import gzip
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ktae_trl.arguments import nearest

logger = logging.getLogger(__name__)

BOXED_SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}."

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Which problems to train and evaluate on, and how to ask them."""

    dataset_name: str = field(
        metadata={"help": "Hub dataset id, or a local .jsonl, .json or .parquet file, or a save_to_disk folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset or folder."})
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
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of the held-out problems."})
    eval_size: int | None = field(default=None, metadata={"help": "Use the first so many held-out problems."})
    problem_column: str = field(default="problem", metadata={"help": "Column with the problem text."})
    answer_column: str = field(
        default="answer", metadata={"help": "Column with the answer, or a list of accepted answers."}
    )
    system_prompt: str = field(
        default=BOXED_SYSTEM_PROMPT, metadata={"help": "System prompt of every problem; empty for none."}
    )
    max_prompt_length: int | None = field(
        default=1024, metadata={"help": "Leave out prompts of more tokens. Default 1024; null for no limit."}
    )

    def __post_init__(self):
        if isinstance(self.dataset_filter, str):  # from the command line
            try:
                self.dataset_filter = json.loads(self.dataset_filter)
            except json.JSONDecodeError as error:
                raise ValueError(f"dataset_filter is not JSON: {error}: {self.dataset_filter}") from None
        chosen = self.dataset_filter
        if chosen is not None and not (isinstance(chosen, dict) and all(isinstance(v, list) for v in chosen.values())):
            raise ValueError(
                f"dataset_filter maps columns to lists of values, as in {{level: [3, 4, 5]}}, not {chosen}"
            )


def load(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Load a dataset from the Hub or from local files.

    Args:
        name: Hub id, or the path of a JSON Lines, JSON or Parquet file (`.gz` too) or of a `save_to_disk` folder.
        config, split: of a Hub dataset; `split` also picks from a saved `DatasetDict`. A file has no splits.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: an empty or malformed file (with the number of the bad line), or an unknown split.
    """
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if path.is_dir():
        dataset = load_from_disk(name)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"{name} has no split {split!r}. There are: {', '.join(dataset)}")
            dataset = dataset[split]
    elif suffix in _FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {name} (looked in {Path.cwd()})")
        dataset = _load_file(path, _FORMATS[suffix])
    elif path.is_file():
        raise ValueError(f"{name} has a format that is not read. Known endings: {', '.join(_FORMATS)}, also with .gz")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name} is neither a data file ({', '.join(_FORMATS)}) nor a folder (looked in {Path.cwd()})"
        )
    else:
        dataset = load_dataset(name, config, split=split)
    if len(dataset) == 0:
        raise ValueError(f"{name} holds no problems")
    return dataset


def _load_file(path: Path, file_format: str) -> Dataset:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        return load_dataset(file_format, data_files=str(path), split="train")
    except Exception as error:
        if ".jsonl" in path.suffixes:
            _raise_for_bad_line(path)
        raise ValueError(f"{path} could not be read as {file_format}: {error}") from error


def _raise_for_bad_line(path: Path) -> None:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: an object was expected, not {line.strip()[:80]}")


def to_prompts(
    dataset: Dataset,
    *,
    problem_column: str = "problem",
    answer_column: str = "answer",
    system_prompt: str = BOXED_SYSTEM_PROMPT,
) -> Dataset:
    """Turn problems and answers into TRL's columns `prompt` (a conversation) and `solution` (one or more strings).

    Other columns stay, for reward functions that use them. A row without a problem or an answer is left out; a warning
    says how many were.

    Raises:
        ValueError: a column that is not there.
    """
    for column in (problem_column, answer_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"The dataset has no column {column!r}. There are: {', '.join(dataset.column_names)}. "
                "Set problem_column and answer_column."
            )
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []

    def convert(row: dict) -> dict:
        answer = row[answer_column]
        return {
            "new_prompt": [*system, {"role": "user", "content": row[problem_column]}],
            "new_solution": [str(a) for a in answer] if isinstance(answer, list) else str(answer),
        }

    whole = _keep(
        dataset, lambda row: row[problem_column] and row[answer_column] not in (None, "", []), "no problem or answer"
    )
    # `map` forces the old type on a column that it writes anew, so the new ones have other names at first.
    replaced = {problem_column, answer_column, "prompt", "solution"} & set(dataset.column_names)
    converted = whole.map(convert, remove_columns=sorted(replaced))
    return converted.rename_columns({"new_prompt": "prompt", "new_solution": "solution"})


def keep_rows(dataset: Dataset, values: dict[str, list]) -> Dataset:
    """Keep the rows that have, in each of these columns, one of its values.

    Raises:
        ValueError: a column that is not there, or no row is left (with the values that there are).
    """
    for column, wanted in values.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"dataset_filter: there is no column {column!r}{nearest(column, dataset.column_names)}. "
                f"There are: {', '.join(dataset.column_names)}. For all rows: --dataset_filter null"
            )
        there = dataset.unique(column)
        dataset = dataset.filter(lambda value, wanted=wanted: value in wanted, input_columns=column)
        if len(dataset) == 0:
            raise ValueError(f"dataset_filter: no row has {column} in {wanted}. There are: {str(there[:20])[1:-1]}")
    return dataset


def drop_long(dataset: Dataset, tokenizer, max_prompt_length: int | None) -> Dataset:
    """Leave out prompts of more than `max_prompt_length` tokens; a warning says how many were.

    Raises:
        ValueError: no prompt is left.
    """
    if max_prompt_length is None:
        return dataset

    def fits(row: dict) -> bool:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        return len(ids) <= max_prompt_length

    return _keep(dataset, fits, f"more than {max_prompt_length} tokens (max_prompt_length)")


def load_prompts(arguments: DataArguments, tokenizer) -> tuple[Dataset, Dataset | None]:
    """Return the training prompts and the held-out ones (None if the arguments name none)."""

    def prepare(name: str, split: str, values: dict[str, list]) -> Dataset:
        dataset = to_prompts(
            keep_rows(load(name, arguments.dataset_config, split), values),
            problem_column=arguments.problem_column,
            answer_column=arguments.answer_column,
            system_prompt=arguments.system_prompt,
        )
        return drop_long(dataset, tokenizer, arguments.max_prompt_length)

    train = prepare(arguments.dataset_name, arguments.dataset_split, arguments.dataset_filter or {})
    if arguments.eval_dataset_name is None:
        return train, None
    held_out = prepare(arguments.eval_dataset_name, arguments.eval_dataset_split, {})
    return train, held_out.select(range(min(arguments.eval_size or len(held_out), len(held_out))))


def _keep(dataset: Dataset, wanted: Callable[[dict], bool], reason: str) -> Dataset:
    kept = dataset.filter(wanted)
    if len(kept) < len(dataset):
        logger.warning("Left out %d of %d rows: %s", len(dataset) - len(kept), len(dataset), reason)
    if len(kept) == 0:
        raise ValueError(f"No row is left of {len(dataset)}: {reason}")
    return kept
