"""The files that a user names, and their raw rows: JSON Lines or Parquet, one row in memory at a time."""

import gzip
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ktae_trl.arguments import NotFoundError, UserError
from ktae_trl.files.lines import parsed, raw_lines
from ktae_trl.report import records
from ktae_trl.report.dumps.rollout import Row

LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".npy", ".npz")
_BATCH = 64  # rows of a Parquet file
_DOCS = "https://github.com/ktae-trl/ktae-trl/tree/main/docs/guides/other_trainers.md#pickles"


def files(paths: Iterable[Path]) -> list[Path]:
    """Return the files with rows, in natural order of their names and each once.

    A folder stands for the files in it and in its subfolders that end in .jsonl, .ndjson (or these with .gz) or
    .parquet, and the folder of a run with records for these records.

    Raises:
        NotFoundError: A path does not exist, or a folder has no such files.
        UserError: A file is a pickle.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            some = _in_folder(path)
        elif path.is_file():
            some = [path]
            if _is_pickle(path):
                raise _pickle(path)
        else:
            raise NotFoundError(f"There is no file {path} (looked in {Path.cwd()})")
        for one in some:
            found.setdefault(one.resolve(), one)
    return sorted(found.values(), key=_natural)


def _in_folder(folder: Path) -> list[Path]:
    if recorded := records.files(folder):
        return recorded
    there = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    some = [path for path in there if path.name.endswith((*LINES, ".parquet"))]
    if not some:
        pickles = [path for path in there if path.suffix in PICKLES]
        if pickles:
            raise _pickle(min(pickles))
        raise NotFoundError(f"{folder} contains no files with rollouts (*{', *'.join(LINES)}, *.parquet)")
    return some


def _pickle(path: Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which is not read: loading one runs code from the file. Convert it in the environment "
        f"that wrote it: {_DOCS}"
    )


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        begin = file.read(2)
    return path.suffix in PICKLES or begin in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts `2.jsonl` before `10.jsonl`."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(int(part[:18]), len(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)]


def is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"


def read(path: Path) -> Iterator[tuple[int, str, Row | UserError]]:
    """Yield the rows of a file, or what is wrong with one, each with its place for `read_at` and for a reader.

    Raises:
        UserError: The whole file, or the rest of it, cannot be read.
    """
    if is_parquet(path):
        with _opened(path) as file:
            rows = _rows(file, range(file.num_row_groups), path)
            yield from ((at, f"row {at + 1}", row) for at, row in enumerate(rows))
        return
    at = 0
    for number, line in raw_lines(path):
        try:
            row = parsed(path, number, line)
        except UserError as error:
            row = error
        if row is not None:
            yield at, f"line {number}", row
        at += len(line)


def read_at(path: Path, places: list[int]) -> Iterator[Row]:
    """Yield the rows at these places, which ascend."""
    if not is_parquet(path):
        yield from (parsed(path, 0 if at else 1, line) for at, line in _lines_at(path, places))
        return
    with _opened(path) as file:
        begin = 0
        wanted = set(places)
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if not wanted.isdisjoint(range(begin, end)):
                rows = enumerate(_rows(file, [group], path), begin)
                yield from (row for at, row in rows if at in wanted)
            begin = end


def _lines_at(path: Path, places: list[int]) -> Iterator[tuple[int, bytes]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for at in places:
            file.seek(at)
            yield at, file.readline()


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file, or it is cut off: {error}") from None


def _rows(file: pq.ParquetFile, groups: Iterable[int], path: Path) -> Iterator[Row]:
    """Yield rows. NaN stands for null in columns of floats, which says that the column has numbers."""
    try:
        for batch in file.iter_batches(_BATCH, row_groups=list(groups)):
            floats = [field.name for field in batch.schema if pa.types.is_floating(field.type)]
            for row in batch.to_pylist():
                yield row | {name: float("nan") for name in floats if row[name] is None}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
