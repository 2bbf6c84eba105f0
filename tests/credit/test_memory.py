"""`ktae_memory`: key-token values from the groups of earlier generations."""

import itertools
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ktae_trl import KTAEGRPOConfig
from ktae_trl.arguments import UserError
from ktae_trl.credit.combine import combine
from ktae_trl.credit.ktae import memory
from ktae_trl.credit.ktae.method import KTAE
from ktae_trl.report import records
from ktae_trl.report.group_view import is_key_token_value
from tests.credit.test_importance import as_groups
from tests.credit.test_ktae import random_groups
from tests.trainers import difference, logged, make_trainer, prompts, watch_batches, weights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from needle_rows import ROWS, Rollouts

V = 30
REMEMBERS = {"ktae_memory": 0.9}
GENERATIONS = {
    "per_device_train_batch_size": 16,
    "steps_per_generation": 2,
    "num_iterations": 1,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_completion_length": 60,
    "learning_rate": 1e-3,
    **REMEMBERS,
}


def slow_evidence(ids, mask, correct, scored, ignored, weights):
    """Loop over groups and tokens; a rollout votes if it is scored and has a token."""
    surplus, variance = [0.0] * V, [0.0] * V
    for group, masks, labels, graded, weight in zip(*map(list, (ids, mask, correct, scored, weights)), strict=True):
        texts = [{int(t) for t, m in zip(*pair, strict=True) if m} for pair in zip(group, masks, strict=True)]
        votes = [(text, bool(label)) for text, label, g in zip(texts, labels, graded, strict=True) if text and g]
        N, n_right = len(votes), sum(label for _, label in votes)
        if not 0 < n_right < N:
            continue
        for v in set().union(*texts) - set(ignored):
            a = sum(v in text and label for text, label in votes)
            n = sum(v in text for text, _ in votes)
            if n:
                surplus[v] += float(weight) * (a - n_right * n / N)
                variance[v] += float(weight) * n_right * (N - n_right) * n * (N - n) / (N * N * (N - 1))
    return torch.tensor([surplus, variance])


@pytest.mark.parametrize("seed", range(6))
def test_slow_loop(seed):
    ids, mask, correct = random_groups(seed, P=12, G=[2, 4, 8, 16, 5, 3][seed], vocabulary=V)
    generator = torch.Generator().manual_seed(seed)
    scored = torch.rand(correct.shape, generator=generator) < 0.8
    share_P = torch.rand(12, generator=generator)
    found = memory.evidence(ids, mask, correct, V, scored=scored, ignore_ids=(3, 5), weight_P=share_P)
    torch.testing.assert_close(found, slow_evidence(ids, mask, correct, scored, (3, 5), share_P), atol=1e-5, rtol=1e-5)
    assert found[0].abs().max() > 0
    assert (found[:, [3, 5]] == 0).all()


def test_mean_and_variance_under_random_labels():
    """All 20 ways to label three of six rollouts as correct: d has mean 0 and the variance that is stated."""
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 2], [2, 2], [4, 4]])[None]
    mask = torch.ones_like(ids).bool()
    surplus, variance = [], []
    for right in itertools.combinations(range(6), 3):
        correct = torch.tensor([i in right for i in range(6)])[None]
        d, var = memory.evidence(ids, mask, correct, 6)
        surplus.append(d)
        variance.append(var)
    surplus, variance = torch.stack(surplus), torch.stack(variance)
    torch.testing.assert_close(surplus.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(surplus.var(0, correction=0), variance[0], atol=1e-6, rtol=1e-5)
    assert (variance == variance[0]).all()


def test_groups_of_different_difficulty_do_not_mix():
    """A token that goes with neither side in any group has d = 0, although it is more frequent in the easy group."""
    easy = torch.tensor([[1], [1], [1], [1], [1], [1], [0], [0]])
    hard = torch.tensor([[1], [0], [1], [0], [0], [0], [0], [0]])
    ids = torch.stack([easy, hard])
    correct = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    d, var = memory.evidence(ids, torch.ones_like(ids).bool(), correct, 2)
    assert d[1].item() == pytest.approx((3 - 4 * 6 / 8) + (1 - 2 * 2 / 8))
    assert var[1].item() == pytest.approx(4 * 4 * 6 * 2 / (64 * 7) + 2 * 6 * 2 * 6 / (64 * 7))


def test_what_comes_before_counts_less():
    first, second = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 0.0], [1.0, 0.0]])
    found = memory.later(first, second, 0.5)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [2.5, 2.0]]))


