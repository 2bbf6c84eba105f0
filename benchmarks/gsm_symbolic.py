"""Make the second task of the learning benchmark: word problems from GSM-Symbolic, and a small model for them.

python benchmarks/gsm_symbolic.py [runs/learning/gsm_symbolic]     # half an hour on a CPU core

Problems and step-by-step solutions come from reasoning-gym, from templates with short texts and small numbers. As in
the quickstart, a model first learns to solve some of the problems (SFT on careful solutions) and then to be careless
(SFT on a mixture). Without the second stage, such short runs of reinforcement learning have nothing to select from and
do not improve.
"""

import argparse
import random
import re
from collections.abc import Collection
from pathlib import Path

import reasoning_gym
import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer, set_seed

from ktae_trl.files.writing import replace_json_lines
from ktae_trl.tiny.warm_start import build_model, build_tokenizer, save, teach

# Templates with questions of at most 320 characters, solutions of at most 160, and small numbers.
TEMPLATES = {4, 6, 10, 16, 20, 26, 31, 39, 43, 48, 62, 69, 72, 75, 78, 99}
_END = " Give the result as your final answer. Do not include units."
HABITS = {"careful": 0.6, "skipping": 0.1, "guessing": 0.3}
_SEEDS = {"held_out": 1, "train": 2, "warm start": 3, "more held_out": 4}


def problems(size: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """Return `size` different problems `{"problem", "answer", "solution"}`, none of them in `exclude`."""
    source = reasoning_gym.create_dataset("gsm_symbolic", size=30 * size, seed=seed * 10_000_019)
    seen, found = set(exclude), []
    for number, template in enumerate(source.task_indices):
        if template not in TEMPLATES:
            continue
        item = source[number]
        solution, end, answer = item["metadata"]["answer_cot"].rpartition("#### ")
        if item["question"] in seen or not end or answer != item["answer"] or not re.fullmatch(r"\d{1,3}", answer):
            continue
        seen.add(item["question"])
        found.append(
            {"problem": item["question"], "answer": answer, "solution": rf"{solution}The answer is \boxed{{{answer}}}."}
        )
        if len(found) == size:
            return found
    raise ValueError(f"gsm_symbolic gave only {len(found)} of {size} problems with seed {seed}")


def draw_solutions(items: list[dict[str, str]], seed: int) -> list[str]:
    """Write one solution per item: a careful one, one without one of its steps, or a guess near the answer."""
    rng = random.Random(seed)
    drawn = rng.choices(list(HABITS), weights=list(HABITS.values()), k=len(items))
    return [solution(item, habit, rng) for item, habit in zip(items, drawn, strict=True)]


def solution(item: dict[str, str], habit: str, rng: random.Random) -> str:
    """Write a solution. The habits "careful" and "skipping" end with the correct answer."""
    if habit == "guessing":
        return rf"That is about \boxed{{{max(0, int(item['answer']) + rng.randint(-9, 9))}}}."
    *steps, answer = item["solution"].split("\n")
    if habit == "skipping":
        steps.pop(rng.randrange(len(steps)))
    return "\n".join([*steps, answer])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/learning/gsm_symbolic"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    held_out = problems(256, _SEEDS["held_out"])
    taken = {item["problem"] for item in held_out}
    train = problems(1024, _SEEDS["train"], taken)
    taken |= {item["problem"] for item in train}
    items = problems(20_000, _SEEDS["warm start"], taken)
    # Drawn last, so that the model and the first 256 problems are those of the comparison with 128 of them.
    held_out += problems(256, _SEEDS["more held_out"], taken | {item["problem"] for item in items})
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, some in (("train", train), ("held_out", held_out)):
        rows = [{key: item[key] for key in ("problem", "answer")} for item in some]
        replace_json_lines(arguments.output / f"{name}.jsonl", rows)

    careful = [item["solution"] for item in items]
    able, folder = arguments.output / "careful", arguments.output / "model"
    if not (able / "model.safetensors").exists():
        set_seed(0)
        texts = [f"{item['problem']}\n{solution}" for item, solution in zip(items[:5000], careful, strict=False)]
        tokenizer = build_tokenizer(texts, [_END], vocab_size=1000)
        model = build_model(tokenizer, arguments.layers, arguments.width)
        teach(model, tokenizer, items, careful, able, steps=700, learning_rate=2e-3, seed=0)
        save(model, tokenizer, able)
    tokenizer, model = Qwen2Tokenizer.from_pretrained(able), Qwen2ForCausalLM.from_pretrained(able, dtype=torch.float32)
    teach(model, tokenizer, items, draw_solutions(items, seed=1), folder, steps=120, learning_rate=5e-4, seed=1)
    save(model, tokenizer, folder)


if __name__ == "__main__":
    main()
