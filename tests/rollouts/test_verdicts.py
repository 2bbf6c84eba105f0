"""Which rollouts are right: fixed thresholds and the mean of each group."""

import pytest
import torch

from ktae_trl import KTAEGRPOConfig
from ktae_trl.rollouts.verdicts import AUTO, correctness_index, read_threshold, verdicts
from tests.trainers import logged, make_trainer

NAN, INF = float("nan"), float("inf")


def by_hand(row: list[float], threshold) -> tuple[list[bool], list[bool]]:
    """Return which rollouts of a group are right and which are scored, in plain Python."""
    given = [reward for reward in row if reward == reward]
    if threshold == AUTO:
        if len(set(given)) < 2 or INF in map(abs, given):
            return [False] * len(row), [False] * len(row)
        threshold = sum(given) / len(given)
    return [reward == reward and reward > threshold for reward in row], [reward == reward for reward in row]


@pytest.mark.parametrize("threshold", [0.0, 0.5, AUTO])
def test_verdicts_by_hand(threshold):
    rewards = [
        [0.0, 1.0, 0.0, 1.0],
        [0.2, 0.4, 0.9, NAN],
        [0.1, 0.1, 0.1, 0.1],  # whose mean in float32 is not 0.1
        [NAN, NAN, NAN, NAN],
        [-3.0, -1.0, -1.0, NAN],
        [0.7, NAN, NAN, NAN],
    ]
    found = verdicts(torch.tensor(rewards), threshold)
    expected = [by_hand(row, threshold) for row in rewards]
    assert found.correct_PG.tolist() == [right for right, _ in expected]
    assert found.scored_PG.tolist() == [scored for _, scored in expected]
    both = [any(right) and any(s and not r for r, s in zip(right, scored, strict=True)) for right, scored in expected]
    assert found.informative.tolist() == both


def test_an_infinite_reward_has_no_mean():
    found = verdicts(torch.tensor([[INF, 0.0, 1.0, 0.0]]), AUTO)
    assert not found.scored_PG.any()


def test_metrics():
    found = verdicts(torch.tensor([[1.0, 0.0, 0.0, NAN]]), 0.0).metrics()
    assert found == {"correctness/right": pytest.approx(1 / 3), "correctness/judged": 0.75}


@pytest.mark.parametrize(("value", "expected"), [("auto", AUTO), ("0.5", 0.5), (1, 1.0), ("-2", -2.0)])
def test_thresholds(tmp_path, value, expected):
    assert read_threshold(value) == expected
    assert (
        KTAEGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, correctness_threshold=value).correctness_threshold
        == expected
    )


@pytest.mark.parametrize("value", ["mean", "nan", None, "inf", True])
def test_bad_thresholds(value):
    with pytest.raises(ValueError, match="correctness_threshold must be a number or 'auto', not"):
        read_threshold(value)


def test_two_functions_of_one_name():
    assert correctness_index(["a", "b"], None) == 0
    assert correctness_index(["a", "a", "b"], "b") == 2
    with pytest.raises(ValueError, match=r"'a' is the name of 2 reward functions \(a, a\)"):
        correctness_index(["a", "a"], "a")
    with pytest.raises(ValueError, match=r"'c' is not one of the reward functions. Choose from: a"):
        correctness_index(["a"], "c")


def length(completions, **kwargs):
    """A continuous reward."""
    return [len(completion[0]["content"]) / 100 for completion in completions]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_continuous_reward_teaches_with_auto(tmp_path, dynamic):
    """With the default threshold of 0 all rollouts would be right, and no token would get a value."""
    settings = {"reward_funcs": length, "max_steps": 1, "dynamic_sampling": dynamic, "correctness_reward": "length"}
    if not dynamic:
        trainer = make_trainer(tmp_path / "zero", **settings)
        trainer.train()
        assert logged(trainer, "ktae/informative_groups") == [0]
        assert logged(trainer, "correctness/right") == [1]
    trainer = make_trainer(tmp_path / "auto", **settings, correctness_threshold="auto")
    trainer.train()
    assert logged(trainer, "ktae/informative_groups") == [1]
    assert 0 < logged(trainer, "correctness/right")[0] < 1