def test_values_by_hand():
    evidence_2V = torch.tensor([[0.0, 2.0, -1.0, 400.0], [0.0, 3.0, 0.0, 99.0]])
    sigmoid = [1 / (1 + math.exp(-theta)) for theta in (0, 0.5, -1, 4)]
    found = memory.values(evidence_2V, torch.tensor([[0, 1], [2, 3]]))
    torch.testing.assert_close(found.flatten(), torch.tensor([2 * s - 1 for s in sigmoid]))


def test_a_value_is_that_of_the_odds_ratio_whatever_the_number_of_groups():
    """Presence with probability 0.45 and 0.55 in wrong and correct rollouts: the odds ratio is (0.55/0.45)^2 = 1.49."""
    generator = torch.Generator().manual_seed(0)
    expected = (1.494 - 1) / (1.494 + 1)
    for groups, tolerance in ((2_000, 0.03), (40_000, 0.01)):
        correct = (torch.arange(16) % 2 == 0).expand(groups, -1)
        chance = torch.where(correct, 0.55, 0.45)
        ids = (torch.rand(groups, 16, generator=generator) < chance).int()[..., None]
        evidence_2V = memory.evidence(ids, torch.ones_like(ids).bool(), correct, 2)
        assert memory.values(evidence_2V, torch.tensor([1])).item() == pytest.approx(expected, abs=tolerance)


# The method


def method(**changes):
    config = KTAEGRPOConfig(output_dir="x", use_cpu=True, bf16=False, **REMEMBERS | changes)
    tools = SimpleNamespace(vocabulary=V, device="cpu", total=lambda x: x)
    return KTAE(config, tools)


def test_a_generation_is_valued_by_earlier_ones_only():
    ktae = method(ktae_memory=0.5)
    generations = [as_groups(*random_groups(seed, G=8, vocabulary=V)) for seed in (1, 2, 3)]
    known = torch.zeros(2, V)
    for i, groups in enumerate(generations):
        credit = ktae.credit(groups)
        mixed = groups.correct_PG.any(1) & ~groups.correct_PG.all(1)
        expected = memory.values(known, groups.ids_BT) * groups.mask_BT * mixed.repeat_interleave(8)[:, None]
        expected[torch.isin(groups.ids_BT, torch.tensor(groups.special_ids))] = 0
        torch.testing.assert_close(credit.values_BT, expected)
        assert bool(credit.values_BT.any()) == (i > 0)
        # The labels of a generation do not change its own values: nothing leans to a rollout's own side.
        turned = groups._replace(correct_PG=~groups.correct_PG)
        torch.testing.assert_close(ktae.credit(turned).values_BT, credit.values_BT)
        ktae.learn(groups)
        new = memory.evidence(groups.ids_PGT, groups.mask_PGT, groups.correct_PG, V, ignore_ids=groups.special_ids)
        known = 0.5 * known + new
    assert {name for name in credit.sums if name.startswith("ktae/value")} == {"ktae/value_right", "ktae/value_wrong"}


def test_a_group_that_is_spread_over_processes_counts_once():
    groups = as_groups(*random_groups(4, P=3, G=8, vocabulary=V))
    whole, parts = method(), [method(), method()]
    whole.learn(groups)
    for part, own in zip(parts, (slice(0, 11), slice(11, 24)), strict=True):
        part.learn(groups._replace(own=own))
    total = sum(part.state()["evidence"] for part in parts)
    torch.testing.assert_close(total, whole.state()["evidence"], atol=1e-6, rtol=1e-5)


def test_rollouts_without_a_grade_neither_teach_nor_have_values():
    ids, mask, correct = random_groups(2, G=8, vocabulary=V, lengths=False)
    groups = as_groups(ids, mask, correct, scored=torch.arange(8).expand(3, -1) > 1)
    ktae, known = method(ktae_combine="add"), method(ktae_combine="add")
    ktae.learn(groups)
    known.learn(groups._replace(correct_PG=correct ^ ~groups.scored_PG))  # other labels where there is no grade
    torch.testing.assert_close(ktae.state()["evidence"], known.state()["evidence"])
    values_PGT = ktae.credit(groups).values_BT.view(3, 8, -1)
    assert (values_PGT[:, :2] == 0).all()
    assert values_PGT[:, 2:].any()


