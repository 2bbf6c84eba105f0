"""Dynamic sampling on two processes: the same decisions on both, and the same batches as on one."""

import pytest

from tests.distributed.launching import TWO_PROCESSES
from tests.distributed.test_same_as_one import REPLAYED, SAMPLED, assert_same_as_one
from tests.trainers import difference

pytestmark = TWO_PROCESSES
# Of 14 problems five are informative, and a generation has three; so it takes some, and the stream wraps.
DYNAMIC = {"dynamic_sampling": True, "reward": "third", "prompts": 14}
REUSE = {"dynamic_sampling_reuse": True, "reward": "two_thirds", "num_iterations": 1}
ONE_SIDED = {"replay": False, "dynamic_sampling": True, "reward": "right_on_the_first", "prompts": 8, "max_steps": 2}


def logged(result: dict, name: str) -> list[float]:
    return [entry[f"dynamic_sampling/{name}"] for entry in result["metrics"] if f"dynamic_sampling/{name}" in entry]


def test_the_same_as_one_process(crews, tmp_path):
    settings = {**REPLAYED, **DYNAMIC, "save_strategy": "no"}
    (one,) = crews.train(tmp_path / "one", {**settings, "per_device_train_batch_size": 24}, None)
    # 12 rows a process: the second of the three groups lies on both, when generated and when chosen.
    two = crews.train(tmp_path / "two", {**settings, "per_device_train_batch_size": 12}, "ddp")
    assert_same_as_one(two, one)
    assert max(logged(one, "generations")) > 1
    assert set(logged(one, "filled")) == {0}
    for result in two:
        assert all((advantages.abs() > 0.5).all() for advantages in result["advantages"])


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_kept_groups_are_the_same_as_on_one_process(crews, tmp_path, mode):
    """A process may hold any number of the kept rollouts, and computes their log-probabilities with the others."""
    settings = {**REPLAYED, **DYNAMIC, **REUSE, "save_strategy": "no"}
    (one,) = crews.train(tmp_path / "one", {**settings, "per_device_train_batch_size": 24}, None)
    two = crews.train(tmp_path / "two", {**settings, "per_device_train_batch_size": 12}, mode)
    for result in two:
        assert difference(result["weights"], one["weights"]) < 1e-5
    assert sum(logged(one, "reused")) > 1
    assert logged(two[0], "reused") == logged(one, "reused")
    assert logged(two[0], "groups_per_needed") == logged(one, "groups_per_needed")


def test_resume_with_kept_groups(crews, tmp_path):
    settings = {**SAMPLED, **DYNAMIC, **REUSE, "steps_per_generation": 1, "max_steps": 6}
    settings["per_device_train_batch_size"] = 16
    whole = crews.train(tmp_path / "whole", settings, "ddp")
    reused = logged(whole[0], "reused")
    step = next(i for i in range(1, 6) if reused[i])
    resumed = crews.train(tmp_path / "resumed", settings, "ddp", tmp_path / f"whole/checkpoint-{step}")
    assert difference(resumed[0]["weights"], whole[0]["weights"]) == 0
    assert logged(resumed[0], "reused") == reused


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_one_process_finds_all_its_groups_useless(crews, tmp_path, mode):
    settings = {**ONE_SIDED, "per_device_train_batch_size": 8, "max_completion_length": 12}
    two = crews.train(tmp_path, settings, mode)
    assert logged(two[0], "generations") == [2, 2]  # a group of each, twice, to have two informative ones
    for result in two:  # and they are spread again: each process trains on one
        assert all((advantages.abs() > 0.5).all() for advantages in result["advantages"])
    assert difference(two[0]["weights"], two[1]["weights"]) == 0


def test_the_maximum_is_met_on_both(crews, tmp_path):
    settings = {**ONE_SIDED, "per_device_train_batch_size": 8, "max_completion_length": 12}
    two = crews.train(tmp_path, {**settings, "dynamic_sampling_max_batches": 1}, "ddp")
    assert logged(two[0], "filled") == [0.5, 0.5]
    assert difference(two[0]["weights"], two[1]["weights"]) == 0


def test_resume_draws_the_same_prompts(crews, tmp_path):
    settings = {**SAMPLED, **DYNAMIC, "max_steps": 10}
    whole = crews.train(tmp_path / "whole", settings, "ddp")
    assert logged(whole[0], "epoch")[-1] > 1
    # 4 forward passes a generation: inside a cycle, and between two.
    for step in (3, 8):
        resumed = crews.train(tmp_path / f"from-{step}", settings, "ddp", tmp_path / f"whole/checkpoint-{step}")
        assert difference(resumed[0]["weights"], whole[0]["weights"]) == 0
        assert logged(resumed[0], "prompts") == logged(whole[0], "prompts")
