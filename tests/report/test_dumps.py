"""`ktae explain` reads the files of other trainers as they are: the same rollouts from each, and bad files."""

import gzip
import json
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from ktae_trl import tiny
from ktae_trl.arguments import UserError
from ktae_trl.report.contents import collect
from ktae_trl.report.dumps import sources
from ktae_trl.report.dumps.explaining import explain_files
from ktae_trl.report.dumps.formats import BY_NAME, FORMATS
from ktae_trl.report.dumps.index import Index
from ktae_trl.report.dumps.rollout import step_in
from ktae_trl.report.dumps.rows import renamed, suggested_mapping
from ktae_trl.report.rows import group_advantages, method_with
from ktae_trl.report.run import main
from tests.report import dump_files
from tests.report.dump_files import FIRST, GROUPS, ROLLOUTS, TOKENIZER, WITHOUT_STEPS, WRITERS, encoded, lines
from tests.reporting import Page

METHOD = method_with("multiply", 1.0, 1.0, 1.0, False)
ROOT = Path(__file__).parents[2]
TINY = str(tiny.MODEL)
NO_TOKENIZER = {"open_instruct", "eval_samples", "records"}  # their files name it, or have the strings


def explained(*paths: Path, tokenizer: str | None = TINY, **options) -> tuple[list[dict], list[str], list[str]]:
    """The rows, the lines that are printed, and the notes of the page."""
    found = explain_files(list(paths), METHOD, tokenizer=tokenizer, **options)
    return [row for record in found.records for row in record.rows], found.lines, found.notes


# The formats


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rollouts(tmp_path, name):
    folder = dump_files.write(name, tmp_path / "files")
    rows, (line, summary, *named), notes = explained(folder, tokenizer=None if name in NO_TOKENIZER else TINY)
    assert named == [f"Tokenizer, which the files name: {TINY}"] * (name in NO_TOKENIZER - {"records"})
    groups = FIRST if name in WITHOUT_STEPS else GROUPS
    found = [(row["step"], row["prompt"], row["completion"], row["correct"]) for row in rows]
    all_of_them = [x for some in groups for x in some]
    steps = [0 if name in WITHOUT_STEPS else x.step for x in all_of_them]
    assert found == [(s, x.prompt, x.completion, x.correct) for s, x in zip(steps, all_of_them, strict=True)]
    assert [row["token_ids"] for row in rows] == [x.ids for x in all_of_them]
    assert ["".join(row["tokens"]) for row in rows] == [x.completion for x in all_of_them]
    assert [row["rollout"] for row in rows] == [0, 1, 2, 3] * len(groups)
    assert [row["group"] for row in rows[::4]] == ([0, 1] if name in WITHOUT_STEPS else [0, 1, 0])
    assert BY_NAME[name].title in line
    assert re.search(rf"\((\d steps?, )?{len(groups)} prompts x 4 rollouts\)$", line)
    assert ("2 steps" in line) is (name not in WITHOUT_STEPS)
    assert summary == f"prompts: {len(groups)} ({len(groups)} with correct and wrong rollouts); rollouts: {len(rows)}"
    assert all(any(abs(k) > 0.1 for k in row["credit"]) for row in rows)
    again = [note for note in notes if "tokenized again" in note]
    assert len(again) == (name not in {*NO_TOKENIZER - {"eval_samples"}, *WITH_IDS})
    own = {"trl", "ms_swift", "records", "open_instruct", *WITH_IDS}
    assert ("The advantage A of a rollout is the one in the file." in notes) is (name in own)
    of_grpo = group_advantages([True, False, False, True]) * len(groups)
    expected = [x.advantage for x in all_of_them] if name in own else of_grpo
    assert [row["advantage"] for row in rows] == pytest.approx(expected, abs=1e-6)


WITH_IDS = {"prime_rl", "prime_rl_tokens", "atropos", "nemo_rl"}


def test_every_format_is_tested_and_in_the_documentation(capsys):
    assert set(WRITERS) == set(BY_NAME)
    assert len({one.title for one in FORMATS}) == len(FORMATS)
    page = (ROOT / "docs" / "guides" / "other_trainers.md").read_text()
    table = re.findall(r"^\| [^|]+ \| `(\w+)` \|", page, re.MULTILINE)
    assert table == list(BY_NAME)
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    said = " ".join(capsys.readouterr().out.split()).split("whose keys the files have): ")[1].split(" --")[0]
    assert re.split(", | or ", said) == list(BY_NAME)


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("open_instruct", {"log_probability": -0.5}),
        ("prime_rl", {"log_probability": -0.5}),
        ("prime_rl_tokens", {"log_probability": -0.5, "trainer_logprobs": -0.75, "entropy": 0.25, "ratio": 1.5}),
        ("atropos", {"log_probability": -0.5}),
        ("nemo_rl", {"log_probability": -0.5, "prev_logprobs": -0.75}),
        ("records", {"entropy": 0.25}),
    ],
)
def test_numbers_of_tokens_are_kept(tmp_path, name, arrays):
    rows, _, _ = explained(dump_files.write(name, tmp_path / "files"), tokenizer=None if name == "records" else TINY)
    for row in rows:
        assert row["arrays"] == {key: [value] * len(row["token_ids"]) for key, value in arrays.items()}