@pytest.mark.parametrize("how", ["multiply", "add"])
def test_the_row_of_the_needle_benchmark_is_the_package_s_method(how):
    """Four generations of one group, the third of them with one side only."""
    row, ktae = ROWS[f"{how}_memory"].begin(), method(ktae_combine=how)
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for generation in range(4):
        ids = torch.randint(10, V, (1, 8, 12), generator=generator)
        success = torch.rand(1, 8, 1, generator=generator) < (1.0 if generation == 2 else 0.5)
        nothing = torch.zeros(1, 12, 8, V)
        rollouts = Rollouts(ids, torch.ones_like(ids).bool(), ids[0, 0] < 0, success, torch.zeros(1, 8), nothing)
        groups = as_groups(ids, rollouts.mask_SGT, rollouts.correct_SG, advantages=rollouts.advantages_SG.flatten())
        expected = combine(groups.advantages_B, ktae.credit(groups).values_BT, how)
        ktae.learn(groups)
        torch.testing.assert_close(row(rollouts)[0], expected)
        changed += not torch.allclose(expected, groups.advantages_B[:, None].expand_as(expected))
    assert changed == 2


def test_other_methods_value_the_records_of_such_a_run_by_their_own_groups():
    for settings in KTAE.variants.values():
        assert settings["ktae_memory"] == 0


def test_without_memory_nothing_is_learned():
    ktae = method(ktae_memory=0.0)
    ktae.learn(as_groups(*random_groups(1)))
    assert ktae.state() == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ktae_memory": 1.0}, "ktae_memory must be at least 0 and below 1, not 1.0"),
        ({"ktae_memory": -0.1}, "ktae_memory must be at least 0 and below 1, not -0.1"),
        (
            {"ktae_combine": "importance"},
            "ktae_memory gives signed values, but ktae_combine: importance needs strengths",
        ),
    ],
)
def test_settings_that_do_not_fit(changes, words):
    with pytest.raises(UserError, match=words):
        KTAEGRPOConfig(output_dir="x", use_cpu=True, bf16=False, credit="ktae", **REMEMBERS | changes)


# Training


def test_training_learns_from_each_generation_once_and_evaluation_teaches_nothing(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **GENERATIONS | {"save_strategy": "no", "max_steps": 4, "num_iterations": 2, "record_steps": 1},
        credit_in_evaluation=True,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=16,
        eval_dataset=prompts(4),
    )
    learned = []
    ktae = trainer.token_credit.method
    learn = ktae.learn
    ktae.learn = lambda groups: (learned.append(groups), learn(groups))
    batches = watch_batches(trainer)
    trainer.train()
    assert len(learned) == 1  # one generation, for 2 x 2 steps
    assert len(batches) > 1  # those of the evaluations
    assert not batches[0]["credit"].any()
    record = records.read(records.files(tmp_path)[0])
    assert not is_key_token_value(record.method)
    assert record.method.settings["ktae_memory"] == 0.9


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("step", [4, 5])  # between two generations and inside one
def test_resume_is_exact(tmp_path, step):
    whole = make_trainer(tmp_path / "whole", train_dataset=prompts(12), **GENERATIONS)
    whole.train()
    name = f"checkpoint-{step}"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "part" / name)
    resumed = make_trainer(tmp_path / "part", train_dataset=prompts(12), **GENERATIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / name))
    assert difference(weights(resumed), weights(whole)) == 0
    assert logged(resumed, "ktae/abs_value") == logged(whole, "ktae/abs_value")
    assert logged(whole, "ktae/abs_value")[-1] > 0  # after the checkpoint, the evidence makes a difference


def test_a_checkpoint_without_evidence_is_said(tmp_path, caplog):
    begun = make_trainer(tmp_path, train_dataset=prompts(12), **GENERATIONS | {"ktae_memory": 0.0, "max_steps": 2})
    begun.train()
    resumed = make_trainer(tmp_path, train_dataset=prompts(12), **GENERATIONS | {"max_steps": 3})
    resumed.train(resume_from_checkpoint=True)
    assert "holds nothing that credit: ktae learned, so it learns from scratch" in caplog.text
