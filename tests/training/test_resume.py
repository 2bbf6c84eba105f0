"""A run that was stopped and resumed ends with the weights of one that was not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerCallback

from ktae_trl import KTAEGRPOConfig, tiny, trl_seam
from ktae_trl.files import checkpoints
from ktae_trl.files.checkpoints import MANIFEST, ResumeError
from ktae_trl.rewards import boxed_format
from ktae_trl.training import resume
from ktae_trl.training.changes import HASH, OWN, ROWS, SETTINGS, fingerprint
from tests.samples.version_0_1 import make
from tests.trainers import difference, logged, make_trainer, prompts, weights

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


@pytest.mark.slow_after(1)
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


@pytest.mark.slow
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


def resumed_from(checkpoint: Path, folder: Path, caplog=None, **settings):
    """Train on from a copy of a checkpoint with other settings; return the trainer and what it warned of."""
    shutil.copytree(checkpoint, folder / checkpoint.name)
    trainer = make_trainer(folder, **{**CYCLES, "train_dataset": prompts(12), **settings})
    trainer.train(resume_from_checkpoint=str(folder / checkpoint.name))
    return trainer, [] if caplog is None else [
        r.getMessage() for r in caplog.records if r.name == "ktae_trl.training.resume"
    ]


# What a checkpoint inside a generation cycle holds must fit


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"per_device_train_batch_size": 32, "steps_per_generation": 1}, "steps_per_generation changed from 2 to 1"),
        ({"num_iterations": 1}, "num_iterations changed from 2 to 1"),
        ({"beta": 0.04}, "beta changed from 0.0 to 0.04"),
        ({"credit": "none"}, "credit changed from 'ktae' to 'none'"),
        ({"ktae_combine": "add"}, "ktae_combine changed from 'multiply' to 'add'"),
        ({"correctness_threshold": 0.5}, "correctness_threshold changed from 0.0 to 0.5"),
        ({"temperature": 0.7}, "temperature changed from 1.0 to 0.7"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions changed from False to True"),
        ({"scale_rewards": "none"}, "scale_rewards changed from 'group' to 'none'"),
        ({"reward_funcs": boxed_format}, "reward_funcs changed from ['math_accuracy'] to ['boxed_format']"),
    ],
)
def test_rollouts_of_other_settings_are_refused_before_the_first_step(uninterrupted, tmp_path, settings, problem):
    folder, _ = uninterrupted
    with pytest.raises(ResumeError, match=r"6 mod 4 \(steps_per_generation x num_iterations\) = 2") as refused:
        resumed_from(folder / "checkpoint-6", tmp_path, **settings)
    assert problem in str(refused.value)


def test_at_the_end_of_a_cycle_other_settings_are_in_effect_and_named(uninterrupted, tmp_path, caplog):
    folder, _ = uninterrupted
    changed = {"beta": 0.04, "loss_type": "grpo", "top_p": 0.9, "max_steps": 5, "temperature": 0.7}
    trainer, (said,) = resumed_from(folder / "checkpoint-4", tmp_path, caplog, **changed)
    assert trainer.state.global_step == 5
    assert logged(trainer, "kl")  # beta is in effect
    for line in (
        "beta changed from 0.0 to 0.04: in effect",
        "loss_type changed from 'dapo' to 'grpo': in effect",
        "top_p changed from 1.0 to 0.9: in effect from the next generation",
        "max_steps changed from 18 to 5: in effect",
    ):
        assert f"\n  {line}" in said


def test_dynamic_sampling_that_is_turned_on_begins_with_the_first_prompts_and_says_so(uninterrupted, tmp_path, caplog):
    folder, _ = uninterrupted
    trainer, (said,) = resumed_from(
        folder / "checkpoint-4", tmp_path, caplog, dynamic_sampling=True, dynamic_sampling_max_batches=1, max_steps=5
    )
    assert (
        "dynamic_sampling changed from False to True: in effect; the checkpoint does not record which prompts" in said
    )
    assert trainer.dynamic_sampling.state()["position"] == 4


def test_every_setting_of_the_table_is_there_and_once():
    assert len(set(SETTINGS)) == len(SETTINGS)
    others = {ROWS, HASH, OWN, "num_processes", "reward_funcs", "overlong_buffer"}
    assert set(SETTINGS) - set(KTAEGRPOConfig.__dataclass_fields__) == others
    assert {"ktae_combine", "tree_depth", "correctness_threshold", "answer_format"} <= set(SETTINGS)


def test_another_batch_at_the_end_of_a_cycle_starts_a_generation(uninterrupted, tmp_path, caplog):
    folder, _ = uninterrupted
    _, (said,) = resumed_from(folder / "checkpoint-4", tmp_path, caplog, num_iterations=1, max_steps=5)
    assert "num_iterations changed from 2 to 1: in effect; training starts with a new generation" in said
    saved = torch.load(tmp_path / "checkpoint-5" / "rollouts_0.pt", weights_only=True)
    assert saved["step"] == 1


def test_a_resume_without_changes_says_nothing(uninterrupted, tmp_path, caplog):
    folder, _ = uninterrupted
    assert resumed_from(folder / "checkpoint-17", tmp_path, caplog, logging_steps=2, save_steps=5)[1] == []


def test_a_lost_file_of_rollouts_is_not_replaced_by_another_process_s(uninterrupted, tmp_path, monkeypatch):
    folder, _ = uninterrupted
    trainer = make_trainer(tmp_path, train_dataset=prompts(12), **CYCLES)
    both = lambda own: [*own, None] if own[0] else own  # noqa: E731 (what two processes gather)
    monkeypatch.setattr(resume, "gather_object", both)
    with pytest.raises(ResumeError, match=r"rollouts_1\.pt is missing"):  # also on the process that has its own
        resume.Resume(trainer).restore(str(folder / "checkpoint-6"), 18)
    resume.Resume(trainer).restore(str(folder / "checkpoint-4"), 18)  # holds no rollouts of anybody
    assert trl_seam.place(trainer) == (4, None)


# Version 0.1 recorded the layout only


def test_a_training_that_version_0_1_began_is_ended_exactly(tmp_path):
    """See `tests/samples/version_0_1/make.py`."""
    shutil.copytree(make.CHECKPOINT, tmp_path / make.CHECKPOINT.name)
    trainer = make.make_trainer(tmp_path, AutoTokenizer.from_pretrained(make.CHECKPOINT))
    trainer.train(resume_from_checkpoint=str(tmp_path / make.CHECKPOINT.name))
    assert trainer.state.global_step == 10
    whole = load_file(make.WEIGHTS)
    ended = {name: value for name, value in weights(trainer).items() if name in whole}
    assert difference(ended, whole) < 1e-6  # other processors round otherwise
    before = load_file(make.CHECKPOINT / "model.safetensors")
    assert difference(before, whole) > 5e-3


def without_manifest(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint as a trainer without manifests would have written it."""
    shutil.copytree(checkpoint, folder / checkpoint.name)
    (folder / checkpoint.name / MANIFEST).unlink()
    return folder / checkpoint.name


