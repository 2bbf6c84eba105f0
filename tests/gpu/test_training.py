"""Trainings on a GPU: what a step costs by phase, exact resume, gradient checkpointing, adapters."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ktae_trl import tiny
from ktae_trl.credit import METHODS
from tests.processes import run, started
from tests.trainers import difference, logged, make_trainer, weights

ROOT = Path(__file__).parents[2]
ON_GPU = {"use_cpu": False, "bf16": True}
HUB_MODEL, LOCAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct", ROOT / "models/smollm2_135m"  # make real-model


def cost(credit: str, steps: int, *words: str) -> dict:
    """Return what benchmarks/step_cost.py measures of one method."""
    command = [sys.executable, "benchmarks/step_cost.py", "--credit", credit, "--steps", str(steps), *words]
    done = run(command, cwd=ROOT, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def note(figures: dict, measured: dict) -> dict[str, float]:
    """Write down the time of a step, tokens a second and memory; return the share of each phase."""
    seconds = sum(measured["step"])
    shares = {phase: sum(each) / seconds for phase, each in measured["phases"].items()}
    figures["s/step"] = round(seconds / len(measured["step"]), 3)
    figures["tokens/s"] = round(sum(measured["tokens"]) / seconds)
    figures["GiB"] = round(measured["peak_mib"] / 1024, 2)
    figures |= {phase: f"{share:.2%}" for phase, share in shares.items()}
    return shares


@pytest.mark.parametrize("credit", ["none", *METHODS])
def test_step_of_the_quickstart(gpu, figures, credit):
    note(figures, cost(credit, 20))


@pytest.mark.parametrize("credit", ["none", *METHODS])
def test_step_of_smollm2_135m(gpu, figures, credit):
    try:
        AutoModelForCausalLM.from_pretrained(HUB_MODEL, local_files_only=True)
        model = HUB_MODEL
    except OSError:
        model = str(LOCAL_MODEL)
        if not LOCAL_MODEL.is_dir():
            pytest.skip(f"{HUB_MODEL} is neither in the Hub's cache nor at models/smollm2_135m (make real-model)")
    batch = ("--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "1", "--model_name_or_path", model)
    note(figures, cost(credit, 8, "--config", "configs/smollm2_135m.yaml", "--", *batch))


@pytest.mark.parametrize("credit", ["none", "ktae"])
def test_step_of_half_a_billion_parameters(gpu, figures, credit):
    """16 rollouts of 1,024 tokens: KTAE stays under 0.2% of a step."""
    shares = note(figures, cost(credit, 4, "--model", "500m"))
    assert credit == "none" or shares["credit"] < 0.002


@pytest.mark.parametrize("credit", ["ktae", "oar_g"])
def test_trains_in_bf16_with_gradient_checkpointing(gpu, figures, tmp_path, credit):
    trainer = make_trainer(tmp_path, credit=credit, gradient_checkpointing=True, **ON_GPU)
    before = weights(trainer)
    trainer.train()
    figures["gradient norms"] = [round(norm, 3) for norm in logged(trainer, "grad_norm")]
    assert difference(before, weights(trainer)) > 0
    assert all(norm < 1e4 for norm in figures["gradient norms"])


@pytest.mark.parametrize("bits", [16, 4])
def test_trains_an_adapter(gpu, figures, tmp_path, bits):
    settings = {}
    if bits == 4:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        settings["model"] = AutoModelForCausalLM.from_pretrained(tiny.MODEL, quantization_config=quantized)
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, credit="ktae", peft_config=adapter, **ON_GPU, **settings)
    before = {name: p for name, p in weights(trainer).items() if "lora" in name}
    trainer.train()
    figures["moved"] = f"{difference(before, {name: p for name, p in weights(trainer).items() if name in before}):.1e}"
    assert float(figures["moved"]) > 0


def test_resume_is_exact(gpu, figures, tmp_path):
    """From inside a generation cycle, with kernels that add in the same order each time, as far as there are such."""

    settings = {"steps_per_generation": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **ON_GPU}

    def trained(folder: str, checkpoint: str | None = None):
        model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32, attn_implementation="eager")
        trainer = make_trainer(tmp_path / folder, credit="ktae", model=model, max_completion_length=64, **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole, again = trained("whole"), trained("again")
        resumed = trained("resumed", str(tmp_path / "whole/checkpoint-3"))
    finally:
        torch.use_deterministic_algorithms(False)
    figures["the same run twice differs by"] = f"{difference(weights(whole), weights(again)):.1e}"
    figures["the resumed run differs by"] = f"{difference(weights(whole), weights(resumed)):.1e}"
    if difference(weights(whole), weights(again)):
        pytest.skip("on this GPU the same run twice differs")
    assert difference(weights(whole), weights(resumed)) == 0


def test_ten_minutes_of_the_learning_benchmark(gpu, figures, tmp_path):
    """Resumable: the same command resumes from there. Passes if it ends or is still running."""
    command = [sys.executable, "benchmarks/learning.py", "--config", "benchmarks/learning_gpu.yaml"]
    began, log = time.monotonic(), tmp_path / "log"
    with log.open("w") as said, started(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and time.monotonic() - began < 600:
            time.sleep(1)
        assert not process.returncode, log.read_text()[-3000:]
    figures["minutes"] = round((time.monotonic() - began) / 60, 1)
    figures["the model is made"] = (ROOT / "runs/learning_gpu/gsm_symbolic/model/model.safetensors").exists()
    figures["runs that ended"] = len(list((ROOT / "runs/learning_gpu").glob("**/curve.parquet")))
