"""Columns of a dataset: read their values, select rows by value, and rename columns whose names are reserved."""

import logging
from collections.abc import Iterable

import pyarrow
import pyarrow.compute
from datasets import Dataset

from ktae_trl.arguments import UserError, nearest

# Arguments of reward functions. A column with such a name would collide with what TRL passes, or not be passed at all.
RESERVED = {
    *("prompts", "completion", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments", "answer_format", "opened_think"),
}
IMAGES = ("image", "images")  # columns from which TRL takes images
logger = logging.getLogger(__name__)


def column_values(dataset: Dataset, path: str) -> list:
    """Return the values of a column, or of a field of a nested column (a dotted path); None where a value is missing.

    Raises:
        ValueError: the column or field does not exist.
    """
    name, *fields = [path] if path in dataset.column_names else path.split(".")
    if name not in dataset.column_names:
        raise UserError(
            f"The dataset has no column {name!r}{nearest(name, dataset.column_names)}. "
            f"Its columns: {', '.join(dataset.column_names)}"
        )
    values = dataset[name][:]
    for field_name in fields:
        there = dict.fromkeys(key for value in values if isinstance(value, dict) for key in value)
        if field_name not in there:
            raise UserError(
                f"The column {name!r} has no field {field_name!r}{nearest(field_name, there)} (column {path!r}). "
                f"Its fields: {', '.join(there) or 'none'}"
            )
        values = [value.get(field_name) if isinstance(value, dict) else None for value in values]
    return values


def original_column(dataset: Dataset, path: str) -> str:
    """Return the name that `to_prompts` gave to a column (or dotted path) of the data."""
    name, dot, fields = path.partition(".")
    return f"data_{name}{dot}{fields}" if f"data_{name}" in dataset.column_names else path


def matching_rows(dataset: Dataset, values: dict[str, list]) -> list[int]:
    """Return the indices of the rows that have one of the given values in each of the given columns.

    Raises:
        ValueError: a column does not exist, or no row matches. The message lists the columns or values in the data.
    """
    rows = list(range(len(dataset)))
    for column, wanted in values.items():
        if column not in dataset.column_names:
            raise UserError(
                f"dataset_filter: the dataset has no column {column!r}{nearest(column, dataset.column_names)}. "
                f"Its columns: {', '.join(dataset.column_names)}. To use all rows: --dataset_filter null"
            )
        found = dataset[column][:]
        there = list(dict.fromkeys(found[row] for row in rows))
        rows = [row for row in rows if found[row] in wanted]
        if not rows:
            raise UserError(f"dataset_filter: no row has {column} in {wanted}. Values found: {str(there[:20])[1:-1]}")
    return rows


def keep_rows(dataset: Dataset, values: dict[str, list]) -> Dataset:
    """Return the dataset with only the `matching_rows`."""
    return dataset.select(matching_rows(dataset, values))


def free_names(dataset: Dataset, taken: set[str] = RESERVED, silent: Iterable[str] = ()) -> Dataset:
    """Rename columns whose names are in `taken` to `data_NAME`, and remove image columns that have no images.

    A warning lists the renamed columns, except those in `silent`.
    """
    for name in IMAGES:
        if name in dataset.column_names and not any(has_image(dataset, name)):
            dataset = dataset.remove_columns(name)
    renamed = {name: f"data_{name}" for name in dataset.column_names if name in taken}
    if told := {old: new for old, new in renamed.items() if old not in silent}:
        logger.warning(
            "Renamed columns because TRL or ktae_trl uses their names: %s",
            ", ".join(f"{old} is now {new}" for old, new in told.items()),
        )
    return dataset.rename_columns(renamed)


def has_image(dataset: Dataset, column: str) -> list[bool]:
    """Return for each row whether it has an image or a non-empty list of images, without decoding any."""
    values = dataset.with_format("arrow")[column][:]
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        return [bool(length) for length in pyarrow.compute.list_value_length(values).to_pylist()]
    return values.is_valid().to_pylist()


def with_free_names(dataset):
    """Apply `free_names` to a dataset or a dict of datasets; streaming datasets and None are returned unchanged."""
    if isinstance(dataset, dict):
        return {name: with_free_names(part) for name, part in dataset.items()}
    return free_names(dataset) if isinstance(dataset, Dataset) else dataset
