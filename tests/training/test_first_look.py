"""What is said when the first generations hold nothing to learn from."""

import logging
from types import SimpleNamespace

import pytest

from ktae_trl.training.first_look import GENERATIONS, Seen, no_answer, no_signal
from tests.trainers import make_trainer, replay

ARGS = {
    "credit": "ktae",
    "answer_format": "boxed",
    "correctness_threshold": 0.0,
    "dynamic_sampling": False,
    "max_completion_length": 100,
    "tree_min_spread": 0.1,
    "tree_spread": "range",
}
SEEN = {
    "generations": 3,
    "groups": 6,
    "rollouts": 48,
    "judged": 48,
    "lowest": 0.0,
    "highest": 0.0,
    "answered": 40,
    "example": "and so on, and so on",
}


def said(function, seen: dict, args: dict, *more) -> str | None:
    return function(Seen(**SEEN | seen), SimpleNamespace(**ARGS | args), "math_accuracy", *more)


@pytest.mark.parametrize(
    ("seen", "args", "words"),
    [
        ({"right": 48, "lowest": 1.0, "highest": 1.0}, {}, "all 48 rollouts are correct. The problems are too easy"),
        ({}, {}, "all 48 rollouts are wrong. The problems are too hard"),
        ({"cut_off": 40.0}, {}, "83% of the completions were cut off. Raise max_completion_length (100 tokens)"),
        ({"judged": 0, "lowest": float("inf"), "highest": -float("inf")}, {}, "returned None for all 48 rollouts"),
        (
            {"right": 48, "lowest": 0.2, "highest": 0.9},
            {},
            "returned rewards from 0.2 to 0.9, so all 48 rollouts are correct by correctness_threshold (0). "
            "Set correctness_threshold to a value between these, or to auto",
        ),
        (
            {"lowest": 0.2, "highest": 0.9},
            {"correctness_threshold": 2.0},
            "all 48 rollouts are wrong by correctness_threshold (2)",
        ),
        ({"right": 24, "highest": 1.0}, {}, "of each group are all correct or all wrong (24 correct, 24 wrong)"),
        ({"lowest": 0.5, "highest": 0.5}, {}, "returned 0.5 for all 48 rollouts"),
        (
            {"informative": 6, "stats": {"tree/signal_depth_1": 0.0}},
            {"credit": "tree"},
            "No siblings in the trees of the first 6 groups (3 generations) differ by at least tree_min_spread (0.1, "
            "tree_spread: range)",
        ),
    ],
)
def test_no_signal(seen, args, words):
    assert words in said(no_signal, seen, args)


def test_a_signal_needs_no_words():
    assert said(no_signal, {"informative": 1}, {}) is None
    assert said(no_signal, {"informative": 1, "stats": {"tree/signal_depth_2": 3.0}}, {"credit": "tree"}) is None


@pytest.mark.parametrize(
    ("answer_format", "form"),
    [
        ("boxed", r"a complete \boxed{}"),
        ("tag", "a complete <answer>...</answer>"),
        ("hash", "a line that begins with ####"),
        ("last_number", "any number"),
        ("auto", r"a complete \boxed{} or"),
    ],
)
def test_no_answer(answer_format, form):
    words = said(no_answer, {"answered": 0}, {"answer_format": answer_format}, True)
    assert words.startswith(f"None of the first 48 completions has {form}")
    assert f"(answer_format: {answer_format}), which math_accuracy reads, so all rollouts are wrong." in words
    assert "One completion ends with 'and so on, and so on'" in words
    assert "set answer_format to what the model writes" in words
    assert said(no_answer, {"answered": 1}, {"answer_format": answer_format}, True) is None
    # A reward function that does not read answers does not miss any; OAR does.
    assert said(no_answer, {"answered": 0}, {"answer_format": answer_format}, False) is None
    oar = {"answer_format": answer_format, "credit": "oar_g"}
    assert "which credit: oar_g needs" in said(no_answer, {"answered": 0}, oar, False)


def test_cut_off_completions_have_another_remedy():
    words = said(no_answer, {"answered": 0, "cut_off": 48.0}, {}, True)
    assert "100% of the completions were cut off" in words
    assert "raise max_completion_length (100 tokens)" in words


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "This warning is shown once" in record.getMessage()]


def test_a_training_says_it_before_its_first_line_of_metrics(tmp_path, caplog):
    lines = []
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, answer_format="tag", max_steps=4)
        log = type(trainer).log

        def spy(self, logs, *args):
            log(self, logs, *args)
            lines.append(len(warnings(caplog)))

        trainer.log = spy.__get__(trainer)
        trainer.train()
    assert lines[0] == 1
    (said,) = warnings(caplog)
    assert "None of the first 16 completions has a complete <answer>...</answer>" in said


def test_a_training_says_that_its_threshold_tells_nothing_apart(tmp_path, caplog):
    def share(completions, **kwargs):
        return [0.25 + len(c[0]["content"]) / 1000 for c in completions]

    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, reward_funcs=share, max_steps=GENERATIONS + 1).train()
    (said,) = warnings(caplog)
    assert "share returned rewards from 0." in said
    assert "all 48 rollouts are correct by correctness_threshold (0)" in said


def test_a_healthy_training_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, rollout_func=replay, max_steps=GENERATIONS + 1, max_completion_length=80).train()
    assert warnings(caplog) == []
