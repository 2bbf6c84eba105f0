"""GTPO against a slow loop and by hand, its degenerate groups, and in a training."""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from ktae_trl import KTAEGRPOConfig, tiny
from ktae_trl.credit.gtpo import GTPO, entropy_shares, standardized, token_advantages
from ktae_trl.rewards import math_accuracy
from tests.reference import gtpo_loop
from tests.trainers import first_batch, logged, make_trainer, replay

CPU = {"output_dir": "x", "use_cpu": True, "bf16": False}


def advantages(entropies, mask, correct, **settings) -> torch.Tensor:
    """The advantages of one group; `correct` has None for rollouts that were not graded."""
    return token_advantages(
        torch.tensor([entropies]),
        torch.tensor([mask]).bool(),
        torch.tensor([[side is True for side in correct]]),
        torch.tensor([[side is not None for side in correct]]),
        **settings,
    )[0]


def random_groups(seed: int, P: int = 4, G: int = 7, T: int = 9):
    """Groups with rollouts of unequal length, holes (tool output), rollouts without any trained token or verdict."""
    rng = random.Random(seed)
    entropies = [[[rng.choice([0.0, rng.expovariate(2)]) for _ in range(T)] for _ in range(G)] for _ in range(P)]
    mask = [
        [[t < n and rng.random() < 0.9 for t in range(T)] for n in rng.choices(range(T + 1), k=G)] for _ in range(P)
    ]
    correct = [rng.choices([True, False, None], weights=[3, 3, 1], k=G) for _ in range(P)]
    return entropies, mask, correct


