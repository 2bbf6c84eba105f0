"""How a run's folder is written: each file at once or not at all, never through a link, by one program at a time."""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

from ktae_trl.arguments import UserError

LOCK = ".lock"
_held: dict[Path, list] = {}  # by this process: the open lock file of a folder, and how often it was taken
_held_lock = threading.Lock()
logger = logging.getLogger(__name__)


class FolderInUseError(UserError):
    """Another program is writing to the folder; the message names it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a draft to write, and put it in the place of `path` at the end.

    At no time is there half of the file under its name. A link is replaced, and what it points to stays as it is. After
    an error the draft is gone and the file as it was. The draft keeps the suffix, for libraries that go by it.
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


@contextmanager
def locked(folder: Path, program: str) -> Iterator[None]:
    """Hold a folder, which is made if need be: in here no other process can take it.

    The operating system lets go of it when the process ends, however it ends. The same process may take it again.

    Args:
        program: what is running, for the message that another one gets.

    Raises:
        FolderInUseError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    with _held_lock:
        if key not in _held:
            _held[key] = [_take(folder, program), 0]
        _held[key][1] += 1
    try:
        yield
    finally:
        with _held_lock:
            _held[key][1] -= 1
            if not _held[key][1]:
                _held.pop(key)[0].close()


def _take(folder: Path, program: str) -> IO[str]:
    # A record lock (POSIX): a forked child does not inherit it, such as a worker that outlives a killed training.
    file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = _holder(file.read())
            file.close()
            raise FolderInUseError(
                f"{folder} is in use: {holder} is writing to it. Wait until it has ended, or end it, or choose another "
                "output_dir"
            ) from None
        logger.warning("%s cannot be locked (%s): nothing stops a second program from writing to it", folder, error)
    file.truncate()
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    json.dump({"program": program, "pid": os.getpid(), "host": socket.gethostname(), "started": now}, file)
    file.flush()
    return file


def _holder(text: str) -> str:
    try:
        said = json.loads(text)
        return f"{said['program']} (process {said['pid']} on {said['host']}, since {said['started']})"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock, or is an older version
        return "another program"
