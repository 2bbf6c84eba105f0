"""Starts trainings on several processes as people start them on several devices, here on the CPU.

Starting two processes takes longer than a small training, so the processes of a launch train one job after the other
(`Crews`). Each job still says how many processes it ran on and in which mode.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

from tests.distributed import training
from tests.processes import started

ROOT = Path(__file__).parents[2]
# Two processes take both cores of a small machine: one worker runs these tests, in turn.
TWO_PROCESSES = [pytest.mark.slow, pytest.mark.xdist_group("two processes")]


def file(name: str, **changes) -> dict:
    """Return a file of configs/accelerate in float32; `changes` go into its part for DeepSpeed or FSDP."""
    config = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text()) | {"mixed_precision": "no"}
    for part in {"deepspeed_config", "fsdp_config"} & config.keys():
        config[part] |= changes
    return config


# The file for accelerate, and what must come of it: the distributed type, and the class of the wrapped model. Several
# ways of launching on a CPU run one process, independent processes or plain DDP instead, and exit 0.
ZERO = ("DEEPSPEED", "DeepSpeedEngine")
FSDP = ("FSDP", "FSDPQwen2ForCausalLM")
MODES = {
    "ddp": (file("ddp"), "MULTI_CPU", "DistributedDataParallel"),  # MULTI_GPU only makes accelerate call torchrun
    "zero1": (file("zero2", zero_stage=1), *ZERO),
    **{name: (file(name), *ZERO) for name in ("zero2", "zero2_offload", "zero3", "zero3_offload")},
    "fsdp2": (file("fsdp2"), *FSDP),
}
TWO_NODES = {"two_nodes": (file("two_nodes"), *ZERO)}
# accelerate's own defaults, with which transformers' save_model() saves no model.
SHARDED = {
    "zero3_sharded": (file("zero3", zero3_save_16bit_model=False), *ZERO),
    "fsdp2_sharded": (file("fsdp2", fsdp_state_dict_type="SHARDED_STATE_DICT"), *FSDP),
}
LAUNCHES = MODES | TWO_NODES | SHARDED


def accelerate(folder: Path, mode: str, processes: int = 2, **more) -> list[str]:
    """Return the words that launch a script; `more` goes into accelerate's file in `folder`."""
    folder.mkdir(exist_ok=True)
    file = folder / "accelerate.yaml"
    entries = {**LAUNCHES[mode][0], "num_processes": processes, "main_process_port": 0, **more}
    file.write_text(yaml.dump(entries))
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]


def environment(mode: str | None = None) -> dict[str, str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # The training settings say `use_cpu`. DDP takes this too; DeepSpeed and FSDP would turn into DDP.
    return {**variables, "ACCELERATE_USE_CPU": "true"} if mode in (None, "ddp") else variables


class Crew:
    """The processes of one launch, which do one job after the other (crew.py)."""

    def __init__(self, folder: Path, mode: str, processes: int):
        self.folder, self.processes, self.jobs = folder, processes, 0
        self.stack = ExitStack()
        words = [*accelerate(folder, mode, processes), str(Path(__file__).with_name("crew.py")), str(folder)]
        said = self.stack.enter_context((folder / "said").open("w"))
        options = {"cwd": ROOT, "env": environment(mode), "stdout": said, "stderr": subprocess.STDOUT}
        self.launched = self.stack.enter_context(started(words, **options))

    def do(self, function: str, *arguments, seconds: float = 300) -> None:
        """Let each process call `function`, named "module:function", with arguments that JSON can carry."""
        written = self.folder / "order.part"
        written.write_text(json.dumps([function, arguments]))
        written.rename(self.folder / f"{self.jobs}.order")
        done = [self.folder / f"{self.jobs}.done.{rank}" for rank in range(self.processes)]
        self.jobs += 1
        until = time.monotonic() + seconds
        while not all(path.exists() for path in done):
            alive = self.launched.poll() is None and time.monotonic() < until
            assert alive, (self.folder / "said").read_text()[-5000:]
            time.sleep(0.02)


class Crews:
    """The crew that is there: it ends with a job that fails, or when another one is needed (conftest.py sorts)."""

    def __init__(self, root: Path):
        self.root, self.which, self.crew = root, None, None

    def do(self, mode: str, function: str, *arguments, processes: int = 2) -> None:
        if self.which != (mode, processes):
            self.end()
            self.crew, self.which = Crew(Path(tempfile.mkdtemp(dir=self.root)), mode, processes), (mode, processes)
        try:
            self.crew.do(function, *arguments)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        if self.which:
            self.crew.stack.close()
            self.which = None

    def train(
        self, folder: Path, settings: dict, mode: str | None, checkpoint: Path | None = None, processes: int = 2
    ) -> list[dict]:
        """Run training.py, without a mode in this process; return the result of each process."""
        arguments = [settings, str(folder), checkpoint and str(checkpoint)]
        if mode:
            self.do(mode, "tests.distributed.training:main", *arguments, processes=processes)
        else:
            training.main(*arguments)
        return read(folder, mode, processes)


def read(folder: Path, mode: str | None, processes: int = 2) -> list[dict]:
    """Return what the processes wrote, once sure that they ran together and in the mode that was meant."""
    _, distributed_type, wrapped = LAUNCHES[mode] if mode else (None, "NO", "Qwen2ForCausalLM")
    results = [torch.load(folder / f"process_{i}.pt", weights_only=True) for i in range(processes if mode else 1)]
    for result in results:
        assert result["processes"] == len(results)
        assert result["distributed_type"] == distributed_type
        adapted = [wrapped.replace("Qwen2ForCausalLM", peft) for peft in ("PeftModelForCausalLM", "PeftModel")]
        assert result["wrapped"] in (wrapped, *adapted)
    return results
