"""Calls reward functions: logs a line during long calls, and ends the run after `reward_timeout`.

A call that takes longer than `reward_timeout` is interrupted in the thread where it runs. The function thus keeps its
thread-local state and may use signals itself. There are three levels:

1. On the main thread, SIGALRM interrupts the call. It wakes sleeps and sockets, and regular expressions check for it. A
   function that sets its own alarm, as math-verify does, replaces ours: the watching thread sends the signal again.
   An asynchronous function is cancelled. Other threads receive no signals: there the function runs in a separate
   thread, which is abandoned.
2. If the call does not end within `GRACE` seconds (a lock in C, a blocking sleep in an asynchronous function), the
   watching thread logs the function and its stack and ends the process with SIGTERM. The advice on how to resume
   follows.
3. A call in C that neither checks for signals nor lets other threads run also blocks the watching thread. Then
   `faulthandler`, which needs no Python, prints the stacks and ends the process.
"""

import asyncio
import atexit
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait

FIRST_NOTE = 60.0  # seconds until the first log line about a running call; the interval doubles after each line
GRACE = 10.0  # seconds that an interrupted call has to end
_AGAIN = 1.0  # seconds until a call that ignored an interrupt is interrupted again

logger = logging.getLogger(__name__)


class _Late(BaseException):
    """Interrupts a reward function. A BaseException, so that `except Exception` does not catch it."""


def call(function: Callable, name: str, seconds: float | None, arguments: dict) -> list:
    """Call a reward function with a batch, and log a line now and then while it runs.

    Args:
        function: the reward function.
        name: its name in the metrics.
        seconds: `reward_timeout`; None for no limit.
        arguments: its keyword arguments: `completions`, and others. Lists as long as `completions` have one item per
            completion.

    Raises:
        TimeoutError: the call took longer than `seconds`. To name the slow completion in the message, the function is
            called again with one completion at a time.
    """
    what = _what(name)

    def once(arguments: dict, where: Callable[[], str]):
        with _Watch(what, seconds, where) as watch:
            if seconds is None:
                return function(**arguments)
            if _may_set_alarm():
                return _with_alarm(function, arguments, watch)
            return _in_thread(function, arguments, seconds)

    try:
        return once(arguments, lambda: _slow_row(_thread_tries(function, seconds), arguments, seconds))
    except _Late:
        _given_up(what, seconds)
    row = _slow_row(lambda one: once(one, lambda: _describe(one)), arguments, seconds)
    raise TimeoutError(_message(what, seconds, row))


async def call_async(function: Callable, name: str, seconds: float | None, arguments: dict) -> list:
    """Call an asynchronous reward function. See `call`."""
    what, loop = _what(name), asyncio.get_running_loop()

    def alone(**arguments):
        return asyncio.run(function(**arguments))

    async def once(arguments: dict, where: Callable[[], str]):
        with _Watch(what, seconds, where):
            task = asyncio.ensure_future(function(**arguments))
            done, _ = await asyncio.wait({task}, timeout=seconds)
            if not done:
                task.cancel()
                raise _Late
            return task.result()

    def from_thread(one: dict):
        return asyncio.run_coroutine_threadsafe(once(one, lambda: _describe(one)), loop).result()

    try:
        return await once(arguments, lambda: _slow_row(_thread_tries(alone, seconds), arguments, seconds))
    except _Late:
        _given_up(what, seconds)
    row = await asyncio.to_thread(_slow_row, from_thread, arguments, seconds)
    raise TimeoutError(_message(what, seconds, row))


class _Watch(threading.Thread):
    """Watches a call from another thread: logs that it is running, and ends the process if it cannot be interrupted.

    Args:
        what: description of the reward function.
        seconds: the limit; None for no limit.
        where: describes the slow completion, for a call that cannot be interrupted.
    """

    def __init__(self, what: str, seconds: float | None, where: Callable[[], str]):
        super().__init__(daemon=True, name="reward_timeout")
        self.what, self.limit, self.where = what, seconds or math.inf, where
        self.called_by = threading.get_ident()
        self.alarmed = False  # whether the call can be interrupted by SIGALRM
        self.begun, self.next_note = time.monotonic(), FIRST_NOTE
        self.ended, self.ending = threading.Event(), threading.Lock()

    def __enter__(self):
        self.start()
        if self.limit < math.inf:
            faulthandler.dump_traceback_later(self.limit + 2 * GRACE, exit=True, file=2)
        return self

    def __exit__(self, *_):
        self.stop()
        self.join()
        if self.limit < math.inf:
            faulthandler.cancel_dump_traceback_later()

    def stop(self) -> None:
        with self.ending:
            self.ended.set()

    def age(self) -> float:
        return time.monotonic() - self.begun

    def run(self) -> None:
        while not self.ended.wait(max(min(self.next_note, max(self.limit, self.age()) + _AGAIN) - self.age(), 0)):
            self.note()
            if self.age() > self.limit + GRACE:
                return self.end()
            if self.age() > self.limit:
                self.interrupt_again()

    def note(self) -> None:
        """Log that the call is still running, if a line is due."""
        if (age := self.age()) < self.next_note:
            return
        self.next_note *= 2
        then = f"It will be interrupted after {self.limit:g} s (reward_timeout)"
        if self.limit == math.inf:
            then = "Set reward_timeout to end the run in such a case, with an error that names the completion"
        logger.warning("%s", f"{self.what} has been running for {age:.0f} s. {then}")

    def interrupt_again(self) -> None:
        with self.ending:  # after the call has ended, the signal would hit other code
            if self.alarmed and not self.ended.is_set() and callable(signal.getsignal(signal.SIGALRM)):
                signal.pthread_kill(self.called_by, signal.SIGALRM)

    def end(self) -> None:
        faulthandler.dump_traceback_later(3 * self.limit + GRACE, exit=True, file=2)  # replaces the earlier one
        stack = "".join(traceback.format_stack(sys._current_frames().get(self.called_by)))
        _given_up(self.what, self.limit, f" and cannot be interrupted at this point:\n{stack}")
        logger.error("%s", _message(self.what, self.limit, self.where()))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)


