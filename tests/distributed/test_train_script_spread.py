"""train.py on two processes: what it leaves, and what happens when one of them dies."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from ktae_trl.files import checkpoints
from tests.distributed.launching import ROOT, SHARDED, TWO_PROCESSES, accelerate, environment
from tests.processes import children, gone, started

pytestmark = TWO_PROCESSES
SMALL = {
    "max_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_size": 12,
    "held_out_samples": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 8,
}


SHIM = Path(__file__).with_name("train_on_cpu.py")


@contextmanager
def train(folder: Path, mode: str, settings: dict, path: str = "", script=SHIM, **more) -> Iterator[subprocess.Popen]:
    """Start train.py with the quickstart recipe; what it says goes to folder/said. `path`: for its imports."""
    words = [str(word) for key, value in {**SMALL, **settings}.items() for word in (f"--{key}", value)]
    words = ["--config", "configs/quickstart.yaml", "--output_dir", str(folder / "out"), *words]
    command, env = [*accelerate(folder, mode, **more), str(script), *words], environment(mode)
    env["PYTHONPATH"] += f":{path}"
    said, options = (folder / "said").open("w"), {"cwd": ROOT, "env": env, "stderr": subprocess.STDOUT}
    with said, started(command, stdout=said, **options) as launched:
        yield launched


def train_to_the_end(*arguments, **more) -> int:
    """Return the exit code."""
    with train(*arguments, **more) as launched:
        return launched.wait(200)


@pytest.mark.parametrize("mode", SHARDED)
def test_a_spread_model_is_saved_whole(tmp_path, mode):
    settings = {"gradient_checkpointing": "true", "learning_rate": 1e-3}
    # ZeRO-3 with gradient checkpointing can abort at exit, after all is done.
    assert train_to_the_end(tmp_path, mode, settings) == 0, said(tmp_path)
    assert f"\nran as 2 {' '.join(SHARDED[mode][1:])}\n" in said(tmp_path)
    assert "Saved model" in said(tmp_path)
    results = json.loads((tmp_path / "out" / "held_out_results.json").read_text())
    assert set(results) >= {"before_greedy", "after_greedy"}
    # Training moved all weights, and all of them are there.
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    untrained = dict(AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).named_parameters())
    assert saved.keys() == untrained.keys()
    for name, value in saved.items():
        assert 0 < (value - untrained[name]).abs().max() < 0.01


def test_a_dry_run_of_two_processes_is_shown_once(tmp_path):
    assert train_to_the_end(tmp_path, "ddp", {"dry_run": "true"}) == 0, said(tmp_path)
    assert said(tmp_path).count("16 rollouts x 2 processes x 1 steps_per_generation = 32 rollouts per generation") == 1
    assert not (tmp_path / "out").exists()


def test_two_processes_on_a_cpu_resume_without_our_help(tmp_path):
    settings = {"save_steps": 1, "held_out_samples": 0, "learning_rate": 1e-3, "use_cpu": "true"}
    for more in ({}, {"max_steps": 3, "lr_scheduler_type": "constant", "resume_from_checkpoint": "true"}):
        ended = train_to_the_end(tmp_path, "ddp", settings | more, script=ROOT / "train.py")
        assert ended == 0, said(tmp_path)
    assert "Trained to step 3" in said(tmp_path)


def test_a_resume_is_refused_by_all_processes_and_once(tmp_path):
    settings = {"save_steps": 1, "held_out_samples": 0}
    assert train_to_the_end(tmp_path, "ddp", settings) == 0, said(tmp_path)
    another = {**settings, "max_steps": 3, "seed": 7, "resume_from_checkpoint": "true"}
    assert train_to_the_end(tmp_path, "ddp", another) != 0
    (line,) = re.findall(r"^train.py: .*", said(tmp_path), re.MULTILINE)
    assert re.search("The training prompts or their order have changed since .*checkpoint-2 was saved", line)
    assert re.search(r"seed changed from \d+ to 7", line)
    assert "ResumeError" not in said(tmp_path)  # no traceback


def said(folder: Path) -> str:
    return (folder / "said").read_text()


def process(launched: subprocess.Popen, rank: int) -> int:
    """Return the id of a process of a launch."""
    for child in Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise ProcessLookupError(f"process {rank} of the launch")


@pytest.mark.parametrize("dies", [0, 1])
def test_a_process_dies_and_the_run_goes_on(tmp_path, dies):
    settings = {"max_steps": 8, "save_steps": 2}
    with train(tmp_path, "ddp", settings) as launched:
        until = time.monotonic() + 200
        while not checkpoints.is_sealed(tmp_path / "out" / "checkpoint-2"):
            assert launched.poll() is None, said(tmp_path)
            assert time.monotonic() < until, said(tmp_path)
            time.sleep(0.05)
        time.sleep(0.1)  # into the third step
        os.kill(process(launched, dies), signal.SIGKILL)
        assert launched.wait(60) != 0
    # The other process said so, whether it met a broken connection or the launcher's SIGTERM first.
    (line,) = re.findall(r"^train.py: .*", said(tmp_path), re.MULTILINE)
    told = re.fullmatch(
        r"train.py: training stopped after step (\d) \(process (\d)\): "
        r"(?:lost the connection to another process|received SIGTERM).*\. "
        r"Resume from the last checkpoint \((.*)\) with --resume_from_checkpoint true",
        line,
    )
    assert told, line
    step, survivor, checkpoint = told.groups()
    assert 2 <= int(step) < 8
    assert int(survivor) == 1 - dies
    begin = int(checkpoint.rpartition("-")[2])
    assert begin in (int(step), int(step) - 1)
    # One that was being written when the process died does not stop the run from going on.
    checkpoints.begin(tmp_path / "out" / "checkpoint-7")
    (tmp_path / "out" / "checkpoint-7" / "rollouts_0.pt").touch()

    assert train_to_the_end(tmp_path, "ddp", {**settings, "resume_from_checkpoint": "true"}) == 0, said(tmp_path)
    assert "\nran as 2 MULTI_CPU DistributedDataParallel\n" in said(tmp_path)
    assert "Trained to step 8" in said(tmp_path)
    logged = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in logged] == list(range(1, 9))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


HANGS = """
import os, time

