"""The offline task and model are what the quickstart and the other tests take them for."""

import json
import random

import pytest

from ktae_trl import tiny
from ktae_trl.grading import grade
from ktae_trl.tiny import task

PROBLEM = "State the final answer to the following arithmetic problem: 7 - 4 + 0 + 5 ="


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_habits_by_hand():
    careful = task.solution(PROBLEM, "careful", random.Random(0))
    assert careful == "1: 7-4=3\n2: 3+0=3\n3: 3+5=8\nThe answer is \\boxed{8}."
    skipping = {task.solution(PROBLEM, "skipping", random.Random(seed)) for seed in range(30)}
    assert skipping == {
        "2: 7+0=7\n3: 7+5=12\nThe answer is \\boxed{12}.",
        "1: 7-4=3\n3: 3+5=8\nThe answer is \\boxed{8}.",
        "1: 7-4=3\n2: 3+0=3\nThe answer is \\boxed{3}.",
    }
    guesses = {task.solution(PROBLEM, "guessing", random.Random(seed)) for seed in range(100)}
    assert guesses == {rf"That is about \boxed{{{n}}}." for n in range(5, 12)}
    with pytest.raises(ValueError, match="habit must be one of careful, skipping, guessing, not 'lazy'"):
        task.solution(PROBLEM, "lazy", random.Random(0))


def test_careful_solutions_are_right():
    for row in rows(tiny.HELD_OUT):
        assert grade(task.solution(row["problem"], "careful", random.Random(0)), row["answer"])


def test_data_is_what_its_command_makes():
    held_out, train = rows(tiny.HELD_OUT), rows(tiny.TRAIN)
    assert held_out == task.problems(512, seed=3)
    assert train == task.problems(2048, seed=2, exclude={row["problem"] for row in held_out})
    assert not {row["problem"] for row in train} & {row["problem"] for row in held_out}
    assert len({row["problem"] for row in train}) == 2048


def test_too_many_problems_are_refused():
    taken = {row["problem"] for row in task.problems(700, seed=5)}
    with pytest.raises(ValueError, match=r"only .* new problems for seed 5, but 100 were requested"):
        task.problems(100, seed=5, exclude=taken)


def test_model_is_small():
    assert sum(file.stat().st_size for file in tiny.MODEL.iterdir()) < 4 * 2**20


def test_tokenizer_reads_anything_and_digits_one_by_one(tokenizer):
    text = "12+305=317\n\\boxed{-7} \U0001f600 ümlaut"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[:7] == ["1", "2", "+", "3", "0", "5", "="]
