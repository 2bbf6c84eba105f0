"""Worker processes that compare answers under hard limits: a comparison that takes too long ends with its worker.

Plain subprocesses of the same Python that run `ktae_trl.grading.worker`: they never import the main script, so they
work from any thread, in notebooks, under torchrun and beside CUDA, and they end when the main process does.
"""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

SECONDS = 2.0  # of a worker's processor time; it ends itself by a signal
_WALL_SECONDS = 30.0  # if it did not, for whatever reason
MEGABYTES = 500
_START_SECONDS = 120
_STARTS = 3  # failed starts in a row that are an error; one may be an accident, such as a lack of memory
_AHEAD = 4  # tasks that a worker has at hand, so that it never waits for us
_SMALL = 4096  # bytes; a pipe holds 65,536


class Task(NamedTuple):
    golds: tuple[str, ...]
    answer: str | None


class _Worker:
    def __init__(self):
        # Where this Python finds its packages, the worker must find them too (a checkout, an edited sys.path).
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ktae_trl.grading.worker", str(MEGABYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.ready = False
        self.tasks: deque[int] = deque()  # numbers of the tasks sent; the first is being worked on
        self.gold_read = False  # of the first task
        self.deadline = time.monotonic() + _START_SECONDS
        self._unfinished = b""

    def takes(self, line: bytes) -> bool:
        """Say whether a task can be sent: the next ones wait in the pipe, unless they could fill it and block us."""
        return self.ready and (not self.tasks or (len(self.tasks) < _AHEAD and len(line) <= _SMALL))

    def send(self, number: int, line: bytes) -> None:
        self.tasks.append(number)
        if len(self.tasks) == 1:
            self._begin()
        with contextlib.suppress(BrokenPipeError):  # it has died; the end of its output will tell
            self.process.stdin.write(line)
            self.process.stdin.flush()

    def hear(self, word: str) -> dict[int, str]:
        """Take note of a word it said; returns the verdict if it was one."""
        if word == "gold":
            self.gold_read = True
            return {}
        verdict = {self.tasks.popleft(): word} if self.ready else {}
        self.ready = True
        self._begin()
        return verdict

    def _begin(self) -> None:
        self.gold_read = False
        self.deadline = time.monotonic() + _WALL_SECONDS if self.tasks else math.inf

    def words(self) -> list[str] | None:
        """Return what it has said since we last asked; None if it has ended."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        return [line.decode() for line in lines]

    def kill(self) -> int:
        """End it and return its exit code, the one it had if it ended by itself."""
        self.process.kill()
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return code

    def why(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2000:].decode(errors="replace").strip() or f"exit code {self.process.returncode}"


class Pool:
    """Compares answers with up to `size` workers, which start when there is work and stay for the next call."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[_Worker] = []
        self.failed_starts = 0

    def run(self, tasks: Sequence[Task]) -> list[str]:
        """Return the verdict of each task, in order: the worker's words, or "timeout" or "worker died".

        A gold answer that was not read in time, or that killed the worker, is an "unparsable gold".

        Raises:
            RuntimeError: workers cannot start.
        """
        try:
            return self._run(tasks)
        except BaseException:  # a Ctrl-C too: answers still on their way would be taken for those of the next call
            self.close()
            raise

    def _run(self, tasks: Sequence[Task]) -> list[str]:
        lines = [json.dumps([SECONDS, *task]).encode() + b"\n" for task in tasks]
        waiting = deque(range(len(tasks)))
        verdicts: dict[int, str] = {}
        self.workers += [_Worker() for _ in range(min(self.size, len(tasks)) - len(self.workers))]
        while len(verdicts) < len(tasks):
            for worker in self.workers:
                while waiting and worker.takes(lines[waiting[0]]):
                    number = waiting.popleft()
                    worker.send(number, lines[number])
            # Only a worker that was past its time before we looked, and still has said nothing, is too late: a main
            # process that was itself held up does not count against it.
            now = time.monotonic()
            heard = self._wait(min(worker.deadline for worker in self.workers) - now)
            for i, worker in enumerate(self.workers):
                words = worker.words() if worker in heard else []
                for word in words or []:
                    verdicts.update(worker.hear(word))
                    self.failed_starts = 0
                late = worker not in heard and worker.deadline <= now
                if words is not None and not late:
                    continue
                timed_out = worker.kill() == -signal.SIGPROF or late
                if not worker.ready:
                    self.failed_starts += 1
                    if self.failed_starts == _STARTS:
                        raise RuntimeError(f"The grading workers cannot start: {worker.why()}")
                if worker.tasks:
                    verdict = "timeout" if timed_out else "worker died"
                    verdicts[worker.tasks.popleft()] = verdict if worker.gold_read else "unparsable gold"
                waiting.extendleft(reversed(worker.tasks))
                self.workers[i] = _Worker()
        return [verdicts[i] for i in range(len(tasks))]

    def _wait(self, seconds: float) -> set[_Worker]:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            return {key.data for key, _ in selector.select(max(seconds, 0) if seconds < math.inf else None)}

    def close(self) -> None:
        """End all workers and wait for them."""
        workers, self.workers = self.workers, []  # even if a second Ctrl-C ends this, no call meets them again
        for worker in workers:
            worker.kill()
