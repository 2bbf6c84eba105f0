"""The worker processes: what happens when they, or the process that uses them, come to grief."""

import json
import multiprocessing
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ktae_trl import grading
from ktae_trl.grading import confinement, grade, grade_full, grade_many, grade_many_full, pool
from tests.processes import started

ENDLESS = r"\boxed{9^{9^{9^{9^{9}}}}}"
HARD = r"\boxed{1+x}"  # right for x+1, but not as text


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Each test compares anew what others have compared before."""
    monkeypatch.setattr(grading, "_verdicts", {})


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
    grade(HARD, "x+2")
    assert workers() == before


def test_number_of_workers(monkeypatch):
    completions, golds = [rf"\boxed{{{i}+x}}" for i in range(40)], [f"x+{i}" for i in range(40)]
    for count in (1, 3):
        assert grade_many(completions, golds, workers=count) == [True] * 40
        assert len(workers()) == count
        grading._verdicts.clear()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # as torchrun sets it
    assert grade_many(completions, golds) == [True] * 40
    assert len(workers()) == 1


def test_easy_answers_start_no_worker():
    grading._close()
    assert grade_many([r"\boxed{17}", r"\boxed{0.5}", r"\boxed{18}", "none"], ["17", r"\frac12", "17", "17"]) == [
        True, True, False, False,
    ]  # fmt: skip
    assert grading._pool is None


BLOWS = [signal.SIGKILL, signal.SIGSTOP]
RIGHT = [rf"\boxed{{{i}+x}}" for i in range(6)], [f"x+{i}" for i in range(6)]


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("blow", BLOWS)
@pytest.mark.parametrize("count", [1, 3])
def test_idle_workers_that_are_killed_or_frozen_cost_no_verdict(blow, count):
    """All of them at once."""
    assert grade_many(*RIGHT, workers=count) == [True] * 6
    grading._verdicts.clear()
    victims = workers()
    for victim in victims:
        os.kill(victim, blow)
    begin = time.monotonic()
    assert [result.reason for result in grade_many_full(*RIGHT, workers=count)] == ["equal"] * 6
    assert time.monotonic() - begin < 3 + 10  # it was noticed within 3 s; new workers start
    assert not set(victims) & set(workers())
    assert gone(victims)


@pytest.mark.slow
@pytest.mark.parametrize("blow", BLOWS)
def test_a_busy_worker_that_is_killed_or_frozen_costs_no_verdict(blow):
    """Neither that of the answer it worked on, nor those of the answers in its pipe."""
    grade_many([HARD], ["x+1"], workers=1)
    (victim,) = workers()
    threading.Timer(0.5, os.kill, (victim, blow)).start()
    # The costly one first, as it comes: sorted, it would be the last.
    outcomes = grading._pool.run([pool.Task(("x+1",), ENDLESS[7:-1]), *[pool.Task(("x+1",), "1+x")] * 20])
    assert [outcome.verdict for outcome in outcomes] == ["timeout", *["equal"] * 20]
    assert victim not in workers()
    assert gone([victim])


def test_only_an_answer_that_ends_a_fresh_worker_too_is_to_blame(monkeypatch):
    """Graded a second time, not a third; the answers beside it get their verdicts."""
    plain_send, sent = pool._Worker.send, []

    def send(self, number, line):
        plain_send(self, number, line)
        if b"666" in line:
            sent.append(self.process.pid)
            self.process.kill()

    grading._close()
    monkeypatch.setattr(pool._Worker, "send", send)
    died = ("worker died", "unparsable gold")  # had it read the accepted answer?
    assert grade_full(r"\boxed{666+x}", "x+666").reason in died
    assert len(set(sent)) == len(sent) == 2
    # In the pipe behind others it ends the workers of others, who are innocent.
    completions = [*RIGHT[0], r"\boxed{666+x}"]
    reasons = [grade.reason for grade in grade_many_full(completions, [*RIGHT[1], "x+666"], workers=1)]
    assert reasons[:-1] == ["equal"] * 6
    assert reasons[-1] in died
    assert not any(reason in grading._verdicts.values() for reason in ("worker died", "unparsable gold"))


def test_an_answer_that_fills_the_pipe_of_a_frozen_worker():
    grade_many([HARD], ["x+1"], workers=1)
    os.kill(workers()[0], signal.SIGSTOP)
    golds = ["x+1", *[f"x+{i}" + " " * 9000 for i in range(2, 30)]]
    assert grade_many([HARD], [golds], workers=1) == [True]


@pytest.mark.parametrize(
    ("state", "active", "ready", "late_after"),
    [
        ("S", False, True, pool._SILENT_SECONDS),
        ("T", False, True, pool._SILENT_SECONDS),
        ("T", False, False, pool._SILENT_SECONDS),
        ("S", False, False, pool._START_SECONDS),
        ("R", False, True, pool._WALL_SECONDS),  # no processor is free for it
        ("D", False, True, pool._WALL_SECONDS),  # its memory is on a disk
        ("S", True, True, pool._WALL_SECONDS),
        (None, False, True, pool._WALL_SECONDS),  # no /proc here
    ],
)
def test_frozen_or_slow(monkeypatch, state, active, ready, late_after):
    ticks = iter(range(10_000))
    monkeypatch.setattr(pool, "_activity", lambda _: (state, state and (b"%d" % next(ticks) if active else b"7")))
    worker = pool._Worker()
    try:
        worker.ready = ready
        worker.tasks.append(0)
        seconds = 0.0
        while not worker.is_late(0.125):
            seconds += 0.125
        assert late_after - 0.25 <= seconds <= late_after + 0.5
    finally:
        worker.kill()


@pytest.mark.slow
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


@pytest.mark.slow
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
    monkeypatch.setattr(pool, "_SILENT_SECONDS", 0.1)
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
    assert grade(HARD, "x+3") is False
    assert workers() == mine


def run(script: str):
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


GRADE_FOR_EVER = r"""
from ktae_trl.grading import grade, grade_many
grade(r"\boxed{1+x}", "x+1")
print("ready", flush=True)
i = 9
while True:
    i += 1
    grade_many([rf"\boxed{{{i}^{{9^{{9^{{9^{{9}}}}}}}}}}"] * 2, ["x+1", "x+2"])