def as_version_0_1(checkpoint: Path, folder: Path) -> Path:
    file = without_manifest(checkpoint, folder) / "rollouts_0.pt"
    saved = torch.load(file, weights_only=True)
    settings = saved.pop("settings")
    layout = [
        *("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"),
        *("num_iterations", "num_generations", "credit"),
    ]
    torch.save({**saved, "layout": {name: settings[name] for name in layout}}, file)
    return folder / checkpoint.name


def test_a_checkpoint_of_version_0_1_is_resumed_exactly(uninterrupted, tmp_path, caplog):
    folder, whole = uninterrupted
    checkpoint = as_version_0_1(folder / "checkpoint-15", tmp_path / "old")
    resumed, said = resumed_from(checkpoint, tmp_path, caplog)
    assert difference(weights(resumed), weights(whole)) == 0
    assert said == []


def test_a_checkpoint_of_version_0_1_is_checked_for_what_the_loss_reads(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    checkpoint = as_version_0_1(folder / "checkpoint-6", tmp_path / "old")
    with pytest.raises(ResumeError, match=r"beta is 0\.04, but they have no ref_per_token_logps"):
        resumed_from(checkpoint, tmp_path / "beta", beta=0.04)
    with pytest.raises(ResumeError, match="num_iterations changed from 2 to 1"):
        resumed_from(checkpoint, tmp_path / "iterations", num_iterations=1)


# Other prompts, or another order


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"train_dataset": prompts(16)}, "number of training prompts changed from 12 to 16"),
        ({"train_dataset": prompts(12, tiny.HELD_OUT)}, "hash of training prompts changed from"),
        ({"seed": 7}, "seed changed from 42 to 7"),
        ({"shuffle_dataset": False}, "shuffle_dataset changed from True to False"),
    ],
)
def test_other_prompts_are_refused_unless_they_are_wanted(uninterrupted, tmp_path, caplog, settings, problem):
    folder, _ = uninterrupted
    with pytest.raises(
        ResumeError, match=r"--ignore_data_skip true\. Or .*--model_name_or_path .*checkpoint-8"
    ) as error:
        resumed_from(folder / "checkpoint-8", tmp_path / "refused", **settings)
    assert problem in str(error.value)
    settings = {**settings, "ignore_data_skip": True, "max_steps": 9}
    trainer, said = resumed_from(folder / "checkpoint-8", tmp_path / "wanted", caplog, **settings)
    assert trainer.state.global_step == 9
    assert problem in said[0]
    assert "training starts at the first prompt of the epoch" in said[0]


