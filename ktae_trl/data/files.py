"""Data files, read as they are written: no text becomes a date or a number, and errors name the line."""

import csv
import json
import math
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow
from datasets import Dataset, DatasetInfo, Features, Json, load_dataset

from ktae_trl.arguments import NotFoundError, UserError
from ktae_trl.files.lines import read_json_lines, read_lines


def read(path: Path) -> Dataset:
    """Read a file of one of the `ENDINGS`, `.gz` too.

    Values stay as they are written. In a column that mixes types, fractions and whole numbers of more than 64 bits are
    texts, so that they stay exact. CSV columns are texts.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is empty, malformed (with the number of the line) or not UTF-8.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no data file {path} (looked in {Path.cwd()})")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    return _READERS[ending(path)](path)


def ending(path: Path) -> str:
    """Return what a file's name says about its format, such as `.jsonl` for `problems.jsonl.gz`."""
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def _read_jsonl(path: Path) -> Dataset:
    return _from_rows([row for _, row in read_json_lines(path)], path)


def _read_json(path: Path) -> Dataset:
    """Read a list of objects, or lines of them, which many files of this ending hold."""
    text = "".join(line for _, line in read_lines(path))
    if not text.lstrip().startswith("["):
        return _read_jsonl(path)
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: an object was expected, not {str(row)[:80]}")
    return _from_rows(rows, path)


def _read_csv(path: Path) -> Dataset:
    csv.field_size_limit(sys.maxsize)  # solutions can be long
    reader = csv.reader((line for _, line in read_lines(path)), strict=True)
    try:
        names = next(reader, [])
        rows = []
        for values in filter(None, reader):
            if len(values) != len(names):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(values)} values, but {len(names)} columns: "
                    f"{', '.join(names)}. A value with a comma needs quotation marks around it"
                )
            rows.append(dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: two columns have the name {', '.join(map(repr, sorted(twice)))}")
    return _from_rows(rows, path)


def _read_parquet(path: Path) -> Dataset:
    try:
        return load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:
        raise UserError(f"{path} could not be read as parquet: {error}") from error


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
ENDINGS = tuple(_READERS)
# Files that are not read, so that one that is not there is not taken for a Hub dataset.
NOT_READ = {".tsv", ".txt", ".xls", ".xlsx", ".arrow", ".feather", ".pkl", ".pickle", ".xml", ".yaml", ".yml", ".zip"}


def _from_rows(rows: list[dict], path: Path) -> Dataset:
    if not rows:
        raise UserError(f"{path} holds no problems")
    columns, mixed = {}, {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):  # of several types, or numbers that are too long
            columns[name] = pyarrow.array([None if value is None else json.dumps(_exact(value)) for value in values])
            mixed[name] = Json()
        except ValueError as error:
            raise UserError(f"{path}, column {name!r}: {error}") from None
    table = pyarrow.table(columns)
    features = Features({**Features.from_arrow_schema(table.schema), **mixed})
    return Dataset(table.cast(features.arrow_schema), info=DatasetInfo(features=features))


def _exact(value):
    """Write the numbers that `datasets` would read back as others as texts, in plain digits; NaN as null."""
    if isinstance(value, dict):
        return {name: _exact(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_exact(part) for part in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else f"{Decimal(str(value)):f}"
    return str(value) if isinstance(value, int) and value.bit_length() > 63 else value
