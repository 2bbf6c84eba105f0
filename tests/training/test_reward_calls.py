"""Reward functions that hang: a line says what is waited for, and `reward_timeout` ends the run."""

import asyncio
import itertools
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from ktae_trl import KTAEGRPOConfig
from ktae_trl.rewards import checked
from ktae_trl.training import reward_calls
from tests.processes import run
from tests.trainers import make_trainer

HANGS, COUNT = 5, 8
COMPLETIONS = [[{"role": "assistant", "content": f"no {i}" if i != HANGS else "hang"}] for i in range(COUNT)]
PROMPTS = [[{"role": "user", "content": f"What is {i}?"}] for i in range(COUNT)]
ROW = rf"Completion {HANGS} of {COUNT} alone takes that long: prompt 'What is {HANGS}\?', completion 'hang'"
TOO_LONG = rf"^The reward function 'mine' took longer than reward_timeout \(0\.3 s\)\. {ROW}\. Set a time limit "


def call(function, seconds=0.3):
    return checked(function, "mine", seconds)(completions=COMPLETIONS, prompts=PROMPTS, number=list(range(COUNT)))


def rewards(completions, hang, **kwargs):
    """Reward 1 for each completion; the one that says so hangs."""
    for completion, prompt, number in zip(completions, kwargs["prompts"], kwargs["number"], strict=True):
        assert prompt[0]["content"] == f"What is {number}?"  # as few of all that belong to completions
        if completion[-1]["content"] == "hang":
            hang()
    return [1.0] * len(completions)


def loop():
    while True:
        pass


def socket_read():
    here, there = socket.socketpair()
    with here, there:
        here.recv(1)


def caught():
    while True:
        with suppress(Exception):
            time.sleep(100)


def pool():
    stop = threading.Event()
    try:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(stop.wait).result()
    finally:
        stop.set()


def alarm_of_its_own():
    """As math-verify's: takes the alarm, and puts back the handler only."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    time.sleep(100)


HANGING = {
    "loop": loop,
    "sleep": lambda: time.sleep(100),
    "socket": socket_read,
    "regular expression": lambda: re.match(r"(a+)+$", "a" * 50 + "b"),
    "lock": lambda: threading.Lock().acquire() and threading.Event().wait(),
    "catches exceptions": caught,
    "pool of threads": pool,
    "alarm of its own": alarm_of_its_own,
}


@pytest.fixture
def outer_alarm():
    """A timer of somebody else, as of pytest-timeout, which goes on after a call."""

    def handler(*_):
        raise AssertionError("the outer alarm")

    before, timer = signal.signal(signal.SIGALRM, handler), signal.setitimer(signal.ITIMER_REAL, 50)
    yield
    left, _ = signal.setitimer(signal.ITIMER_REAL, *timer)
    now = signal.signal(signal.SIGALRM, before)
    assert now is handler
    assert 20 < left < 50


@pytest.mark.parametrize("hang", HANGING.values(), ids=HANGING)
def test_a_function_that_hangs_is_named_with_the_completion(hang, outer_alarm):
    with pytest.raises(TimeoutError, match=TOO_LONG):
        call(lambda **kwargs: rewards(hang=hang, **kwargs))


@pytest.mark.parametrize("hang", ["loop", "sleep"])
def test_off_the_main_thread(hang):
    stop = threading.Event()  # so that the threads that are left end with the test
    waits = {"sleep": stop.wait, "loop": lambda: any(stop.is_set() for _ in itertools.count())}
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(call, lambda **kwargs: rewards(hang=waits[hang], **kwargs))
        with pytest.raises(TimeoutError, match=TOO_LONG):
            late.result()
        stop.set()


def test_an_asynchronous_function():
    async def mine(completions, prompts, **kwargs):
        if any(completion[-1]["content"] == "hang" for completion in completions):
            await asyncio.sleep(100)
        return [1.0] * len(completions)

    with pytest.raises(TimeoutError, match=TOO_LONG):
        asyncio.run(call(mine))


def test_a_batch_that_takes_too_long_as_a_whole():
    def mine(completions, **kwargs):
        time.sleep(0.12 * len(completions))
        return [1.0] * len(completions)

    with pytest.raises(TimeoutError, match=r"No single completion takes that long: the first \d of 8, one"):
        call(mine)

    def whole_batches_only(completions, **kwargs):
        assert len(completions) == COUNT
        time.sleep(100)

    with pytest.raises(TimeoutError, match=r"with completion 0 alone the function fails \(AssertionError"):
        call(whole_batches_only)


@pytest.mark.parametrize("seconds", [None, 30])
def test_in_time_nothing_changes(seconds):
    """Its values and errors pass, a TimeoutError of its own too, and so do its thread and its alarms."""
    seen = []

    def mine(completions, **kwargs):
        seen.append(threading.current_thread())
        before = signal.signal(signal.SIGALRM, lambda *_: seen.append("alarm"))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.1)
        signal.signal(signal.SIGALRM, before)
        return range(len(completions))

    assert call(mine, seconds) == list(range(COUNT))
    assert seen == [threading.main_thread(), "alarm"]

    def fails(completions, **kwargs):
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match=r"^of its own$"):
        call(fails, seconds)
    assert not [thread for thread in threading.enumerate() if thread.name == "reward_timeout"]


@pytest.mark.parametrize("how", ["main thread", "another thread", "asynchronous", "regular expression"])
def test_what_is_waited_for_is_said(how, monkeypatch, caplog):
    monkeypatch.setattr(reward_calls, "FIRST_NOTE", 0.1)
    monkeypatch.setattr(reward_calls, "_AGAIN", 0.02)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")

    def mine(completions, **kwargs):
        time.sleep(0.5)
        return [1.0] * len(completions)

    async def asynchronous(completions, **kwargs):
        await asyncio.sleep(0.5)
        return [1.0] * len(completions)

    def matching(completions, **kwargs):  # no other Python runs until it ends
        for length in itertools.count(15):
            begin = time.monotonic()
            re.match(r"(a+)+$", "a" * length + "b")
            if time.monotonic() - begin > 0.25:
                return [1.0] * len(completions)

    timer = signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's; without a limit it would be left alone
    try:
        if how == "another thread":
            with ThreadPoolExecutor(1) as threads:
                threads.submit(call, mine, None).result()
        elif how == "asynchronous":
            asyncio.run(call(asynchronous, None))
        else:
            call(matching if how == "regular expression" else mine, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
    said = [record.getMessage() for record in caplog.records]
    if how != "regular expression":
        assert len(said) == 3  # after 0.1, 0.2 and 0.4 seconds
    for line in said:
        assert re.fullmatch(
            r"The reward function 'mine' \(process 1\) has been running for \d s\. Set reward_timeout to end the run "
            "in such a case, with an error that names the completion",
            line,
        )
    assert said


RUN = """
import asyncio, ctypes, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from ktae_trl.training import reward_calls
from ktae_trl.rewards import checked
from ktae_trl.training.stopping import advice_at_the_end
from tests.training.test_reward_calls import COMPLETIONS, COUNT, PROMPTS, rewards
from tests.training.test_stopping import trainer_in

