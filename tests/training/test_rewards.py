import json
import math
import sys
from pathlib import Path

import pytest
import torch

from ktae_trl import rewards, tiny
from ktae_trl.grading import Grade
from ktae_trl.training import run as training
from tests.trainers import make_trainer

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
        "grading/budget": 0,
    }
    assert rewards.math_accuracy(completions, solution, prompts=None, trainer_state=None) == values


def test_the_run_s_grading_budget_reaches_the_grader(tmp_path, monkeypatch):
    given, metrics = [], {}

    def grade_many_full(completions, answers, answer_format, budget):
        given.append(budget)
        return [Grade(False, "x", "budget")] * len(completions)

    monkeypatch.setattr(rewards, "grade_many_full", grade_many_full)
    for budget in (60.0, 7.0, None):
        trainer = make_trainer(tmp_path / str(budget), **({} if budget == 60.0 else {"grading_budget": budget}))
        trainer.reward_funcs[0](completions=[RIGHT], solution=["4"], log_metric=metrics.__setitem__)
    assert given == [60.0, 7.0, None]
    assert metrics["grading/budget"] == 1
    with pytest.raises(ValueError, match=r"grading_budget must be above 0.*not -1"):
        make_trainer(tmp_path, grading_budget=-1)


def test_messages_without_a_text_or_with_text_in_parts():
    """As runs with tools have them: the last message may only call a tool."""
    parts = [{"type": "text", "text": r"So \boxed{"}, {"type": "image"}, {"type": "text", "text": "4}"}]
    last = [{"tool_calls": []}, {"content": None}, {"content": parts}]
    assert rewards.boxed_format([[{"role": "assistant", **message}] for message in last]) == [0.0, 0.0, 1.0]


def test_boxed_format():
    assert rewards.boxed_format([RIGHT, NONE, r"\boxed{1"]) == [1.0, 0.0, 0.0]


def test_rewards_by_name():
    names = ["math_accuracy", "soft_overlong", "tests.training.test_rewards.brevity"]
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
    with pytest.raises(ValueError, match=r"above 0 and below max_completion_length \(10\).*not 10"):
        rewards.load_rewards(["soft_overlong"], **{**options, "overlong_buffer": 10})
    with pytest.raises(
        ValueError, match=r"'math_acuracy' \(did you mean 'math_accuracy'\?\). Choose from math_accuracy, "
    ):
        rewards.load_rewards(["math_acuracy"], **options)
    with pytest.raises(ImportError, match=r"'no_such.module' could not be imported: there is no module 'no_such'"):
        rewards.load_rewards(["no_such.module"], **options)
    with pytest.raises(
        ImportError, match=r"'tests.training.test_rewards' \(.*\) has no 'brevit' \(did you mean 'brevity'\?\)"
    ):
        rewards.load_rewards(["tests.training.test_rewards.brevit"], **options)
    with pytest.raises(ImportError, match="is not a function but a list"):
        rewards.load_rewards(["tests.training.test_rewards.NOT_A_FUNCTION"], **options)


NOT_A_FUNCTION = [1]

VERDICT = """
import module_of_the_user

def my_verdict(completions, result, problem_id, solution, **kwargs):
    assert [[str(r)] for r in result] == solution
    words = [c[-1]["content"].replace("{", " ").replace("}", " ").split() for c in completions]
    return [float(str(r) in said) for said, r in zip(words, result, strict=True)]
"""