"""


@pytest.mark.slow_after(1)
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
        assert gone(pids, 60)  # each may use its 2 s of processor time


def test_after_a_ctrl_c_grading_goes_on():
    script = r"""
        import os, signal, threading
        from ktae_trl.grading import grade, grade_many
        threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        i = 9
        try:
            while True:
                i += 1
                grade_many([rf"\boxed{{{i}^{{9^{{9^{{9^{{9}}}}}}}}}}"], ["x+1"])
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


def flood(count: int) -> tuple[list[str], list[str]]:
    """Answers that never end, each another one, and their accepted answer."""
    return [rf"\boxed{{{i + 2}^{{9^{{9^{{9^{{9}}}}}}}}}}" for i in range(count)], ["x+1"] * count


@pytest.mark.slow
def test_a_flood_of_hostile_answers_costs_its_budget_and_no_right_answer(monkeypatch, caplog):
    monkeypatch.setattr(pool, "SECONDS", 0.5)
    monkeypatch.setattr(grading, "_LEAST_BUDGET", 1.0)
    monkeypatch.setattr(grading, "_told", False)
    completions, golds = flood(40)
    completions, golds = completions + RIGHT[0], golds + RIGHT[1]
    for _ in range(2):
        reasons = [grade.reason for grade in grade_many_full(completions, golds, workers=2, budget=1.0)]
        assert reasons[-6:] == ["equal"] * 6
        assert set(reasons[:-6]) == {"timeout", "budget"}
    (warning,) = [record.message for record in caplog.records if "not compared" in record.message]
    assert re.match(r"\d+ of 46 answers were not compared and count as wrong", warning)
    assert "grading_budget" in warning
    assert "budget" not in grading._verdicts.values()
    # Nobody works on any of them any more.
    assert grade_many(*RIGHT, workers=2) == [True] * 6


def test_without_a_budget_all_are_compared(monkeypatch):
    monkeypatch.setattr(pool, "SECONDS", 0.5)
    monkeypatch.setattr(grading, "_LEAST_BUDGET", 0.1)
    assert {grade.reason for grade in grade_many_full(*flood(3), budget=None)} == {"timeout"}


