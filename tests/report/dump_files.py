"""Small files as other trainers write them: the same rollouts in each format.

`write(name, folder)` writes a format's files from the names of its fields. All hold `ROLLOUTS`.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from transformers import AutoTokenizer

from ktae_trl import tiny

TOKENIZER = AutoTokenizer.from_pretrained(tiny.MODEL)


class Truth(NamedTuple):
    step: int
    prompt: str
    completion: str
    correct: bool
    advantage: float

    @property
    def ids(self) -> list[int]:
        return encoded(self.completion)

    @property
    def prompt_ids(self) -> list[int]:
        return encoded(self.prompt)


def encoded(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def group(step: int, prompt: str, answer: str) -> list[Truth]:
    right, wrong = f"The answer is {answer}.", "It is about 9"
    return [
        Truth(step, prompt, right, True, 0.5),
        Truth(step, prompt, wrong, False, -0.5),
        Truth(step, prompt, wrong + ".", False, -0.25),
        Truth(step, prompt, right + " Yes", True, 0.25),
    ]


# Two prompts in step 1, one of them again in step 2.
GROUPS = [group(1, "What is 2 + 2?", "4"), group(1, "What is 3 + 4?", "7"), group(2, "What is 2 + 2?", "4")]
ROLLOUTS = [one for some in GROUPS for one in some]
# Formats without a step have the groups of step 1 only.
FIRST = GROUPS[:2]


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_step(some: list[Truth]) -> dict[int, list[Truth]]:
    return {step: [one for one in some if one.step == step] for step in dict.fromkeys(one.step for one in some)}


def trl(folder: Path) -> None:
    (folder / "completions").mkdir()
    for step, some in by_step(ROLLOUTS).items():
        frame = pd.DataFrame(
            {
                "step": step,
                "prompt": [one.prompt for one in some],
                "completion": [one.completion for one in some],
                "math_accuracy": [float(one.correct) for one in some],
                "advantage": [one.advantage for one in some],
            }
        )
        frame.to_parquet(folder / "completions" / f"completions_{step:05}.parquet")


def verl(folder: Path) -> None:
    for step, some in by_step(ROLLOUTS).items():
        rows = [
            {"input": x.prompt, "output": x.completion, "gts": "4", "score": 2.0 * x.correct - 1, "step": step}
            for x in some
        ]
        lines(folder / f"{step}.jsonl", rows)


def areal(folder: Path) -> None:
    for number, some in enumerate(GROUPS):
        rows = [
            {
                "task_id": number,
                "sample_idx": i,
                "seqlen": 9,
                "head_version": 0,
                "tail_version": x.step,
                "reward": float(x.correct),
                "prompt": x.prompt,
                "completion": x.completion,
            }
            for i, x in enumerate(some)
        ]
        lines(folder / "rollout" / str(some[0].step) / f"{number}.jsonl", rows)


def open_instruct(folder: Path) -> None:
    rows = [
        {
            "step": x.step,
            "prompt_idx": number,
            "sample_idx": i,
            "prompt_tokens": x.prompt_ids,
            "response_tokens": x.ids,
            "reward": 10.0 * x.correct,
            "advantage": x.advantage,
            "finish_reason": "stop",
            "dataset": "math",
            "logprobs": [-0.5] * len(x.ids),
        }
        for number, some in enumerate(GROUPS)
        for i, x in enumerate(some)
    ]
    lines(folder / "run_rollouts_000000.jsonl", rows)
    lines(folder / "run_metadata.jsonl", [{"run_name": "run", "model_name": str(tiny.MODEL), "git_commit": "1"}])


def ms_swift(folder: Path) -> None:
    rows = [
        {
            "gen_step": [str(step)] * len(some),
            "prompt": [x.prompt for x in some],
            "completion": [x.completion for x in some],
            "MathAccuracy": [float(x.correct) for x in some],
            "advantages": [x.advantage for x in some],
        }
        for step, some in by_step(ROLLOUTS).items()
    ]
    lines(folder / "completions.jsonl", rows)


def prime_rl(folder: Path) -> None:
    def episode(number: int, x: Truth) -> dict:
        nodes = [
            {"parent": None, "message": {"role": "user", "content": x.prompt}, "sampled": False, "logprobs": []},
            {"parent": 0, "message": {"role": "assistant", "content": x.completion}, "sampled": True},
        ]
        nodes[0] |= {"token_ids": x.prompt_ids, "mask": [False] * len(x.prompt_ids)}
        nodes[1] |= {"token_ids": x.ids, "mask": [True] * len(x.ids), "logprobs": [-0.5] * len(x.ids)}
        nodes[1] |= {"advantages": [x.advantage] * len(x.ids)}
        trace = {"id": "t", "nodes": nodes, "rewards": {"accuracy": {"score": float(x.correct), "weight": 1.0}}}
        return {"group": {"id": f"g{number}"}, "run": {"work": {"step": x.step}}, "traces": [trace]}

    for kind in ("all", "effective"):
        for step in (1, 2):
            rows = [episode(number, x) for number, some in enumerate(GROUPS) for x in some if x.step == step]
            lines(folder / f"step_{step}" / "train" / kind / "traces.jsonl", rows)


def prime_rl_tokens(folder: Path) -> None:
    for step, some in by_step(ROLLOUTS).items():
        rows = []
        for x in some:
            before, own = len(x.prompt_ids), len(x.ids)
            rows.append(
                {
                    "schema_version": 1,
                    "step": step + 100,
                    "export_step": step,
                    "token_ids": x.prompt_ids + x.ids,
                    "position_ids": list(range(before + own)),
                    "loss_mask": [False] * before + [True] * own,
                    "advantages": [0.0] * before + [x.advantage] * own,
                    "rewards": [float(x.correct)] * (before + own),
                    "inference_logprobs": [0.0] * before + [-0.5] * own,
                    "trainer_logprobs": [0.0] * before + [-0.75] * own,
                    "entropy": [0.25] * (before + own),
                    "importance_ratio": [1.5] * (before + own),
                    "losses": [{}] * (before + own),
                }
            )
        lines(folder / "token_exports" / f"step_{step}" / "rank_0.jsonl", rows)


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def atropos(folder: Path) -> None:
    rows = [
        {
            "tokens": [x.prompt_ids + x.ids for x in some],
            "masks": [[-100] * len(x.prompt_ids) + x.ids for x in some],
            "scores": [1.0 if x.correct else -1.0 for x in some],
            "advantages": [[x.advantage] * len(x.prompt_ids + x.ids) for x in some],
            "inference_logprobs": [[1.0] * len(x.prompt_ids) + [-0.5] * len(x.ids) for x in some],
            "messages": [[_message("user", x.prompt), _message("assistant", x.completion)] for x in some],
            "group_overrides": {},
        }
        for some in FIRST
    ]
    lines(folder / "groups.jsonl", rows)


def nemo_rl(folder: Path) -> None:
    for step, some in by_step(ROLLOUTS).items():
        longest = max(len(x.prompt_ids + x.ids) for x in some)
        rows = []
        for i, x in enumerate(some):
            before, own = len(x.prompt_ids), len(x.ids)
            rest = longest - before - own
            rows.append(
                {
                    "content": [[x.prompt, x.completion]],
                    "rewards": [float(x.correct)],
                    "input_lengths": [before + own],
                    "token_ids": [x.prompt_ids + x.ids + [0] * rest],
                    "token_loss_mask": [[0] * before + [1] * own + [0] * rest],
                    "advantages": [[x.advantage] * longest],
                    "generation_logprobs": [[0.0] * before + [-0.5] * own + [0.0] * rest],
                    "prev_logprobs": [[0.0] * before + [-0.75] * own + [0.0] * rest],
                    "idx": i,
                }
            )
        lines(folder / f"train_data_step{step}.jsonl", rows)


def skyrl(folder: Path) -> None:
    for step, some in by_step(ROLLOUTS).items():
        rows = [
            {
                "input_prompt": x.prompt,
                "output_response": x.completion,
                "score": [0.0, float(x.correct)],
                "stop_reason": "stop",
                "env_class": "math",
                "env_extras": {},
                "data_source": "math",
            }
            for x in some
        ]
        lines(folder / f"global_step_{step}_evals" / "math.jsonl", rows)


def roll(folder: Path) -> None:
    for step, some in by_step(ROLLOUTS).items():
        row = {
            "prompt": [x.prompt for x in some],
            "responses": [x.completion for x in some],
            "scores": [float(x.correct) for x in some],
            "ground_truth": ["4"] * len(some),
        }
        lines(folder / f"rollout_dump_data.step_{step}.jsonl", [row])


def lm_eval(folder: Path) -> None:
    rows = [
        {
            "doc_id": number,
            "doc": {"question": some[0].prompt},
            "target": "4",
            "arguments": {"gen_args_0": {"arg_0": some[0].prompt, "arg_1": {"until": []}}},
            "resps": [[x.completion for x in some]],
            "filtered_resps": [x.completion for x in some],
            "filter": "none",
            "metrics": ["exact_match"],
            "exact_match": [float(x.correct) for x in some],
        }
        for number, some in enumerate(FIRST)
    ]
    lines(folder / "samples_math_2025-01-01T00-00-00.jsonl", rows)


def eval_samples(folder: Path) -> None:
    rows = [
        {
            "id": str(number),
            "sample": i,
            "problem": x.prompt,
            "prompt": x.prompt,
            "completion": x.completion,
            "tokens": len(x.ids),
            "truncated": False,
            "answers": ["4"],
            "verdict": x.correct,
        }
        for number, some in enumerate(FIRST)
        for i, x in enumerate(some)
    ]
    lines(folder / "math.jsonl", rows)
    (folder / "settings.json").write_text(json.dumps({"model_name_or_path": str(tiny.MODEL)}))
    (folder / "summary.json").write_text("{}")


def rows(folder: Path) -> None:
    lines(
        folder / "rows.jsonl",
        [{"prompt": x.prompt, "completion": x.completion, "correct": x.correct, "step": x.step} for x in ROLLOUTS],
    )


def records(folder: Path) -> None:
    from ktae_trl.credit import find_method
    from ktae_trl.report import records as own

    method = own.method_of(find_method("oar_g"), "scale", {}, special_ids=(0,))
    for step, some in by_step(ROLLOUTS).items():
        found = [
            {
                "step": x.step,
                "group": GROUPS.index(next(g for g in GROUPS if x in g)),
                "rollout": i,
                "prompt": x.prompt,
                "completion": x.completion,
                "token_ids": x.ids,
                "tokens": [TOKENIZER.decode([one]) for one in x.ids],
                "trained": [True] * len(x.ids),
                "rewards": {"math_accuracy": float(x.correct), "brevity": 0.5},
                "correct": x.correct,
                "advantage": x.advantage,
                "credit": [1.0] * len(x.ids),
                "advantages": [x.advantage] * len(x.ids),
                "arrays": {"entropy": [0.25] * len(x.ids)},
            }
            for i, x in enumerate(some)
        ]
        own.write(folder / own.FOLDER / own.file_name(step), own.Record(method, found))
    (folder / "completions.jsonl").write_text("{}\n")  # other files of a run
    (folder / "settings.json").write_text("{}")


WRITERS = {
    one.__name__: one
    for one in (
        *(trl, verl, areal, open_instruct, ms_swift, prime_rl, prime_rl_tokens, atropos, nemo_rl, skyrl, roll),
        *(lm_eval, eval_samples, records, rows),
    )
}
WITHOUT_STEPS = {"atropos", "lm_eval", "eval_samples"}


def write(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[name](folder)
    return folder
