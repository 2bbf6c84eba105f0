"""A pretrained model, and GSM8K as the Hub has it, from the dry run to a comparison, as a user types it.

The model is skipped without its folder (`make real-model`), GSM8K without the folder of reference material.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import pytest

from tests.hub_server import TOKEN, serving
from tests.processes import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/smollm2_135m"


def ktae(*words, **variables: str) -> str:
    """Run the command; return what it said."""
    command = [sys.executable, "-m", "ktae_trl", *map(str, words)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    done = run(command, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("recipe", ["smollm2_135m", "smollm2_135m_lora"])
def test_two_steps_of_a_pretrained_model(tmp_path, recipe):
    if not MODEL.is_dir():
        pytest.skip(f"{MODEL} is not there: make real-model")
    trained, measured, page = tmp_path / "run", tmp_path / "eval", tmp_path / "page.html"
    few = ["--max_steps", 2, "--record_steps", 1, "--save_steps", 2, "--held_out_samples", 0, "--num_generations", 4]
    few += ["--gradient_accumulation_steps", 2, "--max_completion_length", 24]
    ktae("train", ROOT / f"configs/{recipe}.yaml", "--model_name_or_path", MODEL, "--output_dir", trained, *few)
    log = json.loads((trained / "checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert [math.isfinite(entry["grad_norm"]) for entry in log if "loss" in entry] == [True, True]

    model = trained
    if recipe.endswith("lora"):
        model = tmp_path / "merged"
        ktae("merge", trained, "-o", model)
    config = ["--config", "configs/eval/smollm2_135m.yaml", "--backend", "transformers", "--limit", 8]
    ktae("eval", *config, "--model_name_or_path", model, "--samples", 1, "--k", 1, "--output_dir", measured)
    rows = [json.loads(line) for line in (measured / "word_problems.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(row["prompt"].count("<|im_start|>user") == 4 for row in rows)  # three examples and the problem
    assert {row["verdict"] for row in rows} <= {True, False}

    ktae("report", trained, "--output", page)
    assert "<html" in page.read_text()[:500]
    with serving() as hub:
        network = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        ktae("push", trained, "--repo_id", "ann/words", **network)
        weights = "adapter_model.safetensors" if recipe.endswith("lora") else "model.safetensors"
        assert {weights, "tokenizer.json", "README.md"} <= hub.repos["ann/words"]["files"].keys()


def test_gsm8k_as_the_hub_has_it(shared, tmp_path):
    """Columns `question` and `answer`, whose last line is `#### 72`. The offline model: two runs take a minute."""
    for split, count in (("train", 96), ("test", 24)):
        rows = [json.loads(line) for line in (shared / f"gsm8k/{split}.jsonl").read_text().splitlines()[:count]]
        lines = [{"question": row["problem"], "answer": f"{row['solution']}\n#### {row['answer']}"} for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = ["--dataset_name", tmp_path / "train.jsonl", "--eval_dataset_name", tmp_path / "test.jsonl"]
    data += ["--problem_column", "question", "--answer_column", "answer", "--max_prompt_length", "null"]
    few = ["--max_steps", 2, "--per_device_train_batch_size", 32, "--eval_strategy", "no", "--held_out_samples", 0]
    few += ["--record_steps", 1, "--save_steps", 2, "--max_completion_length", 16]
    recipe = [ROOT / "configs/quickstart.yaml", *data, *few]

    said = ktae("train", *recipe, "--dry_run", "true", "--output_dir", tmp_path / "none")
    assert re.search(r"Gold answer: 72\b", said)
    entry = f"benchmarks:\n  - {{name: gsm8k, dataset: {tmp_path / 'test.jsonl'}, problem: question, answer: answer}}\n"
    (tmp_path / "gsm8k.yaml").write_text(f"{entry}backend: transformers\nmax_new_tokens: 16\n")
    for credit in ("none", "ktae"):
        ktae("train", *recipe, "--credit", credit, "--output_dir", tmp_path / credit)
        measured = ["--model_name_or_path", tmp_path / credit, "--output_dir", tmp_path / f"eval_{credit}"]
        ktae("eval", "--config", tmp_path / "gsm8k.yaml", *measured)
    said = ktae("compare", tmp_path / "eval_none", tmp_path / "eval_ktae", "--output_dir", tmp_path / "compared")
    assert "gsm8k" in said
    ktae("report", tmp_path / "ktae", "--output", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000
