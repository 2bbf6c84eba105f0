"""The lock of a run's folder: one program at a time writes to it."""

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
def locked(folder: Path, program: str) -> Iterator[None]:
    """Lock a folder, which is created if it is not there: meanwhile no other process can lock it.

    The operating system releases the lock when the process ends, however it ends. The same process may lock it again.

    Args:
        program: what is running, for the message that another one gets.

    Raises:
        FolderInUseError: another process has locked it.
        UserError: it cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file has its name, or the disk is read-only
        raise UserError(f"The folder {folder} cannot be made: {error.strerror}. Choose another output_dir") from error
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
