"""Worker processes that compare answers under hard limits: a comparison that takes too long is killed with its worker.

Plain subprocesses of the same Python that run `ktae_trl.grading.worker`: they never import the main script, so they
work from any thread, in notebooks, under torchrun and beside CUDA, and they end when the main process does.
"""

import contextlib
import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

SECONDS = 2.0
MEGABYTES = 500
_START_SECONDS = 120
_AHEAD = 4  # tasks that a worker has at hand, so that it never waits for us
_SMALL = 4096  # bytes; a pipe holds 65,536


class Task(NamedTuple):
    golds: tuple[str, ...]
    answer: str | None


class _Worker:
    def __init__(self):
        # Where this Python finds its packages, the worker must find them too (a checkout, an edited sys.path).
        path = os.pathsep.join(entry for entry in sys.path if entry)
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
        self.deadline = time.monotonic() + SECONDS if self.tasks else math.inf

    def words(self) -> list[str] | None:
        """Return what it has said since we last asked; None if it has ended."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        return [line.decode() for line in lines]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def why(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2000:].decode(errors="replace").strip() or f"exit code {self.process.returncode}"


class Pool:
    """Compares answers with up to `size` workers, which start when there is work and stay for the next call."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task]) -> list[str]:
        """Return the verdict of each task, in order: the worker's words, or "timeout" or "worker died".

        A gold answer that was not read in time, or that killed the worker, is an "unparsable gold".

        Raises:
            RuntimeError: a worker cannot start.
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
                if words is None or (worker not in heard and worker.deadline <= now):
                    worker.kill()
                    if not worker.ready:
                        raise RuntimeError(f"A grading worker could not start: {worker.why()}")
                    if worker.tasks:
                        verdict = "worker died" if words is None else "timeout"
                        verdicts[worker.tasks.popleft()] = verdict if worker.gold_read else "unparsable gold"
                    waiting.extendleft(reversed(worker.tasks))
                    self.workers[i] = _Worker()
                for word in words or []:
                    verdicts.update(worker.hear(word))
        return [verdicts[i] for i in range(len(tasks))]

    def _wait(self, seconds: float) -> set[_Worker]:
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            return {key.data for key, _ in selector.select(max(seconds, 0) if seconds < math.inf else None)}

    def close(self) -> None:
        """End all workers and wait for them."""
        for worker in self.workers:
            worker.kill()
        self.workers = []