def mine(completions, **kwargs):
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    return [float(i % 2) for i in range(len(completions))]
"""


def test_a_reward_function_that_hangs_on_one_process_ends_all(tmp_path):
    (tmp_path / "hanging.py").write_text(HANGS)
    settings = {"reward_funcs": "hanging.mine", "reward_timeout": 1, "held_out_samples": 0}
    with train(tmp_path, "ddp", settings, path=str(tmp_path)) as launched:
        assert launched.wait(100) != 0
    (error,) = re.findall(r"^TimeoutError: .*", said(tmp_path).replace("[rank1]: ", ""), re.MULTILINE)
    assert error.startswith(
        "TimeoutError: The reward function 'mine' (process 1) took longer than reward_timeout (1 s)"
    )
    assert "Completion 0 of 16 alone takes that long" in error
    lines = re.findall(r"^train.py: training stopped after step 0 \(process (\d)\): (.*)", said(tmp_path), re.MULTILINE)
    assert ("1", f"{error}. There is no checkpoint in {tmp_path / 'out'} yet. Start again") in lines


# One write a line: print writes the text and the line's end apart, and two processes share the file.
WAITS = """
import os, time

def mine(completions, **kwargs):
    os.write(1, b"[it waits]\\n")
    time.sleep(1000)
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nobody_outlives_the_launcher(tmp_path, blow, processes):
    (tmp_path / "waiting.py").write_text(WAITS)
    more = {} if processes == 2 else {"num_processes": 1, "distributed_type": "NO"}
    settings = {"reward_funcs": "waiting.mine", "held_out_samples": 0}
    with train(tmp_path, "ddp", settings, path=str(tmp_path), **more) as launched:
        until = time.monotonic() + 100
        while said(tmp_path).count("[it waits]") < processes:
            assert launched.poll() is None, said(tmp_path)
            assert time.monotonic() < until, said(tmp_path)
            time.sleep(0.05)
        started_by_it = children(launched.pid)
        assert len(started_by_it) >= processes
        launched.send_signal(blow)
        assert launched.wait(60) != 0
        assert gone(started_by_it)
    passed_on = "SIGHUP" if (blow, processes) == (signal.SIGHUP, 2) else "SIGTERM"
    assert re.search(rf"^train.py: training stopped after step 0.*\b{passed_on}\b", said(tmp_path), re.MULTILINE)
