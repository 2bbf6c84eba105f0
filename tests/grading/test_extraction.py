r"""Where the final answer stands in a completion, in each answer format."""

import time

import pytest

from ktae_trl.grading import ANSWER_FORMATS, INSTRUCTIONS, answered, find_answer, grade, grade_full, write_answer


def text_of(completion: str, answer_format: str) -> str | None:
    answer = find_answer(completion, answer_format)
    return answer and answer.text


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"\boxed{1} then \boxed{ \frac{1}{2} }", r"\frac{1}{2}"),
        # Boxes of one answer, and boxes that are not.
        (r"The values are \boxed{3}, \boxed{5}, \boxed{7}", "3, 5, 7"),
        (r"\(\boxed{1}\) and \(\boxed{-2}\).", "1, -2"),
        (r"$x=\boxed{3}$ or $x_{1}=\boxed{-3}$", "3, -3"),
        (r"$\boxed{3}\text{ and }\boxed{5}$", "3, 5"),
        (r"\boxed{2}, so the sum is \boxed{5}", "5"),
        (r"\boxed{5}. The answer is \boxed{7}", "7"),
        (r"\boxed{5} \boxed{7}", "7"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"\boxed{5}," + 80 * " " + r"\boxed{7}", "7"),
        # Without braces, where no box has them.
        (r"The answer is $\boxed 5$", "5"),
        (r"so $\boxed\frac12$", r"\frac12"),
        (r"so \boxed 12.5. Done", "12.5"),
        (r"so \boxed -3", "-3"),
        (r"\boxed x", "x"),
        (r"\(\boxed 3x+1\)", "3x+1"),
        (r"\boxed{5}, as asked in a \boxed notation", "5"),
        (r"\boxed{5} and \boxed 7", "5"),
        (r"in a \boxed notation", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{1}, \boxed", None),
        ("5", None),
    ],
)
def test_boxed(completion, expected):
    assert text_of(completion, "boxed") == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer>5</answer> no: <answer> 7\n</answer>", "7"),
        (r"<answer> It is \boxed{\frac{1}{2}} </answer>", r"\frac{1}{2}"),
        ("<answer>5</answer> no: <answer>7", None),
        ("<answer>5 <answer>7</answer>", "7"),
        ("5</answer>", None),
        (r"\boxed{5}", None),
    ],
)
def test_tag(completion, expected):
    assert text_of(completion, "tag") == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### 1,200  \nor\n  ####  $7 ", "$7"),
        ("it is #### 5", None),
        ("####", None),
    ],
)
def test_hash(completion, expected):
    assert text_of(completion, "hash") == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("2 + 3 is 5.", "5"),
        ("She pays $1,200.50.", "$1,200.50"),
        ("It is -7 or so", "-7"),
        ("It falls by 7%.", "7%"),
        ("about 3/4 of them", "3/4"),
        ("10-5", "5"),
        (".5 or so", ".5"),
        ("1, 2, 3", "3"),
        ("x2 has none", None),
        ("none", None),
    ],
)
def test_last_number(completion, expected):
    assert text_of(completion, "last_number") == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"<answer>1</answer> #### 2 \boxed{3} 4", "3"),
        ("#### 2\n<answer>1</answer> 4", "1"),
        ("#### 2\n4", "2"),
        ("it is 4", "4"),
        (r"it is 4 or \boxed{5", None),  # a box that is cut off is no reason to take another number
        ("it is 4: <answer>5", None),
    ],
)
def test_auto_takes_the_first_format_that_is_there(completion, expected):
    assert text_of(completion, "auto") == expected


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
def test_what_is_written_is_found(answer_format):
    assert text_of("So we get 3.\n" + write_answer("72", answer_format), answer_format) == "72"


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
def test_thinking_is_no_answer(answer_format):
    seven, nine = write_answer("7", answer_format), write_answer("9", answer_format)
    assert text_of(f"<think>\n{seven}\n</think>\nWell.", answer_format) is None
    assert text_of(f"<think>\n{seven}\n</think>\n{nine}", answer_format) == "9"
    assert text_of(f"{seven}\n</think>\n{nine}", answer_format) == "9"
    assert text_of(f"<think>\n{seven}", answer_format) is None  # cut off while it thinks
    assert text_of(f"<think>a</think>\n{nine}\n<think>\n{seven}", answer_format) is None


def test_a_prompt_can_open_the_thinking():
    assert find_answer(answered("Assistant: <think>\n", r"\boxed{5}")) is None
    assert find_answer(answered("Assistant: <think>\n", r"hm</think>\boxed{5}")).text == "5"
    assert find_answer(answered("<think></think>", r"\boxed{5}")).text == "5"


def test_where_an_answer_stands():
    answer = find_answer(r"so $\boxed{ 3 }$, $\boxed{5}$.")
    assert answer.begin == 4
    assert [r"so $\boxed{ 3 }$, $\boxed{5}$."[slice(*span)] for span in answer.spans] == ["3", "5"]


def test_verdicts_and_reasons_in_a_format():
    assert grade("#### 1,200", "1200", "hash") is True
    assert grade(r"\boxed{1200}", "1200", "hash") is False
    assert grade_full("5", "5").reason == "no boxed answer"
    assert grade_full(r"\boxed{5}", "5", "tag").reason == "no answer"
    assert grade_full("It is 72.", "72", "last_number")[:2] == (True, "72")
    with pytest.raises(
        ValueError, match=r"answer_format='box' is unknown \(did you mean 'boxed'\?\). Choose from: boxed"
    ):
        grade("5", "5", "box")


def test_a_hedge_is_no_answer():
    assert grade(r"\boxed{5} or \boxed{7}", "7") is False
    assert grade(r"\boxed{5} or \boxed{7}", "5,7") is True


def test_instructions_name_what_is_read():
    assert r"\boxed{}" in INSTRUCTIONS["boxed"]
    assert r"\boxed{}" in INSTRUCTIONS["auto"]
    assert "<answer>" in INSTRUCTIONS["tag"]
    assert "####" in INSTRUCTIONS["hash"]
    assert set(INSTRUCTIONS) == set(ANSWER_FORMATS)


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{1}" + " , " * 100_000 + r"\boxed{2}",
        r"\boxed{1}, " * 50_000,
        r"\boxed 5" + " " * 200_000,
        r"\boxed 5 " * 50_000,
        "<answer>" * 50_000,
        "<answer>" + "<" * 300_000,
        "<think>" * 50_000 + "</think>" * 50_000,
        "#### " * 50_000,
        "#### 1\n" * 50_000,
        "\n".join(["####" + " " * 1000] * 200),
        "1," * 100_000,
        "1" * 200_000,
    ],
    ids=lambda text: text[:12],
)
def test_long_completions_take_no_time(completion, answer_format):
    began = time.process_time()
    find_answer(completion, answer_format)
    assert time.process_time() - began < 2