def test_a_function_of_the_working_directory(tmp_path, monkeypatch):
    """`accelerate launch` puts the folder of the script on the path, not the one that the user is in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    options = {"max_completion_length": 10, "overlong_buffer": 2}
    Path("mine_too.py").write_text(VERDICT)
    # An error inside the user's module is shown as it is, with its line, and not as a module that is missing.
    expected = (
        r"mine_too fails with ModuleNotFoundError: No module named 'module_of_the_user' \(.*mine_too.py, line 2\)"
    )
    with pytest.raises(ImportError, match=expected):
        rewards.load_rewards(["mine_too.my_verdict"], **options)
    Path("module_of_the_user.py").touch()
    (function,) = rewards.load_rewards("mine_too.my_verdict", **options)
    assert function([[{"content": "it is 5"}]], result=[5], problem_id=[1], solution=[["5"]]) == [1.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "each of the 2 completions, but returned 1"),
        ("ab", "each of the 2 completions, not str: ab"),
        (0.5, "each of the 2 completions, not float: 0.5"),
        (torch.tensor(0.5), "each of the 2 completions, not Tensor"),
        ([1.0, "0.5"], "but the value at index 1 is of type str: 0.5"),
        ([[1.0], 2.0], r"but the value at index 0 is of type list: \[1.0\]"),
    ],
)
def test_bad_values_name_the_function(values, words):
    with pytest.raises(ValueError, match=f"The reward function 'mine' must return a list .*{words}"):
        rewards.check_values(values, "mine", 2)
    assert rewards.check_values([True, None], "mine", 2) == [1.0, None]
    assert rewards.check_values(torch.tensor([1.0, 2.0]), "mine", 2) == [1.0, 2.0]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), torch.tensor(-torch.inf), 1e39, -(10**400)])
def test_infinite_rewards_are_refused(value):
    """1e39 is infinite in the single precision of TRL's tensors."""
    words = r"'mine' must return finite numbers, but the value at index 1 \(of 3\) is -?(inf|1e\+39)"
    with pytest.raises(ValueError, match=words):
        rewards.check_values([0.0, value, 1.0], "mine", 3)
    assert math.isnan(rewards.check_values([float("nan")], "mine", 1)[0])  # no reward, as None


def test_a_training_names_the_function_that_returns_too_few(tmp_path):
    def mine(completions, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="'mine' must return a list with a number or None for each of the 16"):
        make_trainer(tmp_path, reward_funcs=mine).train()


def test_the_answer_format_reaches_functions_that_have_a_parameter_for_it(tmp_path):
    seen = []

    def mine(completions, answer_format, **kwargs):
        seen.append(answer_format)
        return [0.0] * len(completions)

    def other(completions, **kwargs):
        assert "answer_format" not in kwargs
        return [1.0] * len(completions)

    make_trainer(tmp_path, reward_funcs=[mine, other], answer_format="hash", max_steps=1).train()
    assert seen == ["hash"]


def test_answers_in_the_run_s_format(tmp_path):
    completion = [{"role": "assistant", "content": "so\n#### 4"}]
    trainer = make_trainer(tmp_path, answer_format="hash", reward_funcs=[rewards.math_accuracy, rewards.boxed_format])
    assert trainer.reward_func_names == ["math_accuracy", "boxed_format"]
    assert [function(completions=[completion], solution=["4"]) for function in trainer.reward_funcs] == [[1.0], [1.0]]


OWN_DATA = """
model_name_or_path: {model}
dataset_name: {folder}/mine.jsonl
problem_column: question
answer_column: result
reward_funcs: [my_rewards.my_verdict]
eval_dataset_name: {folder}/mine.jsonl
eval_size: 4
held_out_samples: 2
max_steps: 2
num_generations: 4
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
max_completion_length: 8
use_cpu: true
bf16: false
gradient_checkpointing: false
report_to: none
output_dir: {folder}/out
"""


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A user's folder: data, a reward function, a recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [{"question": f"What is {n} + 1?", "result": n + 1, "problem_id": n} for n in range(8)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_rewards.py").write_text(VERDICT.replace("import module_of_the_user", "seen = []"))
    Path("recipe.yaml").write_text(OWN_DATA.format(folder=tmp_path, model=tiny.MODEL))
    yield ["--config", "recipe.yaml"]
    sys.modules.pop("my_rewards", None)


def test_own_data_with_an_own_verdict(own_data, tmp_path, capfd):
    """The function that configs/own_data.yaml documents, from the folder of the user, in training and held-out."""
    training.train(*training.read_arguments(own_data))
    said = capfd.readouterr().out
    assert "Held-out accuracy by my_verdict (4 problems; sampled: 2 per problem at temperature 1)" in said
    assert said.rstrip().splitlines()[-2] == "Next:"  # the data are the user's own: the recipe for them is not proposed
    assert (
        said.rstrip().splitlines()[-1].partition("ktae")[2].startswith(" eval math --prompt chat --model_name_or_path ")
    )
    results = json.loads((tmp_path / "out" / "held_out_results.json").read_text())
    assert results["what"] == "accuracy by my_verdict"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "accuracy by my_verdict, greedy, measured in training" in card


