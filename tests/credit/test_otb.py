"""OTB against a slow loop over whole distributions and by autograd, its properties, and in a training."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from ktae_trl.credit.otb import OTB, energies, token_advantages
from ktae_trl.policy import whole
from tests.reference import otb_loop
from tests.trainers import first_batch, logged, make_trainer, replay


def random_group(seed: int, G: int = 6, T: int = 9, V: int = 5):
    """Rollouts of unequal length with holes (tool output), the longest of which is alone at the end."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    distributions = (3 * torch.randn(G, T, V, generator=generator)).softmax(-1)
    ids = torch.randint(V, (G, T), generator=generator)
    lengths = [T, *rng.choices(range(T - 1), k=G - 1)]
    mask = torch.tensor([[t < n and (t == T - 1 or rng.random() < 0.9) for t in range(T)] for n in lengths])
    returns = torch.randn(G, generator=generator)
    return distributions, ids, mask, returns


def found_for(distributions, ids, mask, returns) -> torch.Tensor:
    probs = distributions.gather(-1, ids[..., None])[..., 0]
    energy = energies(probs, distributions.square().sum(-1), mask)
    return token_advantages(returns[None], energy[None], mask[None])[0]


@pytest.mark.parametrize("seed", range(5))
def test_against_the_slow_loop(seed):
    group = random_group(seed)
    expected = otb_loop.token_advantages(*(x.tolist() for x in group))
    torch.testing.assert_close(found_for(*group), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    assert found_for(*group).std() > 0.1


def test_a_term_of_the_energy_is_the_squared_gradient_of_the_logits():
    logits = torch.tensor([1.0, -0.5, 0.3], requires_grad=True)
    for token in range(3):
        probs = logits.softmax(-1)
        (gradient,) = torch.autograd.grad(probs[token].log(), logits)
        term = energies(probs[token, None], probs.square().sum()[None], torch.ones(1).bool())
        assert term.item() == pytest.approx(gradient.square().sum().item(), abs=1e-6)


def test_energies_by_hand():
    """1 - 2 x 0.5 + 0.5 = 0.5 for one of two equally likely tokens; 0 for a sure one; masked tokens add nothing."""
    probs, squares = torch.tensor([0.5, 1.0, 0.5, 0.5]), torch.tensor([0.5, 1.0, 0.5, 0.5])
    mask = torch.tensor([True, True, False, True])
    assert energies(probs, squares, mask).tolist() == [0.5, 0.5, 0.5, 1.0]
    assert energies(torch.tensor([1.0000001]), torch.tensor([1.0]), mask[:1]).tolist() == [0.0]


def test_advantages_by_hand():
    """Returns 1 and 0 with W of 1 and 3: the baseline is 1/4. Then the second has ended: the baseline is the mean."""
    values = token_advantages(
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[[1.0, 1.5], [3.0, 3.0]]]),
        torch.tensor([[[True, True], [True, False]]]),
    )
    torch.testing.assert_close(values, torch.tensor([[[0.75, 0.5], [-0.25, 0.0]]]), atol=1e-5, rtol=0)


# Properties


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_with_equal_weights_the_baseline_is_the_mean_of_those_alive(weight):
    _, _, mask, returns = random_group(3)
    values = token_advantages(returns[None], torch.full(mask.shape, weight)[None], mask[None])[0]
    for t in range(mask.shape[1]):
        alive = mask[:, t]
        if alive.sum() > 1:
            torch.testing.assert_close(values[alive, t], returns[alive] - returns[alive].mean())


def test_adding_a_number_to_the_returns_changes_nothing_and_a_factor_is_kept():
    distributions, ids, mask, returns = random_group(4)
    values = found_for(distributions, ids, mask, returns)
    torch.testing.assert_close(found_for(distributions, ids, mask, returns + 3), values, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_for(distributions, ids, mask, 2 * returns), 2 * values)


def test_a_rollout_that_is_alone_keeps_its_advantage():
    distributions, ids, mask, returns = random_group(5)
    values = found_for(distributions, ids, mask, returns)
    assert mask[:, -1].sum() == 1
    assert values[mask[:, -1], -1].item() == pytest.approx((returns[mask[:, -1]] - returns.mean()).item(), abs=1e-6)


def test_no_other_baseline_has_a_smaller_weighted_square():
    distributions, ids, mask, returns = random_group(6)
    energy = energies(distributions.gather(-1, ids[..., None])[..., 0], distributions.square().sum(-1), mask)
    values = found_for(distributions, ids, mask, returns)
    for t in range(mask.shape[1] - 1):
        alive = mask[:, t]
        if alive.sum() < 2:
            continue
        best = (energy[alive, t] * values[alive, t].square()).sum()
        for other in torch.linspace(-2, 2, 41):
            assert best <= (energy[alive, t] * (returns[alive] - other).square()).sum() + 1e-5


def test_equal_returns_have_no_advantage():
    distributions, ids, mask, returns = random_group(7)
    assert found_for(distributions, ids, mask, torch.full_like(returns, 2.0)).abs().max() < 1e-5


# What the tools give