@pytest.mark.parametrize("normalize", ["group", "sides"])
@pytest.mark.parametrize("seed", range(5))
def test_against_the_slow_loop(seed, normalize):
    entropies, mask, correct = random_groups(seed)
    found = token_advantages(
        torch.tensor(entropies),
        torch.tensor(mask),
        torch.tensor([[side is True for side in group] for group in correct]),
        torch.tensor([[side is not None for side in group] for group in correct]),
        entropy_weight=0.3,
        normalize=normalize,
    )
    # alpha_1 and alpha_2 matter only by their ratio, and not at all if each side is normalised.
    expected = [
        gtpo_loop.token_advantages(*group, alpha1=2.0, alpha2=0.6, together=normalize == "group")
        for group in zip(entropies, mask, correct, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert (found != 0).float().mean() > 0.1
    assert (found[~torch.tensor(mask)] == 0).all()


def test_shares_by_hand():
    """Entropies 0.3 and 0.1 of correct rollouts give 3/4 and 1/4 of two shares; of wrong ones, 1/4 and 3/4."""
    entropies = torch.tensor([[[0.3], [0.1], [0.3], [0.1], [5.0]]]) - 1e-3
    alive = torch.tensor([[[True], [True], [True], [True], [False]]])
    correct = torch.tensor([[True, True, False, False, False]])
    shares = entropy_shares(entropies, alive, correct)[0, :, 0]
    torch.testing.assert_close(shares, torch.tensor([1.5, 0.5, 0.5, 1.5, 0.0]))


def test_a_position_without_entropy_has_equal_shares_and_rounding_is_no_entropy():
    entropies = torch.tensor([[[0.0], [-1e-7], [0.0], [-1e-7]]])
    correct = torch.tensor([[True, True, False, False]])
    assert entropy_shares(entropies, torch.ones(1, 4, 1).bool(), correct).flatten().tolist() == [1.0] * 4


def test_advantages_by_hand():
    """Two correct and two wrong rollouts of one token, with shares 3/2 and 1/2."""
    entropies = [[0.299], [0.099], [0.099], [0.299]]
    mask, correct = [[1]] * 4, [True, True, False, False]
    sides = advantages(entropies, mask, correct, normalize="sides")[:, 0]
    torch.testing.assert_close(sides, torch.tensor([1.0, -1.0, -1.0, 1.0]), atol=1e-5, rtol=0)
    # r~ = 1.15, 1.05, -1.15, -1.05: their mean is 0.
    std = math.sqrt((1.15**2 + 1.05**2) / 2)
    group = advantages(entropies, mask, correct)[:, 0]
    torch.testing.assert_close(group, torch.tensor([1.15, 1.05, -1.15, -1.05]) / std, atol=1e-5, rtol=0)


def test_the_sides_are_normalised_separately():
    entropies, mask, correct = random_groups(7, P=1, G=16, T=40)
    found = advantages(entropies[0], mask[0], correct[0], normalize="sides")
    for side in (True, False):
        rows = [i for i, own in enumerate(correct[0]) if own is side]
        tokens = found[rows][torch.tensor(mask[0])[rows]]
        assert tokens.mean().item() == pytest.approx(0, abs=1e-5)
        assert tokens.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_normalised_by_sides_the_sign_follows_entropy_and_not_correctness():
    """As the page says: here it is the same with the verdicts exchanged."""
    entropies, mask = [[0.1, 0.5], [0.5, 0.1], [0.1, 0.5], [0.5, 0.1]], [[1, 1]] * 4
    found = advantages(entropies, mask, [True, True, False, False], normalize="sides")
    exchanged = advantages(entropies, mask, [False, False, True, True], normalize="sides")
    assert torch.equal(found > 0, torch.tensor(entropies) > 0.3)
    assert torch.equal(found > 0, exchanged > 0)
    by_group = advantages(entropies, mask, [True, True, False, False])
    assert torch.equal(by_group > 0, torch.tensor([[True], [True], [False], [False]]).expand(4, 2))


# Degenerate groups


@pytest.mark.parametrize("normalize", ["group", "sides"])
@pytest.mark.parametrize("correct", [[True] * 3, [False] * 3, [None] * 3, [True, True, None], [False, None, None]])
def test_a_group_of_one_side_gets_nothing(correct, normalize):
    entropies = [[0.1, 0.5], [0.7, 0.2], [0.3, 0.4]]
    assert (advantages(entropies, [[1, 1]] * 3, correct, normalize=normalize) == 0).all()


def test_a_side_whose_rollouts_are_all_masked_is_no_side():
    """Truncated rollouts that are not trained on have a mask of zeros."""
    entropies = [[0.1, 0.5], [0.7, 0.2], [0.3, 0.4]]
    assert (advantages(entropies, [[1, 1], [1, 1], [0, 0]], [True, True, False]) == 0).all()


def test_the_only_rollout_of_a_side_gets_nothing_by_sides_and_its_side_by_group():
    """Its shares are 1 everywhere, so that there is nothing to normalise."""
    rng = random.Random(1)
    entropies = [[rng.random() for _ in range(200)] for _ in range(4)]
    correct = [True, False, False, False]
    by_sides = advantages(entropies, [[1] * 200] * 4, correct, normalize="sides")
    assert (by_sides[0] == 0).all()
    assert (by_sides[1:] != 0).all()
    by_group = advantages(entropies, [[1] * 200] * 4, correct)
    assert (by_group[0] > 0).all()


def test_a_constant_is_standardised_to_zero():
    """Also if it is rounded differently at some tokens."""
    x = torch.ones(1, 3, 100)
    x[0, 1, ::2] += torch.finfo(torch.float32).eps
    assert (standardized(x, torch.ones_like(x).bool()) == 0).all()
    assert (standardized(x, torch.zeros_like(x).bool()) == 0).all()


# Settings, and in a training


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gtpo_normalize": "side"}, "gtpo_normalize must be one of group, sides, not 'side'"),
        ({"gtpo_entropy_weight": -0.1}, "gtpo_entropy_weight must be at least 0, not -0.1"),
        ({"gtpo_entropy_weight": math.nan}, "gtpo_entropy_weight must be at least 0, not nan"),
        ({"gtpo_entropy_weight": math.inf}, "gtpo_entropy_weight must be at least 0, not inf"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        KTAEGRPOConfig(credit="gtpo", **CPU, **settings)


@pytest.mark.parametrize("normalize", ["group", "sides"])
def test_in_a_training_the_values_are_those_of_single_passes(tmp_path, normalize):
    settings = {"credit": "gtpo", "gtpo_normalize": normalize, "rollout_func": replay, "max_completion_length": 40}
    trainer = make_trainer(tmp_path, temperature=0.8, max_steps=1, per_device_train_batch_size=32, **settings)
    batch = first_batch(trainer)
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    mask = batch["completion_mask"].bool()
    entropies = torch.zeros(mask.shape)
    for row in range(len(mask)):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][mask[row]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1] / 0.8
        entropies[row, : len(completion)] = torch.special.entr(logits.softmax(-1)).sum(-1)
    correct = batch["advantages"].view(-1, 8) > 0
    mixed = correct.any(1)
    assert mixed.tolist().count(True) in (2, 3)  # and at least one group is all wrong
    for group in range(4):
        rows = slice(8 * group, 8 * group + 8)
        expected = gtpo_loop.token_advantages(
            entropies[rows].tolist(), mask[rows].tolist(), correct[group].tolist(), together=normalize == "group"
        )
        torch.testing.assert_close(
            batch["credit"][rows], torch.tensor(expected), atol=0.02, rtol=0.02
        )  # of rounded entropies near 0
    values = batch["credit"]
    turned = torch.where(correct.flatten()[:, None], values < 0, values > 0)
    turned = turned[mask & mixed.repeat_interleave(8)[:, None]].float().mean().item()
    trainer.train()
    assert logged(trainer, "gtpo/turned_tokens") == pytest.approx([turned], abs=0.01)
    assert logged(trainer, "gtpo/trained_share") == pytest.approx([(values[mask] != 0).float().mean().item()], abs=0.01)
    ratio = values.abs().sum() / (batch["advantages"].abs()[:, None] * mask).sum()
    assert logged(trainer, "gtpo/advantage_ratio") == pytest.approx([ratio.item()], rel=0.01)


def test_other_rewards_are_not_seen(tmp_path):
    """Values replace advantages, so a second reward function changes nothing but TRL's advantages."""

    def shorter(completions, **kwargs):
        return [-0.01 * len(text[-1]["content"]) for text in completions]

    batches = [
        first_batch(make_trainer(tmp_path, credit="gtpo", rollout_func=replay, max_steps=1, reward_funcs=rewards))
        for rewards in (math_accuracy, [math_accuracy, shorter])
    ]
    assert not torch.equal(batches[0]["advantages"], batches[1]["advantages"])
    torch.testing.assert_close(batches[0]["credit"], batches[1]["credit"])
    assert GTPO.how == "replace"
