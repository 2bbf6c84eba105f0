import gzip
import json
import threading

import pytest

from ktae_trl.grading import Grade, grade, grade_full, grade_many, last_boxed


@pytest.mark.parametrize(
    ("completion", "answers", "verdict"),
    [
        (r"so \boxed{17}", "17", True),
        (r"so \boxed{ 17 }", "$17$", True),
        (r"so \boxed{17}", r"\boxed{17}", True),
        (r"so \boxed{-3}", "3", False),
        (r"so \boxed{17.0}", "17", True),
        (r"so \boxed{0.50}", r"\frac12", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{(1, 2)}", "(1,2)", True),
        (r"\boxed{(2, 1)}", "(1,2)", False),
        (r"\boxed{\text{East}}", r"\text{east}", True),
        # only the last box counts
        (r"first \boxed{1}, no: \boxed{2}", "2", True),
        (r"first \boxed{2}, no: \boxed{1}", "2", False),
        (r"first \boxed{2}, no: \boxed{2", "2", False),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}", True),
        # what a degenerate completion may hold
        (r"\boxed{" + "1" * 5000 + "}", "1", False),
        ("1", "1" * 5000, None),
        (r"\boxed{" + "{" * 500 + "}", "1", False),
        # no box, no answer
        ("the answer is 17", "17", False),
        ("", "17", False),
        # several accepted answers
        (r"\boxed{0.25}", ["4", r"\frac{1}{4}"], True),
        (r"\boxed{5}", ["4", r"\frac{1}{4}"], False),
        (r"\boxed{4}", [r"\frac{", "4"], True),
        # a gold answer that is no mathematics: unscorable, unless it was written literally
        (r"\boxed{4}", r"\frac{", None),
        (r"\boxed{4}", "", None),
        ("no box", "???", None),
        (r"\boxed{???}", "???", True),
    ],
)
def test_verdicts(completion, answers, verdict):
    assert grade(completion, answers) is verdict


def test_reasons():
    assert grade_full(r"\boxed{2}", "2") == Grade(True, "2", "equal")
    assert grade_full(r"\boxed{2}", "3") == Grade(False, "2", "different")
    assert grade_full("2", "3") == Grade(False, None, "no boxed answer")
    assert grade_full(r"\boxed{\frac{}", "3") == Grade(False, None, "no boxed answer")
    assert grade_full(r"\boxed{???}", "3") == Grade(False, "???", "unparsable answer")
    assert grade_full(r"\boxed{2}", "???") == Grade(None, "2", "unparsable gold")


def test_last_boxed_matches_braces():
    assert last_boxed(r"\boxed{\frac{1}{2}} and \boxed {\sqrt{x^{2}}} .") == r"\sqrt{x^{2}}"
    assert last_boxed(r"\boxed{\{1\}}") == r"\{1\}"
    assert last_boxed(r"\boxed{1} \boxed{\frac{1}{2}") is None
    assert last_boxed("none") is None


def test_many_are_graded_in_order():
    assert grade_many([r"\boxed{1}", r"\boxed{2}", "3"], ["1", "1", "???"]) == [True, False, None]
    with pytest.raises(ValueError, match="zip"):
        grade_many(["a"], [])


def test_other_threads_can_grade():
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(grade(r"\boxed{\frac{2}{4}}", r"\frac{1}{2}")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_official_verdicts(shared):
    """Real outputs of a 7B model. What is left over: '12^{\\text{th}}' for '12', which math-verify does not read."""
    path = shared / "graded_outputs" / "qwen2.5_math_7b_grpo_ktae.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    verdicts = grade_many([row["output"] for row in rows], [row["answers"] for row in rows])
    wrong = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict != row["official_correct"]]
    assert len(rows) == 613
    assert [last_boxed(row["output"]) for row in wrong] == [r"12^{\text{th}}"]
