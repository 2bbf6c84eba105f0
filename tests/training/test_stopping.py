"""What a training says that stops before its end."""

import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from ktae_trl.files.checkpoints import ResumeError
from ktae_trl.hub.upload import HubError
from ktae_trl.training.stopping import Advice, advice_at_the_end, reason_of
from tests.distributed.launching import environment
from tests.processes import children, gone, run, started


def trainer_in(folder, step=7, processes=1):
    return SimpleNamespace(
        args=SimpleNamespace(output_dir=str(folder)),
        state=SimpleNamespace(global_step=step, max_steps=20),
        accelerator=SimpleNamespace(process_index=0, num_processes=processes),
    )


def checkpoint(folder, step, whole=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if whole:
        (path / "trainer_state.json").write_text('{"global_step": 1}')
    return str(path)


def test_the_line_says_where_it_stopped_and_how_to_resume(tmp_path):
    advice = Advice(trainer_in(tmp_path))
    stopped = "train.py: training stopped after step 7: interrupted. "
    assert advice.line("interrupted") == f"{stopped}There is no checkpoint in {tmp_path} yet. Start again"
    resume = f"Resume from the last checkpoint ({checkpoint(tmp_path, 6)}) with --resume_from_checkpoint true"
    assert advice.line("interrupted") == stopped + resume
    finished = Advice(trainer_in(tmp_path, step=20, processes=2))
    last = "train.py: stopped after the last training step (20), before everything was saved (process 0): no space. "
    assert finished.line("no space") == last + resume
    finished.saved = "It is in x"
    assert finished.line("?") == "train.py: stopped after the model was saved (process 0): ?. It is in x"


STOPS = """
import atexit, sys
from tqdm import tqdm
from tests.training.test_stopping import trainer_in
from ktae_trl.training.stopping import advice_at_the_end
with advice_at_the_end(trainer_in(sys.argv[1])):
    atexit.register(print, "a tracker ends", file=sys.stderr)
    bar = tqdm(total=3, bar_format="a bar\\n")
    raise {error}
"""


def stops(tmp_path, error: str) -> tuple[int, list[str]]:
    """Raise an error in a run; return the exit code and the lines of stderr."""
    script = [sys.executable, "-c", STOPS.format(error=error), str(tmp_path)]
    done = run(script, timeout=60)
    return done.returncode, [line for line in done.stderr.splitlines() if line]


@pytest.mark.slow
def test_the_last_line_after_an_error_is_the_advice(tmp_path):
    code, lines = stops(tmp_path, "ValueError('first')")
    assert code == 1
    assert lines[1].startswith("a bar")
    assert lines[2].startswith("Traceback")
    assert lines[-3:-1] == ["ValueError: first", "a tracker ends"]
    start = f"There is no checkpoint in {tmp_path} yet. Start again"
    assert lines[-1] == f"train.py: training stopped after step 7: ValueError: first. {start}"


@pytest.mark.slow
def test_the_last_line_after_ctrl_c_is_the_advice_and_there_is_no_traceback(tmp_path):
    six = checkpoint(tmp_path, 6)
    resume = f"Resume from the last checkpoint ({six}) with --resume_from_checkpoint true"
    said = ["a bar", "a bar", "a tracker ends", f"train.py: training stopped after step 7: interrupted. {resume}"]
    assert stops(tmp_path, "KeyboardInterrupt") == (130, said)


@pytest.mark.parametrize("error", [ResumeError, HubError])
def test_an_error_that_says_what_to_do_gets_no_other_advice(tmp_path, error, monkeypatch):
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr("atexit.unregister", registered.remove)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error), advice_at_the_end(trainer_in(tmp_path)):
        raise error
    assert registered == []
    assert signal.getsignal(signal.SIGTERM) == before


def test_training_that_ends_well_says_nothing(tmp_path, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with advice_at_the_end(trainer_in(tmp_path)):
        pass
    assert capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) == before


def test_reasons():
    gloo = [
        RuntimeError(f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] {what}. Check the logs.")
        for what in (
            "Connection closed by peer [127.0.0.1]:5",
            "Read error [127.0.0.1]:5: Connection reset by peer",
            "Write error [127.0.0.1]:5: Broken pipe",
        )
    ]
    nccl = torch.distributed.DistBackendError("NCCL error in: x.cpp:1\nremote process exited")
    for error in (*gloo, nccl):
        assert reason_of(error).startswith("lost the connection to another process, which has probably died [")
    assert reason_of(AssertionError()) == "AssertionError"
    assert reason_of(ValueError("x. y")) == "ValueError: x. y"


STUCK = """
import ctypes, sys
from tests.training.test_stopping import trainer_in
from ktae_trl.training.stopping import advice_at_the_end
with advice_at_the_end(trainer_in(sys.argv[1], processes=2)):
    print("waiting", flush=True)
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)  # for ever, and no signal makes it return to Python: as in NCCL
"""


FROM_OUTSIDE = {signal.SIGTERM: "received SIGTERM", signal.SIGHUP: "the terminal was closed (SIGHUP)"}


