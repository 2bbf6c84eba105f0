"""Worker processes that compare answers under hard limits: a comparison that takes too long ends with its worker.

Plain subprocesses of the same Python that run `ktae_trl.grading.worker`: they never import the main script, so they
work from any thread, in notebooks, under torchrun and beside CUDA, and they end when the main process does.

Whose fault is it when a worker ends? Only its own clock (SIGPROF after 2 s of processor time) is surely the answer's
doing: that is a "timeout". Any other end (killed when memory runs out, frozen, crashed) may have come from outside, so
the answer is graded again, once, alone on a fresh worker; if it ends that one too, its verdict is "worker died".

A worker is frozen if it has an answer to compare but for 1.5 s neither says a word, nor uses any processor time, nor
waits for a processor or a disk (the kernel's word, where there is a /proc). So a busy machine makes nobody look frozen.
A worker that does not end by itself within 30 s is replaced as well. Time only counts while the main process looks:
one that was itself held up (a suspended laptop, a debugger) finds its workers as they were.
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

SECONDS = 2.0  # of a worker's processor time; it ends itself by a signal
_WALL_SECONDS = 30.0  # if it did not, for whatever reason
_SILENT_SECONDS = 1.5  # with the start of another worker a frozen one costs 3 s at most
_LOOK_SECONDS = 0.25
MEGABYTES = 500
_START_SECONDS = 120
_STARTS = 3  # failed starts in a row that are an error; one may be an accident, such as a lack of memory
_AHEAD = 4  # tasks that a worker has at hand, so that it never waits for us
# Powers of powers, and powers and factorials of large numbers: most answers that never end are such.
_COSTLY = re.compile(r"\^\{[^{}^]*\^|\^\{?\d{4}|\d{4}!")


class Task(NamedTuple):
    golds: tuple[str, ...]
    answer: str | None


class Outcome(NamedTuple):
    verdict: str  # the worker's words, "timeout", "worker died" or "budget"
    lasting: bool  # whether it would be the same the next time


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
        os.set_blocking(self.process.stdin.fileno(), False)  # a frozen worker does not empty its pipe
        self.ready = False
        self.suspect: int | None = None  # number of the task that ended its last worker; this one gets it first, alone
        self.tasks: deque[int] = deque()  # numbers of the tasks sent; the first is being worked on
        self.gold_read = False  # of the first task
        self.seconds = 0.0  # that the first task, or the start, has taken so far
        self.active = False  # whether processor time was used meanwhile
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
        """Send what there is room for in the pipe."""
        try:
            self.unsent = self.unsent[os.write(self.process.stdin.fileno(), self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:  # it has died; the end of its output will tell
            self.unsent = b""

    def hear(self, line: str) -> tuple[dict[int, str], float]:
        """Take note of a line it said; returns the verdict if it was one, and the processor time that it took."""
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
        """Take note of time that has passed without a word from it; returns whether it is to be replaced."""
        if self.ready and not self.tasks:
            return False
        self.seconds += seconds
        self._unlooked += seconds
        if self._unlooked >= _LOOK_SECONDS:
            self._look()
        return self._silent >= _SILENT_SECONDS or self.seconds >= (_WALL_SECONDS if self.ready else _START_SECONDS)

    def _look(self) -> None:
        state, used = _activity(self.process.pid)
        # A worker that sleeps while it starts may wait for a file of a slow disk; one that is stopped does not.
        waits = state in ("R", "D") or (state == "S" and not self.ready)
        if used is None or used != self._used or waits:
            self._silent = 0.0
        else:
            self._silent += self._unlooked
        self.active = self.active or self._used not in (None, used)
        self._used, self._unlooked = used, 0.0

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
        for file in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                file.close()
        return code

    def why(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2000:].decode(errors="replace").strip() or f"exit code {self.process.returncode}"


def _activity(pid: int) -> tuple[str | None, bytes | None]:
    """Return the kernel's letter for what a process does, and the processor time it has used; None without /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None, None
    return status[0].decode(), b" ".join(status[11:13])


class _Call:
    """The tasks of one call of `Pool.run`, and how far they are."""

    def __init__(self, tasks: Sequence[Task]):
        self.lines = [json.dumps([SECONDS, *task]).encode() + b"\n" for task in tasks]
        # What may be costly comes last: if the budget does not reach for all, it does for the others.
        order = sorted(range(len(tasks)), key=lambda i: _COSTLY.search(tasks[i].answer or "") is not None)
        self.waiting = deque(order)
        self.outcomes: dict[int, Outcome] = {}
        self.suspects: set[int] = set()
        self.spent = 0.0  # seconds of workers' processor time

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
        """Take back the tasks of a worker that has ended; returns the one to grade again on a fresh worker first."""
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
    """Compares answers with up to `size` workers, which start when there is work and stay for the next call."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[_Worker] = []
        self.failed_starts = 0

    def run(self, tasks: Sequence[Task], budget: float | None = None) -> list[Outcome]:
        """Return the outcome of each task, in order.

        A gold answer that was not read in time, or that killed its worker, is an "unparsable gold".

        Args:
            budget: seconds of processor time that each worker may spend, with the starts of those that replace others;
                None for no limit. What is not done by then has the outcome "budget".

        Raises:
            RuntimeError: workers cannot start.
        """
        try:
            return self._run(_Call(tasks), budget)
        except BaseException:  # a Ctrl-C too: answers still on their way would be taken for those of the next call
            self.close()
            raise

    def _run(self, call: _Call, budget: float | None) -> list[Outcome]:
        for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
            worker.kill()
            self.workers.remove(worker)
        self.workers += [_Worker() for _ in range(min(self.size, len(call.lines)) - len(self.workers))]
        replaced: set[_Worker] = set()  # those whose start is part of the cost
        looked = time.monotonic()
        while call.open:
            if budget is not None and call.spent > budget * len(self.workers):
                self._give_up(call)
                break
            for worker in self.workers:
                call.hand_out(worker)
            heard = self._wait(_LOOK_SECONDS)
            # A main process that was itself held up does not count the time, and first hears what was said meanwhile.
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
        """End a worker that has ended or is late, and start another one."""
        by_clock = worker.kill() == -signal.SIGPROF
        timed_out = by_clock or (late and worker.active and worker.seconds >= _WALL_SECONDS)
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts == _STARTS:
                raise RuntimeError(f"The grading workers cannot start: {worker.why()}")
        fresh = _Worker()
        fresh.suspect = call.take_back(worker, "timeout" if timed_out else "worker died", lasting=by_clock)
        return fresh

    def _give_up(self, call: _Call) -> None:
        """The budget is spent: end the workers that have tasks, or were started for one."""
        for worker in [worker for worker in self.workers if worker.tasks or worker.suspect is not None]:
            worker.kill()
            self.workers.remove(worker)
        for number in range(len(call.lines)):
            call.outcomes.setdefault(number, Outcome("budget", False))

    def _wait(self, seconds: float) -> set[_Worker]:
        """Wait until a worker speaks, or some seconds; returns those that speak. Meanwhile they get what is unsent."""
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
        workers, self.workers = self.workers, []  # even if a second Ctrl-C ends this, no call meets them again
        for worker in workers:
            worker.kill()