reward_calls.GRACE = 1
library = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)

def lock_in_c():
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def no_other_python():
    sum(iter(int, 1))

def pool_of_threads():
    with ThreadPoolExecutor(1) as threads:
        threads.submit(threading.Event().wait).result()

def catches_all():
    while True:
        try:
            time.sleep(100)
        except:
            pass

def mine(**kwargs):
    return rewards(hang=globals()[sys.argv[2]], **kwargs)

async def blocks(completions, **kwargs):
    for completion in completions:
        if completion[-1]["content"] == "hang":
            time.sleep(100)
    return [1.0] * len(completions)

def train():
    function = blocks if sys.argv[2] == "blocks" else mine
    return checked(function, "mine", 0.3)(completions=COMPLETIONS, prompts=PROMPTS, number=list(range(COUNT)))

with advice_at_the_end(trainer_in(Path(sys.argv[1]))):
    values = train()
    if sys.argv[2] == "blocks":  # as TRL does
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(values, loop).result()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lock_in_c", "blocks", "catches_all", "pool_of_threads"])
def test_what_cannot_be_interrupted_ends_with_its_process(tmp_path, how):
    done = run([sys.executable, "-c", RUN, str(tmp_path), how], timeout=60)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert re.search(TOO_LONG[1:], done.stderr), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train.py: training stopped after step 7: ")
    assert last.endswith("yet. Start again")
    if how != "pool_of_threads":  # which is interrupted, but keeps its thread
        assert f"in {how}" in done.stderr  # the stack


@pytest.mark.slow
def test_what_lets_no_python_run_ends_with_its_process(tmp_path):
    done = run([sys.executable, "-c", RUN, str(tmp_path), "no_other_python"], timeout=60)
    assert done.returncode == 1
    assert "Timeout (0:00:02.300000)!" in done.stderr
    assert " in no_other_python" in done.stderr


def test_reward_timeout_reaches_the_functions_of_a_training(tmp_path):
    def mine(completions, **kwargs):
        time.sleep(100)

    with pytest.raises(TimeoutError, match=r"'mine' took longer than reward_timeout \(0\.2 s\)\. Completion 0 of 16"):
        make_trainer(tmp_path, reward_funcs=mine, reward_timeout=0.2).train()


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_bad_limits(tmp_path, value):
    with pytest.raises(ValueError, match=f"reward_timeout must be a positive number of seconds, or None.*{value}"):
        KTAEGRPOConfig(str(tmp_path), reward_timeout=value, use_cpu=True, bf16=False)
