"""Reads text files and JSON Lines. Errors name the file and the line."""

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ktae_trl.arguments import NotFoundError, UserError

logger = logging.getLogger(__name__)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line of a UTF-8 file, which may be compressed (`.gz`).

    The text includes the line ending. A byte-order mark is removed.

    Raises:
        NotFoundError: the file does not exist.
        UserError: a line is not UTF-8, or the gzip file is damaged.
    """
    path = Path(path)
    for number, line in raw_lines(path):
        yield number, _decoded(path, number, line)


def read_json_lines(
    path: str | Path,
    *,
    remedy: str = "",
    parse_float: Callable[[str], Any] | None = None,
    skip_damaged: bool = False,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line that is not blank.

    Args:
        remedy: sentence to append to error messages.
        parse_float: converts numbers with a fraction. `Decimal` keeps them exact.
        skip_damaged: skip lines that are not JSON objects, such as the last line of an interrupted run, with a warning.

    Raises:
        NotFoundError: the file does not exist.
        UserError: a line is not UTF-8 or not a JSON object, or the gzip file is damaged.
    """
    path = Path(path)
    for number, line in raw_lines(path):
        try:
            value = parsed(path, number, line, parse_float)
        except UserError as error:
            if not skip_damaged:
                raise UserError(f"{error}. {remedy}" if remedy else str(error)) from None
            logger.warning("Skipped a damaged line, perhaps of an interrupted run: %s", error)
            continue
        if value is not None:
            yield number, value


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line of a file, which may be compressed (`.gz`).

    Raises:
        NotFoundError: the file does not exist.
        UserError: the gzip file is damaged.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no file {path} (looked in {Path.cwd()})")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            yield from enumerate(file, 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a damaged gzip file: {error}") from None


def parsed(
    path: Path, number: int, line: bytes, parse_float: Callable[[str], Any] | None = None
) -> dict[str, Any] | None:
    """Return the object of a line, or None if the line is blank.

    Raises:
        UserError: the line is not UTF-8 or not a JSON object. The message has its number.
    """
    text = _decoded(path, number, line)
    return _object(path, number, text, parse_float) if text.strip() else None


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8. "
            f"Convert the file, for example: iconv -f LATIN1 -t UTF-8 {path.name} > utf8-{path.name}"
        ) from None


def _object(path: Path, number: int, text: str, parse_float: Callable[[str], Any] | None) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: an object was expected, not {text.strip()[:80]}")
    return value
