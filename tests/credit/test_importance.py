"""`ktae_combine: importance` and `ktae_scale`: A w with weights by strength, and A + c K."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ktae_trl import KTAEGRPOConfig
from ktae_trl.arguments import UserError
from ktae_trl.credit import find_method
from ktae_trl.credit.combine import combine
from ktae_trl.credit.ktae import key_token_strengths, key_token_values
from ktae_trl.credit.ktae import values as ktae
from ktae_trl.credit.ktae.method import KTAE
from ktae_trl.credit.method import Groups
from ktae_trl.report import explain, records, write_report
from ktae_trl.report.group_view import describe, split
from tests.credit.test_ktae import groups as some_groups
from tests.credit.test_ktae import random_groups
from tests.reference import ktae_loop
from tests.reporting import Page, random_group
from tests.trainers import difference, logged, make_trainer, replay, weights

SPECIAL = (3, 5)


def config(**changes) -> KTAEGRPOConfig:
    return KTAEGRPOConfig(output_dir="x", use_cpu=True, bf16=False, **changes)


def as_groups(ids, mask, correct, scored=None, advantages=None, special=SPECIAL) -> Groups:
    P, G, _ = ids.shape
    scored = torch.ones_like(correct) if scored is None else scored
    advantages = torch.where(correct, 0.9, -1.1).flatten() if advantages is None else advantages
    prompts = torch.zeros(P * G, 1, dtype=torch.long)
    lengths = mask.sum(2).flatten()
    return Groups(ids, mask, correct, scored, advantages, prompts, prompts + 1, lengths, special, slice(0, P * G))


def credited(groups: Groups, **changes):
    """The method's values, metrics and token advantages."""
    method = KTAE(config(**changes), None)
    values_BT, sums = method.credit(groups)
    metrics = {name: (total / count).item() for name, (total, count) in sums.items()}
    return values_BT, metrics, combine(groups.advantages_B, values_BT, method.how)


def importance(groups: Groups, **changes):
    return credited(groups, ktae_combine="importance", **changes)


def shares(mask_BT, x_BT):
    """The mean over each rollout's trained tokens, for rollouts that have some."""
    n = mask_BT.sum(1)
    return ((x_BT * mask_BT).sum(1) / n)[n > 0]


# The slow loop


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("weighting", [(1.0, 1.0), (0.0, 1.0), (2.0, 1.0), (1.0, 0.0)])
def test_slow_loop(numba, leave_one_out, weighting, monkeypatch):
    monkeypatch.setattr(ktae, "NUMBA", numba and ktae.NUMBA)
    fisher_weight, ig_weight = weighting
    options = {"fisher_weight": fisher_weight, "ig_weight": ig_weight, "leave_one_out": leave_one_out}
    positive = 0
    for seed, (G, beta) in enumerate([(2, 1.0), (4, 4.0), (8, 0.5), (16, 1.0), (5, 0.0), (3, 100.0)]):
        ids, mask, correct = random_groups(seed, G=G)
        scored = torch.tensor(np.random.default_rng(seed).random(correct.shape) < 0.85)
        given = {"scored": scored, "ignore_ids": SPECIAL, **options}
        strengths = key_token_strengths(ids, mask, correct, **given)
        expected = ktae_loop.key_token_strengths(ids, mask, correct, **given)
        assert strengths.dtype == torch.float32
        np.testing.assert_allclose(strengths, expected, atol=1e-6)
        positive += (expected > 0).sum()
        changes = {f"ktae_{name}": value for name, value in options.items()} | {"ktae_importance_beta": beta}
        values_BT, *_ = importance(as_groups(ids, mask, correct, scored), **changes)
        expected = ktae_loop.importance_weights(ids, mask, correct, beta, **given)
        np.testing.assert_allclose(values_BT.view(ids.shape), expected, rtol=2e-6)
    assert positive > 100


