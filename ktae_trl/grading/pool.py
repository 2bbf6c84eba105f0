"""Worker processes that compare answers with hard limits: a comparison that takes too long ends with its worker.

Workers are plain subprocesses of the same Python that run `ktae_trl.grading.worker`. They never import the main script,
so they work from any thread, in notebooks, under torchrun and in processes that use CUDA. They end when the main
process ends.

If a worker ends, the answer it was comparing is not always the cause. Only the worker's own timer (SIGPROF after 2 s of
processor time) is certainly due to the answer: the verdict is "timeout". Any other end (out of memory, frozen, crashed)
may have an external cause, so the answer is compared once more, alone on a fresh worker. If that worker ends too, the
verdict is "worker died".

A worker counts as frozen if it has an answer to compare and for 1.5 s neither writes a line, nor uses processor time,
nor waits for a processor or a disk (according to the kernel, where /proc exists). A busy machine alone does not make a
worker look frozen. A worker that has not finished after 30 s is replaced as well. Only time in which the main process
itself runs is counted: if it was suspended (a closed laptop, a debugger), the workers are not blamed for it.
"""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 2.0  # limit on a comparison's processor time, after which a signal ends the worker
_WALL_SECONDS = 30.0  # limit on a comparison's wall time, in case the signal has no effect
_SILENT_SECONDS = 1.5  # after this a silent worker counts as frozen; with a new worker's start, that costs at most 3 s
_LOOK_SECONDS = 0.25
MEGABYTES = 500
_START_SECONDS = 120
_STARTS = 3  # failed starts in a row that raise an error; a single failure may be temporary (no memory)
_AHEAD = 4  # tasks sent to a worker in advance, so that it never waits for the main process
# Powers of powers, and powers and factorials of large numbers: most answers that time out have one of these forms.
_COSTLY = re.compile(r"\^\{[^{}^]*\^|\^\{?\d{4}|\d{4}!")


class Task(NamedTuple):
    golds: tuple[str, ...]
    answer: str | None


class Outcome(NamedTuple):
    verdict: str  # the worker's verdict, "timeout", "worker died" or "budget"
    lasting: bool  # whether another comparison would give the same verdict, so that it can be cached