def test_probabilities_and_squares_are_those_of_the_logits(tmp_path):
    """The head of the model is put back afterwards: the loss and generation use it as before."""
    trainer = make_trainer(tmp_path, credit="otb", rollout_func=replay, temperature=0.7, max_completion_length=40)
    forward, seen = trainer.model.forward, []

    def spy(groups):
        seen.append((groups, tools_squares(groups)))
        return seen[0][1]

    tools = trainer.token_credit.tools
    tools_squares, tools.token_squares = tools.token_squares, spy
    first_batch(trainer)
    assert trainer.model.forward == forward
    groups, (probs_BT, squares_BT) = seen[0]
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    for prompt, completion, probs, squares in zip(
        groups.prompts, groups.completions, probs_BT, squares_BT, strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        distributions, n = logits.softmax(-1), len(completion)
        torch.testing.assert_close(probs[:n], distributions[range(n), completion], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(squares[:n], distributions.square().sum(-1), atol=1e-5, rtol=1e-4)
        assert not probs[n:].any()
        assert not squares[n:].any()


class Processes:
    """Stands in for accelerate: process `index` of several, which hold `parts`."""

    def __init__(self, index: int, parts: list[torch.Tensor]):
        self.process_index, self.parts, self.calls = index, parts, 0

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert torch.equal(x, self.parts[self.process_index])
        return torch.cat(self.parts)


def test_groups_are_completed_from_other_processes():
    """Three processes with 4 rollouts each, in groups of 3: the second process holds parts of the second and third."""
    x = torch.randn(12, 2)
    parts = list(x.split(4))
    for index, groups in enumerate([(0, 2), (1, 3), (2, 4)]):
        found = whole(parts[index], 3, Processes(index, parts))
        assert torch.equal(found, x.view(4, 3, 2)[slice(*groups)])
    alone = Processes(1, parts)
    assert torch.equal(whole(parts[1], 2, alone), x[4:8].view(2, 2, 2))
    assert alone.calls == 0  # whole groups on each process
    flat = [part[:, 0] for part in parts]
    assert whole(flat[0], 3, Processes(0, flat)).shape == (2, 3)


# In a training


def test_in_a_training_the_values_are_those_of_whole_distributions(tmp_path):
    settings = {"credit": "otb", "rollout_func": replay, "max_completion_length": 40, "max_steps": 1}
    trainer = make_trainer(tmp_path, **settings)
    batch = first_batch(trainer)
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    mask, B, T = batch["completion_mask"].bool(), *batch["completion_ids"].shape
    distributions = torch.zeros(B, T, model.config.vocab_size)
    for row in range(B):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][mask[row]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        distributions[row, : len(completion)] = logits.softmax(-1)
    for group in range(B // 8):
        rows = slice(8 * group, 8 * group + 8)
        expected = otb_loop.token_advantages(
            distributions[rows].tolist(),
            batch["completion_ids"][rows].tolist(),
            mask[rows].tolist(),
            batch["advantages"][rows].tolist(),
        )
        torch.testing.assert_close(batch["credit"][rows], torch.tensor(expected), atol=1e-3, rtol=1e-3)
    trainer.train()
    before = batch["advantages"][:, None] * mask
    ratio = batch["credit"].abs().sum() / before.abs().sum()
    assert logged(trainer, "otb/advantage_ratio") == pytest.approx([ratio.item()], rel=1e-3)
    assert 0 < logged(trainer, "otb/variance_ratio")[0] < 1
    alone = mask.view(-1, 8, T) & (mask.view(-1, 8, T).sum(1, keepdim=True) == 1)
    assert logged(trainer, "otb/alone") == pytest.approx([(alone.sum() / mask.sum()).item()])
    assert alone.any()


def credit_of(probs, squares, advantages: list[float], scored: list[bool]):
    """The credit of one group on one process, all of whose tokens are trained on."""
    G, T = probs.shape
    groups = SimpleNamespace(
        mask_PGT=torch.ones(1, G, T).bool(),
        mask_BT=torch.ones(G, T).bool(),
        scored_PG=torch.tensor([scored]),
        advantages_B=torch.tensor(advantages),
        own_rows=lambda x: x.flatten(0, 1),
    )
    tools = SimpleNamespace(
        token_squares=lambda groups: (probs, squares), of_groups=lambda groups, x: x.unflatten(0, (1, G))
    )
    return OTB(None, tools).credit(groups)


def test_a_rollout_without_a_reward_is_not_trained_on():
    """TRL gives it A = 0. With another reward it has one, and takes part."""
    probs, squares = torch.tensor([[0.5], [0.0], [0.3]]), torch.full((3, 1), 0.5)
    credit = credit_of(probs, squares, [1.0, -1.0, 0.0], [True, True, False])
    two = credit_of(probs[:2], squares[:2], [1.0, -1.0], [True, True])
    assert credit.values_BT[2].tolist() == [0]
    assert torch.equal(credit.values_BT[:2], two.values_BT)
    other = credit_of(probs, squares, [1.0, -1.5, 0.5], [True, True, False])
    assert other.values_BT[2].item() != 0


def test_metrics_by_hand():
    """Returns 1 and -1, one token each: W = 0.5 and 1.5, so B = -0.5 and A' = 1.5 and -0.5."""
    probs, squares = torch.tensor([[0.5], [0.0]]), torch.tensor([[0.5], [0.5]])
    credit = credit_of(probs, squares, [1.0, -1.0], [True, True])
    torch.testing.assert_close(credit.values_BT, torch.tensor([[1.5], [-0.5]]), atol=1e-5, rtol=0)
    sums = {name: (total.item(), count.item()) for name, (total, count) in credit.sums.items()}
    assert sums["otb/variance_ratio"] == pytest.approx((0.5 * 2.25 + 1.5 * 0.25, 2.0), abs=1e-4)
    assert sums["otb/advantage_ratio"] == pytest.approx((2.0, 2.0), abs=1e-4)
    assert sums["otb/alone"] == (0, 2)
