import datetime
import gzip
import json
import logging
from decimal import Decimal

import pytest
from datasets import Dataset, DatasetDict

from ktae_trl import data
from ktae_trl.data.columns import original_column
from ktae_trl.data.problems import drop_long
from ktae_trl.grading import INSTRUCTIONS
from ktae_trl.grading.golds import gold_answers
from ktae_trl.rewards import math_accuracy
from tests.trainers import make_trainer

ROWS = [{"problem": "1 + 1 =", "answer": "2"}, {"problem": "2 + 2 =", "answer": "4"}]


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="problems.jsonl"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return to_file


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_local_form(write, tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "p.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write(lines(ROWS))
    jsonl = write(lines(ROWS))
    array = write(json.dumps(ROWS), "array.json")
    for path in (jsonl, array, *(str(tmp_path / n) for n in ("p.parquet", "saved", "splits", "z.jsonl.gz"))):
        assert data.load(path).to_list() == ROWS
    assert data.load(str(tmp_path / "splits"), split="test").to_list() == ROWS[:1]


def test_prompts():
    dataset = Dataset.from_list([{**row, "level": i} for i, row in enumerate(ROWS)])
    assert data.to_prompts(dataset)[1] == {
        "problem": "2 + 2 =",  # the columns of the data stay
        "answer": "4",
        "level": 1,
        "prompt": [
            {"role": "system", "content": r"Please reason step by step, and put your final answer within \boxed{}."},
            {"role": "user", "content": "2 + 2 ="},
        ],
        "solution": ["4"],
    }
    assert data.to_prompts(dataset, system_prompt="")[0]["prompt"] == [{"role": "user", "content": "1 + 1 ="}]


def test_named_columns_and_kinds_of_answers():
    rows = [{"question": "a", "result": 7}, {"question": "b", "result": 8}]
    prompts = data.to_prompts(Dataset.from_list(rows), problem_column="question", answer_column="result")
    assert prompts["solution"] == [["7"], ["8"]]
    assert prompts["result"] == [7, 8]
    assert prompts[0]["prompt"][-1]["content"] == "a"
    several = Dataset.from_list([{"problem": "c", "answer": ["1", "2"]}])
    assert data.to_prompts(several)["solution"] == [["1", "2"]]


@pytest.mark.parametrize(
    "values", [[5, 6], [5.0, 0.5], [True, False], [Decimal("1.50"), None], [["1"], [None]], ["", "2"]]
)
def test_answers_of_every_type(values):
    rows = [{"problem": "p", "answer": value} for value in values]
    expected = [gold_answers(value) for value in values]
    assert data.to_prompts(Dataset.from_list(rows))["solution"] == [answers for answers in expected if answers]


def test_nested_columns():
    """As in DAPO-Math-17k, and other data in verl's form."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{n} + {n} ="}],
            "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
            "extra_info": {"index": n, "answer": 2 * n},
        }
        for n in range(2)
    ]
    for path in ("reward_model.ground_truth", "extra_info.answer"):
        prompts = data.to_prompts(Dataset.from_list(rows), problem_column="prompt", answer_column=path)
        assert prompts["solution"] == [["0"], ["2"]]
        assert prompts[1]["prompt"][-1] == {"role": "user", "content": "1 + 1 ="}
        assert prompts[1]["reward_model"] == rows[1]["reward_model"]
    inside = [{"extra": {"problem": "p", "a": {"b": "5"}}}]
    prompts = data.to_prompts(Dataset.from_list(inside), problem_column="extra.problem", answer_column="extra.a.b")
    assert (prompts[0]["prompt"][-1]["content"], prompts[0]["solution"]) == ("p", ["5"])
    with pytest.raises(ValueError, match=r"'reward_model' has no field 'truth' .*Its fields: ground_truth, style\."):
        data.to_prompts(Dataset.from_list(rows), problem_column="prompt", answer_column="reward_model.truth")


def test_a_column_whose_name_is_dotted():
    rows = [{"a.b": "p", "answer": "5"}]
    assert data.to_prompts(Dataset.from_list(rows), problem_column="a.b")[0]["prompt"][-1]["content"] == "p"


def test_worked_solutions_stay_under_another_name(caplog):
    rows = [{"problem": "p", "solution": r"So it is \boxed{5}.", "answer": "5"}]
    with caplog.at_level(logging.WARNING):
        prompts = data.to_prompts(Dataset.from_list(rows))
    assert (prompts[0]["solution"], prompts[0]["data_solution"]) == (["5"], rows[0]["solution"])
    assert "uses their names: solution is now data_solution" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prompts = data.to_prompts(Dataset.from_list(rows), answer_column="solution")
    assert (prompts[0]["solution"], prompts[0]["data_solution"]) == (["5"], rows[0]["solution"])
    assert not caplog.text
    assert original_column(prompts, "solution") == "data_solution"
    assert original_column(prompts, "answer") == "answer"


def test_columns_that_reward_functions_get_otherwise(tmp_path, caplog):
    """TRL hands them over by these names; a null image it takes for an image."""
    taken = ("prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra")
    taken = (*taken, "log_metric", "environments", "answer_format", "opened_think")
    row = {"problem": "7 - 2 =", "answer": "5", "image": None, "images": [], **dict.fromkeys(taken, "mine")}
    with caplog.at_level(logging.WARNING):
        prompts = data.to_prompts(Dataset.from_list([row] * 4))
    assert "prompts is now data_prompts, completion is now data_completion, completions is now" in caplog.text
    seen = {}

    def reward(completions, data_completions, data_log_extra, problem, answer, solution, **kwargs):
        seen.update(kwargs, data_completions=data_completions, data_log_extra=data_log_extra)
        seen.update(problem=problem, solution=solution)
        return [float(i % 2) for i, _ in enumerate(completions)]

    trainer = make_trainer(tmp_path, max_steps=1, train_dataset=prompts, reward_funcs=[reward, math_accuracy])
    trainer.train()
    assert {seen[f"data_{name}"][0] for name in taken} == {"mine"}
    assert (seen["problem"][0], seen["solution"][0]) == ("7 - 2 =", ["5"])
    assert not {"image", "images"} & set(seen)


def test_rows_with_images_are_left_out_of_a_training_on_text(write, tokenizer, caplog):
    rows = [{**ROWS[0], "image": None}, {**ROWS[1], "image": {"path": "a.png"}}]
    with caplog.at_level(logging.WARNING):
        train, _ = data.load_prompts(data.DataArguments(write(lines(rows))), tokenizer)
    assert (len(train), "image" in train.column_names) == (1, False)
    assert "Left out 1 of 2 rows: they have an image (column 'image'), but prompts are text only" in caplog.text
    assert "image" in data.to_prompts(Dataset.from_list(rows)).column_names  # for a model that sees them


def test_answers_without_a_verdict_are_left_out_and_counted(write, tokenizer, caplog):
    rows = Dataset.from_list([*ROWS, {"problem": "Draw it.", "answer": "???"}])
    with caplog.at_level(logging.WARNING):
        assert data.to_prompts(rows)["solution"] == [["2"], ["4"]]
    assert "Left out 1 of 3 rows: answers that cannot be graded, such as '???'" in caplog.text
    caplog.clear()
    prose = {"problem": "p", "answer": "If she gives 5 of her 12 pens to Tom, she has 12 - 5 = 7 pens left."}
    with caplog.at_level(logging.WARNING):
        assert len(data.to_prompts(Dataset.from_list([*ROWS, prose]))) == 2
    assert "Left out 1 of 3 rows: answers in prose that do not end with a line ####, a box or 'The" in caplog.text
    assert len(data.to_prompts(rows, gradable_only=False)) == 3  # for a reward function that does not grade
    with pytest.raises(ValueError, match=r"No rows are left. Left out 1 of 1 rows: answers that cannot be graded"):
        data.to_prompts(rows.select([2]))


def test_incomplete_rows_are_left_out_and_counted(caplog):
    rows = [*ROWS, {"problem": "", "answer": "1"}, {"problem": "p", "answer": None}]
    with caplog.at_level(logging.WARNING):
        assert len(data.to_prompts(Dataset.from_list(rows))) == 2
    assert "Left out 2 of 4 rows: no problem or answer" in caplog.text


def test_long_prompts_are_left_out_and_counted(tokenizer, caplog):
    rows = [*ROWS, {"problem": "1 + " * 500 + "1 =", "answer": "501"}]
    prompts = data.to_prompts(Dataset.from_list(rows))
    length = len(tokenizer.apply_chat_template(prompts[0]["prompt"], add_generation_prompt=True, return_dict=False))
    with caplog.at_level(logging.WARNING):
        kept = drop_long(prompts, tokenizer, length)
    assert kept["solution"] == [["2"], ["4"]]
    assert f"Left out 1 of 3 rows: more than {length} tokens (max_prompt_length)" in caplog.text
    assert len(drop_long(prompts, tokenizer, None)) == 3
    with pytest.raises(ValueError, match=f"No rows are left. Left out 3 of 3 rows: more than {length - 1} tokens"):
        drop_long(prompts, tokenizer, length - 1)


def test_load_prompts(write, tokenizer):
    path = write(lines(ROWS))
    arguments = data.DataArguments(dataset_name=path, eval_dataset_name=path, eval_size=1)
    train, held_out = data.load_prompts(arguments, tokenizer)
    assert (len(train), len(held_out)) == (2, 1)
    assert data.load_prompts(data.DataArguments(dataset_name=path), tokenizer)[1] is None


# Bad input


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "a/b/c"])
def test_missing_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}.*looked in {tmp_path}"):
        data.load(name)


def test_empty_file(write):
    with pytest.raises(ValueError, match=r"problems\.jsonl is empty"):
        data.load(write(""))


@pytest.mark.parametrize(
    ("bad", "words"),
    [('{"problem": "3 + 3 =", "answer"', "line 3: not JSON"), ('["3 + 3 =", "6"]', "line 3: an object was expected")],
)
def test_malformed_line(write, bad, words):
    with pytest.raises(ValueError, match=words):
        data.load(write(lines(ROWS) + bad + "\n" + lines(ROWS)))


def test_malformed_line_of_a_compressed_file(tmp_path):
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write(lines(ROWS) + "{\n")
    with pytest.raises(ValueError, match=r"z\.jsonl\.gz, line 3: not JSON"):
        data.load(str(tmp_path / "z.jsonl.gz"))


def test_unknown_format(write, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"problems\.txt has an unsupported format. Supported endings: .jsonl, "):
        data.load(write("problem,answer", "problems.txt"))
    monkeypatch.chdir(tmp_path)  # nothing is looked up on the Hub
    with pytest.raises(ValueError, match=r"problems\.xlsx has an unsupported format"):
        data.load("problems.xlsx")
    with pytest.raises(FileNotFoundError, match=r"There is no data file mine\.csv"):
        data.load("mine.csv")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"problem": 5, "answer": "5"}, "a problem must be text or a list of chat messages, not int: 5"),
        ({"problem": None, "answer": "5"}, "not null"),
        ({"problem": [], "answer": "5"}, "not an empty list"),
        ({"problem": [{"role": "user", "content": None}], "answer": "5"}, "has no content"),
        ({"problem": "p", "answer": {"value": "5"}}, r"not a dict: .*dotted path, such as COLUMN\.value"),
        ({"problem": "p", "answer": [["1", "2"]]}, "not a list of lists"),
        ({"problem": "p", "answer": datetime.date(2024, 1, 5)}, "not a date: 2024-01-05"),
        ({"problem": "p", "answer": b"5"}, "not a bytes"),
    ],
)
def test_values_of_another_kind_are_named_with_their_row(row, words):
    with pytest.raises(ValueError, match=rf"^row 2 \(problem, answer\): .*{words}"):
        data.to_prompts(Dataset.from_list([row, row]), rows=[1])


def test_the_row_is_that_of_the_file(write, tokenizer):
    rows = [{"problem": "p", "answer": "1", "level": 1}] * 3 + [{"problem": "p", "answer": {"a": 1}, "level": 2}]
    arguments = data.DataArguments(write(json.dumps(rows), "mine.json"), dataset_filter={"level": [2]})
    with pytest.raises(ValueError, match=r"mine\.json: row 4 "):
        data.load_prompts(arguments, tokenizer)


def test_missing_column():
    with pytest.raises(ValueError, match=r"no column 'answer'. Its columns: problem, reply. Set problem_column and"):
        data.to_prompts(Dataset.from_list([{"problem": "p", "reply": "r"}]))


def test_unknown_split(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"has no split 'test'. There are: train"):
        data.load(str(tmp_path / "splits"), split="test")


@pytest.mark.parametrize("name", ["numbers.jsonl", "numbers.csv", "saved", "splits"])
def test_parts_of_a_split(write, tmp_path, name):
    rows = [{"n": str(n)} for n in range(10)]
    dataset = Dataset.from_list(rows)
    if name == "splits":
        DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / name)
    elif name == "saved":
        dataset.save_to_disk(tmp_path / name)
    else:
        write(lines(rows) if name.endswith("jsonl") else "n\n" + "".join(f"{n}\n" for n in range(10)), name)

    def numbers(split):
        return [int(row["n"]) for row in data.load(str(tmp_path / name), split=split)]

    assert numbers("train") == list(range(10))
    assert numbers("train[:3]") == [0, 1, 2]
    assert numbers("test[-2:]") == [8, 9]
    assert numbers("train[50%:70%]") == [5, 6]
    with pytest.raises(ValueError, match=r"'train\[3' is not a split of .*Write train, train\[:100\] or"):
        numbers("train[3")


def test_held_out_problems_have_columns_of_their_own(write, tokenizer):
    names = {"dataset_name": write(lines([{"question": "1 + 1?", "answer": "2\n#### 2"}]), "gsm8k.jsonl")}
    names |= {
        "eval_dataset_name": write(lines([{"problem": "2?", "answer": "x", "solution": r"\boxed{4}"}]), "math.jsonl")
    }
    arguments = data.DataArguments(**names, problem_column="question", eval_problem_column="problem")
    arguments.eval_answer_column = "solution"
    train, held_out = data.load_prompts(arguments, tokenizer)
    assert (train["solution"], held_out["solution"]) == ([["2"]], [["4"]])


def test_the_configuration_of_held_out_problems(tokenizer, monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("ktae_trl.data.recipe.load", load)
    first = {"dataset_name": "openai/gsm8k", "dataset_config": "main"}
    for second in (
        {"eval_dataset_name": "openai/gsm8k"},
        {"eval_dataset_name": "HuggingFaceH4/MATH-500"},
        {"eval_dataset_name": "math-ai/aime25", "eval_dataset_config": "I", "eval_dataset_split": "train"},
    ):
        data.load_prompts(data.DataArguments(**first, **second), tokenizer)
    assert asked[1::2] == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("math-ai/aime25", "I", "train"),
    ]


LEVELS = [{"problem": f"{n} =", "answer": str(n), "level": n % 5 + 1, "hard": n > 5} for n in range(10)]


def test_a_filter_keeps_rows_with_these_values(write, tokenizer):
    both = {"level": [3, 4], "hard": [True]}
    arguments = {"dataset_name": write(lines(LEVELS)), "max_prompt_length": None}
    arguments = data.DataArguments(**arguments, eval_dataset_name=arguments["dataset_name"], dataset_filter=both)
    train, held_out = data.load_prompts(arguments, tokenizer)
    assert train["solution"] == [["7"], ["8"]]
    assert len(held_out) == 10  # measured on all


def test_a_filter_from_the_command_line():
    assert data.DataArguments("x", dataset_filter='{"level": [3]}').dataset_filter == {"level": [3]}
    assert data.DataArguments("x", dataset_filter="null").dataset_filter is None


@pytest.mark.parametrize("bad", ["{level: [3]}", '{"level": 3}', "[3]", {"level": 3}])
def test_a_filter_of_another_form(bad):
    with pytest.raises(ValueError, match=r"dataset_filter (is not JSON|must map columns to lists of values)"):
        data.DataArguments("x", dataset_filter=bad)


def test_a_filter_that_leaves_nothing_says_what_there_is():
    rows = Dataset.from_list(LEVELS)
    with pytest.raises(ValueError, match=r"no row has level in \['Level 3'\]. Values found: 1, 2, 3, 4, 5"):
        data.keep_rows(rows, {"level": ["Level 3"]})
    with pytest.raises(
        ValueError, match=r"no column 'levels' \(did you mean 'level'\?\). Its columns: problem, answer, "
    ):
        data.keep_rows(rows, {"levels": [3]})


def test_the_system_prompt_asks_for_the_answer_format():
    dataset = Dataset.from_list([{"problem": "1 + 1 =", "answer": 2}])
    asked = {
        name: data.to_prompts(dataset, answer_format=name)[0]["prompt"][0]["content"] for name in ("hash", "boxed")
    }
    assert asked == {name: INSTRUCTIONS[name] for name in asked}
