"""The numbers of tokens in records against forward passes and loops of the test's own, and against TRL's metrics."""

import copy
import logging
import math

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from ktae_trl import tiny, trl_seam
from ktae_trl.report import records
from ktae_trl.training.recorder import RECORDED
from tests.trainers import around, difference, logged, make_trainer, replay, watch_batches, weights


def distinct(prompts: list, trainer) -> dict:
    """Like `replay`, but no two of the 32 rollouts are equal: each begins with a token of its own."""
    rollouts = replay(prompts, trainer)
    ids = [[3 + i, *ids[: trainer.max_completion_length - 1]] for i, ids in enumerate(rollouts["completion_ids"])]
    return rollouts | {"completion_ids": ids}


def odd(completion_ids, **_) -> list[float]:
    """A reward for about every second rollout, so that advantages of both signs are frequent."""
    return [float(sum(ids) % 2) for ids in completion_ids]


# A generation of 4 groups of 8, which TRL shuffles and splits into two forward passes of one optimizer step.
ONE_STEP = {
    "rollout_func": distinct,
    "record_steps": 1,
    "max_steps": 1,
    "per_device_train_batch_size": 16,
    "steps_per_generation": 2,
    "gradient_accumulation_steps": 2,
}
# Two optimizer steps on a generation: the second one's weights are not those that generated.
TWO_STEPS = ONE_STEP | {"max_steps": 2, "gradient_accumulation_steps": 1}
NAMES = {"log_probability", "entropy", "ratio", "clipped"}


def forward(state: dict, prompt: list[int], completion: list[int], temperature: float = 1.0) -> tuple[list, list]:
    """Return the log-probability and the entropy of each token of one completion, without padding."""
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    p_TV = (logits_TV.double() / temperature).softmax(1)
    return p_TV[range(len(completion)), completion].log().tolist(), (-p_TV * p_TV.log()).sum(1).tolist()


def without_padding(batch: dict) -> list[tuple[list[int], list[int]]]:
    """Return the prompt and completion of each row."""
    sides = []
    for side in ("prompt", "completion"):
        pairs = zip(batch[f"{side}_ids"], batch[f"{side}_mask"].bool(), strict=True)
        sides.append([ids[mask].tolist() for ids, mask in pairs])
    return list(zip(*sides, strict=True))


def watch_losses(trainer) -> list[tuple[dict, list]]:
    """Collect the weights and the rows of each forward pass."""
    seen = []

    def look(original, model, inputs):
        seen.append((copy.deepcopy(trainer.model.state_dict()), without_padding(inputs)))
        return original(model, inputs)

    around(trainer, "loss", look)
    return seen


def rows_of(folder) -> list[dict]:
    return [row for path in records.files(folder) for row in records.read(path).rows]


@pytest.mark.parametrize("credit", ["ktae", "none"])
def test_probabilities_and_entropies_are_those_of_a_forward_pass(tmp_path, credit):
    trainer = make_trainer(tmp_path, **ONE_STEP, credit=credit, temperature=0.7)
    batches, before = watch_batches(trainer), copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    rows = rows_of(tmp_path)
    assert len(rows) == 32
    for row, (prompt, completion) in zip(rows, without_padding(batches[0]), strict=True):
        arrays = row["arrays"]
        logps, entropies = forward(before, prompt, completion, 0.7)
        assert arrays.keys() == NAMES
        assert arrays["log_probability"] == pytest.approx(logps, abs=1e-4)
        assert arrays["entropy"] == pytest.approx(entropies, abs=1e-5)
        # No weights but these have generated: TRL keeps no other probabilities.
        assert arrays["ratio"] == [1.0] * len(completion)
        assert arrays["clipped"] == [0.0] * len(completion)
    assert len({len(row["tokens"]) for row in rows}) > 3
    assert any(len(set(row["advantages"])) > 1 for row in rows) == (credit == "ktae")


