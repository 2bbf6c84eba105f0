"""What README, and the pages that it refers to, show is what the code does."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import tested_where
from benchmarks.published import gains
from ktae_trl import tiny
from ktae_trl.credit.combine import combine
from ktae_trl.credit.ktae.values import key_token_values
from ktae_trl.training.plan import ModelSize, memory_table
from tests.processes import run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
CAREFUL = "1: 9-3=6\n2: 6-1=5\n3: 5-3=2\n4: 2+5=7\nThe answer is \\boxed{7}."
ROLLOUTS = [
    *[CAREFUL] * 4,
    "1: 9-3=6\n2: 6-1=5\n3: 5-3=2\nThe answer is \\boxed{2}.",
    "1: 9-3=6\n3: 6-3=3\n4: 3+5=8\nThe answer is \\boxed{8}.",
    r"That is about \boxed{0}.",
    r"That is about \boxed{11}.",
]


def test_the_group_of_the_overview_of_methods(tokenizer):
    batch = tokenizer([text + tokenizer.eos_token for text in ROLLOUTS], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    right = torch.tensor([True] * 4 + [False] * 4)
    values = key_token_values(ids[None], mask[None], right[None], ignore_ids=[tokenizer.eos_token_id])[0]
    rewards = right.float()
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # TRL's
    final = combine(advantages, values, "multiply")

    page = (DOCS / "methods/index.md").read_text()
    rows = re.findall(r"^  (\S+) +(\d)(?: of 4)? +(\d)(?: of 4)? +([-+]?\d\.\d\d) +(.*)$", page, re.MULTILINE)
    assert [row[0] for row in rows] == ["7", "+", ":", "is", "8", "That"]
    for word, in_right, in_wrong, value, rest in rows:
        token = tokenizer.convert_tokens_to_ids(word if word != "is" else "Ġis")
        found = (ids == token) & mask.bool()
        assert found.any(1)[right].sum() == int(in_right)
        assert found.any(1)[~right].sum() == int(in_wrong)
        assert values[found][0].item() == pytest.approx(float(value), abs=0.005)
        shown = [float(x) for x in re.findall(r"[-+]\d\.\d\d", rest)]
        sides = [final[found & side[:, None]] for side in (right, ~right)]
        assert [side[0].item() for side in sides if len(side)] == pytest.approx(shown, abs=0.006)


def test_the_published_table_is_what_the_command_prints(shared):
    results = json.loads((shared / "published_results.json").read_text())
    assert gains(results) in (DOCS / "evidence/published_gains.md").read_text()


def test_the_gpus_are_those_of_the_files():
    assert f"\n\n{tested_where.table()}\n\n" in README


def test_a_file_of_a_gpu_is_a_row(tmp_path):
    tests = [{"outcome": outcome} for outcome in ("passed", "passed", "skipped")]
    found = {"gpu": "NVIDIA H100", "gpus": 2, "gib": 79.6, "python": "3.12.1", "tests": tests}
    found["packages"] = {"torch": "2.13.0", "vllm": None}
    (tmp_path / "gpu_nvidia_h100.json").write_text(json.dumps(found))
    row = tested_where.table(tmp_path).splitlines()[2]
    assert row.startswith("| 2 x NVIDIA H100, 80 GiB | python 3.12.1, torch 2.13.0 | [2 passed, 1 skipped, 0 failed](")


def test_every_file_that_is_named_is_there():
    """By a whole address: a package index shows this page, too."""
    links = re.findall(r"\]\(([^)#][^)]*)\)", README)
    files = [link for link in links if "/ktae-trl/ktae-trl/" in link]
    assert len(files) > 15
    assert all(link.startswith("https://") for link in links)
    for link in files:
        path = re.sub(r"^https://(github|raw.githubusercontent).com/ktae-trl/ktae-trl/(blob/)?main/", "", link)
        assert (ROOT / path.partition("#")[0]).exists(), link
    for link in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README):
        assert link.startswith("https://raw.githubusercontent.com/"), link  # the picture, not a page about it


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1500


def test_two_lines_turn_a_program_of_trl_into_ours(tmp_path):
    """The diff of README, applied to TRL's program and run with a small model, its own data and reward."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    assert re.findall(r"^[-+]", diff, re.MULTILINE) == ["-", "+", "-", "+"]
    program = re.sub(r"^-.*\n", "", diff, flags=re.MULTILINE)
    program = re.sub(r"^[ +]", "", program, flags=re.MULTILINE).replace("Qwen/Qwen2.5-0.5B-Instruct", str(tiny.MODEL))
    short = "output_dir='out', max_steps=2, use_cpu=True, bf16=False, max_completion_length=40, save_strategy='no'"
    before = f"""
import datasets, functools, ktae_trl
from ktae_trl import tiny
from ktae_trl.data import load, to_prompts
rows = to_prompts(load(str(tiny.TRAIN))).select(range(32))
datasets.load_dataset = lambda name, split: rows.map(lambda row: {{"solution": row["solution"][0]}})
config = ktae_trl.KTAEGRPOConfig({short}, logging_steps=1, report_to="none")
ktae_trl.KTAEGRPOTrainer = functools.partial(ktae_trl.KTAEGRPOTrainer, args=config)
"""
    after = "\nassert trainer.state.global_step == 2 and 'ktae/abs_value' in trainer.state.log_history[0]\n"
    (tmp_path / "run.py").write_text(before + program + after)
    done = run([sys.executable, "run.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_memory_table_is_what_the_estimators_say():
    pytest.importorskip("deepspeed", reason="the estimate is DeepSpeed's")
    page = (DOCS / "guides/scale.md").read_text()
    rows = re.findall(r"^\| Qwen\S+ \(([\d,]+) parameters, largest layer ([\d,]+)\) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 2
    for total, layer, cells in rows:
        size = ModelSize(int(total.replace(",", "")), int(layer.replace(",", "")), None)
        shown = [f"{gpu:.3g}" + (f" ({cpu:.3g})" if "off" in name else "") for name, gpu, cpu in memory_table(size, 8)]
        assert cells.split(" | ") == shown


def test_the_table_of_recipes_is_what_they_say():
    page = (DOCS / "guides/recipes.md").read_text()
    rows = re.findall(r"^\| (\[`.*?) \| .* \| ([\d,]+) x (\d+), (\d) \| (\d) (GPU|CPU)", page, re.MULTILINE)
    shown = {}
    for links, prompts, rollouts, steps, devices, device in rows:
        for name in re.findall(r"/configs/([^/)]+)\.yaml\)", links):
            shown[name] = (
                int(prompts.replace(",", "")),
                int(rollouts),
                int(steps),
                int(devices) if device == "GPU" else 1,
            )
    assert shown.keys() == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name, batch in shown.items():
        recipe = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        accumulated = recipe.get("gradient_accumulation_steps", 1)
        per_generation = recipe.get("steps_per_generation", accumulated)
        processes, rollouts = recipe.get("num_processes", 1), recipe["num_generations"]
        prompts = recipe["per_device_train_batch_size"] * processes * per_generation // rollouts
        assert batch == (prompts, rollouts, per_generation // accumulated, processes)
