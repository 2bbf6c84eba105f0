"""Who is asked over the network: nobody, by `make quickstart` and by a training on local data without telemetry."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SWITCH = "HF_HUB_DISABLE_TELEMETRY"
# Python's own audit events, which C code raises, too. Nothing leaves the machine: what is not loopback fails.
WATCH = """
import os, sys

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else "local"  # a path: a Unix socket
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "local", "localhost", "127.0.0.1", "::1", os.uname().nodename):
        with open(os.environ["ASKED"], "a") as file:
            file.write(host + "\\n")
        raise OSError(f"the test lets nobody ask {host}")

sys.addaudithook(watch)
"""
TRAIN = """
import runpy, sys
runpy.run_path("train.py", run_name="__main__")
from huggingface_hub.utils._telemetry import _TELEMETRY_QUEUE
_TELEMETRY_QUEUE.join()  # another thread sends
"""


def asked_by_a_training(folder: Path, **environment: str) -> set[str]:
    """Train a step with the quickstart's recipe; return whom the process and its children wanted to reach."""
    (folder / "watch").mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    (folder / "asked").touch()
    unset = {SWITCH, "HF_HUB_OFFLINE", "CI", "DO_NOT_TRACK", "DISABLE_TELEMETRY"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    paths = os.pathsep.join([str(folder / "watch"), str(ROOT)])
    small = {"max_steps": 1, "per_device_train_batch_size": 16, "eval_strategy": "no", "eval_size": 4}
    small |= {"held_out_samples": 1, "save_strategy": "steps", "save_steps": 1, "output_dir": folder / "run"}
    words = [str(word) for key, value in small.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, "--config", "configs/quickstart.yaml", *words],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": paths, "ASKED": str(folder / "asked"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "run" / "key_tokens.html").exists()
    return set((folder / "asked").read_text().split())


@pytest.mark.slow
def test_a_training_without_telemetry_asks_nobody(tmp_path):
    assert asked_by_a_training(tmp_path, **{SWITCH: "1"}) == set()


@pytest.mark.slow
def test_with_telemetry_only_the_hub_is_asked(tmp_path):
    """As the documentation says. It also shows that these tests see what is asked."""
    assert asked_by_a_training(tmp_path) == {"huggingface.co"}


@pytest.mark.parametrize("target", ["quickstart", "test", "test-slow", "bench"])
def test_make_switches_telemetry_off(tmp_path, target):
    (tmp_path / "bin").mkdir()
    for name in ("ktae", "pytest", "python"):  # in place of a virtual environment that is up to date
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} ${SWITCH}" >> {tmp_path}/ran\n')
        program.chmod(0o755)
    for name in ("quickstart", "dev"):
        (tmp_path / f"{name}.installed").touch()
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    command = ["make", target, f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ran = (tmp_path / "ran").read_text().splitlines()
    assert ran
    assert (target == "quickstart") == any(line.startswith("ktae ") for line in ran)  # which has no defaults to list
    assert all(line.endswith(" 1") for line in ran)
