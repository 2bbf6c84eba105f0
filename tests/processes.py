"""Processes that tests start: whatever happens to the test, none of them is left, nor any that they started."""

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

_MARK = "STARTED_BY_TEST"  # in the environment, which grandchildren inherit, whatever group or session they are in


@contextmanager
def started(
    command: Sequence[str], *, env: dict[str, str] | None = None, ignored: Sequence[int] = (), **options
) -> Iterator[subprocess.Popen]:
    """Start a process in a group of its own; in the end, end it and all that it started.

    Args:
        ignored: which of SIGINT and SIGHUP it is to ignore. What these tests ignore, as the background job of a shell
            or of nohup, is not handed down.
        options: of `subprocess.Popen`.
    """
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        env={**(os.environ if env is None else env), _MARK: mark},
        text=True,
        process_group=0,
        preexec_fn=partial(_ignore_only, ignored),
        **options,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        while left := marked(mark):  # one may start another while we look
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(OSError):  # of what could not be written any more
                    pipe.close()


def _ignore_only(ignored: Sequence[int]) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


def marked(mark: str) -> list[int]:
    """Return the processes that have this mark in their environment; one that is dead has none any more."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{_MARK}={mark}".encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have, by /proc."""
    own = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return own + [other for child in own for other in children(child)]


def gone(pids: Sequence[int], seconds: float = 10) -> bool:
    """Wait until processes are dead; say whether they are."""
    end = time.monotonic() + seconds
    while any(_lives(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(command: Sequence[str], *, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """Run a command to its end; return its exit code and what it said."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    with started(command, **options) as process:
        output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
