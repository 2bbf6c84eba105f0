"""A loss that is not finite on one process of several: all skip the step, in every way of spreading a model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from tests.distributed.launching import TWO_PROCESSES
from tests.trainers import difference

pytestmark = TWO_PROCESSES
SETTINGS = {"replay": True, "prompts": 8, "max_completion_length": 12, "learning_rate": 0.1, "max_steps": 1}
UNTRAINED = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)


@pytest.mark.parametrize(
    ("mode", "where"),
    [*((mode, "gradient") for mode in ("ddp", "zero1", "zero2", "zero3", "fsdp2")), ("ddp", "loss"), ("zero3", "loss")],
)
def test_all_processes_skip_a_step_that_is_not_finite_on_one(crews, tmp_path, mode, where):
    for result in crews.train(tmp_path, {**SETTINGS, "poison": [[1], where]}, mode):
        assert difference(result["weights"], dict(UNTRAINED.named_parameters())) == 0
        assert [entry["skipped_steps"] for entry in result["metrics"]] == [1]
