import gzip
import json
import logging

import pytest
from datasets import Dataset, DatasetDict

from ktae_trl import data

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
        "prompt": [
            {"role": "system", "content": r"Please reason step by step, and put your final answer within \boxed{}."},
            {"role": "user", "content": "2 + 2 ="},
        ],
        "solution": "4",
        "level": 1,
    }
    assert data.to_prompts(dataset, system_prompt="")[0]["prompt"] == [{"role": "user", "content": "1 + 1 ="}]


def test_named_columns_and_kinds_of_answers():
    rows = [{"question": "a", "solution": 7}, {"question": "b", "solution": 8}]
    prompts = data.to_prompts(Dataset.from_list(rows), problem_column="question", answer_column="solution")
    assert prompts["solution"] == ["7", "8"]
    assert prompts[0]["prompt"][-1]["content"] == "a"
    several = Dataset.from_list([{"problem": "c", "answer": ["1", "2"]}])
    assert data.to_prompts(several)["solution"] == [["1", "2"]]


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
        kept = data.drop_long(prompts, tokenizer, length)
    assert kept["solution"] == ["2", "4"]
    assert f"Left out 1 of 3 rows: more than {length} tokens (max_prompt_length)" in caplog.text
    assert len(data.drop_long(prompts, tokenizer, None)) == 3
    with pytest.raises(ValueError, match=f"No row is left of 3: more than {length - 1} tokens"):
        data.drop_long(prompts, tokenizer, length - 1)


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


def test_unknown_format(write):
    with pytest.raises(ValueError, match=r"problems\.csv has a format that is not read. Known endings: .jsonl, "):
        data.load(write("problem,answer", "problems.csv"))


def test_missing_column():
    with pytest.raises(ValueError, match=r"no column 'answer'. There are: problem, reply. Set problem_column and"):
        data.to_prompts(Dataset.from_list([{"problem": "p", "reply": "r"}]))


def test_unknown_split(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"has no split 'test'. There are: train"):
        data.load(str(tmp_path / "splits"), split="test")


LEVELS = [{"problem": f"{n} =", "answer": str(n), "level": n % 5 + 1, "hard": n > 5} for n in range(10)]


def test_a_filter_keeps_rows_with_these_values(write, tokenizer):
    both = {"level": [3, 4], "hard": [True]}
    arguments = {"dataset_name": write(lines(LEVELS)), "max_prompt_length": None}
    arguments = data.DataArguments(**arguments, eval_dataset_name=arguments["dataset_name"], dataset_filter=both)
    train, held_out = data.load_prompts(arguments, tokenizer)
    assert train["solution"] == ["7", "8"]
    assert len(held_out) == 10  # measured on all


def test_a_filter_from_the_command_line():
    assert data.DataArguments("x", dataset_filter='{"level": [3]}').dataset_filter == {"level": [3]}
    assert data.DataArguments("x", dataset_filter="null").dataset_filter is None


@pytest.mark.parametrize("bad", ["{level: [3]}", '{"level": 3}', "[3]", {"level": 3}])
def test_a_filter_of_another_form(bad):
    with pytest.raises(ValueError, match=r"dataset_filter (is not JSON|maps columns to lists of values)"):
        data.DataArguments("x", dataset_filter=bad)


def test_a_filter_that_leaves_nothing_says_what_there_is():
    rows = Dataset.from_list(LEVELS)
    with pytest.raises(ValueError, match=r"no row has level in \['Level 3'\]. There are: 1, 2, 3, 4, 5"):
        data.keep_rows(rows, {"level": ["Level 3"]})
    with pytest.raises(
        ValueError, match=r"no column 'levels' \(did you mean 'level'\?\). There are: problem, answer, "
    ):
        data.keep_rows(rows, {"levels": [3]})
