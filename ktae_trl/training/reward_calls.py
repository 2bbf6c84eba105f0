"""Calls of reward functions: a line says what is waited for, and `reward_timeout` ends a run whose function hangs.

A call that takes longer than `reward_timeout` is interrupted where it runs, so that a function keeps the state of its
thread and may use signals itself:

1. On the main thread by SIGALRM, which wakes a sleep or a socket, and which regular expressions look for. A function
   that sets an alarm itself, as math-verify does, takes ours away: the watching thread sends it again. An asynchronous
   function is cancelled. Other threads get no signals: there the function runs in a thread of its own, which is left.
2. What does not end in `GRACE` seconds (a lock in C, a sleep in an asynchronous function) ends with its process: the
   watching thread says which function it is, with its stack, and sends SIGTERM, so that the advice how to resume
   follows.
3. A call in C that neither looks for signals nor lets another thread run leaves `faulthandler`, which needs no Python:
   it prints the stacks and ends the process.
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

FIRST_NOTE = 60.0  # seconds until a line says what is waited for; the next ones come after twice as long each
GRACE = 10.0  # seconds that an interrupted call may take to end
_AGAIN = 1.0  # seconds until a call that went on is interrupted again

logger = logging.getLogger(__name__)


class _Late(BaseException):
    """Interrupts a reward function. Functions that catch any Exception do not catch it."""


def call(function: Callable, name: str, seconds: float | None, arguments: dict) -> list:
    """Call a reward function with a batch; say now and then that it is waited for.

    Args:
        function: takes `completions` and other lists, of which those of as many items belong to the completions.
        name: as metrics have it.
        seconds: `reward_timeout`, None for no limit.
        arguments: the keyword arguments.

    Raises:
        TimeoutError: it took longer than `seconds`. The message names the completion that does so by itself: they are
            tried one at a time.
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
    """Call an asynchronous reward function as `call` does the others."""
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
    """Runs beside a call: says what is waited for, and ends what does not end.

    Args:
        what: names the reward function.
        seconds: the limit.
        where: finds the completion that takes so long, where the call cannot be interrupted.
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
        """Say what is waited for, if it is time to."""
        if (age := self.age()) < self.next_note:
            return
        self.next_note *= 2
        then = f"reward_timeout ends it after {self.limit:g} s"
        if self.limit == math.inf:
            then = "With reward_timeout, such a call ends the run with an error that names the completion"
        logger.warning("%s", f"{self.what} has been running for {age:.0f} s. {then}")

    def interrupt_again(self) -> None:
        with self.ending:  # once it has ended, the signal would mean something else
            if self.alarmed and not self.ended.is_set() and callable(signal.getsignal(signal.SIGALRM)):
                signal.pthread_kill(self.called_by, signal.SIGALRM)

    def end(self) -> None:
        faulthandler.dump_traceback_later(3 * self.limit + GRACE, exit=True, file=2)  # in place of the one before
        stack = "".join(traceback.format_stack(sys._current_frames().get(self.called_by)))
        _given_up(self.what, self.limit, f", and cannot be interrupted where it is:\n{stack}")
        logger.error("%s", _message(self.what, self.limit, self.where()))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)


def _may_set_alarm() -> bool:
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) is not None


def _with_alarm(function: Callable, arguments: dict, watch: _Watch):
    struck = False

    def arm() -> None:  # notes are the watching thread's, unless it cannot run
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

    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)  # somebody's timer goes on after the call
    before = signal.signal(signal.SIGALRM, strike)
    watch.alarmed = True
    try:
        try:
            arm()
            values = function(**arguments)
        finally:
            watch.stop()
    finally:
        watch.stop()  # the alarm may have struck in the first
        if signal.getsignal(signal.SIGALRM) is strike:  # else the function has set its own
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if left:
                signal.setitimer(signal.ITIMER_REAL, max(left - watch.age(), 0.001), interval)
    if struck:  # and the function has caught it
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
    """Say which completion takes longer than the limit by itself.

    If single ones do not, but together they did by then, the batch as a whole is to blame.
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
            return f"Completion {i} of {count} takes that long by itself: {_describe(one)}"
        except Exception as error:  # whatever a function does that is not made for one completion
            return f"Which completion it is cannot be said: with completion {i} alone it fails ({error!r:.200})"
        if time.monotonic() - begun > seconds:
            break
    took = f"the first {i + 1}, one at a time, took {time.monotonic() - begun:.3g} s"
    return f"None of its {count} completions takes that long by itself: {took}"


def _describe(one: dict) -> str:
    """Return the heads of a prompt and a completion, on one line."""
    return ", ".join(
        f"{name} {_text(one[key][0])[:120]!r}"
        for name, key in (("prompt", "prompts"), ("completion", "completions"))
        if one.get(key)
    )


def _text(value) -> str:
    """Return a text, or that of a conversation's last message."""
    return str(value[-1].get("content") if isinstance(value, list) and value else value)


def _what(name: str) -> str:
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1  # set by the launcher
    return f"The reward function {name!r}" + (f" (process {os.environ.get('RANK', 0)})" if several else "")


def _message(what: str, seconds: float, row: str) -> str:
    return (
        f"{what} took longer than reward_timeout ({seconds:g} s). {row}. Limit the time of what the function calls, or "
        "raise reward_timeout"
    )


def _given_up(what: str, seconds: float, more: str = "; looking for the completion that takes so long") -> None:
    """Say that a call is late. Threads that it has left, as of a pool, must not keep the process from ending."""
    logger.warning("%s took longer than reward_timeout (%g s)%s", what, seconds, more)
    left = threading.Event()
    atexit.register(left.set)  # called once no other thread is waited for

    def end() -> None:
        threading.main_thread().join()
        if not left.wait(GRACE):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
