"""Locks a run's folder, so that only one program at a time writes to it."""

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
_held: dict[Path, list] = {}  # locks of this process: folder -> [open lock file, number of times it was taken]
_held_lock = threading.Lock()
logger = logging.getLogger(__name__)


class FolderInUseError(UserError):
    """Another program is writing to the folder. The message names the program."""


@contextmanager
def locked(folder: Path, program: str) -> Iterator[None]:
    """Create a folder if needed, and lock it against other processes.

    The operating system releases the lock when the process ends, even if it is killed. The same process may lock the
    folder several times.

    Args:
        program: name of the running program, for the error message in other processes.

    Raises:
        FolderInUseError: another process has locked the folder.
        UserError: the folder cannot be created.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file has this name, or the disk is read-only
        raise UserError(f"Cannot create the folder {folder}: {error.strerror}. Choose another output_dir") from error
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
    # A POSIX record lock, which forked children do not inherit: a worker that outlives a killed training holds no lock.
    file = os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            holder = _holder(file.read())
            file.close()
            raise FolderInUseError(
                f"{folder} is in use: {holder} is writing to it. Wait for it to end, stop it, or choose another "
                "output_dir"
            ) from None
        logger.warning("Cannot lock %s (%s). Do not let a second program write to it", folder, error)
    file.truncate()
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    json.dump({"program": program, "pid": os.getpid(), "host": socket.gethostname(), "started": now}, file)
    file.flush()
    return file


def _holder(text: str) -> str:
    try:
        said = json.loads(text)
        return f"{said['program']} (process {said['pid']} on {said['host']}, since {said['started']})"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock, or is an older version
        return "another program"