def test_without_shuffling_the_seed_decides_nothing(tmp_path, caplog):
    settings = {**CYCLES, "shuffle_dataset": False, "max_steps": 2}
    make_trainer(tmp_path, train_dataset=prompts(12), **settings).train()
    _, said = resumed_from(tmp_path / "checkpoint-1", tmp_path / "again", caplog, **settings, seed=7)
    assert said == []


def test_fingerprints():
    data = prompts(200)
    assert fingerprint(data) == fingerprint(prompts(200))
    assert fingerprint(data) == fingerprint(data.add_column("more", [0] * 200).select(range(200)))
    others = [
        data.select(range(199)),
        data.select([*range(1, 200), 0]),
        data.select(range(199, -1, -1)),
        data.select([]),
    ]
    stream = data.to_iterable_dataset()
    assert fingerprint(stream) == fingerprint(prompts(200).to_iterable_dataset())
    others += [stream, stream.skip(1)]
    marks = [json.dumps(fingerprint(x)) for x in (data, *others)]
    assert len(set(marks)) == len(marks)
    # A value that JSON does not know, such as an image, is not written with its address in memory.
    strange = IterableDataset.from_generator(lambda: iter([{"prompt": {1: object()}}]))
    assert fingerprint(strange) == fingerprint(strange)


# Streams


