"""`eval.py` with vLLM. On a CPU: `make test-vllm`, which builds an environment with vLLM's CPU build."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from tests.processes import children, gone, run, started

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUICK = ["--config", "configs/eval/quickstart.yaml"]
# On a CPU, vLLM 0.31 crashes on requests with a seed if it prefills in chunks.
OPTIONS = {"enforce_eager": True, "max_model_len": 256, "enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}


def start(folder, *words, **options):
    # Without its word on cores, vLLM wants a NUMA node for each process of tensor parallelism.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if "tensor_parallel_size" in options else {}
    vllm = ["--backend", "vllm", "--vllm_options", json.dumps(OPTIONS | options)]
    return started(
        [sys.executable, "eval.py", *QUICK, *vllm, "--output_dir", str(folder), *words],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | cores,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def evaluate(folder, *words, **options) -> list[dict]:
    with start(folder, *words, **options) as process:
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return samples(folder)


def samples(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]


def with_transformers(folder, *words) -> list[dict]:
    command = [sys.executable, "eval.py", *QUICK, "--backend", "transformers", "--output_dir", str(folder), *words]
    run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}).check_returncode()
    return samples(folder)


GREEDY = ["--temperature", "0", "--samples", "1", "--limit", "64"]


def test_both_backends_give_the_same_greedy_results(tmp_path):
    mine, theirs = evaluate(tmp_path / "vllm", *GREEDY), with_transformers(tmp_path / "transformers", *GREEDY)
    assert len(mine) == 64
    assert mine[0].keys() == theirs[0].keys()
    # Rounding may turn a tie between two tokens; it does so rarely.
    assert sum(a == b for a, b in zip(mine, theirs, strict=True)) >= 63


def test_an_adapter_gives_the_same_greedy_results(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    adapter = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    words = [*GREEDY, "--model_name_or_path", str(tmp_path / "adapter")]
    mine, theirs = evaluate(tmp_path / "vllm", *words), with_transformers(tmp_path / "transformers", *words)
    assert sum(a == b for a, b in zip(mine, theirs, strict=True)) >= 62
    plain = with_transformers(tmp_path / "plain", *GREEDY)
    assert sum(a["completion"] == b["completion"] for a, b in zip(mine, plain, strict=True)) < 60


SAMPLED = ["--samples", "4", "--limit", "64"]


def test_samples_do_not_depend_on_what_runs_beside_them(tmp_path):
    """One engine, two in parallel, and one whose layers are split over two processes draw the same samples."""
    alone = evaluate(tmp_path / "alone", *SAMPLED)
    assert len({row["completion"] for row in alone}) > 64
    right = sum(row["verdict"] for row in alone) / len(alone)
    expected = with_transformers(tmp_path / "transformers", *SAMPLED)
    assert right == pytest.approx(sum(row["verdict"] for row in expected) / len(expected), abs=0.12)
    for how in ({"data_parallel_size": 2}, {"tensor_parallel_size": 2}):
        together = evaluate(tmp_path / "-".join(how), *SAMPLED, **how)
        assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 0.97 * len(alone)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_in_the_middle(tmp_path, blow):
    """The run that goes on has the samples of the killed one, and ends with those of an uninterrupted one.

    Ctrl-C reaches vLLM's own processes too, as on a terminal.
    """
    words = ["--samples", "16", "--limit", "64"]
    whole = evaluate(tmp_path / "whole", *words)
    path = tmp_path / "killed" / "sums.jsonl"
    with start(tmp_path / "killed", *words) as process:
        while not (path.exists() and path.read_bytes().count(b"\n") >= 20):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        if blow == signal.SIGKILL:
            process.kill()
            process.wait()
        else:
            pids = children(process.pid)
            (os.killpg if blow == signal.SIGINT else os.kill)(process.pid, blow)
            said = process.communicate(timeout=120)[0]
            assert "The samples generated so far are saved" in said
            assert "Traceback" not in said
            assert gone(pids)
    early = [json.loads(line) for line in path.read_text().splitlines()[:20]]
    assert path.read_bytes().count(b"\n") < len(whole)
    resumed = evaluate(tmp_path / "killed", *words)
    kept = {(row["id"], row["sample"]): row["completion"] for row in resumed}
    assert all(kept[row["id"], row["sample"]] == row["completion"] for row in early)
    assert sum(a == b for a, b in zip(whole, resumed, strict=True)) >= 0.99 * len(whole)
