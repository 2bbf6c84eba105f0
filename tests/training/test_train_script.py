"""train.py as a user starts it."""

import json
import os
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktae_trl.files.lock import locked
from tests.processes import run
from tests.trainers import difference

ROOT = Path(__file__).parents[2]
SMALL = {
    "max_steps": 4,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_size": 16,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 16,
}


LAUNCHER = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")


def train(
    output: Path, *arguments: str, config: str = "configs/quickstart.yaml", launcher=LAUNCHER
) -> CompletedProcess:
    settings = [str(word) for key, value in SMALL.items() for word in (f"--{key}", value)]
    return run(
        [sys.executable, *launcher, "train.py", "--config", config, "--output_dir", str(output), *settings, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_train_saves_what_a_user_needs_and_resumes(tmp_path):
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Held-out accuracy by math_accuracy before training: greedy" in done.stdout
    closing = r"^ +before +after\n  greedy +[\d.]+% +[\d.]+%\n  sampled +[\d.]+% +[\d.]+%$"
    assert re.search(closing, done.stdout, re.MULTILINE)
    header = next(line for line in done.stdout.splitlines() if line.startswith("step "))
    assert "K correct" in header
    # Neither output is a terminal: no bar is redrawn.
    assert "\r" not in done.stdout + done.stderr
    assert "%|" not in done.stdout + done.stderr
    results = json.loads((tmp_path / "held_out_results.json").read_text())
    assert set(results) >= {"before_greedy", "before_sampled", "after_greedy", "after_sampled"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer)
    assert "ktae" in (tmp_path / "README.md").read_text()
    assert list(tmp_path.glob("**/events.out.tfevents*"))

    again = train(tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))
    assert again.returncode == 0, again.stderr[-3000:]
    resumed = json.loads((tmp_path / "held_out_results.json").read_text())
    assert {**resumed, "train_seconds": 0} == {**results, "train_seconds": 0}


@pytest.mark.slow
def test_bad_settings_end_with_one_line(tmp_path):
    done = train(tmp_path, "--credit", "ktea")
    assert done.returncode != 0
    assert "train.py: credit='ktea' is unknown (did you mean 'ktae'?). Choose from: none, ktae" in done.stderr


@pytest.mark.slow
def test_second_training_in_a_folder_is_refused_with_one_line(tmp_path):
    with locked(tmp_path, "train.py"):
        refused = train(tmp_path, launcher=())
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    last = refused.stderr.strip().splitlines()[-1]
    assert last.startswith(f"train.py: {tmp_path} is in use: train.py (process {os.getpid()} on ")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.slow
def test_what_fails_after_training_is_done_again_by_resuming(tmp_path):
    (tmp_path / "model.safetensors").mkdir(parents=True)  # so the model cannot be written
    settings = ("--max_steps", "2", "--held_out_samples", "0", "--eval_strategy", "no")
    failed = train(tmp_path, *settings, launcher=())
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("train.py: stopped after the last training step (2), before everything was saved: ")
    checkpoint = tmp_path / "checkpoint-2"
    assert last.endswith(f"Resume from the last checkpoint ({checkpoint}) with --resume_from_checkpoint true")
    (tmp_path / "model.safetensors").rmdir()
    done = train(tmp_path, *settings, "--resume_from_checkpoint", "true", launcher=())
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Trained to step 2" in done.stdout
    assert "ktae" in (tmp_path / "README.md").read_text()
    of_checkpoint, saved = (AutoModelForCausalLM.from_pretrained(f) for f in (checkpoint, tmp_path))
    assert difference(dict(of_checkpoint.named_parameters()), dict(saved.named_parameters())) == 0

    refused = train(tmp_path, *settings, "--resume_from_checkpoint", "true", "--seed", "7", launcher=())
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith(
        f"train.py: The training prompts or their order have changed since {checkpoint} was saved: "
    )
