import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from ktae_trl import tiny
from ktae_trl.evaluation.tasks import Benchmark, Problem, load_problems, parse_benchmarks, prompts, unscorable

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))
ROWS = [{"id": "a", "problem": "1 + 1?", "answers": ["2", "two"]}, {"id": "b", "problem": "2 + 2?", "answers": ["4"]}]


def write(folder, rows, name="mine"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_four_lines_add_a_benchmark(tmp_path):
    path = write(tmp_path, [{"question": "1 + 1?", "result": 2}, {"question": "2 + 2?", "result": "4"}])
    entry = yaml.safe_load(f"- name: mine\n  dataset: {path}\n  problem: question\n  answer: result")
    (benchmark,) = parse_benchmarks(entry)
    assert load_problems(benchmark) == [Problem("mine", "0", "1 + 1?", ("2",)), Problem("mine", "1", "2 + 2?", ("4",))]


def test_answers_and_problems_of_any_kind(tmp_path):
    rows = [
        {"q": "1 + 1?", "gold": {"value": 2.0}},
        {"q": [{"role": "user", "content": "2 + 2?"}], "gold": {"value": "It is so.\n#### 4"}},
        {"q": "3 + 3?", "gold": {"value": ["6", "six"]}},
    ]
    found = load_problems(Benchmark("mine", write(tmp_path, rows), problem="q", answer="gold.value"))
    assert [p.text for p in found] == ["1 + 1?", "2 + 2?", "3 + 3?"]
    assert [p.answers for p in found] == [("2",), ("4",), ("6", "six")]
    assert [p.messages for p in found] == [None, rows[1]["q"], None]
    rows[1]["gold"]["value"] = {"a": 1}
    with pytest.raises(ValueError, match=r"problem '1' \(row 2\): An answer must be .* not a dict"):
        load_problems(Benchmark("mine", write(tmp_path, rows), problem="q", answer="gold.value"))
    rows[2]["q"] = 5
    with pytest.raises(ValueError, match=r"problem '0' \(row 1\): a problem must be text or a list .* not int: 5"):
        load_problems(Benchmark("mine", write(tmp_path, rows[2:]), problem="q", answer="gold.value"))


def test_a_folder_stands_in_for_the_hub(tmp_path):
    write(tmp_path, ROWS)
    benchmark = Benchmark("mine", "some/hub-dataset", problem="other")
    assert load_problems(benchmark, str(tmp_path)) == [
        Problem("mine", "a", "1 + 1?", ("2", "two")),
        Problem("mine", "b", "2 + 2?", ("4",)),
    ]
    assert len(load_problems(benchmark, str(tmp_path), limit=1)) == 1


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_name_benchmarks(config):
    benchmarks = parse_benchmarks(yaml.safe_load(config.read_text())["benchmarks"])
    assert all(isinstance(getattr(b, f.name), str | None) for b in benchmarks for f in fields(b))


def test_the_five_benchmarks_of_the_paper(shared):
    entries = yaml.safe_load((CONFIGS[0].parent / "math.yaml").read_text())["benchmarks"]
    sizes = {b.name: len(load_problems(b, str(shared / "eval_suite"))) for b in parse_benchmarks(entries)}
    assert sizes == {"aime24": 30, "amc23": 83, "math500": 500, "minerva": 272, "olympiadbench": 675}
    assert [b.name for b in parse_benchmarks(entries, only=["math500", "aime24"])] == ["aime24", "math500"]


def test_unscorable_problems_are_found():
    problems = [Problem("m", "1", "", ("2",)), Problem("m", "2", "", (r"\frac{",)), Problem("m", "3", "", ("???", "3"))]
    assert [problem.id for problem in unscorable(problems)] == ["2"]


def test_templates(tokenizer):
    problem = Problem("m", "1", "What is {x}^2?", ("4",))
    texts = {t: prompts([problem], t, "Box it.", tokenizer)[0][0] for t in ("qwen", "r1", "none", "chat")}
    assert texts["none"] == "What is {x}^2?"
    assert texts["qwen"] == (
        "<|im_start|>system\nBox it.<|im_end|>\n<|im_start|>user\nWhat is {x}^2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts["r1"].endswith("User: What is {x}^2?\nBox it.\nAssistant: <think>")
    conversation = [{"role": "system", "content": "Box it."}, {"role": "user", "content": "What is {x}^2?"}]
    assert texts["chat"] == tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    _, ids = prompts([problem], "chat", "", tokenizer)
    assert ids[0] == tokenizer.apply_chat_template(conversation[1:], add_generation_prompt=True, return_dict=False)


def test_bad_benchmarks(tmp_path):
    with pytest.raises(ValueError, match=r"entry 1: unknown key 'splt' \(did you mean 'split'\?\)"):
        parse_benchmarks([{"name": "a", "dataset": "b", "splt": "test"}])
    with pytest.raises(ValueError, match="entry 2: 'dataset' is missing"):
        parse_benchmarks([{"name": "a", "dataset": "b"}, {"name": "c"}])
    with pytest.raises(ValueError, match="entry 2: the name 'a' is already used"):
        parse_benchmarks([{"name": "a", "dataset": "b"}, {"name": "a", "dataset": "c"}])
    with pytest.raises(ValueError, match="entry 1: expected a mapping with name and dataset, not 'aime24'"):
        parse_benchmarks(["aime24"])
    with pytest.raises(ValueError, match="The config has no benchmarks"):
        parse_benchmarks([])
    with pytest.raises(ValueError, match=r"Unknown benchmark 'aime' .*'aime24'\?\)\. Choose from aime24"):
        parse_benchmarks([{"name": "aime24", "dataset": "b"}], only=["aime"])


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (None, FileNotFoundError, "There is no data file .*mine.jsonl"),
        ([], ValueError, "mine.jsonl is empty"),
        (
            [{"id": "a", "question": "?", "answers": ["1"]}],
            ValueError,
            r"benchmark 'mine' .*no column 'problem'.* Its columns",
        ),
        ([*ROWS, ROWS[0]], ValueError, "benchmark 'mine' .*, row 3: the id 'a' is already used by another problem"),
        (
            [ROWS[0], {"id": "b", "problem": "?", "answers": []}],
            ValueError,
            "problem 'b' .*the answer is missing",
        ),
        (
            [ROWS[0], {"id": "b", "problem": "", "answers": ["1"]}],
            ValueError,
            "problem 'b' .*the text is missing",
        ),
    ],
)
def test_bad_files(tmp_path, rows, error, message):
    if rows is not None:
        write(tmp_path, rows)
    with pytest.raises(error, match=message):
        load_problems(Benchmark("mine", "some/where"), str(tmp_path))


def test_bad_folder_and_prompts(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"The folder nowhere \(benchmark_folder\) does not exist"):
        load_problems(Benchmark("mine", "some/where"), "nowhere")
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    with pytest.raises(ValueError, match=r"Unknown prompt 'qwn' \(did you mean 'qwen'\?\)"):
        prompts([], "qwn", "", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template\. Set prompt to one of qwen, r1, none"):
        prompts([Problem("m", "1", "?", ("1",))], "chat", "", tokenizer)
