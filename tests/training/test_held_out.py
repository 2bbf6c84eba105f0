import types

import pytest
import torch

from ktae_trl import tiny
from ktae_trl.training.held_out import Accuracy, HeldOutAccuracy, generate, held_out_accuracy
from tests.trainers import make_trainer, prompts


def test_held_out_accuracy(tmp_path):
    trainer = make_trainer(tmp_path, max_completion_length=80)
    dataset = prompts(40, tiny.HELD_OUT)
    accuracy = held_out_accuracy(trainer, dataset, samples=3, batch_size=32)
    assert 0.05 <= accuracy.sampled <= 0.9
    assert accuracy.samples == 3
    # The batch and what was drawn before make no difference to the greedy answers.
    assert held_out_accuracy(trainer, dataset, samples=1, batch_size=7).greedy == accuracy.greedy


def test_measuring_does_not_change_the_training_that_follows(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.train()
    state = torch.random.get_rng_state()
    held_out_accuracy(trainer, prompts(8, tiny.HELD_OUT), samples=1, batch_size=8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert trainer.model.training


def test_completions_come_in_the_order_of_the_prompts(tmp_path):
    trainer = make_trainer(tmp_path)
    conversations = prompts(12, tiny.HELD_OUT)["prompt"]
    options = {"greedy": True, "max_new_tokens": 20, "eos_token_ids": trainer.eos_token_ids}
    together = generate(trainer.model, trainer.processing_class, conversations, batch_size=5, **options)
    alone = [generate(trainer.model, trainer.processing_class, [c], batch_size=1, **options)[0] for c in conversations]
    assert together == alone


def test_unscorable_problems_are_left_out(tmp_path):
    dataset = prompts(4, tiny.HELD_OUT).map(lambda row: {"solution": "???"})
    accuracy = held_out_accuracy(make_trainer(tmp_path), dataset, samples=1, batch_size=8)
    assert accuracy == Accuracy(None, None, 1, unscored=8)
    assert "greedy not scored" in str(accuracy)
    assert "completions excluded because they have no score: 8" in str(accuracy)


def test_sampling_settings_of_the_model_are_not_taken_over(tmp_path):
    """Instruct models ship top_p and repetition penalties; accuracy at temperature 1 has neither."""
    trainer = make_trainer(tmp_path)
    seen = {}
    plain_generate = trainer.model.generate

    def spy(*args, generation_config, **kwargs):
        seen.update(trainer.model._prepare_generation_config(generation_config)[0].to_dict())
        return plain_generate(*args, generation_config=generation_config, **kwargs)

    trainer.model.generation_config.update(top_p=0.5, top_k=5, temperature=0.3, repetition_penalty=1.5, do_sample=True)
    trainer.model.generate = spy
    generate(
        trainer.model,
        trainer.processing_class,
        prompts(2)["prompt"],
        greedy=False,
        max_new_tokens=4,
        eos_token_ids=[2],
        batch_size=2,
    )
    assert [seen[name] for name in ("top_p", "top_k", "temperature", "repetition_penalty")] == [1.0, 0, 1.0, 1.0]
    assert trainer.model.generation_config.top_p == 0.5  # and it gets them back


def before(folder, *, step=0, checkpoint=None, problems=6, samples=2, measured=None):
    """Return the accuracy before training that a run shows, which measures `measured` if it measures."""
    trainer = make_trainer(folder, eval_dataset=prompts(problems, tiny.HELD_OUT))
    callback = HeldOutAccuracy(trainer, samples)
    callback.measure = lambda: measured
    trainer.resumed_from = checkpoint and str(checkpoint)
    callback.on_train_begin(trainer.args, types.SimpleNamespace(global_step=step, is_world_process_zero=True), None)
    return callback.before


def test_the_accuracy_before_is_that_of_the_run_that_is_resumed(tmp_path, capsys):
    one, other = Accuracy(0.25, 0.5, 2), Accuracy(0.75, 1.0, 2)
    assert before(tmp_path / "one", measured=one) == one
    assert before(tmp_path / "other", measured=other) == other
    resumed = {"step": 4, "checkpoint": tmp_path / "one" / "checkpoint-4"}
    assert before(tmp_path / "one", **resumed) == one
    assert before(tmp_path / "other", **resumed) == one  # another output_dir, in which an earlier run has been
    assert before(tmp_path / "third", **resumed) == one
    assert before(tmp_path / "third", step=6, checkpoint=tmp_path / "third" / "checkpoint-6") == one
    assert "is not used" not in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"problems": 5}, {"samples": 1}])
def test_the_accuracy_before_is_of_the_same_problems(tmp_path, capsys, change):
    before(tmp_path, measured=Accuracy(0.25, 0.5, 2))
    assert before(tmp_path, step=4, checkpoint=tmp_path / "checkpoint-4", **change) is None
    said = capsys.readouterr().out
    assert "held_out_before.json is not used: it was measured on other held-out problems" in said
    assert "before training: not measured" in said


def test_the_accuracy_before_is_by_the_same_verdict(tmp_path, capsys):
    """A figure by another reward or threshold must not be compared with the one after training."""
    for other in ({"reward": "my_verdict"}, {"threshold": 0.5}, {"threshold": "auto"}):
        before(tmp_path, measured=Accuracy(0.25, 0.5, 2, **other))
        assert before(tmp_path, step=4, checkpoint=tmp_path / "checkpoint-4") is None
        assert "which this run does not measure" in capsys.readouterr().out
