import datetime
import json
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from ktae_trl.grading.golds import describe, gold_answers, is_prose

GSM8K = "He has 3 bags of 24.\nThat is 3*24 = <<3*24=72>>72 apples.\n#### 72"
MATH = r"We have $x = \boxed{3}$ or, with the other sign, $x = \boxed{\frac{1}{2}}$. That is all."


@pytest.mark.parametrize(
    ("value", "answers", "how"),
    [
        # numbers, in plain digits
        (5, ["5"], "value"),
        (142.0, ["142"], "value"),
        (0.1, ["0.1"], "value"),
        (1e-05, ["0.00001"], "value"),
        (6.02e23, ["602" + 21 * "0"], "value"),
        (-0.0, ["0"], "value"),
        (2**70 + 1, [str(2**70 + 1)], "value"),
        (True, ["True"], "value"),
        (Decimal("142.50"), ["142.5"], "value"),
        (
            Decimal("1234567890123456789012345678901234567890.5"),
            ["1234567890123456789012345678901234567890.5"],
            "value",
        ),
        (Fraction(1, 2), ["1/2"], "value"),
        (Fraction(4, 2), ["2"], "value"),
        (float("-inf"), [r"-\infty"], "value"),
        (np.float32(0.1), ["0.1"], "value"),
        (np.int64(5), ["5"], "value"),
        (np.True_, ["True"], "value"),
        # texts
        ("5", ["5"], "value"),
        ("007", ["007"], "value"),
        ("1e5", ["1e5"], "value"),
        (" $5$. ", ["5"], "value"),
        ("...", ["..."], "value"),
        ('"5"', ['"5"'], "value"),
        ("no solution", ["no solution"], "value"),
        ("x=5", ["x=5"], "value"),
        # solutions
        (GSM8K, ["72"], "last line ####"),
        ("#### 1,024\n\n", ["1,024"], "last line ####"),
        ("two lines made one #### 5 apples", ["5 apples"], "last line ####"),
        (r"#### \boxed{5}", ["5"], "last line ####"),
        ("#### A heading\n\nand a text", ["#### A heading\n\nand a text"], "value"),
        (MATH, [r"\frac{1}{2}"], "last box"),
        (r"The answer is $\boxed{5}$.", ["5"], "last box"),
        (r"cut off: \boxed{5", [r"cut off: \boxed{5"], "value"),
        ("He has 3 * 24 = 72 apples. The answer is 72.", ["72"], "sentence"),
        ("Hence the final answer is: **3.5**.", ["3.5"], "sentence"),
        ("Answer: C", ["C"], "sentence"),
        ("**Answer:** 5", ["5"], "sentence"),
        ("steps\n\n**Final Answer**: $7$", ["7"], "sentence"),
        ("steps\nFinal answer:\n\n7\n", ["7"], "sentence"),
        ("#### 72\nThe answer is: 72", ["72"], "sentence"),
        ("Final Answer: The final answer is $12$. I hope it is correct.", ["12"], "sentence"),
        ("the answer is no solution", ["no solution"], "sentence"),
        # ... which these are not
        ("There is no answer: the system is inconsistent", ["There is no answer: the system is inconsistent"], "value"),
        ("The answer is 5. So he pays 10.", ["The answer is 5. So he pays 10"], "value"),
        # several accepted answers
        (["34", "35"], ["34", "35"], "list of 2"),
        (("34", 35, 36.0), ["34", "35", "36"], "list of 3"),
        (["1", None, "", "1"], ["1"], "list of 1"),
        ([GSM8K], ["72"], "list of 1"),
        (np.array([1, 2]), ["1", "2"], "list of 2"),
        (np.array(3), ["3"], "value"),
        # ... as text: a list with a text in it, in JSON or as Python writes it
        ('["34"]', ["34"], "list of 1"),
        ('["34", "35"]', ["34", "35"], "list of 2"),
        ('["34", 35]', ["34", "35"], "list of 2"),
        ("['34', '35']", ["34", "35"], "list of 2"),
        (r'["\\frac{1}{2}"]', [r"\frac{1}{2}"], "list of 1"),
        (r'["\frac{1}{2}", "\sqrt{2}"]', [r"\frac{1}{2}", r"\sqrt{2}"], "list of 2"),
        # ... and intervals, points and matrices, which are one answer
        ("[1, 2]", ["[1, 2]"], "value"),
        ("[1, 2)", ["[1, 2)"], "value"),
        ("(1, 2)", ["(1, 2)"], "value"),
        ("[5]", ["[5]"], "value"),
        ("[[1, 2], [3, 4]]", ["[[1, 2], [3, 4]]"], "value"),
        # nothing
        *(
            (nothing, [], "missing")
            for nothing in (
                *(
                    None,
                    float("nan"),
                    Decimal("NaN"),
                    np.float32("nan"),
                    "",
                    " \n",
                    r"\boxed{}",
                    [],
                    [None],
                    ["", None],
                ),
                *(["", None], [float("nan")], "[]", "[null]", np.array([])),
            )
        ),
    ],
)
def test_what_a_value_means(value, answers, how):
    assert (gold_answers(value), describe(value)) == (answers, "missing" if not answers else how)
    assert gold_answers(answers) == answers  # what has been read, read again


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"ground_truth": "5", "style": "rule"}, r"not a dict: .*dotted path, such as COLUMN\.ground_truth"),
        ({}, "not a dict"),
        (b"5", "not a bytes: b'5'"),
        (datetime.date(2024, 1, 5), "not a date: 2024-01-05"),
        ([["1", "2"]], r"not a list of lists: \[\['1', '2'\]\]"),
        (["1", ["2"]], "not a list of lists"),
        (np.ones((2, 2)), "not a list of lists"),
        ('["1", ["2"]]', "not a list of lists"),
        ([{"a": 1}], "not a dict"),
        (1j, "not a complex"),
    ],
)
def test_values_that_are_no_answers(value, words):
    with pytest.raises(TypeError, match=words):
        gold_answers(value)


@pytest.mark.parametrize(
    ("answer", "prose"),
    [
        ("If she gives 5 of her 12 pens to Tom, she has 12 - 5 = 7 pens left.", True),
        ("no real solution exists for these a", False),
        (r"\frac{\sqrt{a b c d}}{\left(x + y\right)} \text{ m} \cdot \alpha \beta \gamma \delta \epsilon", False),
    ],
)
def test_prose(answer, prose):
    assert is_prose(answer) == prose


def test_every_solution_of_gsm8k(shared):
    """Its columns here are taken apart; on the Hub, the answer is the solution with a last line `#### X`."""
    rows = [json.loads(line) for line in (shared / "gsm8k" / "train.jsonl").open()]
    assert all(gold_answers(f"{r['solution']}\n#### {r['answer']}") == [r["answer"]] for r in rows)


def test_long_texts_take_no_time():
    began = time.perf_counter()
    for text in ("The answer is " * 20_000, "the answer: a " * 20_000 + "\nx", "####" * 50_000, "[" * 100_000 + "]"):
        gold_answers(text)
    assert time.perf_counter() - began < 1


def test_nothing_heavy_is_loaded():
    code = "import ktae_trl.grading.golds, sys; print({'torch', 'trl', 'sympy', 'numpy', 'datasets'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
