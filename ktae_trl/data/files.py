"""Data files, read verbatim: a text stays a text, even if it looks like a date or a number. Errors name the line."""

import csv
import json
import math
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow
from datasets import Dataset, DatasetInfo, Features, Json, load_dataset

from ktae_trl.arguments import UserError
from ktae_trl.files.lines import read_json_lines, read_lines
from ktae_trl.preflight import check_file, ending


def read(path: Path) -> Dataset:
    """Read a file with one of the `ENDINGS`, also with `.gz`.

    Values are kept as written. All columns of a CSV file are texts. In a column of several types, fractions and whole
    numbers of more than 64 bits become texts, which keeps them exact.

    Raises:
        NotFoundError: there is no such file.
        UserError: it is empty, malformed (with the number of the line) or not UTF-8.
    """
    check_file(path)
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    return _READERS[ending(path)](path)


def _read_jsonl(path: Path) -> Dataset:
    return _from_rows([row for _, row in read_json_lines(path)], path)


def _read_json(path: Path) -> Dataset:
    """Read a list of objects, or one object a line: many files named `.json` are JSON Lines."""
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
                    f"{', '.join(names)}. Put quotation marks around a value that contains a comma"
                )
            rows.append(dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from None
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: two columns are named {', '.join(map(repr, sorted(twice)))}. Rename one of them")
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


def _from_rows(rows: list[dict], path: Path) -> Dataset:
    if not rows:
        raise UserError(f"{path} has no rows")
    columns, mixed = {}, {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):  # several types, or numbers of more than 64 bits
            columns[name] = pyarrow.array([None if value is None else json.dumps(_exact(value)) for value in values])
            mixed[name] = Json()
        except ValueError as error:
            raise UserError(f"{path}, column {name!r}: {error}") from None
    table = pyarrow.table(columns)
    features = Features({**Features.from_arrow_schema(table.schema), **mixed})
    return Dataset(table.cast(features.arrow_schema), info=DatasetInfo(features=features))


def _exact(value):
    """Return a value whose numbers `datasets` reads back unchanged: those it would change as texts, NaN as None."""
    if isinstance(value, dict):
        return {name: _exact(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_exact(part) for part in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else f"{Decimal(str(value)):f}"
    return str(value) if isinstance(value, int) and value.bit_length() > 63 else value