def is_clipped(ratio: float, advantage: float, settings: dict) -> bool:
    low, high = settings["epsilon"], settings["epsilon_high"]
    if settings["loss_type"] == "cispo":
        return ratio > high and advantage > 0
    ratio = min(ratio, settings.get("delta", math.inf))
    return ratio < 1 - low if advantage < 0 else advantage > 0 and ratio > 1 + high


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "epsilon_high": 1.05},
        {"loss_type": "bnpo", "delta": 1.02, "credit": "none"},
        {"loss_type": "dr_grpo", "ktae_combine": "add"},
        {"loss_type": "luspo", "credit": "oar_g"},
    ],
    ids=str,
)
def test_ratios_and_clipped_tokens_are_those_of_a_loop_and_as_many_as_trl_counts(tmp_path, settings):
    settings = {"epsilon": 0.02, "epsilon_high": 0.03} | settings
    trainer = make_trainer(tmp_path, **TWO_STEPS, **settings, reward_funcs=odd, learning_rate=3e-4)
    batches, losses = watch_batches(trainer), watch_losses(trainer)
    trainer.train()
    (before, first), (after, second) = losses
    assert len(first) == len(second) == 16
    counts, ratios, clipped = [0, 0], [], [[], []]
    for row, (prompt, completion) in zip(rows_of(tmp_path), without_padding(batches[0]), strict=True):
        step = int((prompt, completion) in second)
        assert (prompt, completion) in (second if step else first)
        counts[step] += 1
        old, now = (forward(state, prompt, completion)[0] for state in (before, after if step else before))
        expected = [math.exp(b - a) for a, b in zip(old, now, strict=True)]
        if settings.get("importance_sampling_level") == "sequence":
            expected = [math.prod(expected) ** (1 / len(expected))] * len(expected)
        arrays = row["arrays"]
        assert arrays["log_probability"] == pytest.approx(now, abs=1e-4)
        assert arrays["ratio"] == pytest.approx(expected, rel=1e-4)
        # By the recorded ratio, since the loop's may be rounded to the other side of a bound.
        tokens = zip(arrays["ratio"], row["advantages"], strict=True)
        assert arrays["clipped"] == [is_clipped(ratio, A, settings) for ratio, A in tokens]
        clipped[step] += arrays["clipped"]
        ratios += expected
    assert counts == [16, 16]
    assert max(ratios) > 1.05
    share = "cispo_clip_ratio" if settings["loss_type"] == "cispo" else "clip_ratio/region_mean"
    for step, metric in enumerate(logged(trainer, share)):
        assert metric == pytest.approx(sum(clipped[step]) / len(clipped[step]), abs=1e-6)
    assert 0 < sum(clipped[1]) < len(clipped[1])
    assert sum(clipped[0]) == 0


def test_a_second_pass_over_the_rollouts_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path, **ONE_STEP | {"num_iterations": 2, "max_steps": 2, "learning_rate": 3e-3})
    batches, before = watch_batches(trainer), copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert logged(trainer, "clip_ratio/region_mean")[1] > 0  # the weights are no longer the same
    for row, (prompt, completion) in zip(rows_of(tmp_path), without_padding(batches[0]), strict=True):
        assert row["arrays"]["log_probability"] == pytest.approx(forward(before, prompt, completion)[0], abs=1e-4)
        assert row["arrays"]["ratio"] == pytest.approx([1] * len(completion), abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"credit": "tree", "rollout_func": None, "max_completion_length": 24},
        {"mask_truncated_completions": True, "max_completion_length": 16},
    ],
    ids=str,
)
def test_there_are_no_numbers_of_tokens_that_are_not_trained_on(tmp_path, settings):
    make_trainer(tmp_path, **ONE_STEP | settings).train()
    rows = rows_of(tmp_path)
    for row in rows:
        assert row["arrays"].keys() == NAMES
        for values in row["arrays"].values():
            assert [value is not None for value in values] == row["trained"]
    assert {trained for row in rows for trained in row["trained"]} == {True, False}


def test_what_the_sampler_reported_is_recorded(tmp_path):
    """vLLM cannot score some tokens, for which it reports None."""

    def reporting(prompts, trainer):
        rollouts = distinct(prompts, trainer)
        logprobs = [[-0.5 * j - i for j in range(len(ids))] for i, ids in enumerate(rollouts["completion_ids"])]
        logprobs[3][2] = None
        return rollouts | {"logprobs": logprobs}

    make_trainer(tmp_path, **ONE_STEP | {"rollout_func": reporting}).train()
    for i, row in enumerate(rows_of(tmp_path)):
        reported = [-0.5 * j - i for j in range(len(row["tokens"]))]
        if i == 3:
            reported[2] = None
        assert row["arrays"]["sampling_log_probability"] == reported
        assert row["arrays"].keys() == {*NAMES, "sampling_log_probability"}


@pytest.mark.parametrize("loss_type", ["sapo", "vespo"])
def test_a_loss_that_does_not_clip_has_no_clipped_tokens(tmp_path, loss_type):
    make_trainer(tmp_path, **ONE_STEP, loss_type=loss_type).train()
    assert all(row["arrays"].keys() == NAMES - {"clipped"} for row in rows_of(tmp_path))


@pytest.mark.parametrize("credit", ["ktae", "none"])
def test_the_weights_are_the_same_without_records(tmp_path, credit):
    trainers = []
    for every in (0, 1):
        trainers.append(make_trainer(tmp_path / str(every), **TWO_STEPS | {"record_steps": every, "credit": credit}))
        trainers[-1].train()
    assert difference(*map(weights, trainers)) == 0
    assert vars(trainers[0]).keys() == vars(trainers[1]).keys()  # nothing is left in place of TRL's methods


