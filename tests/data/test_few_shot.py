"""Worked examples before each problem: the same in training, the held-out measurement and `ktae eval`."""

import json
import random
import re
from string import Formatter

import pytest
from transformers import AutoTokenizer

from benchmarks import word_problems
from ktae_trl import data, tiny
from ktae_trl.data.few_shot import worked_examples
from ktae_trl.evaluation.tasks import Problem, prompts
from ktae_trl.grading import grade
from ktae_trl.prompts import conversation

SHOWN = [
    {"role": "user", "content": "1 + 1 = ?"},
    {"role": "assistant", "content": r"That is \boxed{2}."},
]
ASKED = {"role": "user", "content": "2 + 2 = ?"}
SYSTEM = {"role": "system", "content": "Box it."}


@pytest.fixture
def shown(tmp_path):
    def write(*rows):
        file = tmp_path / "shown.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


@pytest.mark.parametrize(
    ("problem", "how", "asked"),
    [
        ("2 + 2 = ?", {}, [*SHOWN, ASKED]),
        ("2 + 2 = ?", {"system_prompt": "Box it."}, [SYSTEM, *SHOWN, ASKED]),
        ([SYSTEM, ASKED], {"system_prompt": "Another."}, [SYSTEM, *SHOWN, ASKED]),
        (
            "2 + 2 = ?",
            {"system_prompt": "Box it.", "in_user": True},
            [{"role": "user", "content": "Box it.\n\n1 + 1 = ?"}, SHOWN[1], ASKED],
        ),
        ([*SHOWN, ASKED], {}, [*SHOWN, *SHOWN, ASKED]),
    ],
)
def test_examples_stand_between_the_system_prompt_and_the_problem(problem, how, asked):
    assert conversation(problem, examples=SHOWN, **how) == asked


def test_training_and_evaluation_ask_the_same(tmp_path, shown):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"problem": "2 + 2 = ?", "answer": "4"}) + "\n")
    few_shot = shown({"problem": "1 + 1 = ?", "solution": r"That is \boxed{2}."})
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    arguments = data.DataArguments(str(file), eval_dataset_name=str(file), system_prompt="Box it.", few_shot=few_shot)
    train, held_out = data.load_prompts(arguments, tokenizer)
    assert train["prompt"][0] == held_out["prompt"][0] == [SYSTEM, *SHOWN, ASKED]
    problem = Problem("b", "1", "2 + 2 = ?", ("4",))
    (text,), _ = prompts([problem], "chat", "Box it.", tokenizer, examples=worked_examples(few_shot))
    assert text == tokenizer.apply_chat_template(train["prompt"][0], tokenize=False, add_generation_prompt=True)
    with pytest.raises(ValueError, match=r"few_shot need the model's own chat template \(prompt: chat\), not .* qwen"):
        prompts([problem], "qwen", "Box it.", tokenizer, examples=worked_examples(few_shot))


def test_the_package_brings_examples_that_are_right():
    examples = worked_examples("word_problems")
    assert [message["role"] for message in examples] == ["user", "assistant"] * 3
    answers = ["13", "18", "9"]
    assert all(grade(message["content"], answer) for message, answer in zip(examples[1::2], answers, strict=True))
    assert worked_examples(None) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": "1 + 1 = ?"}, r"shown\.jsonl: The dataset has no column 'solution'"),
        ({"problem": "1 + 1 = ?", "solution": " "}, r"row 1: the solution must be text, not ' '"),
        ({"problem": None, "solution": r"\boxed{2}"}, r"row 1: the problem must be text, not None"),
        ({"problem": "1 + 1 = ?", "solution": "#### 2"}, r"no answer in .* \(answer_format: boxed\)"),
    ],
)
def test_bad_examples_are_named(shown, row, message):
    with pytest.raises(ValueError, match=message):
        worked_examples(shown(row))


def test_the_answers_of_examples_follow_the_format(shown):
    assert len(worked_examples(shown({"problem": "1 + 1 = ?", "solution": "#### 2"}), "hash")) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("word_problem", r"few_shot must be a file .* or one of word_problems, not 'word_problem' \(did you mean"),
        ("nowhere.jsonl", r"There is no data file nowhere\.jsonl"),
    ],
)
def test_unknown_examples(name, message):
    with pytest.raises(ValueError, match=message):
        worked_examples(name)


def test_word_problems_are_what_their_command_makes():
    made = word_problems.problems()
    for split, size in word_problems.SIZES.items():
        rows = data.load("word_problems", split=split)
        assert len(rows) == size
        assert list(rows) == made[split]
    names = "|".join([*word_problems.NAMES, *word_problems.THINGS])
    bare = {split: {re.sub(rf"\b({names})\b", "_", row["problem"]) for row in rows} for split, rows in made.items()}
    assert not bare["train"] & bare["test"]


@pytest.mark.parametrize("form", word_problems.FORMS, ids=lambda form: form.text[:30])
def test_answers_of_word_problems_are_positive_and_fit_their_form(form):
    rng = random.Random(0)
    for _ in range(50):
        numbers = [rng.randint(2, most) for most in form.largest]
        if form.holds(*numbers):
            assert form.answer(*numbers) > 0
    names = {name for _, name, _, _ in Formatter().parse(form.text) if name}
    assert names & set("abc") == set("abc"[: len(form.largest)])
