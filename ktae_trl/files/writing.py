"""How a run's files are written: each one atomically, and never through a link."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a draft to write, and move it to `path` at the end: atomically.

    A link is replaced, and its target stays as it is. After an error the draft is removed and the file is unchanged.
    The draft keeps the suffix, from which some libraries read the format.
    """
    draft = path.with_name(f".part-{path.name}")
    draft.unlink(missing_ok=True)  # of a process that was killed
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, with its line ends as they are: see `replacing`."""
    with replacing(path) as draft, open(draft, "x", encoding="utf-8", newline="") as file:
        file.write(text)


def replace_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON: see `replacing`."""
    replace_text(path, json.dumps(value, indent=indent) + "\n")


def replace_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write an object a line: see `replacing`."""
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to append to it.

    Raises:
        OSError: it is a link, through which some other file would be written.
    """

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            message = f"{path} is a link to {os.readlink(path)}, which would be written to. Remove the link"
            raise OSError(message) from None

    return open(path, "a", encoding="utf-8", newline="", opener=opener)