def test_by_hand():
    """Two right rollouts (7 9), (7 8 0); two wrong ones (6 9), (6 8): tests/credit/test_ktae.py has F and IG.

    Tokens 7 and 6: F = exp(-2/3) = 0.5134171, IG = 1, S = 0.7567086. Tokens 8 and 9: S = 0. Token 0 ends the text: a
    special token has S = 0 and is part of the mean. With beta = 2 the first rollout has 1 + beta S = (2.5134171, 1) of
    mean 1.7567086, the second (2.5134171, 1, 1) of mean 1.5044724.
    """
    ids = torch.tensor([[[7, 9, 0], [7, 8, 0], [6, 9, 0], [6, 8, 0]]])
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0]]]).bool()
    correct = torch.tensor([[True, True, False, False]])
    values_BT, metrics, advantages_BT = importance(
        as_groups(ids, mask, correct, special=(0,)), ktae_importance_beta=2.0
    )
    two, three = [1.4307536, 0.5692464, 1.0], [1.6706302, 0.6646849, 0.6646849]
    torch.testing.assert_close(values_BT, torch.tensor([two, three, two, two]), atol=1e-6, rtol=0)
    torch.testing.assert_close(advantages_BT[1], 0.9 * torch.tensor(three))
    torch.testing.assert_close(advantages_BT[2], -1.1 * torch.tensor(two))
    squares = 3 * sum(w * w for w in two[:2]) + sum(w * w for w in three)
    assert metrics["ktae/effective_share"] == pytest.approx(9 * 9 / (9 * squares), rel=1e-6)
    assert metrics["ktae/informative_groups"] == 1


def test_leave_one_out_by_hand():
    """A token that no other rollout has has S = 0 there, and so all its rollout's tokens have w = 1.

    Without it: 1 of 2 right, 0 of 2 wrong rollouts have token 1; p = 1 and IG = 0.3112781, so S = 0.1556391.
    """
    ids = torch.tensor([[[1, 9], [9, 9], [9, 9], [9, 9]]])
    groups = as_groups(ids, torch.ones_like(ids).bool(), torch.tensor([[True, True, False, False]]))
    values_BT, *_ = importance(groups)
    torch.testing.assert_close(values_BT[0], torch.tensor([1.1556391, 1.0]) / 1.07781955)
    values_BT, *_ = importance(groups, ktae_leave_one_out=True)
    assert (values_BT == 1).all()


# Properties


@settings(deadline=None, max_examples=60)
@given(some_groups(), st.sampled_from([0.5, 1.0, 4.0]))
def test_sign_and_mean_size_of_a_rollout_s_advantage_are_kept(drawn, beta):
    """Exactly, for all labels: also for shuffled ones, so that nothing leans to a rollout's own side."""
    seed, (ids, mask, correct), options = drawn
    generator = torch.Generator().manual_seed(seed)
    shuffled = correct.gather(1, torch.rand(correct.shape, generator=generator).argsort(1))
    advantages = torch.randn(correct.numel(), generator=generator) * (torch.rand(correct.numel()) < 0.9)
    groups = as_groups(ids, mask, shuffled, advantages=advantages)
    changes = {f"ktae_{name}": value for name, value in options.items()}
    values_BT, _, advantages_BT = importance(groups, ktae_importance_beta=beta, **changes)
    assert (values_BT > 0).all()
    assert torch.equal(advantages_BT.sign(), advantages.sign()[:, None].expand_as(advantages_BT))
    mask_BT, some = groups.mask_BT, groups.mask_BT.any(1)
    torch.testing.assert_close(shares(mask_BT, advantages_BT.abs()), advantages.abs()[some], rtol=2e-6, atol=1e-7)
    lean_B = shares(mask_BT, (advantages_BT - advantages[:, None]) * advantages.sign()[:, None])
    assert (lean_B.abs() < 1e-5).all()