def numbered(n: int):
    """A stream of n prompts, each of which names its number, and the numbers that a training has asked."""
    rows, asked = prompts(n), []

    def reward(completions, number, **kwargs):
        asked.append(number[:: len(number) // 4])
        return [float(i % 3 == 0) for i in range(len(completions))]

    return rows.add_column("number", list(range(n))).to_iterable_dataset(num_shards=2), reward, asked


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("step", [3, 12, 13, 16, 30])  # 12 steps a pass, 4 a generation
def test_a_stream_is_resumed_in_any_pass(streamed, tmp_path, step):
    folder, whole, asked_by_whole = streamed
    stream, reward, asked = numbered(12)
    resumed, _ = resumed_from(
        folder / f"checkpoint-{step}", tmp_path, train_dataset=stream, reward_funcs=reward, max_steps=31
    )
    assert asked == asked_by_whole[-(-step // 4) :]
    assert difference(weights(resumed), weights(whole)) == 0
    assert resumed.state.epoch == whole.state.epoch


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed")
    stream, reward, asked = numbered(12)
    trainer = make_trainer(folder, train_dataset=stream, reward_funcs=reward, **{**CYCLES, "max_steps": 31})
    trainer.train()
    assert len({str(sorted(n for generation in asked[i : i + 3] for n in generation)) for i in (0, 3)}) == 1  # passes
    assert asked[:3] != asked[3:6]  # each in an order of its own
    return folder, trainer, asked


def test_another_stream_is_refused(streamed, tmp_path):
    folder, *_ = streamed
    stream, reward, _ = numbered(16)
    with pytest.raises(ResumeError, match="hash of training prompts"):
        resumed_from(folder / "checkpoint-16", tmp_path, train_dataset=stream.skip(4), reward_funcs=reward)


@pytest.mark.slow
def test_a_longer_training_on_a_stream_resumes_in_its_pass(streamed, tmp_path):
    folder, _, asked_by_whole = streamed
    stream, reward, asked = numbered(12)
    resumed_from(folder / "checkpoint-16", tmp_path, train_dataset=stream, reward_funcs=reward, max_steps=50)
    assert asked[:4] == asked_by_whole[4:]


# Optimizer and schedule


def test_the_checkpoint_s_optimizer_and_the_new_schedule_are_in_effect(uninterrupted, tmp_path, caplog):
    folder, _ = uninterrupted
    changed = {"learning_rate": 5e-4, "weight_decay": 0.1, "adam_beta2": 0.5}
    trainer, (said,) = resumed_from(folder / "checkpoint-12", tmp_path / "rate", caplog, **changed)
    assert set(logged(trainer, "learning_rate")) == {1e-3}
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0}
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.999)}
    for line in (
        "learning_rate changed from 0.001 to 0.0005: no effect",
        "weight_decay changed from 0.0 to 0.1: no effect",
        "adam_beta2 changed from 0.999 to 0.5: no effect",
    ):
        assert f"\n  {line}" in said

    caplog.clear()
    trainer, (said,) = resumed_from(
        folder / "checkpoint-12", tmp_path / "schedule", caplog, lr_scheduler_type="linear", max_steps=24
    )
    assert "lr_scheduler_type changed from 'constant' to 'linear': in effect" in said
    # The first step takes the rate that the checkpoint has; then 24 steps fall from 1e-3 to 0.
    assert logged(trainer, "learning_rate")[13:] == pytest.approx([1e-3 * (24 - done) / 24 for done in range(13, 24)])


def test_another_optimizer_is_refused(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    with pytest.raises(ResumeError, match=r"optim changed from '.*' to 'sgd'"):
        resumed_from(folder / "checkpoint-12", tmp_path, optim="sgd")


@pytest.mark.parametrize("lost", [None, "optimizer.pt", "scheduler.pt"])
def test_a_model_without_its_training_is_refused(uninterrupted, tmp_path, lost):
    folder, _ = uninterrupted
    if lost:
        checkpoint = without_manifest(folder / "checkpoint-8", tmp_path / "lost")
        (checkpoint / lost).unlink()
    else:
        settings = {**CYCLES, "max_steps": 1, "save_only_model": True}
        make_trainer(tmp_path / "model", train_dataset=prompts(12), **settings).train()
        checkpoint = tmp_path / "model" / "checkpoint-1"
    with pytest.raises(
        ResumeError, match=r"contains a model, but lacks .*save_only_model.*--model_name_or_path .*checkpoint"
    ):
        resumed_from(checkpoint, tmp_path)


def test_an_adapter_is_merged_for_a_new_run(tmp_path):
    settings = {**CYCLES, "max_steps": 1, "save_only_model": True}
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    make_trainer(tmp_path / "out", train_dataset=prompts(12), peft_config=adapter, **settings).train()
    with pytest.raises(ResumeError, match=r"ktae merge .*checkpoint-1 -o FOLDER, then --model_name_or_path FOLDER"):
        resumed_from(tmp_path / "out" / "checkpoint-1", tmp_path, peft_config=adapter)


def test_a_finished_run_is_not_trained_further(uninterrupted, tmp_path):
    """So what comes after the training, if it failed, can be done again."""
    folder, whole = uninterrupted
    resumed, _ = resumed_from(folder / "checkpoint-18", tmp_path)
    assert resumed.state.global_step == 18
    assert difference(weights(resumed), weights(whole)) == 0


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("lost", ["rollouts_0.pt", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("sealed", [True, False])  # unsealed: of version 0.1, or of another trainer
def test_going_on_without_a_part_needs_to_be_asked_for(uninterrupted, tmp_path, caplog, lost, sealed):
    folder, _ = uninterrupted
    make = without_manifest if not sealed else lambda source, to: Path(shutil.copytree(source, to / source.name))
    checkpoint = make(folder / "checkpoint-17", tmp_path / "less")
    (checkpoint / lost).unlink()
    with pytest.raises(ResumeError, match="--allow_inexact_resume true"):
        resumed_from(checkpoint, tmp_path)
    trainer, (said,) = resumed_from(checkpoint, tmp_path / "asked", caplog, allow_inexact_resume=True)
    assert "starts from scratch" in said or "starts with a new generation" in said
    assert trainer.state.global_step == 18


def test_what_trl_writes_last_is_a_part_and_an_older_checkpoint_stays_until_then(tmp_path, monkeypatch):
    settings = {**CYCLES, "max_steps": 2, "save_total_limit": 1, "use_adaptive_entropy": True}
    trainer = make_trainer(tmp_path, train_dataset=prompts(12), **settings)
    seen, seal = [], checkpoints.seal

    def looked_at(checkpoint):
        seen.append([path.name for path in sorted(tmp_path.glob("checkpoint-*")) if checkpoints.is_sealed(path)])
        seal(checkpoint)

    monkeypatch.setattr(checkpoints, "seal", looked_at)
    trainer.train()
    assert seen == [[], ["checkpoint-1"]]
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]
    manifest = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())
    assert "entropy_ctrl_state.json" in manifest["files"]


def test_checkpoint_of_the_same_step_is_not_written_twice(uninterrupted, tmp_path):
    """As when a scheduler asks for one right after the last: the time may be over before it is whole again."""
    folder, _ = uninterrupted
    manifest, written = tmp_path / "checkpoint-18" / MANIFEST, []

    class AsksAgain(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            written.append(manifest.stat().st_mtime_ns)
            control.should_save = True

    resumed_from(folder / "checkpoint-17", tmp_path, callbacks=[AsksAgain()])
    assert written == [manifest.stat().st_mtime_ns]