def test_the_start_of_workers_is_no_part_of_the_budget(monkeypatch):
    monkeypatch.setattr(grading, "_LEAST_BUDGET", 0.4)
    grading._close()
    assert grade_many([HARD], ["x+1"], budget=0.1) == [True]


def test_size_of_the_budget(monkeypatch):
    """max(10, budget * N / 1000), of all N completions, whatever is settled as text."""
    given = []

    class Spy:
        size = 1

        def run(self, tasks, budget):
            given.append(budget)
            return [pool.Outcome("different", True)] * len(tasks)

        def close(self):
            pass

    monkeypatch.setattr(grading, "_pool", Spy())
    for count, budget in ((1, 60.0), (32, 60.0), (1000, 60.0), (1024, 30.0), (1000, 0.5), (1000, None)):
        grading._verdicts.clear()
        grade_many([HARD, *[r"\boxed{4}"] * (count - 1)], ["x+1"] * count, workers=1, budget=budget)
    assert given == [10, 10, 60, 30.72, 10, None]


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_a_budget_is_above_0(budget):
    with pytest.raises(ValueError, match=f"budget must be above 0.*not {budget}"):
        grade_many([HARD], ["x+1"], budget=budget)


def test_nothing_is_compared_twice(monkeypatch):
    completions = [HARD, ENDLESS, r"\boxed{???}", HARD, HARD]
    golds = ["x+1", "x+1", "x+1", "???+y", ["x+3", "x+1"]]
    first = grade_many_full(completions, golds)
    assert [grade.reason for grade in first] == ["equal", "timeout", "unparsable answer", "unparsable gold", "equal"]
    monkeypatch.setattr(pool.Pool, "run", None)  # calling it would be an error
    assert grade_many_full(completions, golds) == first


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(grading, "_REMEMBERED", 3)
    for i in range(4):
        grade(HARD, f"x+{i}")
        assert grade(HARD, "x+0") is False  # used again, so not the one to forget
    monkeypatch.setattr(pool.Pool, "run", None)
    assert grade(HARD, "x+0") is False
    assert grade(HARD, "x+3") is False
    with pytest.raises(TypeError):
        grade(HARD, "x+1")


PROBE = r"""
import json, os, socket, subprocess, sys
from ktae_trl.grading import symbolic, worker

folder, port, left = sys.argv[1], int(sys.argv[2]), os.path.join(sys.argv[1], "left")

def fork():
    if os.fork() == 0:
        os._exit(0)

def write():
    with open(os.path.join(folder, "new"), "w") as file:
        file.write("x")

tries = {
    "fork": fork, "write": write,
    "append": lambda: os.write(os.open(left, os.O_WRONLY | os.O_APPEND), b"x"),
    "run": lambda: subprocess.run(["true"], check=True),
    "thread": lambda: __import__("_thread").start_new_thread(print, ()),
    "remove": lambda: os.remove(left),
    "rename": lambda: os.rename(left, left + "2"),
    "connect": lambda: socket.create_connection(("127.0.0.1", port), 5),
    "kill": lambda: os.kill(os.getppid(), 0),
    "read": lambda: open(left).read(),
    "import": lambda: __import__("csv"),
}

def attempt(name):
    try:
        tries[name]()
    except (OSError, RuntimeError) as error:
        return type(error).__name__
    return "done"

worker._verdict = lambda golds, answer, say: json.dumps({name: attempt(name) for name in tries})
worker.main(500)
"""


def test_code_in_a_worker_can_only_compute(tmp_path):
    (tmp_path / "left").write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        done = subprocess.run(
            [sys.executable, "-c", PROBE, tmp_path, str(server.getsockname()[1])],
            input='[2.0, ["x"], "x"]\n',
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1].rpartition(" ")[0])
        reached = True
        try:
            server.accept()[0].close()
        except TimeoutError:
            reached = False
    assert found["read"] == found["import"] == "done"  # what is imported late is still found
    assert found["write"] != "done"
    assert found["append"] != "done"
    assert (tmp_path / "left").read_text() == "here"
    if sys.platform != "linux" or platform.machine() not in confinement._ARCHITECTURES:
        pytest.skip(f"no filter of system calls for {sys.platform} on {platform.machine()}")
    assert reached is False
    assert list(tmp_path.iterdir()) == [tmp_path / "left"]
    assert {name for name, result in found.items() if result == "done"} == {"read", "import"}
