"""A run that was stopped and resumed ends with the weights of one that was not."""

import shutil

import pytest
import torch

from tests.training import difference, logged, make_trainer, prompts, weights

# 16 rows a forward pass, 8 per prompt: a generation of two forward passes takes 4 prompts, so 12 prompts are an epoch.
CYCLES = {
    "per_device_train_batch_size": 16,
    "steps_per_generation": 2,
    "num_iterations": 2,  # 4 forward passes and optimizer steps per generation, 12 steps an epoch
    "max_steps": 18,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_completion_length": 12,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, train_dataset=prompts(12), **CYCLES)
    trainer.train()
    return folder, trainer


@pytest.mark.parametrize(
    "step",
    [
        4,  # between two generations
        6,  # inside a cycle, buffered rollouts left to reuse
        12,  # between two epochs
        15,  # inside a cycle of the second epoch
        16,  # between two generations of the second epoch
    ],
)
def test_resume_is_exact(uninterrupted, tmp_path, step):
    folder, whole = uninterrupted
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = make_trainer(tmp_path, train_dataset=prompts(12), **CYCLES)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == 18
    assert difference(weights(resumed), weights(whole)) == 0
    assert logged(resumed, "reward") == logged(whole, "reward")


def test_resume_with_accumulated_gradients_is_exact(tmp_path):
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_completion_length": 12,
    }
    whole = make_trainer(tmp_path, train_dataset=prompts(8), **settings)
    whole.train()
    for step in (1, 2, 3, 4):
        resumed = make_trainer(tmp_path / "again", train_dataset=prompts(8), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert difference(weights(resumed), weights(whole)) == 0


def test_only_checkpoints_inside_a_cycle_hold_rollouts(uninterrupted):
    folder, _ = uninterrupted
    for step in (4, 6):
        saved = torch.load(folder / f"checkpoint-{step}" / "rollouts_0.pt", weights_only=True)
        assert (saved["rollouts"] is None) == (step % 4 == 0)
        assert saved["step"] == step


def test_a_checkpoint_inside_a_cycle_wants_the_same_batch(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    other = {**CYCLES, "per_device_train_batch_size": 32, "steps_per_generation": 1}
    trainer = make_trainer(tmp_path, train_dataset=prompts(12), **other)
    with pytest.raises(
        ValueError, match=r"6 mod 4 \(steps_per_generation x num_iterations\) = 2.*'steps_per_generation': 1"
    ):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_a_lost_file_of_rollouts_is_not_replaced_by_another_process_s(uninterrupted, tmp_path, monkeypatch):
    folder, _ = uninterrupted
    trainer = make_trainer(tmp_path, train_dataset=prompts(12), **CYCLES)
    monkeypatch.setattr(type(trainer.accelerator), "process_index", 1)
    with pytest.raises(FileNotFoundError, match=r"rollouts_1\.pt is missing"):
        trainer._restore_rollouts(str(folder / "checkpoint-6"))
    trainer._restore_rollouts(str(folder / "checkpoint-4"))  # holds no rollouts of anybody
    assert trainer._step == 4


def test_other_settings_at_the_end_of_a_cycle_are_a_warning(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    trainer = make_trainer(tmp_path, train_dataset=prompts(12), **{**CYCLES, "num_iterations": 1})
    with pytest.warns(UserWarning, match=r"was made with .*'num_iterations': 2.*starts with a new generation"):
        trainer._restore_rollouts(str(folder / "checkpoint-4"))
    assert trainer._step == 0


def test_a_foreign_checkpoint_is_resumed_with_a_warning(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    shutil.copytree(folder / "checkpoint-17", tmp_path / "checkpoint-17")
    (tmp_path / "checkpoint-17" / "rollouts_0.pt").unlink()
    trainer = make_trainer(tmp_path, train_dataset=prompts(12), **CYCLES)
    with pytest.warns(UserWarning, match="was not saved by KTAEGRPOTrainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-17"))
    assert trainer.state.global_step == 18