def test_multiply_and_add_lean_to_the_own_side_and_importance_does_not():
    """Labels without information: K still agrees with the rollout's own label, w cannot."""
    ids, mask, _ = random_groups(0, P=60, G=8, T=40, vocabulary=200)
    correct = torch.rand(ids.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.5
    groups = as_groups(ids, mask, correct, advantages=torch.where(correct, 1.0, -1.0).flatten())
    leans = {}
    for how in ("multiply", "add", "importance"):
        *_, advantages_BT = credited(groups, ktae_combine=how)
        gain_BT = (advantages_BT - groups.advantages_B[:, None]) * groups.advantages_B[:, None].sign()
        leans[how] = shares(groups.mask_BT, gain_BT).mean().item()
    assert leans["multiply"] == pytest.approx(leans["add"])
    assert leans["multiply"] > 0.05
    assert abs(leans["importance"]) < 1e-6


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_nothing_changes_where_nothing_can_be_compared(leave_one_out):
    """Groups of one side, rollouts that cannot be scored, and tokens that are not trained on have w = 1 exactly."""
    ids, mask, _ = random_groups(1, P=4)
    correct = torch.tensor([[True] * 8, [False] * 8, [True, False] * 4, [True] + [False] * 7])
    scored = torch.ones_like(correct)
    scored[2, :3] = False
    mask[2, 3] = False
    groups = as_groups(ids, mask, correct, scored)
    values_BT, metrics, advantages_BT = importance(groups, ktae_leave_one_out=leave_one_out)
    values = values_BT.view(ids.shape)
    assert (values[:2] == 1).all()
    assert (values[2, :4] == 1).all()
    assert (values[~mask] == 1).all()
    assert torch.equal(advantages_BT[:16], groups.advantages_B[:16, None].expand_as(advantages_BT[:16]))
    assert (values[2, 4:] != 1).any()
    # Of the last group's right rollout, without itself there is no right one.
    assert (values[3, 0] == 1).all() == leave_one_out
    assert metrics["ktae/informative_groups"] == 0.5
    own = values[2:][mask[2:]]
    assert metrics["ktae/effective_share"] == pytest.approx((own.sum() ** 2 / (len(own) * (own**2).sum())).item())


@settings(deadline=None, max_examples=30)
@given(some_groups())
def test_direction_does_not_matter(drawn):
    """Neither h3 nor which side is called right."""
    _, (ids, mask, correct), options = drawn
    loo = {"ktae_leave_one_out": options["leave_one_out"]}
    values_BT, *_ = importance(as_groups(ids, mask, correct), **loo)
    others, *_ = importance(as_groups(ids, mask, correct), ktae_tf_weight=options["tf_weight"], ktae_scale=0.5, **loo)
    assert torch.equal(others, values_BT)
    swapped, *_ = importance(as_groups(ids, mask, ~correct), **loo)
    torch.testing.assert_close(swapped, values_BT)


def test_beta_zero_is_grpo_exactly():
    groups = as_groups(*random_groups(2))
    values_BT, _, advantages_BT = importance(groups, ktae_importance_beta=0.0)
    assert (values_BT == 1).all()
    assert torch.equal(advantages_BT, groups.advantages_B[:, None].expand_as(advantages_BT))


def test_the_effective_share_falls_as_beta_grows():
    groups = as_groups(*random_groups(3))
    found = [importance(groups, ktae_importance_beta=beta)[1]["ktae/effective_share"] for beta in (0.0, 1.0, 4.0)]
    assert found[0] == 1
    assert 0 < found[2] < found[1] < 1


# The factor of K


@pytest.mark.parametrize("how", ["multiply", "add"])
def test_scaled_values(how):
    ids, mask, correct = random_groups(4)
    groups = as_groups(ids, mask, correct)
    K = key_token_values(ids, mask, correct, ignore_ids=SPECIAL).flatten(0, 1)
    A = groups.advantages_B[:, None]
    plain = credited(groups, ktae_combine=how)[1]
    for c in (0.0, 0.3, 1.0):
        values_BT, metrics, advantages_BT = credited(groups, ktae_combine=how, ktae_scale=c)
        torch.testing.assert_close(values_BT, c * K)
        torch.testing.assert_close(advantages_BT, A + c * (A.abs() * K if how == "multiply" else K))
        for name in ("value_right", "value_wrong", "abs_value", "saturated"):  # of K itself
            assert metrics[f"ktae/{name}"] == plain[f"ktae/{name}"] != 0
        ratio = (advantages_BT.abs() * groups.mask_BT).sum() / (A.abs() * groups.mask_BT).sum()
        assert metrics["ktae/advantage_ratio"] == pytest.approx(ratio.item())
        if c == 0:
            assert torch.equal(advantages_BT, A.expand_as(advantages_BT))


# In a training


def train(folder, **changes):
    trainer = make_trainer(folder, rollout_func=replay, max_steps=2, optim="sgd", **changes)
    start = weights(trainer)
    trainer.train()
    return trainer, difference(weights(trainer), start)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "changes",
    [{"ktae_combine": "importance", "ktae_importance_beta": 0.0}, {"ktae_scale": 0.0}],
    ids=["beta 0", "scale 0"],
)
def test_a_training_without_effect_is_grpo(tmp_path, changes):
    plain, moved = train(tmp_path / "a", credit="none")
    ours, _ = train(tmp_path / "b", **changes)
    assert moved > 1e-6
    assert difference(weights(ours), weights(plain)) < 1e-7