@pytest.mark.slow
@pytest.mark.parametrize("blow", FROM_OUTSIDE)
def test_signals_end_a_process_that_waits_outside_of_python(tmp_path, blow):
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waiting:
        assert waiting.stdout.readline() == "waiting\n"
        waiting.send_signal(blow)
        _, errors = waiting.communicate(timeout=30)
    assert waiting.returncode == 128 + blow
    assert f"train.py: training stopped after step 7 (process 0): {FROM_OUTSIDE[blow]}" in errors


@pytest.mark.slow
def test_signals_that_are_ignored_stay_so(tmp_path):
    """A background job of a shell script ignores SIGINT, and nohup SIGHUP."""
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    ignored = (signal.SIGINT, signal.SIGHUP)
    with started(command, ignored=ignored, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waiting:
        assert waiting.stdout.readline() == "waiting\n"
        for blow in ignored:
            waiting.send_signal(blow)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
        waiting.terminate()
        _, errors = waiting.communicate(timeout=30)
    assert waiting.returncode == 128 + signal.SIGTERM
    assert errors.count("train.py: ") == 1


WITH_A_POOL = """
import sys, time
from concurrent.futures import ProcessPoolExecutor
from tests.training.test_stopping import trainer_in
from ktae_trl.training.stopping import advice_at_the_end
with advice_at_the_end(trainer_in(sys.argv[1])), ProcessPoolExecutor(2) as pool:
    list(pool.map(abs, range(100)))
    print("waiting", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_processes_of_a_pool_end_with_theirs(tmp_path, blow):
    command = [sys.executable, "-c", WITH_A_POOL, str(tmp_path)]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waiting:
        assert waiting.stdout.readline() == "waiting\n"
        workers = children(waiting.pid)
        assert workers
        waiting.send_signal(blow)
        _, errors = waiting.communicate(timeout=30)
        assert gone(workers)
    assert waiting.returncode == 128 + blow
    assert "train.py: training stopped after step 7: " in errors


LAUNCHES = """
import subprocess, sys
subprocess.Popen([sys.executable, "-u", *sys.argv[1:]]).wait()
"""
LAUNCHED = """
import sys, time
from tests.training.test_stopping import trainer_in
from ktae_trl.training.stopping import advice_at_the_end, end_with_launcher
end_with_launcher()
with advice_at_the_end(trainer_in(sys.argv[1])):
    print("waiting", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
def test_a_run_ends_with_its_launcher(tmp_path):
    (tmp_path / "launched.py").write_text(LAUNCHED)
    command = [sys.executable, "-c", LAUNCHES, str(tmp_path / "launched.py"), str(tmp_path)]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as launcher:
        assert launcher.stdout.readline() == "waiting\n"
        launched = children(launcher.pid)
        launcher.kill()
        _, errors = launcher.communicate(timeout=30)
        assert gone(launched)
    assert "train.py: training stopped after step 7: received SIGTERM" in errors


@pytest.mark.slow
def test_a_run_outlives_a_parent_that_is_no_launcher(tmp_path):
    """As a shell is: one that is closed takes those along that it wants to, by SIGHUP."""
    (tmp_path / "launched.py").write_text(LAUNCHED)
    run_it = f"{sys.executable} {tmp_path / 'launched.py'} {tmp_path}; true"
    with started(["bash", "-c", run_it], stdout=subprocess.PIPE, env=environment()) as shell:
        assert shell.stdout.readline() == "waiting\n"
        launched = children(shell.pid)
        shell.kill()
        assert not gone(launched, seconds=1)


WITH_WORKERS = """
import multiprocessing, sys
from tests.training.test_stopping import trainer_in
from ktae_trl.training.stopping import advice_at_the_end
context = multiprocessing.get_context("fork")
with advice_at_the_end(trainer_in(sys.argv[1])):
    for _ in range(20):
        worker = context.Process(target=multiprocessing.Event().wait)
        worker.start()
        worker.terminate()  # it may not have run a line yet
        worker.join(20)
        assert worker.exitcode == -15, worker.exitcode
    remains = context.Process(target=multiprocessing.Event().wait, daemon=True)
    remains.start()
print("trained", flush=True)
"""


@pytest.mark.slow
def test_workers_that_are_forked_in_training_get_their_own_sigterm(tmp_path):
    done = run([sys.executable, "-c", WITH_WORKERS, str(tmp_path)], timeout=60)
    assert done.stdout == "trained\n", done.stderr
    assert "SIGTERM" not in done.stderr


def test_sigterm_is_left_to_whom_it_belongs(tmp_path):
    def handler(*_):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with advice_at_the_end(trainer_in(tmp_path)):
            assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_off_the_main_thread_errors_pass(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("atexit.register", told.append)

    def train():
        with pytest.raises(ValueError, match="bad"), advice_at_the_end(trainer_in(tmp_path)):
            raise ValueError("bad")

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    (tell,) = told
    written = []
    monkeypatch.setattr("os.write", lambda _, line: written.append(line.decode()))
    tell()
    tell()  # once
    assert len(written) == 1
    assert "train.py: training stopped after step 7: ValueError: bad." in written[0]
