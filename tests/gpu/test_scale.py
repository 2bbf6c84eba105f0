"""ZeRO-2, ZeRO-3, FSDP2 and vLLM on the GPUs that are there."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from tests.processes import run, started

ROOT = Path(__file__).parents[2]
RAN_AS = {"zero2": ("DEEPSPEED", "DeepSpeedEngine"), "zero3": ("DEEPSPEED", "DeepSpeedEngine")}
RAN_AS["fsdp2"] = ("FSDP", "FSDPQwen2ForCausalLM")
COLOCATED = {"use_cpu": False, "vllm_mode": "colocate", "per_device_train_batch_size": 32, "max_completion_length": 64}


def words(options: dict) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("credit", ["ktae", "oar_g"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mode", RAN_AS)
def test_train_script(gpu, figures, tmp_path, mode, processes, credit):
    """`accelerate launch` with the files of configs/accelerate, in bf16; several processes with a GPU each."""
    if processes > torch.cuda.device_count():
        pytest.skip(f"there is one GPU, and this takes {processes}")
    if mode.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    launch = [
        "--config_file",
        f"configs/accelerate/{mode}.yaml",
        "--num_processes",
        processes,
        "--main_process_port",
        0,
    ]
    recipe = ["--config", "configs/quickstart.yaml", "--max_steps", 4, "--eval_strategy", "no", "--held_out_samples", 0]
    recipe += [
        "--use_cpu",
        "false",
        "--bf16",
        "true",
        "--credit",
        credit,
        "--output_dir",
        tmp_path,
        "--logging_steps",
        1,
    ]
    recipe += ["--per_device_train_batch_size", 128 // processes]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *launch,
        "tests/distributed/train_on_cpu.py",
        *recipe,
    ]
    done = run(list(map(str, command)), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=900)
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


def check_sync(figures: dict, result: dict) -> None:
    """vLLM's log-probabilities are the model's once its weights are synced, and not before."""
    figures["gap of log-probabilities"] = f"{result['fresh']:.1e}"
    figures["before the sync"] = f"{result['stale']:.1e}"
    assert max(rollouts["gap"] for rollouts in result["rollouts"]) < 0.01  # float32 kernels of two programs
    assert result["fresh"] < 0.01 < result["stale"] / 10


@pytest.mark.parametrize("sleep", [False, True], ids=["", "with sleep mode"])
def test_colocated_vllm(gpu, figures, tmp_path, sleep):
    from tests.vllm.test_vllm_training import train  # skips without vLLM

    settings = {
        **COLOCATED,
        "vllm_enable_sleep_mode": sleep,
        "vllm_gpu_memory_utilization": 0.2,
        "vllm_max_model_length": 256,
    }
    (result,) = train(tmp_path, settings)
    check_sync(figures, result)
    assert result["moved"] > 1e-4


def test_vllm_server_gets_the_weights(two_gpus, figures, tmp_path):
    """TRL's server on the second GPU, which gets the weights of each step over NCCL."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from tests.vllm.test_vllm_training import train

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [
        "vllm-serve",
        "--model",
        str(tiny.MODEL),
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max_model_len",
        "256",
    ]
    command = [sys.executable, "-m", "trl.cli", *serve, "--enforce_eager", "true"]
    log = tmp_path / "server.log"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "1"}
    with log.open("w") as said, started(command, env=environment, stdout=said, stderr=subprocess.STDOUT) as server:
        until = time.monotonic() + 300
        while True:
            waiting = server.poll() is None and time.monotonic() < until
            assert waiting, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(1)
        settings = {**COLOCATED, "vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}"}
        (result,) = train(tmp_path, settings)
    gaps = [rollouts["gap"] for rollouts in result["rollouts"]]
    figures["gaps of the steps"] = [f"{gap:.1e}" for gap in gaps]
    assert len(gaps) == 3
    assert max(gaps) < 0.01  # each step's rollouts are of that step's weights
    assert result["moved"] > 1e-4
