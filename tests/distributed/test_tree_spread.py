"""Tree sampling on several processes: the same trees as on one, and as many calls of the model on each."""

import pytest

from tests.distributed.launching import launch
from tests.distributed.test_same_as_one import REPLAYED, SAMPLED, assert_same_as_one
from tests.training import difference

pytestmark = pytest.mark.slow
TREE = {"credit": "tree", "tree_segment_tokens": 15, "tree_depth": 3, "max_completion_length": 45}
GROWN = {**REPLAYED, **TREE, "replay": False, "grow": True, "save_strategy": "no", "max_grad_norm": 1.0}


def test_the_same_as_one_process(tmp_path):
    settings = {**GROWN, "num_iterations": 1, "max_steps": 3, "prompts": 12}
    (one,) = launch(tmp_path / "one", {**settings, "per_device_train_batch_size": 32}, None)
    for mode in ("ddp", "zero3"):
        two = launch(tmp_path / mode, {**settings, "per_device_train_batch_size": 16}, mode)
        assert_same_as_one(two, one)
        assert one["calls"] == [8, 16, 32] * 3
        for result in two:
            assert result["calls"] == [4, 8, 16] * 3


@pytest.mark.parametrize("mode", ["ddp", "zero3", "fsdp2"])
def test_one_process_s_texts_end_at_once(tmp_path, mode):
    """It generates on, a token a depth, as long as the other: otherwise the model's collectives would not meet."""
    settings = {**SAMPLED, **TREE, "save_strategy": "no", "max_steps": 2, "prompts": 8, "end_at_once": 1}
    two = launch(tmp_path, settings, mode)
    assert [len(result["calls"]) for result in two] == [6, 6]
    assert two[1]["calls"] == [4, 1, 1] * 2
    assert max(two[0]["calls"]) > 4
    assert difference(two[0]["weights"], two[1]["weights"]) == 0


def test_resume(tmp_path):
    settings = {**SAMPLED, **TREE, "max_steps": 6, "dynamic_sampling": True}
    whole = launch(tmp_path / "whole", settings, "ddp")
    resumed = launch(tmp_path / "resumed", settings, "ddp", str(tmp_path / "whole/checkpoint-3"))
    assert difference(resumed[0]["weights"], whole[0]["weights"]) == 0


def test_trees_must_lie_whole_on_a_process(tmp_path):
    """Three trees on two processes."""
    with pytest.raises(AssertionError, match="must lie whole on a process, but a process has 12 rows"):
        launch(tmp_path, {**SAMPLED, **TREE, "per_device_train_batch_size": 12, "steps_per_generation": 1}, "ddp")