def test_only_recorded_steps_pay(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **ONE_STEP | {"record_steps": 2, "max_steps": 4, "record_groups": 1})
    batches, watched = watch_batches(trainer), []
    stats_in_loss = trl_seam.stats_in_loss
    monkeypatch.setattr(trl_seam, "stats_in_loss", lambda trainer: watched.append(1) or stats_in_loss(trainer))
    trainer.train()
    assert [RECORDED in batch for batch in batches] == [True, False, True, False]
    assert len(watched) == 4  # two forward passes of two generations
    # Of a batch of 32 rows, those of one group are kept.
    assert [len(set(batch[RECORDED][:, 1].tolist())) for batch in batches[::2]] == [2, 2]
    assert all(row["arrays"].keys() == NAMES for row in rows_of(tmp_path))
    assert len(rows_of(tmp_path)) == 16


def not_watched(original, self, model, inputs):
    """Compute the loss as if TRL took the log-probabilities from elsewhere, as a fused kernel would."""
    method = GRPOTrainer.__dict__["_get_per_token_logps_and_entropies"]
    watching = vars(self).pop(method.__name__, None)
    try:
        return original(self, model, inputs)
    finally:
        if watching:
            vars(self)[method.__name__] = watching


def test_a_trl_that_computes_no_such_numbers_is_named_and_the_records_have_none(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trl_seam, "passed", set())
    around(GRPOTrainer, "loss", not_watched, monkeypatch.setattr)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, **ONE_STEP)
    assert "Rollouts are recorded without the numbers that the loss computes. TRL " in caplog.text
    assert "_compute_loss computes log-probabilities 0 times" in caplog.text
    trainer.train()
    assert [row["arrays"] for row in rows_of(tmp_path)] == [{}] * 32
    caplog.clear()
    trl_seam.passed.clear()
    make_trainer(tmp_path / "without", **ONE_STEP | {"record_steps": 0})
    assert "recorded without" not in caplog.text


def test_a_run_in_which_the_loss_computes_no_such_numbers_has_records(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **ONE_STEP)
    around(GRPOTrainer, "loss", not_watched, monkeypatch.setattr)
    trainer.train()
    assert [row["arrays"] for row in rows_of(tmp_path)] == [{}] * 32


class InterruptedRunError(Exception):
    pass


def interrupt(trainer, at: int) -> None:
    """Let the loss raise an exception, at the forward pass with this number, counted from 0."""
    passes = []

    def loss(original, model, inputs):
        passes.append(1)
        if len(passes) > at:
            raise InterruptedRunError
        return original(model, inputs)

    around(trainer, "loss", loss)
    with pytest.raises(InterruptedRunError):
        trainer.train()


@pytest.mark.parametrize(("at", "rows_with_numbers"), [(0, 0), (1, 16)])
def test_a_run_that_ends_early_has_the_record_and_the_numbers_so_far(tmp_path, at, rows_with_numbers):
    interrupt(make_trainer(tmp_path, **TWO_STEPS), at)
    rows = rows_of(tmp_path)
    assert len(rows) == 32
    assert sum(row["arrays"].keys() == NAMES for row in rows) == rows_with_numbers
    assert sum(row["arrays"] == {} for row in rows) == 32 - rows_with_numbers


@pytest.mark.slow
@pytest.mark.parametrize("ended", ["early", "late"])
def test_a_resumed_run_has_the_numbers_of_one_that_was_not_interrupted(tmp_path, ended):
    """Inside a generation, between its two steps of the first pass: half of the rows had their numbers."""
    settings = TWO_STEPS | {"num_iterations": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "whole", **settings).train()
    parts = make_trainer(tmp_path / "parts", **settings)
    if ended == "early":
        interrupt(parts, 1)
        assert sum(row["arrays"] == {} for row in rows_of(tmp_path / "parts")) == 16
    else:
        parts.train()
    make_trainer(tmp_path / "parts", **settings).train(str(tmp_path / "parts" / "checkpoint-1"))
    whole, parts = (records.files(tmp_path / name) for name in ("whole", "parts"))
    assert [path.name for path in whole] == [path.name for path in parts] == [records.file_name(s) for s in (1, 5)]
    assert all(row["arrays"].keys() == NAMES for row in rows_of(tmp_path / "whole"))
    for a, b in zip(whole, parts, strict=True):
        assert pq.read_table(a).equals(pq.read_table(b))


def test_a_resumed_run_in_another_folder_begins_no_record_of_the_past(tmp_path, caplog):
    settings = TWO_STEPS | {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "first", **settings).train()
    trainer = make_trainer(tmp_path / "second", **settings)
    trainer.train(str(tmp_path / "first" / "checkpoint-1"))
    assert trainer.state.global_step == 2
    assert records.files(tmp_path / "second") == []
    assert "Could not write a record" not in caplog.text


def test_a_damaged_record_does_not_end_the_training(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **ONE_STEP)

    def loss(original, model, inputs):
        (tmp_path / "rollouts" / "step_000001.parquet").write_text("damaged")
        return original(model, inputs)

    around(trainer, "loss", loss)
    trainer.train()
    assert trainer.state.global_step == 1
    assert "Could not write a record" in caplog.text
    assert "step_000001.parquet is not a Parquet file" in caplog.text
