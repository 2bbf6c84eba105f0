"""ZeRO-2, ZeRO-3, FSDP2 and vLLM on the GPUs that are there."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from tests.processes import run, started

ROOT = Path(__file__).parents[2]
RAN_AS = {"zero2": ("DEEPSPEED", "DeepSpeedEngine"), "zero3": ("DEEPSPEED", "DeepSpeedEngine")}
RAN_AS["fsdp2"] = ("FSDP", "FSDPQwen2ForCausalLM")
COLOCATED = {"use_cpu": False, "vllm_mode": "colocate", "per_device_train_batch_size": 32, "max_completion_length": 64}


def words(options: dict) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("credit", ["ktae", "oar_g"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mode", RAN_AS)
def test_train_script(all_gpus, figures, tmp_path, mode, processes, credit):
    """`accelerate launch` with the files of configs/accelerate, in bf16; several processes with a GPU each."""
    if processes > len(all_gpus):
        pytest.skip(f"there is one GPU, and this takes {processes}")
    if mode.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    launch = {"config_file": f"configs/accelerate/{mode}.yaml", "num_processes": processes, "main_process_port": 0}
    recipe = {
        "config": "configs/quickstart.yaml",
        "credit": credit,
        "max_steps": 4,
        "per_device_train_batch_size": 128 // processes,
        "held_out_samples": 0,
        "eval_strategy": "no",
        "logging_steps": 1,
        "use_cpu": "false",
        "bf16": "true",
        "output_dir": tmp_path,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", *words(launch)]
    command += ["tests/distributed/train_on_cpu.py", *words(recipe)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ",".join(all_gpus[:processes])}
    done = run(command, cwd=ROOT, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    said = re.search(r"ran as (\d+) (\w+) (\w+)", done.stdout).groups()
    assert said == (str(processes), *RAN_AS[mode])
    log = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    norms = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
    assert len(norms) == 4
    assert all(map(math.isfinite, norms))
    figures["step"] = f"{[entry['step_time'] for entry in log if 'step_time' in entry][-1]:.2f} s"
    trained = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny.MODEL).state_dict()
    assert max((trained[name].float() - start[name].float()).abs().max().item() for name in start) > 0


@pytest.mark.parametrize("sleep", [False, True], ids=["", "with sleep mode"])
def test_colocated_vllm(gpu, figures, tmp_path, sleep):
    from tests.vllm.test_vllm_training import train  # skips without vLLM

    room = {"vllm_gpu_memory_utilization": 0.2, "vllm_max_model_length": 256}
    (result,) = train(tmp_path, {**COLOCATED, **room, "vllm_enable_sleep_mode": sleep}, seconds=900)
    figures["gap of log-probabilities"] = f"{result['fresh']:.1e}"
    figures["after a change of weights, before a sync"] = f"{result['stale']:.1e}"
    assert max(rollouts["gap"] for rollouts in result["rollouts"]) < 0.01  # float32 kernels of two programs
    assert result["fresh"] < 0.01
    # Where vLLM sleeps it throws its weights away, and fetches the model's before anything else.
    assert result["stale"] < 0.01 if sleep else result["stale"] > 0.1
    assert result["moved"] > 1e-4


def test_vllm_server_gets_the_weights(all_gpus, figures, tmp_path, monkeypatch):
    """TRL's server on the second GPU, which gets the weights of each step over NCCL."""
    if len(all_gpus) < 2:
        pytest.skip("there is one GPU, and this takes two")
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from tests.vllm.test_vllm_training import train

    port, group_port = free_port(), free_port()
    serve = {"model": tiny.MODEL, "port": port, "dtype": "float32", "max_model_len": 256, "enforce_eager": "true"}
    command = [sys.executable, "-m", "trl.scripts.vllm_serve", *words(serve), "--gpu_memory_utilization", "0.2"]
    log = tmp_path / "server.log"
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")  # what NCCL is told; there may be no network
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": all_gpus[1]}
    with log.open("w") as said, started(command, env=environment, stdout=said, stderr=subprocess.STDOUT) as server:
        until = time.monotonic() + 300
        while True:
            waiting = server.poll() is None and time.monotonic() < until
            assert waiting, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:  # not there yet
                time.sleep(1)
        settings = {**COLOCATED, "vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}"}
        (result,) = train(tmp_path, {**settings, "vllm_group_port": group_port}, seconds=900)
    gaps = [rollouts["gap"] for rollouts in result["rollouts"]]
    figures["gaps of the steps"] = [f"{gap:.1e}" for gap in gaps]
    assert len(gaps) == 3
    assert max(gaps) < 0.01  # each step's rollouts are of that step's weights
    assert result["moved"] > 1e-4
