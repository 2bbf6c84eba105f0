import pytest

from ktae_trl import rewards

RIGHT, WRONG, NONE = r"\boxed{4}", r"\boxed{5}", "four"


def test_math_accuracy_grades_texts_and_conversations_and_logs():
    columns, metrics = {}, {}
    completions = [
        RIGHT,
        [{"role": "assistant", "content": WRONG}],
        NONE,
        RIGHT,
        r"\boxed{???}",
        r"\boxed{9^{9^{9^{9}}}}",
    ]
    solution = ["4", "4", ["4", "3"], "???", "4", "x+1"]
    values = rewards.math_accuracy(completions, solution, log_extra=columns.__setitem__, log_metric=metrics.__setitem__)
    assert values == [1.0, 0.0, 0.0, None, 0.0, 0.0]
    assert columns == {
        "extracted": ["4", "5", "", "4", "???", "9^{9^{9^{9}}}"],
        "grading": ["equal", "different", "no boxed answer", "unparsable gold", "unparsable answer", "timeout"],
    }
    assert metrics == {
        "grading/unscorable": 1 / 6,
        "grading/unparsable": 1 / 6,
        "grading/timeouts": 1 / 6,
        "grading/worker_deaths": 0,
    }
    assert rewards.math_accuracy(completions, solution, prompts=None, trainer_state=None) == values


def test_boxed_format():
    assert rewards.boxed_format([RIGHT, NONE, r"\boxed{1"]) == [1.0, 0.0, 0.0]


def test_rewards_by_name():
    names = ["math_accuracy", "soft_overlong", "tests.test_rewards.brevity"]
    functions = rewards.load_rewards(names, max_completion_length=100, overlong_buffer=20)
    assert functions[0] is rewards.math_accuracy
    lengths = [[1] * n for n in (80, 90, 100, 101)]
    assert functions[1](completion_ids=lengths) == [0.0, -0.5, -1.0, -1.0]
    assert functions[2] is not None
    assert functions[2](["abc"]) == [-3]


def brevity(completions, **kwargs):
    return [-len(c) for c in completions]


def test_bad_names():
    options = {"max_completion_length": 10, "overlong_buffer": 2}
    with pytest.raises(ValueError, match=r"between 0 and max_completion_length \(10\).*not 10"):
        rewards.load_rewards(["soft_overlong"], **{**options, "overlong_buffer": 10})
    with pytest.raises(
        ValueError, match=r"'math_acuracy' \(did you mean 'math_accuracy'\?\). Choose from math_accuracy, "
    ):
        rewards.load_rewards(["math_acuracy"], **options)
    with pytest.raises(ImportError, match=r"'no_such.module' could not be imported: No module named 'no_such'"):
        rewards.load_rewards(["no_such.module"], **options)
    with pytest.raises(ImportError, match=r"has no attribute 'nothing'"):
        rewards.load_rewards(["tests.test_rewards.nothing"], **options)