def test_the_page_has_the_numbers_and_the_notes(tmp_path, capsys):
    folder = dump_files.write("prime_rl_tokens", tmp_path / "files")
    main(["explain", str(folder), "--tokenizer", TINY, "-o", str(tmp_path / "page.html")])
    assert "Recognised 2 files as prime-rl token exports (2 steps, 3 prompts x 4 rollouts)" in capsys.readouterr().err
    page = Page((tmp_path / "page.html").read_text())
    assert [(group["step"], group["group"]) for group in page.data("index")["groups"]] == [(1, 0), (1, 1), (2, 0)]
    arrays = page.data("block-0")["rollouts"][0]["arrays"]
    assert set(arrays) == {"log_probability", "trainer_logprobs", "entropy", "ratio"}
    assert "The advantage A of a rollout is the one in the file." in page.text


# Turns


def conversation() -> list[dict]:
    return [
        {"role": "assistant", "content": "I ask the tool."},
        {"role": "tool", "content": "It is 4."},
        {"role": "assistant", "content": "The answer is 4."},
    ]


TURNS = ["I ask the tool.", "It is 4.", "The answer is 4."]


def check_turns(row: dict) -> None:
    ids = [encoded(text) for text in TURNS]
    begins = [0, len(ids[0]), len(ids[0] + ids[1])]
    assert row["token_ids"] == [i for own in ids for i in own]
    roles = ("assistant", "tool", "assistant")
    assert row["segments"] == [{"role": role, "begin": at} for role, at in zip(roles, begins, strict=True)]
    assert row["trained"] == [True] * len(ids[0]) + [False] * len(ids[1]) + [True] * len(ids[2])


