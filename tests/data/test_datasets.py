"""The datasets that everybody starts from, in small: each is trained on by a recipe of ten lines.

The files of `tests/data` have the columns of those on the Hub, with rows of our own: sums that the offline model can
do, and one or two that are special in each.
"""

import json
import logging
from pathlib import Path

import pytest
import yaml

from ktae_trl import data, tiny
from ktae_trl.training import run as training

DATA = Path(__file__).parents[1] / "samples"

# name -> its columns, the accepted answers, rows left out, what the recipe says of its columns
DATASETS = {
    "gsm8k": ("question answer", "14,400 5 15 16 15 9", 0, {"problem_column": "question"}),
    "math": ("problem level type solution", r"3 \frac{5}{6} 15 16 15 9", 0, {"answer_column": "solution"}),
    "dapo_math_17k": (
        "data_source prompt ability reward_model extra_info",
        "3 5 15 16 15 9",
        0,
        {"problem_column": "prompt", "answer_column": "reward_model.ground_truth"},
    ),
    "deepscaler": ("problem answer solution", "3 5 15 (-2,2) 15 9", 0, {}),
    "numina_math_cot": ("source problem solution messages", "3 5 15 16 9", 1, {"answer_column": "solution"}),
    "openr1_math_220k": (
        "problem solution answer problem_type question_type source uuid is_reasoning_complete generations "
        "correctness_math_verify correctness_llama finish_reasons correctness_count messages",
        "3 5 15 16 15 9",
        0,
        {},
    ),
    "aime_2024": (
        "ID Problem Solution Answer",
        "3 5 15 16 15 9",
        0,
        {"problem_column": "Problem", "answer_column": "Answer"},
    ),
    "orca_math": ("question answer", "15 16 15 9", 2, {"problem_column": "question"}),
}


def recipe(name: str, output: Path) -> str:
    """Write a recipe of ten lines; return its path."""
    settings = {
        "model_name_or_path": str(tiny.MODEL),
        "dataset_name": str(DATA / f"{name}.jsonl"),
        "output_dir": str(output),
        "problem_column": "problem",
        "answer_column": "answer",
        **DATASETS[name][-1],
        "per_device_train_batch_size": 16,
        "max_completion_length": 80,
        "max_steps": 3,
        "use_cpu": True,
        "bf16": False,
    }
    text = yaml.safe_dump(settings)
    assert len(text.splitlines()) == 10
    (output / "recipe.yaml").write_text(text)
    return str(output / "recipe.yaml")


@pytest.mark.parametrize("name", DATASETS)
def test_what_is_understood(name, tokenizer, caplog):
    columns, answers, left_out, settings = DATASETS[name]
    arguments = data.DataArguments(str(DATA / f"{name}.jsonl"), **settings)
    raw = data.load(arguments.dataset_name)
    assert raw.column_names == columns.split()
    with caplog.at_level(logging.WARNING):
        prompts, _ = data.load_prompts(arguments, tokenizer)
    assert prompts["solution"] == [[answer] for answer in answers.split()]
    assert len(raw) - len(prompts) == left_out == (6 - len(answers.split()))
    assert ("Left out" in caplog.text) == bool(left_out)
    roles = [[message["role"] for message in prompt] for prompt in prompts["prompt"]]
    assert roles == [["system", "user"]] * len(prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_three_steps(name, tmp_path, capfd):
    quiet = ["--report_to", "none", "--logging_steps", "1", "--save_steps", "3"]
    training.train(*training.read_arguments(["--config", recipe(name, tmp_path), *quiet]))
    assert "Trained to step 3" in capfd.readouterr().out
    log = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "rewards/math_accuracy/mean" in entry]
    assert len(steps) == 3
    if (
        name != "dapo_math_17k"
    ):  # whose long instruction is too much for the offline model: else it does some of the sums
        assert max(step["rewards/math_accuracy/mean"] for step in steps) > 0
    assert {step["grading/unscorable"] for step in steps} == {0}


def test_the_dry_run_shows_what_is_understood(tmp_path, capfd):
    words = ["--config", recipe("gsm8k", tmp_path), "--dry_run", "true", "--report_to", "none"]
    training.train(*training.read_arguments(words))
    shown = capfd.readouterr().out
    assert "How many books is that?" in shown
    assert "Gold answer: 14,400   (last line #### in the column answer)" in shown