class _Worker:
    def __init__(self):
        # The worker needs the same import path as this process (a checkout, an edited sys.path).
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ktae_trl.grading.worker", str(MEGABYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"PYTHONPATH": path},
        )
        os.set_blocking(self.process.stdin.fileno(), False)  # because a frozen worker does not read from its pipe
        self.ready = False
        self.suspect: int | None = None  # index of the task that ended its last worker; sent first, and alone
        self.tasks: deque[int] = deque()  # indices of the tasks sent; the first one is being compared
        self.gold_read = False  # whether the worker has read the gold answers of the first task
        self.seconds = 0.0  # wall time of the first task, or of the start, so far
        self.active = False  # whether the worker has used processor time in it
        self.unsent = b""
        self._begin()
        self._unfinished = b""

    def takes(self) -> bool:
        return self.ready and self.suspect is None and len(self.tasks) < _AHEAD

    def send(self, number: int, line: bytes) -> None:
        self.tasks.append(number)
        if len(self.tasks) == 1:
            self._begin()
        self.unsent += line
        self.push()

    def push(self) -> None:
        """Send as much as fits into the pipe."""
        try:
            self.unsent = self.unsent[os.write(self.process.stdin.fileno(), self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # the worker has died, which the end of its output will show
            self.unsent = b""

    def hear(self, line: str) -> tuple[dict[int, str], float]:
        """Process a line from the worker; return its verdict by task index, if it has one, and the processor time."""
        if line == "gold":
            self.gold_read = True
            return {}, 0.0
        word, _, seconds = line.rpartition(" ")
        verdict = {}
        if self.ready:
            verdict[self.tasks.popleft()] = word
            self.suspect = None
        self.ready = True
        self._begin()
        return verdict, float(seconds)

    def _begin(self) -> None:
        self.gold_read = self.active = False
        self.seconds = self._silent = self._unlooked = 0.0
        self._used: bytes | None = None

    def is_late(self, seconds: float) -> bool:
        """Add seconds in which the worker wrote nothing; return whether it must be replaced."""
        if self.ready and not self.tasks:
            return False
        self.seconds += seconds
        self._unlooked += seconds
        if self._unlooked >= _LOOK_SECONDS:
            self._look()
        return self._silent >= _SILENT_SECONDS or self.seconds >= (_WALL_SECONDS if self.ready else _START_SECONDS)

    def _look(self) -> None:
        state, used = _activity(self.process.pid)
        # A worker that sleeps while it starts may be waiting for a slow disk; a stopped one is not.
        waits = state in ("R", "D") or (state == "S" and not self.ready)
        if used is None or used != self._used or waits:
            self._silent = 0.0
        else:
            self._silent += self._unlooked
        self.active = self.active or self._used not in (None, used)
        self._used, self._unlooked = used, 0.0

    def words(self) -> list[str] | None:
        """Return the lines that the worker has written since the last call; None if it has ended."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        return [line.decode() for line in lines]

    def kill(self) -> int:
        """Kill the worker and return its exit code (if it had already ended, the code it ended with)."""
        self.process.kill()
        code = self.process.wait()
        for file in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                file.close()
        return code

    def why(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2000:].decode(errors="replace").strip() or f"exit code {self.process.returncode}"


def _activity(pid: int) -> tuple[str | None, bytes | None]:
    """Return the kernel's state letter of a process and the processor time it has used; None for both without /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None, None
    return status[0].decode(), b" ".join(status[11:13])


class _Call:
    """The tasks of one call of `Pool.run` and their progress."""

    def __init__(self, tasks: Sequence[Task]):
        self.lines = [json.dumps([SECONDS, *task]).encode() + b"\n" for task in tasks]
        # Costly tasks come last, so that the budget is spent on the others first.
        order = sorted(range(len(tasks)), key=lambda i: _COSTLY.search(tasks[i].answer or "") is not None)
        self.waiting = deque(order)
        self.outcomes: dict[int, Outcome] = {}
        self.suspects: set[int] = set()
        self.spent = 0.0  # processor time of all workers, in seconds

    @property
    def open(self) -> bool:
        return len(self.outcomes) < len(self.lines)

    def hand_out(self, worker: _Worker) -> None:
        if worker.ready and worker.suspect is not None and not worker.tasks:
            worker.send(worker.suspect, self.lines[worker.suspect])
        while self.waiting and worker.takes():
            number = self.waiting.popleft()
            worker.send(number, self.lines[number])

    def take_back(self, worker: _Worker, verdict: str, lasting: bool) -> int | None:
        """Take back the tasks of a worker that has ended; return the one that a fresh worker must compare first."""
        suspect = worker.suspect
        if worker.tasks:
            number, suspect = worker.tasks.popleft(), None
            self.spent += min(worker.seconds, SECONDS)
            if verdict == "timeout" or number in self.suspects:
                self.outcomes[number] = Outcome(verdict if worker.gold_read else "unparsable gold", lasting)
            else:
                self.suspects.add(number)
                suspect = number
        self.waiting.extendleft(reversed(worker.tasks))
        return suspect


class Pool:
    """Compare answers with up to `size` workers, which start when they are needed and stay alive for the next call."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[_Worker] = []
        self.failed_starts = 0

    def run(self, tasks: Sequence[Task], budget: float | None = None) -> list[Outcome]:
        """Return the outcome of each task, in order.

        If reading a gold answer times out or ends its worker, the verdict is "unparsable gold".

        Args:
            budget: seconds of processor time per worker, including the starts of workers that replace others; None for
                no limit. Tasks that are not finished by then get the outcome "budget".

        Raises:
            RuntimeError: the workers cannot start.
        """
        try:
            return self._run(_Call(tasks), budget)
        except BaseException:  # also Ctrl-C: the next call would take outstanding verdicts for its own
            self.close()
            raise

    def _run(self, call: _Call, budget: float | None) -> list[Outcome]:
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            worker.kill()
            self.workers.remove(worker)
        self.workers += [_Worker() for _ in range(min(self.size, len(call.lines)) - len(self.workers))]
        replaced: set[_Worker] = set()  # workers whose start counts towards the budget
        looked = time.monotonic()
        while call.open:
            if budget is not None and call.spent > budget * len(self.workers):
                self._give_up(call)
                break
            for worker in self.workers:
                call.hand_out(worker)
            heard = self._wait(_LOOK_SECONDS)
            # The cap excludes time in which the main process was suspended; lines written meanwhile are read first.
            passed = min(time.monotonic() - looked, 2 * _LOOK_SECONDS)
            looked = time.monotonic()
            for i, worker in enumerate(self.workers):
                lines = worker.words() if worker in heard else []
                for line in lines or []:
                    starting = not worker.ready
                    verdict, seconds = worker.hear(line)
                    call.outcomes |= {number: Outcome(word, True) for number, word in verdict.items()}
                    call.spent += seconds if not starting or worker in replaced else 0
                    self.failed_starts = 0
                if lines is None or (worker not in heard and worker.is_late(passed)):
                    self.workers[i] = self._replacement(worker, call, late=lines is not None)
                    replaced.add(self.workers[i])
        return [call.outcomes[i] for i in range(len(call.lines))]

    def _replacement(self, worker: _Worker, call: _Call, late: bool) -> _Worker:
        """Replace a worker that has ended or is late by a fresh one."""
        by_clock = worker.kill() == -signal.SIGPROF
        timed_out = by_clock or (late and worker.active and worker.seconds >= _WALL_SECONDS)
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts == _STARTS:
                raise RuntimeError(f"The grading workers cannot start ({_STARTS} attempts failed): {worker.why()}")
        fresh = _Worker()
        fresh.suspect = call.take_back(worker, "timeout" if timed_out else "worker died", lasting=by_clock)
        return fresh

    def _give_up(self, call: _Call) -> None:
        """End all workers that have tasks or were started for one, because the budget is used up."""
        for worker in [worker for worker in self.workers if worker.tasks or worker.suspect is not None]:
            worker.kill()
            self.workers.remove(worker)
        for number in range(len(call.lines)):
            call.outcomes.setdefault(number, Outcome("budget", False))

    def _wait(self, seconds: float) -> set[_Worker]:
        """Wait up to `seconds` for output and return the workers that have some; meanwhile, send what is unsent."""
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)
            heard = set()
            for key, events in selector.select(seconds):
                if events & selectors.EVENT_READ:
                    heard.add(key.data)
                else:
                    key.data.push()
            return heard

    def close(self) -> None:
        """End all workers and wait for them."""
        workers, self.workers = self.workers, []  # even if Ctrl-C ends the loop, no later call uses them
        for worker in workers:
            worker.kill()