def test_messages_of_trl_are_turns(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    frame = pd.DataFrame(
        {
            "step": 3,
            "prompt": [prompt] * 2,
            "completion": [conversation(), [{"role": "assistant", "content": "5"}]],
            "math_accuracy": [1.0, 0.0],
            "advantage": [0.7, -0.7],
        }
    )
    frame.to_parquet(tmp_path / "completions_00003.parquet")
    rows, _, _ = explained(tmp_path / "completions_00003.parquet")
    assert [row["prompt"] for row in rows] == ["system: Be brief.\n\nuser: 2 + 2?"] * 2
    check_turns(rows[0])
    assert rows[1]["completion"] == "5"
    assert "segments" not in rows[1]


def test_segments_of_areal_are_turns(tmp_path):
    common = {"task_id": 5, "prompt": "2 + 2?"}
    parts = [{"role": one["role"], "text": one["content"]} for one in conversation()]
    rows = [
        {**common, "sample_idx": 0, "reward": 1.0, "completion": "".join(TURNS), "segments": parts},
        {**common, "sample_idx": 1, "reward": 0.0, "completion": "5"},
    ]
    found, _, _ = explained(lines(tmp_path / "7" / "5.jsonl", rows))
    check_turns(found[0])
    assert [row["step"] for row in found] == [7, 7]


def trace(texts: list[tuple[str, str, bool]], score: float, parents: list[int | None] | None = None) -> dict:
    """A trace of prime-rl from (role, text, sampled), with one log-probability per sampled token."""
    nodes = []
    for i, (role, text, sampled) in enumerate(texts):
        ids = encoded(text)
        node = {"message": {"role": role, "content": text}, "token_ids": ids, "mask": [sampled] * len(ids)}
        node |= {"sampled": sampled, "logprobs": [-1.0 - i] * (len(ids) if sampled else 0)}
        node |= {"advantages": [float(i)] * len(ids) if sampled else None}
        nodes.append(node if parents is None else {**node, "parent": parents[i]})
    return {"nodes": nodes, "rewards": {"accuracy": {"score": score}}}


def test_nodes_of_prime_rl_are_turns(tmp_path):
    texts = [("user", "2 + 2?", False), *(("tool" if i == 1 else "assistant", t, i != 1) for i, t in enumerate(TURNS))]
    texts[1] = ("assistant", TURNS[0], True)
    traces = trace(texts, 1.0), trace([texts[0], ("assistant", "5", True)], 0.0)
    episodes = [{"group": {"id": "a"}, "run": {"work": {"step": 4}}, "traces": [one]} for one in traces]
    rows, _, _ = explained(lines(tmp_path / "traces.jsonl", episodes))
    check_turns(rows[0])
    first, tool, last = (len(encoded(text)) for text in TURNS)
    assert rows[0]["prompt"] == "2 + 2?"
    assert rows[0]["arrays"]["log_probability"] == [-2.0] * first + [None] * tool + [-4.0] * last
    # Advantages differ by turn: they are shown, and A is their mean over the trained tokens.
    assert rows[0]["arrays"]["advantage"] == [1.0] * first + [None] * tool + [3.0] * last
    assert rows[0]["advantage"] == pytest.approx((first + 3 * last) / (first + last))
    assert "advantage" not in rows[1]["arrays"]


def test_the_scaffold_of_a_turn_belongs_to_the_prompt(tmp_path):
    """An assistant's node begins with tokens of the template, which were not sampled and have no log-probability."""
    episodes = []
    for text, score in (("The answer is 4.", 1.0), ("It is 5.", 0.0)):
        one = trace([("user", "2 + 2?", False), ("assistant", text, True)], score)
        scaffold, ids = encoded("so: "), encoded(text)
        one["nodes"][1] |= {"token_ids": scaffold + ids, "mask": [False] * len(scaffold) + [True] * len(ids)}
        one["nodes"][1]["logprobs"] = [-0.25 * i for i in range(len(ids))]
        episodes.append({"group": {"id": 1}, "run": {"work": {"step": 1}}, "traces": [one]})
    rows, _, _ = explained(lines(tmp_path / "traces.jsonl", episodes))
    assert [row["prompt"] for row in rows] == ["2 + 2?so: "] * 2
    assert rows[0]["token_ids"] == encoded("The answer is 4.")
    assert rows[0]["arrays"]["log_probability"] == [-0.25 * i for i in range(len(rows[0]["token_ids"]))]


def test_each_branch_of_a_trace_is_a_rollout(tmp_path):
    """A graph of nodes: two leaves below one prompt. Traces that train nothing are left out."""
    texts = [("user", "2 + 2?", False), ("assistant", "The answer is 4.", True), ("assistant", "It is 4.", True)]
    judge = {**trace(texts[:2], 0.5), "agent": {"name": "judge", "trainable": False}}
    episodes = [
        {"group": {"id": "a"}, "run": {}, "traces": [trace(texts, 1.0, [None, 0, 0]), judge]},
        {"group": {"id": "a"}, "run": {}, "traces": [trace([texts[0], ("assistant", "5", True)], 0.0)]},
    ]
    rows, _, _ = explained(lines(tmp_path / "step_6" / "traces.jsonl", episodes))
    assert [(row["completion"], row["correct"], row["step"]) for row in rows] == [
        ("The answer is 4.", True, 6),
        ("It is 4.", True, 6),
        ("5", False, 6),
    ]


def test_a_trace_without_ids_is_read_as_text(tmp_path):
    episodes = []
    for text, score in (("It is 4.", 1.0), ("5", 0.0)):
        one = trace([("user", "2 + 2?", False), ("assistant", text, True)], score)
        for node in one["nodes"]:
            del node["token_ids"], node["mask"], node["logprobs"]
        episodes.append({"group": {"id": 1}, "run": {"work": {"step": 1}}, "traces": [one]})
    rows, _, notes = explained(lines(tmp_path / "traces.jsonl", episodes))
    assert [(row["prompt"], row["completion"]) for row in rows] == [("user: 2 + 2?", "It is 4."), ("user: 2 + 2?", "5")]
    assert any("tokenized again" in note for note in notes)


def test_untrained_tokens_of_a_sequence_are_not_counted(tmp_path):
    """A tool's output in the completion of Atropos: untrained, and without a log-probability."""
    prompt, (first, tool, last) = encoded("2 + 2?"), map(encoded, TURNS)
    wrong = encoded("It is 5.")
    rows = [
        {
            "tokens": [prompt + first + tool + last, prompt + wrong],
            "masks": [[-100] * len(prompt) + first + [-100] * len(tool) + last, [-100] * len(prompt) + wrong],
            "scores": [1.0, 0.0],
            "advantages": [0.5, -0.5],
            "inference_logprobs": [
                [1.0] * len(prompt) + [-0.5] * len(first + tool + last),
                [-0.5] * len(prompt + wrong),
            ],
        }
    ]
    found, _, _ = explained(lines(tmp_path / "groups.jsonl", rows))
    mask = [True] * len(first) + [False] * len(tool) + [True] * len(last)
    assert found[0]["trained"] == mask
    assert found[0]["arrays"]["log_probability"] == [-0.5 if kept else None for kept in mask]
    assert [k for k, kept in zip(found[0]["credit"], mask, strict=True) if not kept] == [0.0] * len(tool)
    assert [row["advantage"] for row in found] == [0.5, -0.5]


# Groups and verdicts


def verl_rows(rewards: list[float], **more) -> list[dict]:
    return [{"input": "2 + 2?", "output": f"It is {i}.", "score": r, "step": 1, **more} for i, r in enumerate(rewards)]


def test_groups_are_those_of_the_file(tmp_path):
    rows = [
        {**row, "uid": uid, "step": step}
        for step in (1, 2)
        for row, uid in zip(verl_rows([1.0, 0.0, 1.0, 0.0]), "abab", strict=True)
    ]
    found, (line, _), _ = explained(lines(tmp_path / "x.jsonl", rows))
    assert [(row["step"], row["group"], row["completion"]) for row in found] == [
        *((1, 0, "It is 0."), (1, 0, "It is 2."), (1, 1, "It is 1."), (1, 1, "It is 3.")),
        *((2, 0, "It is 0."), (2, 0, "It is 2."), (2, 1, "It is 1."), (2, 1, "It is 3.")),
    ]
    assert line.endswith("(2 steps, 4 prompts x 2 rollouts)")


@pytest.mark.parametrize(
    ("rows", "options", "verdicts", "note"),
    [
        ([1.0, 0.0, 1.0, None], {}, [True, False, True, None], "score is above 0.5"),
        ([-1.0, 0.5], {}, [False, True], "score is above -1"),
        ([0.0, 0.5, 1.0, 0.2], {"threshold": 0.4}, [False, True, True, False], "score is above 0.4"),
        ([1.0, 1.0], {}, [True, True], "score is above 0.5"),
    ],
)
def test_rewards_are_verdicts_if_they_have_two_values(tmp_path, rows, options, verdicts, note):
    found, _, notes = explained(lines(tmp_path / "x.jsonl", verl_rows(rows)), **options)
    assert [row["correct"] for row in found] == verdicts
    assert f"A rollout is correct if its {note}." in notes


def test_a_verdict_in_the_file_comes_before_the_reward(tmp_path):
    rows = [{**row, "acc": i == 2} for i, row in enumerate(verl_rows([0.1, 0.7, 0.3]))]
    file = lines(tmp_path / "x.jsonl", rows)
    found, _, notes = explained(file)
    assert [row["correct"] for row in found] == [False, False, True]
    assert found[0]["rewards"] == {"score": 0.1, "acc": 0.0}
    assert not [note for note in notes if "is correct if" in note]
    found, _, _ = explained(file, correct="score", threshold=0.2)
    assert [row["correct"] for row in found] == [False, True, True]


def test_rewards_of_many_values_are_not_guessed(tmp_path):
    file = lines(tmp_path / "x.jsonl", verl_rows([0.0, 0.5, 1.0, 0.5]))
    told = r"score has 3 values: 0 \(1 times\), 0\.5 \(2 times\), 1 \(1 times\)\. Give --threshold X"
    with pytest.raises(UserError, match=told):
        explained(file)
    with pytest.raises(UserError, match=r"12 values: .*and 4 others from 0 to 11"):
        explained(lines(tmp_path / "y.jsonl", verl_rows([float(i) for i in range(12)])))
    with pytest.raises(UserError, match=r"score is always the same: 3 \(2 times\)"):
        explained(lines(tmp_path / "z.jsonl", verl_rows([3.0, 3.0])))


def test_one_of_several_rewards_must_be_chosen(tmp_path):
    frame = pd.DataFrame(
        {
            "step": 1,
            "prompt": "2 + 2?",
            "completion": ["4", "5"],
            "accuracy": [1.0, 0.0],
            "format": [None, 0.5],
            "note": [None, "text"],
            "advantage": [0.7, -0.7],
        }
    )
    frame.to_parquet(tmp_path / "completions_00001.parquet")
    with pytest.raises(UserError, match="Choose one with --correct NAME: accuracy, format"):
        explained(tmp_path)
    rows, _, _ = explained(tmp_path, correct="accuracy")
    assert [row["correct"] for row in rows] == [True, False]
    assert [row["rewards"] for row in rows] == [{"accuracy": 1.0, "format": None}, {"accuracy": 0.0, "format": 0.5}]
    with pytest.raises(UserError, match=r"no number 'acuracy' \(did you mean 'accuracy'\?\) \(--correct\)"):
        explained(tmp_path, correct="acuracy")


def test_responses_of_lm_eval_without_a_verdict_each_are_graded(tmp_path):
    common = {"doc": {}, "arguments": [["2 + 2?", {}]], "filtered_resps": [], "filter": "none", "exact_match": 1.0}
    rows = [
        {"doc_id": 0, "target": "so 2 + 2 = 4\n#### 4", "resps": [["The answer is 4.", "The answer is 5."]], **common},
        {"doc_id": 1, "target": "4", "resps": [["only one"]], **common},
        {"doc_id": 2, "target": "4", "resps": [[-1.5, False]], **common},
    ]
    found, _, notes = explained(lines(tmp_path / "samples_x.jsonl", rows))
    assert [(row["prompt"], row["correct"]) for row in found] == [("2 + 2?", True), ("2 + 2?", False), ("2 + 2?", True)]
    assert [row["group"] for row in found] == [0, 0, 1]
    assert any("Skipped 1 of 3 rows" in note and "only tasks that generate text" in note for note in notes)


def test_other_names_are_mapped(tmp_path):
    rows = [
        {"request": {"text": "2 + 2?"}, "reply": f"It is {i}.", "passed": i == 1, "uid": "x", "logprobs": [1]}
        for i in range(3)
    ]
    file = lines(tmp_path / "x.jsonl", rows)
    found, (line, _), notes = explained(file, names="prompt=request.text, completion=reply,reward=passed,group=uid")
    assert [(row["prompt"], row["correct"]) for row in found] == [("2 + 2?", i == 1) for i in range(3)]
    assert "rows with prompt and completion" in line
    assert "A rollout is correct if its reward is above 0.5." in notes
    with pytest.raises(UserError, match=r"x\.jsonl does not have the format rows: it lacks replie"):
        explained(file, names="prompt=request.text,completion=replie,reward=passed")
    with pytest.raises(UserError, match=r"--map has no field 'promt' \(did you mean 'prompt'\?\)"):
        explained(file, names="promt=request")
    with pytest.raises(UserError, match="--map must be like"):
        explained(file, names="prompt")
    with pytest.raises(UserError, match="cannot be used with --format verl"):
        explained(file, names="prompt=a", format="verl")
    with pytest.raises(UserError, match=r"--format 'verll' is unknown \(did you mean 'verl'\?\)"):
        explained(file, format="verll")


def test_rows_may_have_ids_and_numbers(tmp_path):
    rows = []
    for text, reward in (("The answer is 4.", 1.0), ("It is about 5", 0.0)):
        ids = encoded(text)
        own = {"token_ids": ids, "logprobs": [-0.5] * len(ids), "advantage": reward}
        rows.append({"prompt": "p", "completion": text, "reward": reward, **own})
    found, _, notes = explained(lines(tmp_path / "x.jsonl", rows))
    assert [row["token_ids"] for row in found] == [encoded("The answer is 4."), encoded("It is about 5")]
    assert found[0]["arrays"] == {"log_probability": [-0.5] * len(found[0]["token_ids"])}
    assert [row["advantage"] for row in found] == [1.0, 0.0]
    assert not [note for note in notes if "again" in note]


# Many groups


def test_each_step_has_its_share_of_the_groups_nearest_to_half(tmp_path):
    shares = {1: [0, 4, 2, 1], 2: [1, 3, 0, 2]}  # correct ones of four
    for step, counts in shares.items():
        rows = [
            {"input": f"prompt {p}", "output": f"It is {i}.", "score": float(i < right), "step": step}
            for i in range(4)  # groups lie among each other
            for p, right in enumerate(counts)
        ]
        lines(tmp_path / f"{step}.jsonl", rows)
    rows, (line, summary), notes = explained(tmp_path, max_groups=4)
    assert [(row["step"], row["prompt"]) for row in rows[::4]] == [
        *((1, "prompt 2"), (1, "prompt 3"), (2, "prompt 0"), (2, "prompt 3")),
    ]
    assert [row["group"] for row in rows[::4]] == [2, 3, 0, 3]
    assert [row["completion"] for row in rows[:4]] == [f"It is {i}." for i in range(4)]
    assert "2 steps, 8 prompts x 4 rollouts" in line
    assert summary == "prompts: 8 (5 with correct and wrong rollouts, 1 all correct, 2 all wrong); rollouts: 32"
    assert notes[0].startswith("This page shows 4 of 8 groups: for each step, those closest to an equal number")
    rows, _, _ = explained(tmp_path, max_groups=1)  # fewer groups than steps
    assert [(row["step"], row["prompt"]) for row in rows[::4]] == [(1, "prompt 2")]
    with pytest.raises(UserError, match="max_groups must be at least 1, not 0"):
        explained(tmp_path, max_groups=0)


def test_a_group_of_empty_completions_is_no_fault(tmp_path):
    rows = [{**row, "output": ""} for row in verl_rows([1.0, 0.0])]
    file = lines(tmp_path / "x.jsonl", rows)
    found, _, _ = explained(file)
    assert [(row["token_ids"], row["credit"], row["advantages"]) for row in found] == [([], [], [])] * 2
    main(["explain", str(file), "--tokenizer", TINY, "-o", str(tmp_path / "page.html")])


def test_files_are_read_in_natural_order_and_once(tmp_path):
    for step in (2, 10, 1):
        lines(tmp_path / f"{step}.jsonl", [{**row, "step": step} for row in verl_rows([1.0, 0.0])])
    assert [path.name for path in sources.files([tmp_path])] == ["1.jsonl", "2.jsonl", "10.jsonl"]
    rows, (line, _), _ = explained(tmp_path, tmp_path / "10.jsonl", tmp_path / ".." / tmp_path.name / "1.jsonl")
    assert [row["step"] for row in rows[::2]] == [1, 2, 10]
    assert line.startswith("Recognised 3 files")


def test_a_compressed_file_is_read_like_its_contents(tmp_path):
    dump_files.write("verl", tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    for file in (tmp_path / "plain").iterdir():
        (tmp_path / "packed" / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert explained(tmp_path / "packed")[0] == explained(tmp_path / "plain")[0]


def test_parquet_of_several_row_groups_is_read_in_parts(tmp_path):
    rows = [row for step in range(40) for row in ({**one, "step": step} for one in verl_rows([1.0, 0.0, 0.0]))]
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet", row_group_size=7)
    found, _, _ = explained(tmp_path / "x.parquet", max_groups=5)
    assert [row["step"] for row in found[::3]] == [0, 8, 16, 24, 32]
    assert [row["completion"] for row in found[:3]] == [f"It is {i}." for i in range(3)]


def test_trl_files_that_repeat_a_generation_count_once(tmp_path):
    """With steps_per_generation, TRL logs the same rollouts at several steps."""
    dump_files.write("trl", tmp_path)
    first = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    first.assign(step=3).to_parquet(tmp_path / "completions" / "completions_00003.parquet")
    rows, (line, _), notes = explained(tmp_path)
    assert len(rows) == len(ROLLOUTS)
    assert "2 steps, 3 prompts x 4 rollouts" in line
    assert "1 file repeated the rollouts of another file and was left out." in notes


def test_traces_of_prime_rl_are_not_read_twice(tmp_path):
    dump_files.write("prime_rl", tmp_path)
    (tmp_path / "step_2" / "train" / "effective" / "traces.jsonl").unlink()
    rows, (line, _), _ = explained(tmp_path)
    assert len(rows) == len(ROLLOUTS)
    assert "2 files" in line


def test_shared_tokens_of_a_tree_count_in_every_row(tmp_path):
    from ktae_trl.credit import find_method
    from ktae_trl.report import records
    from tests.reporting import rows_of_group, write_run

    trained = [[True, True], [False, True], [True, True]]
    rows = rows_of_group([["s", "x"], ["s", "y"], ["t", "z"]], [True, True, False], trained=trained)
    write_run(tmp_path, {1: [rows]}, credit="tree", how="replace")
    assert find_method("tree").shares_tokens
    assert records.files(tmp_path)
    found, _, _ = explained(tmp_path, tokenizer=None)
    assert all(all(row["trained"]) for row in found)
    assert found[0]["credit"][0] == found[1]["credit"][0] > 0.5


def test_an_index_is_small(tmp_path):
    """30 bytes per rollout: the columns hold numbers, and no text stays."""
    file = lines(tmp_path / "1.jsonl", verl_rows([1.0, 0.0] * 500))
    index = Index([file], BY_NAME["verl"])
    columns = index.group, index.file, index.at, index.part, index.value
    assert sum(column.nbytes for column in columns) == 28 * len(index) == 28_000


@pytest.mark.parametrize(
    ("path", "step"),
    [
        *(("12.jsonl", 12), ("12.jsonl.gz", 12), ("train_data_step7.jsonl", 7), ("a/step_3/rank_0.jsonl", 3)),
        *(("x/global_step_40_evals/m.jsonl", 40), ("rollout_dump_data.step_5.jsonl", 5), ("footstep2.jsonl", 0)),
        *(("a/b/c/rows.jsonl", 0), ("9/x.jsonl", 0)),
    ],
)
def test_the_step_in_a_path(path, step):
    assert step_in(Path(path)) == step


def test_pages_are_made_group_by_group(tmp_path):
    """Records are made as the page asks for them, one per group."""
    found = explain_files([dump_files.write("verl", tmp_path / "x")], METHOD, tokenizer=TINY)
    assert found.notes == []
    sizes = []

    def counted():
        for record in found.records:
            sizes.append(len(record.rows))
            yield record

    shown = collect(counted())
    assert sizes == [4, 4, 4]
    assert len(shown.groups) == 3
    assert found.notes


# Bad input


def test_a_bad_line_is_named_and_skipped(tmp_path, caplog):
    good = [json.dumps(row) for row in verl_rows([1.0, 0.0])]
    bad = ['{"input": "x"', "[1]", "", '{"input": "x", "output": 3, "score": 1.0}']
    bad.append('{"input": "x", "output": "y", "score": [1]}')
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join([good[0], *bad, good[1]]))
    rows, _, notes = explained(file)
    assert len(rows) == 2
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith(f"Skipped 4 of 6 rows that could not be read. The first: {file}, line 2: not JSON")
    assert said in notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[1]", "line 1: an object was expected"),
        ('{"prompt": "p", "completion": "c"', "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        (
            '{"prompt": "p", "completion": "c", "text": "c"}',
            "line 1: correct (or answers) is missing. The row has: prompt, completion, text",
        ),
        ('{"prompt": 3, "completion": "c", "correct": true}', "line 1: prompt must be a string or a list of chat"),
        ('{"prompt": "p", "completion": [3], "correct": true}', "line 1: completion must be a string or a list"),
        ('{"prompt": "p", "completion": "c", "correct": "yes"}', "line 1: correct must be true, false or null"),
        ('{"prompt": "p", "completion": "c", "answers": []}', "line 1: answers must be a string or a non-empty list"),
        ('{"prompt": "p", "completion": "c", "correct": 1, "step": 0.5}', "line 1: step must be a whole number"),
        ('{"prompt": "p", "completion": "c", "reward": 1' + "0" * 400 + "}", "line 1: reward is too large"),
        ('{"prompt": "p", "completion": "c", "correct": 1, "token_ids": [-1]}', "line 1: token_ids must be a list of"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(row + "\n")
    with pytest.raises(UserError) as stopped:
        explained(file)
    assert f"{file}, {message}" in str(stopped.value)


def test_fields_that_are_not_mapped_keep_their_names(tmp_path):
    rows = [{"input": "2 + 2?", "completion": f"It is {i}.", "reward": float(i == 4), "step": 7} for i in range(3, 5)]
    found, _, _ = explained(lines(tmp_path / "x.jsonl", rows), names="prompt=input")
    assert [(row["prompt"], row["step"], row["correct"]) for row in found] == [
        ("2 + 2?", 7, False),
        ("2 + 2?", 7, True),
    ]
    # What says whether a rollout is correct is only what was named.
    row = {"prompt": "p", "completion": "c", "answers": "4", "correct": True, "score": 0.0}
    assert renamed(row, {"reward": "score"}) == {"prompt": "p", "completion": "c", "score": 0.0, "reward": 0.0}
    assert renamed({"prompt": "p", "reward": "c"}, {"completion": "reward"}) == {"prompt": "p", "completion": "c"}


def test_a_file_of_no_known_form_shows_its_keys_and_the_nearest_format(tmp_path, capsys):
    lines(tmp_path / "x.jsonl", [{"input": "p", "output": "c", "reward": 1.0}])
    with pytest.raises(SystemExit) as stopped:
        main(["explain", str(tmp_path / "x.jsonl"), "--tokenizer", TINY])
    assert "has no known format. Its keys: input, output, reward. The nearest format is verl" in stopped.value.code
    assert ", for which it lacks score. " in stopped.value.code
    assert "--map prompt=input,completion=output" in stopped.value.code
    for keys, names in (
        ({"question", "response", "gold"}, "prompt=question,completion=response,answers=gold"),
        ({"prompt", "reply", "score", "answer"}, "completion=reply,reward=score"),
        ({"text"}, "prompt=input,completion=output,reward=score"),  # an example
    ):
        assert suggested_mapping(keys) == names
    with pytest.raises(
        UserError, match="does not have the format skyrl: it lacks input_prompt, output_response, score"
    ):
        explained(tmp_path / "x.jsonl", format="skyrl")


def test_an_empty_file_is_said_to_be(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"x\.jsonl contains no rollouts: it is empty"):
        explained(tmp_path / "x.jsonl")
    pd.DataFrame({"step": [], "prompt": []}).to_parquet(tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y\.parquet contains no rollouts: it is empty"):
        explained(tmp_path / "y.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty contains no files with rollouts"):
        explained(tmp_path / "empty")


def test_one_completion_per_prompt_has_nothing_to_compare(tmp_path):
    rows = [{**row, "input": f"prompt {i}"} for i, row in enumerate(verl_rows([1.0, 0.0, 1.0]))]
    file = lines(tmp_path / "x.jsonl", rows)
    with pytest.raises(SystemExit, match=r"3 prompts x 1 rollout\)\. .* so there is nothing to compare"):
        main(["explain", str(file), "--tokenizer", TINY, "-o", str(tmp_path / "page.html")])
    assert not (tmp_path / "page.html").exists()


def open_instruct_rows(ids: list[list[int]]) -> list[dict]:
    common = {"step": 1, "prompt_idx": 0, "prompt_tokens": encoded("2 + 2?")}
    return [{**common, "response_tokens": own, "reward": float(i % 2), "logprobs": None} for i, own in enumerate(ids)]


def test_ids_beyond_the_vocabulary_are_shown_as_such(tmp_path):
    text = encoded("The answer is 4.")
    file = lines(tmp_path / "r_rollouts_000000.jsonl", open_instruct_rows([[*text, 151_999, 2**31 - 1], text]))
    rows, _, notes = explained(file)
    assert rows[0]["tokens"][-2:] == ["⟨id 151999⟩", "⟨id 2147483647⟩"]
    assert rows[0]["completion"].endswith("⟨id 151999⟩⟨id 2147483647⟩")
    largest = max(TOKENIZER.get_vocab().values())
    (note,) = [note for note in notes if "beyond" in note]
    assert note.startswith(f"2 token ids are beyond the vocabulary of the tokenizer, whose largest is {largest}.")
    page = main(["explain", str(file), "--tokenizer", TINY, "-o", str(tmp_path / "p.html")])
    assert page is None
    assert "2 token ids are beyond" in Page((tmp_path / "p.html").read_text()).text


def test_a_tokenizer_that_does_not_fit_the_ids_is_refused(tmp_path):
    file = lines(tmp_path / "r_rollouts_000000.jsonl", open_instruct_rows([[90_000 + i for i in range(20)]] * 2))
    with pytest.raises(
        UserError, match=r"does not fit the files: 40 of 40 token ids of a group, up to 90019, are beyond"
    ):
        explained(file)
    # Ids within the vocabulary, but of other tokens: the files' own texts say so.
    dump_files.write("nemo_rl", tmp_path / "nemo")
    for path in (tmp_path / "nemo").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row["token_ids"] = [[(i * 7 + 31) % 200 for i in row["token_ids"][0]]]
        lines(path, rows)
    with pytest.raises(
        UserError, match=r"does not fit the files: the tokens of a rollout are .*, its text in the file is"
    ):
        explained(tmp_path / "nemo")


def test_a_text_that_differs_in_some_rollouts_is_noted(tmp_path):
    dump_files.write("nemo_rl", tmp_path)
    path = tmp_path / "train_data_step2.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["content"] = [["What is 2 + 2?", "0123456789" * 9]]
    lines(path, rows)
    _, _, notes = explained(tmp_path)
    assert "The tokens of 1 of 12 rollouts differ from the text in the file." in notes


def test_a_tokenizer_is_asked_for(tmp_path):
    dump_files.write("verl", tmp_path / "verl")
    with pytest.raises(UserError, match="The tokenizer of the model is needed for verl rollouts: --tokenizer NAME"):
        explained(tmp_path / "verl", tokenizer=None)
    dump_files.write("open_instruct", tmp_path / "oi")
    lines(tmp_path / "oi" / "run_metadata.jsonl", [{"model_name": str(tmp_path / "gone")}])
    with pytest.raises(UserError, match=r"gone' \(named by the files\) could not be loaded"):
        explained(tmp_path / "oi", tokenizer=None)


def test_the_tokenizer_of_a_run_of_trl_is_found(tmp_path):
    dump_files.write("trl", tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    rows, _, _ = explained(tmp_path, tokenizer=None)
    assert [row["token_ids"] for row in rows] == [x.ids for x in ROLLOUTS]


def test_a_folder_of_several_formats_is_not_guessed(tmp_path):
    dump_files.write("verl", tmp_path / "a")
    dump_files.write("skyrl", tmp_path / "b")
    with pytest.raises(
        UserError, match=r"several formats: verl \(2, such as .*1\.jsonl\); skyrl \(2, such as .*math\.jsonl\)"
    ):
        explained(tmp_path)
    rows, (line, _), _ = explained(tmp_path, format="skyrl")
    assert "Recognised 2 files as SkyRL rollouts" in line
    assert len(rows) == len(ROLLOUTS)


def test_other_files_of_a_folder_are_left_out(tmp_path, caplog):
    dump_files.write("skyrl", tmp_path)
    lines(tmp_path / "aggregated_results.jsonl", [{"eval/avg_score": 0.5}])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / ".part-x.jsonl").write_text("{")
    rows, _, _ = explained(tmp_path)
    assert len(rows) == len(ROLLOUTS)
    assert "Left out 2 of 4 files. The first: " in caplog.text


def test_a_parquet_file_that_is_cut_off_is_refused(tmp_path):
    dump_files.write("trl", tmp_path)
    path = tmp_path / "completions" / "completions_00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"completions_00001\.parquet is not a Parquet file, or it is cut off: "):
        explained(path)
    rows, _, _ = explained(tmp_path)  # the other file is there
    assert {row["step"] for row in rows} == {2}


def test_damage_inside_a_parquet_file_is_said(tmp_path):
    rows = [row for step in range(200) for row in ({**one, "step": step} for one in verl_rows([1.0, 0.0]))]
    path = tmp_path / "x.parquet"
    pd.DataFrame(rows).to_parquet(path, row_group_size=50, compression="gzip")
    column = pq.ParquetFile(path).metadata.row_group(4).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    found, _, notes = explained(path)
    assert 0 < len(found) <= 200
    assert any("x.parquet is damaged" in note for note in notes)


def test_a_compressed_file_that_is_cut_off_keeps_its_beginning(tmp_path):
    rows = [{**row, "step": step} for step in range(300) for row in verl_rows([1.0, 0.0])]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(text)[:-300])
    found, _, notes = explained(path)
    assert 0 < len(found) < len(rows)
    assert any("is a damaged gzip file" in note for note in notes)


@pytest.mark.parametrize("name", ["rollout_1.pt", "x.pkl", "x.pickle", "x.npy", "x.dat"])
def test_pickles_are_refused_with_the_reason(tmp_path, name):
    samples = [{"prompt": "p"}]
    if name.endswith(".pt"):
        torch.save(samples, tmp_path / name)
    elif name.endswith(".npy"):
        np.save(tmp_path / name, np.array(samples, dtype=object))
    else:
        (tmp_path / name).write_bytes(pickle.dumps(samples))
    with pytest.raises(
        UserError, match=r"is a pickle, which is not read: loading one runs code from the file\. Convert"
    ):
        explained(tmp_path / name)
    if name != "x.dat":  # a folder is looked through by the names of its files
        with pytest.raises(UserError, match="is a pickle"):
            explained(tmp_path)


def test_the_converter_of_the_documentation_reads_a_pickle_of_slime(tmp_path):
    page = (ROOT / "docs" / "guides" / "other_trainers.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(code.splitlines()) <= 10
    (tmp_path / "convert.py").write_text(code)
    prompt = encoded("2 + 2?")
    samples = [
        {
            "group_index": 3,
            "prompt": "2 + 2?",
            "tokens": [*prompt, *encoded(text)],
            "response": text,
            "response_length": len(encoded(text)),
            "reward": reward,
            "status": "completed",
        }
        for text, reward in (("The answer is 4.", 1), ("It is about 5", 0), ("", 0))
    ]
    torch.save({"rollout_id": 7, "samples": samples}, tmp_path / "rollout_7.pt")
    words = [sys.executable, "convert.py", "rollout_7.pt", "rollout_7.jsonl"]
    subprocess.run(words, cwd=tmp_path, check=True)
    rows, _, _ = explained(tmp_path / "rollout_7.jsonl")
    assert [(row["step"], row["completion"], row["correct"]) for row in rows] == [
        (7, "The answer is 4.", True),
        (7, "It is about 5", False),
        (7, "", False),
    ]
    assert [row["token_ids"] for row in rows] == [encoded(row["completion"]) for row in rows]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in verl_rows([1.0, 0.0])), encoding="utf-8-sig")
    rows, _, notes = explained(path)
    assert [row["prompt"] for row in rows] == ["2 + 2?"] * 2
    assert not [note for note in notes if "Skipped" in note]
