"""Files are read as they are written. Each case says what a table makes of JSON or CSV, by hand."""

import gzip
import json
import random
from pathlib import Path

import pytest

from ktae_trl import data
from ktae_trl.data.columns import column_values
from ktae_trl.data.files import read
from ktae_trl.grading.golds import gold_answers


@pytest.fixture
def file(tmp_path):
    def write(content, name="mine.jsonl"):
        path = tmp_path / name
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


def answers(path: Path) -> list:
    return [gold_answers(value) for value in read(path)["answer"]]


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.jsonl.gz", "mine.ndjson", "mine.json", "lines.json"])
@pytest.mark.parametrize(
    ("written", "understood"),
    [
        ('"2024-01-05" "5"', [["2024-01-05"], ["5"]]),
        ('"2024-01-05T10:00:00"', [["2024-01-05T10:00:00"]]),
        ("18446744073709551617 5", [["18446744073709551617"], ["5"]]),
        ("9223372036854775808 -1", [["9223372036854775808"], ["-1"]]),
        ("1.5 9007199254740993", [["1.5"], ["9007199254740993"]]),
        ("142.0 7", [["142"], ["7"]]),
        ("true null", [["True"], []]),
        # texts, lists and numbers in one column
        ('"5" ["6","7"] "[1,2]" null', [["5"], ["6", "7"], ["[1,2]"], []]),
        ('["6",7] 5', [["6", "7"], ["5"]]),
        ('"x" 142.0 1e-05', [["x"], ["142"], ["0.00001"]]),
        ('"007" 7 7.5', [["007"], ["7"], ["7.5"]]),
        ("NaN 5", [[], ["5"]]),
        ('"" [] [null]', [[], [], []]),
    ],
)
def test_json_as_it_is_written(file, name, written, understood):
    rows = [f'{{"problem":"p","answer":{value}}}' for value in written.split()]
    assert answers(file(f"[{','.join(rows)}]" if name == "mine.json" else "\n".join(rows), name)) == understood


def test_nested_values_of_several_types(file):
    rows = [
        {"extra": {"answer": 2**70, "tags": ["a", 1]}, "level": 3, "note": None},
        {"extra": {"answer": "x"}, "level": "3", "note": {}},
        {"extra": None, "level": None},
    ]
    dataset = read(file("".join(json.dumps(row) + "\n" for row in rows)))
    assert column_values(dataset, "extra.answer") == [str(2**70), "x", None]
    assert column_values(dataset, "extra.tags") == [["a", 1], None, None]
    assert dataset["level"][:] == [3, "3", None]
    assert dataset["note"][:] == [None, {}, None]
    assert read(file(json.dumps(rows), "mine.json")).to_list() == dataset.to_list()


def test_numbers_beside_texts_are_exact(file):
    rng = random.Random(0)
    floats = [rng.uniform(-1, 1) * 10 ** rng.randint(-20, 20) for _ in range(2000)]
    rows = [{"answer": value} for value in (*floats, "a text")]
    texts = read(file(json.dumps(rows), "mine.json"))["answer"][:]
    assert [float(text) for text in texts[:-1]] == floats
    assert not any("e" in str(text) for text in texts[:-1])


def test_messages_whose_contents_differ(file):
    messages = [
        [{"role": "user", "content": "1 + 1?"}],
        [{"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]}],
    ]
    rows = [{"problem": message, "answer": "4"} for message in messages]
    prompts = data.to_prompts(read(file(json.dumps(rows), "mine.json")), system_prompt=None)
    assert [prompt[0]["content"] for prompt in prompts["prompt"]] == ["1 + 1?", "2 + 2?"]


def test_csv_as_it_is_written(file):
    text = 'problem,answer,level\n"1,\n2",007,3\np,1e5,\np,"1,024",4\np,2024-01-05,\np,,\n\np,NA,\n'
    dataset = read(file(text, "mine.csv"))
    assert dataset["answer"][:] == ["007", "1e5", "1,024", "2024-01-05", "", "NA"]
    assert dataset["problem"][0] == "1,\n2"
    assert dataset["level"][:3] == ["3", "", "4"]
    assert read(file(text, "mine.csv.gz")).to_list() == dataset.to_list()
    long = "x" * 200_000
    assert read(file(f"problem,answer\n{long},5\n", "mine.csv"))[0] == {"problem": long, "answer": "5"}


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json", "mine.csv"])
def test_a_byte_order_mark_is_no_text(file, name):
    text = "answer,n\n5,1\n" if name == "mine.csv" else '{"answer": "5", "n": "1"}'
    assert read(file(b"\xef\xbb\xbf" + text.encode(), name)).to_list() == [{"answer": "5", "n": "1"}]


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json", "mine.csv", "mine.jsonl.gz"])
def test_a_latin_1_file_is_named(file, name):
    text = "problem\n5\ncafé\n" if name == "mine.csv" else '{"problem": "5"}\n{"problem": "6"}\n{"problem": "café"}\n'
    byte = 4 if name == "mine.csv" else 17
    with pytest.raises(ValueError, match=rf"{name}, line 3: byte {byte} \(0xe9\) is not UTF-8.*iconv -f LATIN1"):
        read(file(text.encode("latin-1"), name))


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ('{"a": 1}\n\n{"a"', "mine.jsonl", "line 3: not JSON"),
        ('{"a": 1}\n[1]', "mine.jsonl", r"line 2: an object was expected, not \[1\]"),
        ('[{"a": 1}, 5]', "mine.json", "row 2: an object was expected, not 5"),
        ('[{"a": 1}', "mine.json", "not JSON"),
        ('{\n  "data": []\n}', "mine.json", "line 1: not JSON"),
        ("[]", "mine.json", "has no rows"),
        ("\n\n", "mine.jsonl", "has no rows"),
        ("a,b\n", "mine.csv", "has no rows"),
        ("a,b\n1,2\n1,024,2\n", "mine.csv", "line 3: 3 values, but 2 columns: a, b. Put quotation marks"),
        ('a,b\n"1,2\n', "mine.csv", "line 2: not CSV"),
        ("a,a\n1,2\n", "mine.csv", "two columns are named 'a'"),
        (b"\x1f\x8bno", "mine.jsonl", "line 1: byte 2"),
        ('{"a": "\\ud800"}', "mine.jsonl", "column 'a': .*surrogates"),
        ("no", "mine.parquet", "could not be read as parquet"),
    ],
)
def test_malformed_files(file, content, name, words):
    with pytest.raises(ValueError, match=rf"{name}.*{words}"):
        read(file(content, name))


def test_a_gzip_file_that_is_cut_off(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-10])
    (tmp_path / "none.jsonl.gz").write_bytes(b'{"a": 1}\n')
    for name in ("cut", "none"):
        with pytest.raises(ValueError, match=rf"{name}\.jsonl\.gz is a damaged gzip file"):
            read(tmp_path / f"{name}.jsonl.gz")
