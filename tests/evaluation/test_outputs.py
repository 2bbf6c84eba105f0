"""`eval.py grade`: outputs of other programs."""

import gzip
import json
import shutil

import pytest

from ktae_trl.evaluation.run import main
from tests.evaluation.running import complaint, samples


def test_grade_outputs_of_others(tmp_path, capsys):
    path = tmp_path / "theirs.jsonl.gz"
    rows = [
        {"task": "easy", "id": 1, "response": r"\boxed{2}", "solution": "2"},
        {"task": "easy", "id": 1, "response": r"\boxed{3}", "solution": "2"},
        {"task": "hard", "id": 1, "response": r"\boxed{x+1}", "solution": ["1+x", "y"]},
        {"task": "hard", "id": 2, "response": r"\boxed{x}", "solution": "???"},
        {"task": "hard", "id": 1, "response": "none", "solution": ["1+x", "y"]},
        {"task": "hard", "id": 2, "response": r"\boxed{x}", "solution": "???"},
    ]
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)) + "\n\n")
    main(["grade", str(path), "--output_dir", str(tmp_path / "graded"), "--k", "2"])
    summary = json.loads((tmp_path / "graded" / "summary.json").read_text())
    assert [summary["benchmarks"][b]["accuracy"][0] for b in ("easy", "hard")] == [0.5, 0.5]
    assert summary["benchmarks"]["hard"]["unscorable"] == ["2"]
    assert summary["benchmarks"]["easy"]["pass"]["2"][0] == 1
    assert summary["benchmarks"]["easy"]["tokens"] is None
    main(["grade", str(path), "--output_dir", str(tmp_path / "twice")])
    main(["compare", str(tmp_path / "graded"), str(tmp_path / "twice"), "--output_dir", str(tmp_path / "c")])
    assert "no evidence of a difference: identical on every problem" in capsys.readouterr().out


def test_graded_outputs_give_the_published_accuracy(shared, tmp_path):
    main(
        ["grade", str(shared / "graded_outputs" / "qwen2.5_math_7b_grpo_ktae.jsonl.gz"), "--output_dir", str(tmp_path)]
    )
    published = json.loads((shared / "published_results.json").read_text())["GRPO+KTAE_7B"]["accuracy"]
    summary = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
    assert {b: f["accuracy"][0] for b, f in summary.items()} == pytest.approx({b: published[b] for b in summary})


def test_outputs_that_would_be_lost(tmp_path):
    path = tmp_path / "outputs.jsonl"
    rows = [{"output": "\\boxed{1}", "answer": "1", "task": task} for task in ("a/b", "a_b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "Two benchmarks of" in complaint(["grade", str(path), "--output_dir", str(tmp_path / "x")])
    path.write_text('{"output": "\\\\boxed{1}", "answer": "1", "mine": "precious"}\n')
    assert "outputs.jsonl would be overwritten" in complaint(["grade", str(path), "--output_dir", str(tmp_path)])
    assert "precious" in path.read_text()


def test_outputs_in_lists(tmp_path):
    path = tmp_path / "lists.jsonl"
    path.write_text(json.dumps({"output": [r"\boxed{2}", r"\boxed{\frac{1}{2}}"], "answer": r"\frac12"}) + "\n")
    main(["grade", str(path), "--output_dir", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["outputs"]
    assert (figures["samples"], figures["accuracy"][0]) == (2, 0.5)
    path.write_text(json.dumps({"output": [{"role": "assistant", "content": "2"}], "answer": "2"}) + "\n")
    assert "line 1: an output must be a string or a list of strings" in complaint(["grade", str(path)])
    path.write_text(json.dumps({"output": None, "answer": "2"}) + "\n")
    assert "line 1: output is null" in complaint(["grade", str(path)])
    path.write_text(json.dumps({"output": "2", "answer": "2", "tokens": "x"}) + "\n")
    assert "line 1: tokens must be a whole number, not 'x'" in complaint(["grade", str(path)])


def test_no_problem_vanishes(tmp_path):
    """A problem without an output is an error: left out in silence, it would make the rest look better."""
    path = tmp_path / "x.jsonl"
    rows = [{"id": "a", "output": [r"\boxed{2}"], "answer": "2"}, {"id": "b", "output": [], "answer": "3"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = complaint(["grade", str(path), "--output_dir", str(tmp_path / "out")])
    assert "x.jsonl, line 2: problem 'b' has no outputs. To exclude it, grade a copy of the file without" in said
    rows[1]["output"] = [""]  # as the message says
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert grade_file(path)["accuracy"][0] == 0.5


def grade_file(path, *words) -> dict:
    folder = path.with_suffix(".graded")
    main(["grade", str(path), "--output_dir", str(folder), *words])
    (figures,) = json.loads((folder / "summary.json").read_text())["benchmarks"].values()
    return figures


def test_one_id_for_two_problems(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"id": 1, "output": r"\boxed{2}", "answer": "2"}, {"id": 2, "output": "", "answer": "5"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"answer": "3"}]))
    said = complaint(["grade", str(path)])
    assert "x.jsonl, line 3: problem '1' of outputs has the answer 3, but in line 1 the answer 2." in said
    assert "Give each problem its own id (--id_column)" in said
    rows[0]["problem"] = "1 + 1 ="
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"problem": "4 - 2 ="}]))
    assert "line 3: problem '1' of outputs has a different text than in line 1" in complaint(["grade", str(path)])
    rows[0]["answer"] = 2  # the same answer in another form
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"answer": ["2"]}][::2]))
    assert grade_file(path)["samples"] == 2


