"""What is not finite: the step is skipped, weights are not saved, rewards are refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from ktae_trl.files import checkpoints
from ktae_trl.rewards import math_accuracy
from ktae_trl.training.guard import Guard, NotFiniteError, check_rewards, check_weights, or_nan
from tests.trainers import around, difference, logged, make_trainer, weights

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_completion_length": 12, "per_device_train_batch_size": 8}


def poison(trainer, steps: set[int], where: str, value: float = math.nan) -> None:
    """Make the loss or a gradient of these optimizer steps, counted from 1, not finite."""

    def compute_loss(compute, model, inputs):
        loss = compute(model, inputs)
        if trainer.state.global_step + 1 not in steps:
            return loss
        if where == "loss":
            return or_nan(loss + value)  # a constant: its gradient is finite
        loss.register_hook(lambda gradient: gradient * value)
        return loss

    around(trainer, "loss", compute_loss)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_that_is_not_finite_changes_nothing(tmp_path, caplog, where, value):
    trainer = make_trainer(tmp_path, max_steps=4, weight_decay=0.1, **SAVING)
    poison(trainer, {2, 3}, where, value)
    trainer.train()
    after = [torch.load(tmp_path / f"checkpoint-{step}" / "optimizer.pt")["state"][0] for step in (1, 2, 3, 4)]
    model = [(tmp_path / f"checkpoint-{step}" / "model.safetensors").read_bytes() for step in (1, 2, 3, 4)]
    assert model[0] == model[1] == model[2] != model[3]
    assert [state["step"].item() for state in after] == [1, 1, 1, 2]  # Adam's, too
    assert logged(trainer, "skipped_steps") == [1, 2]
    assert [f"Step {step} was skipped" in caplog.text for step in (1, 2, 3, 4)] == [False, True, True, False]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_third_step_in_a_row_ends_the_training_with_good_weights(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=9, **SAVING)
    poison(trainer, {2, 4, 5, 6}, "gradient")
    with pytest.raises(NotFiniteError, match=r"3 steps in a row \(4 to 6\).*gradient norm nan.*learning_rate"):
        trainer.train()
    assert trainer.state.global_step == 5
    assert checkpoints.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert check_weights(trainer.model, "")
    with pytest.raises(NotFiniteError, match=r"\(4 to 6\)"):  # so does the next training of this trainer
        trainer.train()


def test_guard_counts_in_a_row():
    guard = Guard()
    assert [guard.allows(step, norm) for step, norm in enumerate([1.0, math.inf, -math.inf, 0.0, math.nan])] == [
        *(True, False, False, True, False)
    ]
    assert guard.skipped == 3
    assert guard.allows(9, None)  # DeepSpeed was told to take no norm


def test_weights_that_are_not_finite_are_never_saved_and_replace_nothing(tmp_path, caplog):
    trainer = make_trainer(tmp_path, max_steps=3, save_total_limit=1, **SAVING)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                next(model.parameters()).data.view(-1)[-1] = math.nan

    trainer.add_callback(Break)
    good = weights(trainer)
    trainer.save_model()
    with pytest.raises(NotFiniteError, match="some weights are not finite at step 2"):
        trainer.train()
    assert (
        "checkpoint-2 was not saved. Parameters that are not finite: 1, the first is model.embed_tokens" in caplog.text
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert checkpoints.problem(tmp_path / "checkpoint-1") == ""
    before = (tmp_path / "model.safetensors").read_bytes()
    for save in (trainer.save_model, lambda: trainer.save_all(push=False)):
        with pytest.raises(NotFiniteError):
            save()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    loaded = make_trainer(tmp_path / "again", model=str(tmp_path))
    assert difference(weights(loaded), good) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_weight_among_many_is_found_and_large_ones_are_finite(caplog, dtype):
    model = torch.nn.Linear(300, 70, dtype=dtype)
    with torch.no_grad():
        model.weight.fill_(torch.finfo(dtype).max)  # their sum overflows
    assert check_weights(model, "x")
    for value in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            model.bias[3] = value
        assert not check_weights(model, "here")
    assert "here was not saved. Parameters that are not finite: 1, the first is bias" in caplog.text
    model.bias.requires_grad = False  # not trained, so no training made it so
    assert check_weights(model, "x")


def test_finite_loss_is_left_alone():
    for value in (0.3, -2.5e-30, 3e38):
        loss = torch.tensor(value, requires_grad=True)
        result = or_nan(loss)
        result.backward()
        assert result.item() == loss.item()
        assert loss.grad.item() == 1.0


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_rewards_are_refused_by_name(tmp_path, value):
    def generous(completions, **kwargs):
        return [value if i == 5 else 0.0 for i in range(len(completions))]

    trainer = make_trainer(tmp_path, reward_funcs=[math_accuracy, generous], **SAVING)
    with pytest.raises(ValueError, match=rf"'generous' .*{value}"):
        trainer.train()


def test_rewards_of_a_model_are_looked_at_too():
    rewards = torch.tensor([[1.0, 2.0], [math.nan, -math.inf]])
    with pytest.raises(ValueError, match="'judge' returned -inf for rollout 1 of 2"):
        check_rewards(rewards, ["mine", "judge"])
    check_rewards(rewards[:, :1], ["mine"])  # NaN: there is no reward


@pytest.mark.slow
def test_train_script_ends_with_one_line(tmp_path):
    """No traceback: what went wrong, and the checkpoint to resume from."""
    script = f"""
import runpy, sys
from ktae_trl import KTAEGRPOTrainer
from tests.trainers import around

def compute(original, self, model, inputs):
    loss = original(self, model, inputs)
    return loss * float("nan") if self.state.global_step >= 2 else loss

around(KTAEGRPOTrainer, "loss", compute)
sys.argv = ["train.py", "--config", "configs/quickstart.yaml", "--output_dir", {str(tmp_path)!r}, "--max_steps", "9",
    "--save_strategy", "steps", "--save_steps", "1", "--held_out_samples", "0", "--max_completion_length", "12",
    "--per_device_train_batch_size", "8", "--num_generations", "8", "--gradient_accumulation_steps", "1",
    "--steps_per_generation", "null", "--use_cpu", "true", "--report_to", "none"]
runpy.run_path("train.py", run_name="__main__")
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert ended.returncode == 1, ended.stderr[-2000:]
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: training stopped after step 4: 3 steps in a row (3 to 5)")
    assert last.endswith(
        f"Resume from the last checkpoint ({tmp_path}/checkpoint-4) with --resume_from_checkpoint true"
    )
    assert "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