def test_a_training_logs_the_metrics_of_weights(tmp_path):
    trainer, moved = train(tmp_path, ktae_combine="importance", per_device_train_batch_size=32)
    assert moved > 1e-6
    (share, _) = logged(trainer, "ktae/effective_share")
    assert 0.5 < share < 1
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith("ktae/")}
    assert names == {"ktae/effective_share", "ktae/informative_groups", "ktae/seconds"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"ktae_combine": "importence"},
            r"'importence' is unknown \(did you mean 'importance'\?\). Choose from: multip",
        ),
        ({"ktae_scale": 1.5}, "ktae_scale must be between 0 and 1, not 1.5"),
        ({"ktae_scale": float("nan")}, "ktae_scale must be between 0 and 1, not nan"),
        ({"ktae_importance_beta": -1.0}, "ktae_importance_beta must be a finite number >= 0, not -1.0"),
        ({"ktae_importance_beta": float("inf")}, "ktae_importance_beta must be a finite number >= 0, not inf"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(UserError, match=words):
        config(**changes)


# What a user sees


def mixed(record) -> list[dict]:
    """The first group with correct and wrong rollouts."""
    return next(rows for rows in split(record) if {row["correct"] for row in rows} == {True, False})


def test_console_card_and_page_are_those_of_weights(tmp_path, capfd):
    changes = {"ktae_combine": "importance", "ktae_importance_beta": 2.0, "record_steps": 1}
    trainer, _ = train(tmp_path, per_device_train_batch_size=32, **changes)
    said = capfd.readouterr().out
    (head, *_) = [line for line in said.splitlines() if line.startswith("step of 2")]
    assert head.split()[-2:] == ["eff.", "w"]
    assert not {"K", "|K|>.9", "A'/A"} & set(head.split())
    assert "1 / mean w^2" in said
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "weighted by how strongly the token is associated" in card
    assert "raised or lowered" not in card
    assert "ktae_importance_beta: 2.0" in card

    page = Page(write_report(tmp_path, tmp_path / "page.html").read_text(encoding="utf-8"))
    index = page.data("index")
    (method,) = index["methods"]
    assert (method["title"], method["how"], method["key_tokens"]) == ("KTAE (importance)", "scale", False)
    assert method["value"] == {"symbol": "w", "name": "weight w"}
    assert method["settings"]["token advantage"] == "A' = A w"
    names = {panel["title"]: {trace["name"] for trace in panel["traces"]} for panel in index["panels"]}
    assert names["Shares"] == {"effective share", "informative groups"}
    assert "Mean value K" not in names
    number = next(i for i, group in enumerate(index["groups"]) if group["right"] and group["wrong"])
    group, row = page.data(f"block-{number}"), mixed(records.read(records.files(tmp_path)[0]))[0]
    assert (group["step"], group["group"], group["notes"]) == (row["step"], row["group"], [])
    cells = group["rollouts"][0]["cells"]
    shown = [cells["value"][cell] for cell in group["rollouts"][0]["at"]]
    assert shown == pytest.approx(row["credit"], rel=1e-6)
    assert len(set(shown)) > 2


def test_a_page_of_scaled_values_says_so(tmp_path):
    train(tmp_path, ktae_scale=0.5, record_steps=1, per_device_train_batch_size=32)
    path = records.files(tmp_path)[0]
    record = records.read(path)
    assert record.method.symbol == "0.5K"
    assert describe(record.method, mixed(record))["notes"] == []  # K computed again agrees with what was recorded
    other = record.method._replace(settings=record.method.settings | {"ktae_scale": 1.0})
    assert "differs from the recorded K" in describe(other, mixed(record))["notes"][0]
    page = Page(write_report(path, tmp_path / "page.html").read_text(encoding="utf-8"))
    (method,) = page.data("index")["methods"]
    assert method["settings"]["token advantage"] == "A' = A + |A| 0.5K"
    assert method["key_tokens"]


def test_a_record_without_the_settings_is_valued_as_before():
    rows = random_group(seed=2)
    method = records.method_of(find_method("ktae"), "multiply", {"ktae_combine": "multiply", "ktae_ig_weight": 1.0})
    assert describe(method, rows)["notes"] == []


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_rollouts_of_any_source(tokenizer, leave_one_out):
    rows = [
        {"prompt": "2 + 2", "completion": text, "correct": text.endswith("4")}
        for text in ("It is 4", "2 + 2 is 4", "It is 5", "That is 2 + 3")
    ]
    record = explain(rows, tokenizer, combine="importance", leave_one_out=leave_one_out).record
    assert (record.method.how, record.method.symbol) == ("scale", "w")
    T = max(len(row["token_ids"]) for row in record.rows)
    ids, mask = ([row[name] + [0] * (T - len(row[name])) for row in record.rows] for name in ("token_ids", "trained"))
    expected = ktae_loop.importance_weights(
        [ids], [mask], [[row["correct"] for row in record.rows]], leave_one_out=leave_one_out
    )[0]
    assert len(set(expected.flatten())) > 2
    for row, weights_T in zip(record.rows, expected, strict=True):
        own = weights_T[: len(row["token_ids"])]
        np.testing.assert_allclose(row["credit"], own, rtol=2e-6)
        np.testing.assert_allclose(row["advantages"], row["advantage"] * own, rtol=2e-6)
