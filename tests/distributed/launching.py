"""Starts trainings on several processes as people start them on several devices, here on the CPU."""

import json
import os
import sys
from pathlib import Path

import torch
import yaml

from tests.processes import run as finish

ROOT = Path(__file__).parents[2]


def file(name: str, **zero) -> dict:
    """Return a file of configs/accelerate in float32; `zero` goes into its `deepspeed_config`."""
    config = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text()) | {"mixed_precision": "no"}
    return config | {"deepspeed_config": config["deepspeed_config"] | zero} if zero else config


# The file for accelerate, and what must come of it: the distributed type, and the class of the wrapped model. Several
# ways of launching on a CPU run one process, independent processes or plain DDP instead, and exit 0.
MODES = {
    "ddp": (file("ddp"), "MULTI_CPU", "DistributedDataParallel"),  # MULTI_GPU only makes accelerate call torchrun
    "zero1": (file("zero2", zero_stage=1), "DEEPSPEED", "DeepSpeedEngine"),
    **{
        name: (file(name), "DEEPSPEED", "DeepSpeedEngine")
        for name in ("zero2", "zero2_offload", "zero3", "zero3_offload", "two_nodes")
    },
    "fsdp2": (file("fsdp2"), "FSDP", "FSDPQwen2ForCausalLM"),
}


def accelerate(folder: Path, mode: str, processes: int = 2, **more) -> list[str]:
    """Return the words that launch a script; `more` goes into accelerate's file in `folder`."""
    folder.mkdir(exist_ok=True)
    file = folder / "accelerate.yaml"
    entries = {**MODES[mode][0], "num_processes": processes, "main_process_port": 0, **more}
    file.write_text(yaml.dump(entries))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]


def environment(mode: str | None = None) -> dict[str, str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # The training settings say `use_cpu`. DDP takes this too; DeepSpeed and FSDP would turn into DDP.
    return {**variables, "ACCELERATE_USE_CPU": "true"} if mode in (None, "ddp") else variables


def run(folder: Path, settings: dict, *arguments: str) -> list[str]:
    """Return the words that are run.py and its arguments."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    return [str(Path(__file__).with_name("run.py")), str(folder / "settings.json"), str(folder), *arguments]


def launch(folder: Path, settings: dict, mode: str | None, *arguments: str, processes: int = 2) -> list[dict]:
    """Run run.py, without a mode as a plain single process; return the result of each process."""
    launcher = accelerate(folder, mode, processes) if mode else [sys.executable]
    words = [*launcher, *run(folder, settings, *arguments)]
    done = finish(words, cwd=ROOT, env=environment(mode))
    assert done.returncode == 0, done.stderr[-5000:]
    return read(folder, mode, processes)


def read(folder: Path, mode: str | None, processes: int = 2) -> list[dict]:
    """Return what the processes wrote, once sure that they ran together and in the mode that was meant."""
    _, distributed_type, wrapped = MODES[mode] if mode else (None, "NO", "Qwen2ForCausalLM")
    results = [torch.load(folder / f"process_{i}.pt", weights_only=True) for i in range(processes if mode else 1)]
    for result in results:
        assert result["processes"] == len(results)
        assert result["distributed_type"] == distributed_type
        assert result["wrapped"] in (wrapped, wrapped.replace("Qwen2ForCausalLM", "PeftModelForCausalLM"))
    return results
