"""Writes the files of a run: atomically, and never through links."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write, and atomically move it to `path` at the end.

    If `path` is a link, the link is replaced and its target does not change. After an error the temporary file is
    removed and `path` does not change. The temporary file has the suffix of `path`, from which some libraries infer the
    format.
    """
    draft = path.with_name(f".part-{path.name}")
    draft.unlink(missing_ok=True)  # left by a process that was killed
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 and with its line endings unchanged. See `replacing`."""
    with replacing(path) as draft, open(draft, "x", encoding="utf-8", newline="") as file:
        file.write(text)


def replace_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write a value as JSON, atomically. See `replacing`."""
    replace_text(path, json.dumps(value, indent=indent) + "\n")


def replace_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file atomically. See `replacing`."""
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to append to it.

    Raises:
        OSError: `path` is a link, through which another file would be written.
    """

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            message = f"{path} is a symbolic link to {os.readlink(path)}, which would be changed. Remove the link"
            raise OSError(message) from None

    return open(path, "a", encoding="utf-8", newline="", opener=opener)