def _may_set_alarm() -> bool:
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) is not None


def _with_alarm(function: Callable, arguments: dict, watch: _Watch):
    struck = False

    def arm() -> None:  # for the limit, and for log lines when the watching thread cannot run
        signal.setitimer(signal.ITIMER_REAL, max(min(watch.next_note + _AGAIN, watch.limit) - watch.age(), 0.001))

    def strike(*_) -> None:
        nonlocal struck
        if watch.ended.is_set():
            return
        watch.note()
        if watch.age() >= watch.limit:
            struck = True
            raise _Late
        arm()

    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)  # a timer set by other code is restored after the call
    before = signal.signal(signal.SIGALRM, strike)
    watch.alarmed = True
    try:
        try:
            arm()
            values = function(**arguments)
        finally:
            watch.stop()
    finally:
        watch.stop()  # again: the alarm may have interrupted the first stop
        if signal.getsignal(signal.SIGALRM) is strike:  # otherwise the function has set its own handler
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if left:
                signal.setitimer(signal.ITIMER_REAL, max(left - watch.age(), 0.001), interval)
    if struck:  # but the function caught the exception
        raise _Late
    return values


def _in_thread(function: Callable, arguments: dict, seconds: float):
    outcome = Future()

    def work() -> None:
        try:
            outcome.set_result(function(**arguments))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise _Late
    return outcome.result()


def _thread_tries(function: Callable, seconds: float | None) -> Callable[[dict], object]:
    return lambda one: _in_thread(function, one, seconds)


def _slow_row(attempt: Callable[[dict], object], arguments: dict, seconds: float) -> str:
    """Return a sentence on which completion alone takes longer than the limit.

    The search ends once the completions together have taken longer than the limit: then no single one was slow.
    """
    count, begun = len(arguments["completions"]), time.monotonic()
    for i in range(count):
        one = {
            key: value[i : i + 1] if isinstance(value, list | tuple) and len(value) == count else value
            for key, value in arguments.items()
        }
        try:
            attempt(one)
        except _Late:
            return f"Completion {i} of {count} alone takes that long: {_describe(one)}"
        except Exception as error:  # the function may not support a single completion
            return f"The slow completion was not found: with completion {i} alone the function fails ({error!r:.200})"
        if time.monotonic() - begun > seconds:
            break
    took = f"the first {i + 1} of {count}, one at a time, took {time.monotonic() - begun:.3g} s"
    return f"No single completion takes that long: {took}"


def _describe(one: dict) -> str:
    """Return the beginning of the prompt and of the completion, on one line."""
    return ", ".join(
        f"{name} {_text(one[key][0])[:120]!r}"
        for name, key in (("prompt", "prompts"), ("completion", "completions"))
        if one.get(key)
    )


def _text(value) -> str:
    """Return a text, or the content of a conversation's last message."""
    return str(value[-1].get("content") if isinstance(value, list) and value else value)


def _what(name: str) -> str:
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1  # the launcher sets it
    return f"The reward function {name!r}" + (f" (process {os.environ.get('RANK', 0)})" if several else "")


def _message(what: str, seconds: float, row: str) -> str:
    return (
        f"{what} took longer than reward_timeout ({seconds:g} s). {row}. Set a time limit in the function, or raise "
        "reward_timeout"
    )


def _given_up(what: str, seconds: float, more: str = ". Searching for the slow completion") -> None:
    """Log that a call took too long, and keep threads that it has left, such as a pool's, from blocking the exit."""
    logger.warning("%s took longer than reward_timeout (%g s)%s", what, seconds, more)
    left = threading.Event()
    atexit.register(left.set)  # runs after Python has waited for the other threads

    def end() -> None:
        threading.main_thread().join()
        if not left.wait(GRACE):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
