"""Tree sampling on several processes: the same trees as on one, and as many calls of the model on each."""

import pytest

from tests.distributed.launching import TWO_PROCESSES
from tests.distributed.test_same_as_one import REPLAYED, SAMPLED, assert_same_as_one
from tests.trainers import difference

pytestmark = TWO_PROCESSES
TREE = {"credit": "tree", "tree_segment_tokens": 15, "tree_depth": 3, "max_completion_length": 45}
# 6 trees of 4 leaves, whose segments depend on their path only.
GROWN = {
    **REPLAYED,
    **TREE,
    "replay": False,
    "grow": True,
    "reward": "by_tokens",
    "num_generations": 4,
    "tree_depth": 2,
    "prompts": 18,
    "save_strategy": "no",
}


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_the_same_as_one_process(crews, tmp_path, mode):
    (one,) = crews.train(tmp_path / "one", {**GROWN, "per_device_train_batch_size": 24}, None)
    two = crews.train(tmp_path / mode, {**GROWN, "per_device_train_batch_size": 12}, mode)
    assert_same_as_one(two, one)
    assert len(one["calls"]) == 3 * 2
    assert max(one["calls"][1::2]) < 24  # some texts end early
    assert [sum(calls) for calls in zip(*(result["calls"] for result in two), strict=True)] == one["calls"]


@pytest.mark.parametrize("mode", ["ddp", "zero3", "fsdp2"])
def test_one_process_s_texts_end_at_once(crews, tmp_path, mode):
    """It generates on, a token a depth, as long as the other: otherwise the model's collectives would not meet."""
    settings = {**SAMPLED, **TREE, "save_strategy": "no", "num_iterations": 1, "max_steps": 4, "end_at_once": 1}
    two = crews.train(tmp_path, settings, mode)
    assert [len(result["calls"]) for result in two] == [6, 6]
    assert two[1]["calls"] == [4, 1, 1] * 2
    assert max(two[0]["calls"]) > 4
    assert difference(two[0]["weights"], two[1]["weights"]) == 0


def test_resume(crews, tmp_path):
    settings = {**SAMPLED, **TREE, "max_steps": 6, "dynamic_sampling": True}
    whole = crews.train(tmp_path / "whole", settings, "ddp")
    resumed = crews.train(tmp_path / "resumed", settings, "ddp", tmp_path / "whole/checkpoint-3")
    assert difference(resumed[0]["weights"], whole[0]["weights"]) == 0


def test_trees_must_lie_whole_on_a_process(crews, tmp_path):
    """Three trees on two processes."""
    with pytest.raises(AssertionError, match="must generate complete trees, but a process has 12 rows"):
        crews.train(tmp_path, {**SAMPLED, **TREE, "per_device_train_batch_size": 12, "steps_per_generation": 1}, "ddp")