def test_a_mean_reward_is_no_percentage(own_data, tmp_path):
    Path("my_rewards.py").write_text("def my_verdict(completions, **kwargs):\n    return [2.5] * len(completions)\n")
    training.train(*training.read_arguments([*own_data, "--correctness_threshold", "auto", "--max_steps", "1"]))
    row = "| held-out problems | mean reward by my_verdict, greedy, measured in training | 2.5 |  | 4 | 2.5 |"
    assert row in (tmp_path / "out" / "README.md").read_text()


def test_the_dry_run_calls_the_reward_functions(own_data, capfd):
    training.train(*training.read_arguments([*own_data, "--dry_run", "true"]))
    said = " ".join(capfd.readouterr().out.split())
    assert "What is 0 + 1?<|im_end|>" in said
    assert "Gold answer: 1 (the value in the column result)" in said
    assert r"one ends with \boxed{1}, one with \boxed{-987654321}, one has no answer" in said
    assert "my_verdict │ 1 │ 0 │" in said
    assert "Correct rollouts: those with my_verdict above 0 (correctness_threshold: 0.0)." in said
    assert "does not distinguish" not in said
    order = ["The first prompt", "Its rewards", "Batches ─", "Data ─", "Memory ─", "Settings (those that differ"]
    assert sorted(order, key=said.index) == order
    training.train(*training.read_arguments([*own_data, "--dry_run", "true", "--answer_format", "hash"]))
    said = " ".join(capfd.readouterr().out.split())
    assert "one ends with #### 1, one with #### -987654321" in said
    assert "my_verdict │ 1 │ 0 │" in said


def test_the_dry_run_names_a_correctness_reward_that_tells_nothing_apart(own_data, capfd):
    Path("my_rewards.py").write_text("def my_verdict(completions, **kwargs):\n    return [2.0] * len(completions)\n")
    training.train(*training.read_arguments([*own_data, "--dry_run", "true"]))
    assert "my_verdict does not distinguish the correct answer from the wrong one" in capfd.readouterr().out


def test_the_dry_run_says_where_a_reward_function_fails(own_data):
    Path("my_rewards.py").write_text(
        "\ndef my_verdict(completions, **kwargs):\n    raise KeyError('[level]\\nof two')\n"
    )
    with pytest.raises(SystemExit, match=r"fails: KeyError: .*\[level\].* \(\S*my_rewards\.py, line 3\)$") as ended:
        training.train(*training.read_arguments([*own_data, "--dry_run", "true"]))
    assert "\n" not in ended.value.code


def test_a_dry_run_ends_with_a_reward_function_that_hangs(own_data):
    Path("my_rewards.py").write_text("import time\ndef my_verdict(**kwargs):\n    time.sleep(100)\n")
    words = [*own_data, "--dry_run", "true", "--reward_timeout", "0.2"]
    with pytest.raises(
        SystemExit, match=r"'my_verdict' fails: TimeoutError: .* Completion 0 of 3 alone takes that long"
    ):
        training.train(*training.read_arguments(words))


def test_a_dry_run_ends_with_the_error_of_a_reward_function(own_data, capfd):
    Path("my_rewards.py").write_text("def my_verdict(completions, no_such_column, **kwargs):\n    return [0.0]\n")
    with pytest.raises(
        SystemExit, match=r"^train.py: The reward function 'my_verdict' fails: TypeError: .*no_such_column"
    ):
        training.train(*training.read_arguments([*own_data, "--dry_run", "true"]))
    assert "Memory" in capfd.readouterr().out  # the rest of the plan is shown


def test_gold_answers_that_cannot_be_graded_are_counted(own_data, capfd, caplog):
    """Graded against itself, each would be equal."""
    rows = [{"question": f"What is {n}?", "result": r"\ldots\frac{" if n < 3 else str(n)} for n in range(8)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*own_data, "--dry_run", "true", "--reward_funcs", "math_accuracy"]
    training.train(*training.read_arguments(words))
    assert "Left out 3 of 8 rows: answers that cannot be graded" in caplog.text
    training.train(*training.read_arguments([*words[:-2], "--reward_funcs", "boxed_format"]))
    assert "training │ 8 │" in (said := " ".join(capfd.readouterr().out.split()))
    assert "│ 0 │ 3 │" in said


def test_a_shaping_reward_that_decides_what_is_right_is_named(tmp_path, caplog):
    functions = [rewards.boxed_format, rewards.math_accuracy]
    make_trainer(tmp_path, reward_funcs=functions)
    assert "boxed_format decides which rollouts are correct because it is the first reward function" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, reward_funcs=functions, correctness_reward="math_accuracy")
    assert "decides" not in caplog.text