def test_whether_an_output_was_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    values = [True, "true", 1, "True", False, "false", 0, "False"]
    rows = [{"output": "", "answer": "2", "tokens": i, "truncated": value} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = grade_file(path)
    assert figures["truncated"] == 0.5
    assert figures["tokens"]["mean"] == 3.5
    for value in ("no", 2, [], {}, 0.5):
        path.write_text(json.dumps({"output": "", "answer": "2", "truncated": value}) + "\n")
        assert "line 1: truncated must be true or false, not " in complaint(["grade", str(path)])
    for value in (True, -1, 1.5, "7", [], float("nan"), float("inf")):
        path.write_text(json.dumps({"output": "", "answer": "2", "tokens": value}) + "\n")
        assert "line 1: tokens must be a whole number, not " in complaint(["grade", str(path)]), value
    path.write_text('{"output": "", "answer": "2", "tokens": 12.0, "truncated": null}\n')  # as pandas writes a column
    assert grade_file(path)["tokens"]["mean"] == 12


@pytest.mark.parametrize("opened", [open, gzip.open])
def test_a_byte_order_mark_loses_no_line(tmp_path, opened):
    path = tmp_path / ("x.jsonl" if opened is open else "x.jsonl.gz")
    with opened(path, "wt", encoding="utf-8-sig") as file:
        file.write("".join(json.dumps({"output": rf"\boxed{{{i}}}", "answer": "0"}) + "\n" for i in range(2)))
    assert grade_file(path)["accuracy"][0] == 0.5


def test_a_file_in_another_encoding(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('{"output": "größer", "answer": "2"}\n'.encode("latin-1"))
    assert "x.jsonl, line 1: byte 15 (0xf6) is not UTF-8" in complaint(["grade", str(path)])


def test_answers_of_any_kind(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    cases = [(["1", None], "1", True), (["1", None], "None", False), (142.0, "142", True), (3, "3", True)]
    cases += [(True, "True", True), ("so\n#### 72", "72", True), (12345678901234567891, "12345678901234567891", True)]
    cases += [(12345678901234567891, "12345678901234567890", False), ("2024-01-05", "2024-01-05", True)]
    rows = [{"output": rf"\boxed{{{output}}}", "answer": answer} for answer, output, _ in cases]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grade_file(path)
    judged = samples(path.with_suffix(".graded"), "outputs")
    assert [row["verdict"] for row in judged] == [right for *_, right in cases]
    assert "Ignored null and empty answers in the lists of answers of 2 lines of" in caplog.text
    for answer in ([], [None], "", float("nan")):
        path.write_text(json.dumps({"output": "", "answer": answer}) + "\n")
        assert "line 1: the answer is empty (" in complaint(["grade", str(path)]), answer
    path.write_text(json.dumps({"output": "", "answer": {"a": 1}}) + "\n")
    assert "line 1: An answer must be " in complaint(["grade", str(path)])


def test_graded_outputs_of_another_file_stay(tmp_path):
    path, folder = tmp_path / "x.jsonl", tmp_path / "out"
    rows = [{"output": r"\boxed{2}", "answer": "2", "task": task} for task in ("a", "b")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["grade", str(path), "--output_dir", str(folder)])
    path.write_text(json.dumps(rows[0]) + "\n")
    main(["grade", str(path), "--output_dir", str(folder)])
    assert [file.name for file in folder.glob("*.jsonl")] == ["a.jsonl"]  # b is not in the file any more
    other = tmp_path / "y.jsonl"
    shutil.copy(path, other)
    said = complaint(["grade", str(other), "--output_dir", str(folder)])
    assert f"{folder} already contains the results of {path}. Choose another --output_dir" in said


def test_bad_files(tmp_path):
    assert "There is no file nothing.jsonl" in complaint(["grade", "nothing.jsonl"])
    path = tmp_path / "x.jsonl"
    path.write_text("")
    assert "contains no outputs" in complaint(["grade", str(path)])
    path.write_text('{"output": "a", "answer": "1"}\nnot json\n')
    assert "x.jsonl, line 2: not JSON" in complaint(["grade", str(path)])
    path.write_text('{"output": "a"}\n')
    said = complaint(["grade", str(path)])
    assert "line 1: no column answers or answer or solution. Its columns: output. Choose one with" in said
    path.write_text('{"output": "a", "answer": "1"}\n')
    assert "k must be between 1 and the number of samples per problem (1 in outputs), not 2" in complaint(
        ["grade", str(path), "--k", "2", "--output_dir", str(tmp_path / "g")]
    )
