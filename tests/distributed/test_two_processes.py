"""Two real processes (DDP over gloo, on the CPU) against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.training import difference

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

# 3 groups of 8 a step. Replayed rollouts, a step per generation, token-mean loss and SGD, so that the processes'
# own seeds and shuffles make no difference.
REPLAYED = {
    "replay": True,
    "prompts": 9,
    "optim": "sgd",
    "learning_rate": 0.1,
    "loss_type": "dapo",
    "steps_per_generation": 1,
    "max_steps": 4,
    "max_completion_length": 60,
}
SAMPLED = {
    "replay": False,
    "prompts": 8,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_completion_length": 12,
}


def launch(folder: Path, settings: dict, processes: int, *arguments: str) -> list[dict]:
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable]
    if processes > 1:
        # MULTI_GPU only makes accelerate call torchrun; `use_cpu` in the training settings keeps it on the CPU.
        accelerate = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": processes}
        (folder / "accelerate.yaml").write_text(yaml.dump(accelerate))
        command += ["-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
        command += ["--main_process_port", "0"]
    command += [str(Path(__file__).with_name("run.py")), str(folder / "settings.json"), str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [torch.load(folder / f"process_{i}.pt", weights_only=True) for i in range(processes)]
    for result in results:
        # Several ways of launching on a CPU run independent single processes and exit 0.
        assert result["processes"] == processes
        assert result["distributed_type"] == ("MULTI_CPU" if processes > 1 else "NO")
        assert result["wrapped"] == ("DistributedDataParallel" if processes > 1 else "Qwen2ForCausalLM")
    return results


@pytest.mark.parametrize(("how", "leave_one_out"), [("multiply", False), ("add", True)])
def test_groups_spread_over_two_processes(tmp_path, how, leave_one_out):
    settings = {**REPLAYED, "ktae_combine": how, "ktae_leave_one_out": leave_one_out}
    (one,) = launch(tmp_path / "one", {**settings, "per_device_train_batch_size": 24}, 1)
    # 12 rows a process: the second of the three groups lies on both.
    two = launch(tmp_path / "two", {**settings, "per_device_train_batch_size": 12}, 2)
    assert len(one["credits"]) == len(two[0]["credits"]) == 4
    for step, expected in enumerate(one["credits"]):
        assert (expected != 0).any()
        for rank, result in enumerate(two):
            values = result["credits"][step]
            mine = expected[12 * rank : 12 * rank + 12]
            torch.testing.assert_close(values, mine[:, : values.shape[1]], atol=1e-6, rtol=0)
            assert (mine[:, values.shape[1] :] == 0).all()
    assert difference(two[0]["weights"], two[1]["weights"]) == 0
    assert difference(two[0]["weights"], one["weights"]) < 1e-6
    # 5 problems over 2 processes: 3 and 3, one of them twice.
    assert two[0]["held_out"] == two[1]["held_out"]
    assert two[0]["held_out"]["greedy"] == one["held_out"]["greedy"]
    for together, alone in zip(two[0]["metrics"], one["metrics"], strict=True):
        for name in (key for key in alone if key.startswith("ktae/") and key != "ktae/seconds"):
            assert together[name] == pytest.approx(alone[name], abs=1e-5)


def test_whole_groups_on_each_of_two_processes(tmp_path):
    (one,) = launch(tmp_path / "one", {**REPLAYED, "per_device_train_batch_size": 16}, 1)
    two = launch(tmp_path / "two", {**REPLAYED, "per_device_train_batch_size": 8}, 2)
    assert difference(two[0]["weights"], one["weights"]) < 1e-6


def test_two_processes_resume_exactly(tmp_path):
    whole = launch(tmp_path / "whole", SAMPLED, 2)
    # 4 forward passes a generation of 4 prompts, 8 steps an epoch: inside a cycle, and one of the second epoch.
    for step in (3, 10):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = launch(tmp_path / f"from-{step}", SAMPLED, 2, str(checkpoint))
        assert difference(resumed[0]["weights"], whole[0]["weights"]) == 0
