"""The worker processes: what happens when they, or the process that uses them, come to grief."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ktae_trl import grading
from ktae_trl.grading import grade, grade_full, grade_many, grade_many_full, pool
from tests.processes import started

ENDLESS = r"\boxed{9^{9^{9^{9^{9}}}}}"
HARD = r"\boxed{1+x}"  # right for x+1, but not as text


def workers() -> list[int]:
    return [worker.process.pid for worker in grading._pool.workers]


def children(pid: int) -> list[int]:
    """The grading workers that a process has started, zombies too, by /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(status[1]) == pid:
            found.append(int(entry.name))
    return found


def gone(pids: list[int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_workers_stay_for_the_next_call():
    grade(HARD, "x+1")
    before = workers()
    grade(HARD, "x+1")
    assert workers() == before


def test_number_of_workers(monkeypatch):
    completions, golds = [rf"\boxed{{{i}+x}}" for i in range(40)], [f"x+{i}" for i in range(40)]
    for count in (1, 3):
        assert grade_many(completions, golds, workers=count) == [True] * 40
        assert len(workers()) == count
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # as torchrun sets it
    assert grade_many(completions, golds) == [True] * 40
    assert len(workers()) == 1


def test_easy_answers_start_no_worker():
    grading._close()
    assert grade_many([r"\boxed{17}", r"\boxed{0.5}", r"\boxed{18}", "none"], ["17", r"\frac12", "17", "17"]) == [
        True, True, False, False,
    ]  # fmt: skip
    assert grading._pool is None


def test_a_killed_worker_costs_one_verdict():
    assert grade(HARD, "x+1")
    grading._close()
    grade_many([HARD], ["x+1"], workers=1)
    (victim,) = workers()
    threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    completions = [ENDLESS, *[rf"\boxed{{{i}+x}}" for i in range(20)]]
    results = grade_many_full(completions, ["x+1", *[f"x+{i}" for i in range(20)]], workers=1)
    assert [result.reason for result in results] == ["worker died", *["equal"] * 20]
    assert victim not in workers()
    assert gone([victim])


def test_a_timeout_kills_for_real():
    grading._close()
    grade_many([HARD], ["x+1"], workers=1)
    (victim,) = workers()
    completions = [HARD, ENDLESS, HARD, ENDLESS.replace("9", "8"), HARD]
    results = grade_many_full(completions, ["x+1"] * 5, workers=1)
    assert [result.reason for result in results] == ["equal", "timeout", "equal", "timeout", "equal"]
    assert gone([victim])


def test_a_worker_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    grading._close()
    (tmp_path / "math_verify.py").write_text("raise ImportError('no such thing here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)grading workers cannot start.*no such thing here"):
        grade(HARD, "x+1")
    monkeypatch.undo()
    assert grade(HARD, "x+1") is True


def test_one_failed_start_is_no_error(monkeypatch):
    grading._close()
    plain_start, starts = pool._Worker.__init__, []

    def start(self):
        plain_start(self)
        starts.append(self.process.pid)
        if len(starts) == 1:
            self.process.kill()  # as the system does when memory runs out

    monkeypatch.setattr(pool._Worker, "__init__", start)
    assert grade_many([HARD, HARD], ["x+1", "x+2"], workers=1) == [True, False]
    assert len(starts) == 2


def test_a_busy_machine_makes_no_timeouts():
    """The limit is on a worker's own processor time: eight workers on these cores are slow, not wrong."""
    completions = [rf"\boxed{{(x+{i})^8 - (x+{i})^7}}" for i in range(24)]
    golds = [rf"(x+{i})^7 (x+{i}-1)" for i in range(24)]
    assert grade_many(completions, golds, workers=8) == [True] * 24


def test_a_main_process_that_was_held_up_is_no_timeout(monkeypatch):
    """The verdict came in time, but nobody looked: it counts."""
    grade(HARD, "x+1")
    plain_wait = pool.Pool._wait

    def late(self, seconds):
        time.sleep(0.3)
        return plain_wait(self, seconds)

    monkeypatch.setattr(pool.Pool, "_wait", late)
    monkeypatch.setattr(pool, "_WALL_SECONDS", 0.1)
    assert grade_full(r"\boxed{2+x}", "x+2").reason == "equal"


def test_threads_take_turns():
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda i: grade(rf"\boxed{{{i}+x}}", f"x+{i - i % 2}"), range(40)))
    assert verdicts == [True, False] * 20


def grade_elsewhere(queue):
    queue.put((grade_many([HARD, HARD], ["x+1", "x+2"]), workers()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_have_workers_of_their_own(method):
    grade(HARD, "x+1")
    mine = workers()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=grade_elsewhere, args=(queue,))
    child.start()
    verdicts, theirs = queue.get(timeout=60)
    child.join()
    assert verdicts == [True, False]
    assert not set(mine) & set(theirs)
    assert gone(theirs)
    assert grade(HARD, "x+1") is True
    assert workers() == mine


def run(script: str):
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


GRADE_FOR_EVER = r"""
from ktae_trl.grading import grade, grade_many
grade(r"\boxed{1+x}", "x+1")
print("ready", flush=True)
while True:
    grade_many([r"\boxed{9^{9^{9^{9^{9}}}}}"] * 2, ["x+1", "x+2"])
"""


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_no_worker_outlives_the_main_process(blow):
    """Ctrl-C goes to the whole process group; a kill only to the main process, in the middle of a computation."""
    with run(GRADE_FOR_EVER) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        pids = children(process.pid)
        assert len(pids) in (1, 2)
        (os.killpg if blow == signal.SIGINT else os.kill)(process.pid, blow)
        _, errors = process.communicate(timeout=30)
        assert ("KeyboardInterrupt" in errors) == (blow == signal.SIGINT)
        assert "BrokenPipe" not in errors
        assert gone(pids)


def test_after_a_ctrl_c_grading_goes_on():
    script = r"""
        import os, signal, threading
        from ktae_trl.grading import grade, grade_many
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                grade_many([r"\boxed{9^{9^{9^{9^{9}}}}}"], ["x+1"])
        except KeyboardInterrupt:
            print(grade_many([r"\boxed{1+x}", r"\boxed{2+x}"], ["x+1", "x+1"]))
        """
    with run(script) as process:
        output, errors = process.communicate(timeout=60)
    assert output == "[True, False]\n", errors


def test_workers_are_light():
    """Neither torch nor the main script: each worker is small, and starts fast."""
    grade(HARD, "x+1")
    for pid in workers():
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
        peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmPeak"))
        assert int(peak.split()[1]) < pool.MEGABYTES * 1024
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        assert next(line.split()[3] for line in limits if "address space" in line) == str(pool.MEGABYTES << 20)


def test_workers_leave_ctrl_c_to_the_main_process():
    grade(HARD, "x+1")
    before = workers()
    for pid in before:
        os.kill(pid, signal.SIGINT)
    assert grade_full(r"\boxed{2+x}", "x+2").reason == "equal"
    assert workers() == before
