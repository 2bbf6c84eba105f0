"""The needle benchmark: its model, its loss, its methods, its programme and its report."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import needle  # noqa: E402
import needle_model as model  # noqa: E402
import needle_task as task  # noqa: E402
from needle_rows import ROWS, Rollouts  # noqa: E402

from ktae_trl.rollouts.verdicts import Verdicts  # noqa: E402
from tests.reference import gtpo_loop, otb_loop  # noqa: E402
from tests.trainers import hook, make_trainer  # noqa: E402

CONFIG = yaml.safe_load(needle.CONFIG.read_text())
FILLER = 2


@pytest.fixture(autouse=True)
def _short_warm_start(monkeypatch):
    """Start from untrained policies."""
    monkeypatch.setattr(task, "WARM_STEPS", 0)
    task.starting_policies.cache_clear()
    yield
    task.starting_policies.cache_clear()


def policies(seeds) -> model.Parameters:
    start = task.starting_policies(0.0)
    return {name: value[torch.tensor(seeds) % task.WARM_MODELS].clone() for name, value in start.items()}


def rollouts(seeds, group=8):
    p = policies(seeds)
    trace, found, _ = task.sample(p, group, "all", FILLER, task.Noise(seeds), tree=False)
    logps = model.log_distributions(p, trace, task.grammar(FILLER).allowed_TV)
    return p, trace, found._replace(logps_STGV=logps)


class Reference(nn.Module):
    """One policy as modules of PyTorch, with the interface that TRL expects of a causal language model."""

    def __init__(self, p: model.Parameters, s: int):
        super().__init__()
        _, V, X = p["table_SVX"].shape
        self.gru, self.head = nn.GRU(V, X // 3, batch_first=True), nn.Linear(X // 3, V)
        state = {
            "weight_ih_l0": p["table_SVX"][s].T,
            "weight_hh_l0": p["recurrent_SHX"][s].T,
            "bias_ih_l0": torch.zeros(X),
            "bias_hh_l0": p["recurrent_bias_SX"][s],
        }
        self.gru.load_state_dict(state)
        self.head.load_state_dict({"weight": p["output_SHV"][s].T, "bias": p["output_bias_SV"][s]})

    def forward(self, input_ids, **_):
        """Return what TRL reads of an output: log-probability and entropy at each token but the first."""
        states, _ = self.gru(nn.functional.one_hot(input_ids[:, :-1], self.gru.input_size).float())
        logits = self.head(states).masked_fill(~task.grammar(FILLER).allowed_TV, -torch.inf)
        at = torch.distributions.Categorical(logits=logits)
        return SimpleNamespace(logits=logits, log_probs=at.log_prob(input_ids[:, 1:]), entropy=at.entropy().detach())

    def gradient(self) -> model.Parameters:
        return {
            "table_SVX": self.gru.weight_ih_l0.grad.T,
            "recurrent_SHX": self.gru.weight_hh_l0.grad.T,
            "recurrent_bias_SX": self.gru.bias_hh_l0.grad,
            "output_SHV": self.head.weight.grad.T,
            "output_bias_SV": self.head.bias.grad,
        }


# The model


def test_the_batched_model_is_that_of_torch():
    p, trace, found = rollouts([3, 4, 5])
    weight = torch.randn(found.ids_SGT.shape)
    gradient = model.gradients(p, trace, task.grammar(FILLER).allowed_TV, lambda logps, _: (logps * weight).sum())
    for s in range(3):
        reference = Reference(p, s)
        output = reference(torch.cat([torch.full((8, 1), task.BEGIN), found.ids_SGT[s]], 1))
        logps, chosen = output.logits.log_softmax(-1), output.log_probs
        torch.testing.assert_close(found.logps_STGV[s].transpose(0, 1), logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logps_SGT[s], chosen, rtol=1e-5, atol=1e-5)
        (chosen * weight[s]).sum().backward()
        for name, g in reference.gradient().items():
            torch.testing.assert_close(gradient[name][s], g, rtol=1e-4, atol=1e-5)


def test_entropies_and_squares_are_those_of_the_distributions():
    *_, found = rollouts([1])
    at = torch.distributions.Categorical(logits=found.logps_STGV[0].transpose(0, 1))
    torch.testing.assert_close(found.entropies_SGT[0], at.entropy())
    torch.testing.assert_close(found.squares_SGT[0], at.probs.square().sum(-1))


def test_gradients_are_clipped_per_policy():
    gradient = {"a": torch.randn(3, 4, 2), "b": torch.randn(3, 5)}
    gradient = {name: g * torch.tensor([0.1, 1, 10]).view(-1, *[1] * (g.dim() - 1)) for name, g in gradient.items()}
    expected = []
    for s in range(3):
        leaves = [nn.Parameter(g[s].clone()) for g in gradient.values()]
        for leaf in leaves:
            leaf.grad = leaf.detach().clone()
        nn.utils.clip_grad_norm_(leaves, 1.0)
        expected.append([leaf.grad for leaf in leaves])
    model.clip_each(gradient, 1.0)
    for s in range(3):
        for g, wanted in zip(gradient.values(), expected[s], strict=True):
            torch.testing.assert_close(g[s], wanted)


@pytest.mark.parametrize("row", ["grpo", "multiply_shuffled", "tree"])
def test_seeds_do_not_depend_on_those_beside_them(row):
    cell = task.Cell(row, 3e-3, FILLER)
    alone, together = task.train(cell, [7, 8, 9], steps=5), task.train(cell, [5, 7, 8, 9, 11], steps=5)
    torch.testing.assert_close(alone.accuracy_SN, together.accuracy_SN[1:4])
    for name, value in alone.policies.items():
        torch.testing.assert_close(value, together.policies[name][1:4], rtol=1e-4, atol=1e-5)
    assert (alone.policies["table_SVX"] - policies([7, 8, 9])["table_SVX"]).abs().max() > 5e-3


# The loss and the methods, against the trainer

SETTINGS = {
    "grpo": {"credit": "none"},
    "multiply": {"credit": "ktae"},
    "multiply_loo": {"credit": "ktae", "ktae_leave_one_out": True},
    "add": {"credit": "ktae", "ktae_combine": "add"},
    "add_loo": {"credit": "ktae", "ktae_combine": "add", "ktae_leave_one_out": True},
    "importance": {"credit": "ktae", "ktae_combine": "importance"},
    "importance_loo": {"credit": "ktae", "ktae_combine": "importance", "ktae_leave_one_out": True},
    "tree": {"credit": "tree", "tree_segment_tokens": FILLER + 3, "tree_normalizer": "bernoulli"},
}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("row", SETTINGS)
def test_the_gradient_is_that_of_the_trainer(row, loss_type, tmp_path):
    """The trainer computes advantages, token credit and the loss of the same rollouts with the same model."""
    if (row, loss_type) == ("tree", "grpo"):
        pytest.skip("trees need a token-level loss")
    seeds = [1, 2, 3]
    p = policies(seeds)
    tree = ROWS[row].tree
    trace, found, _ = task.sample(p, 8, "all", FILLER, task.Noise(seeds), tree=tree)

    def loss(logps_SGT, logps_STGV):
        advantages = ROWS[row].advantages(found._replace(logps_STGV=logps_STGV))
        return task.policy_loss(logps_SGT, advantages, found.mask_SGT)

    gradient = model.gradients(p, trace, task.grammar(FILLER).allowed_TV, loss)
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=8, loss_type=loss_type, max_completion_length=15, **SETTINGS[row]
    )
    assert (trainer.epsilon_low, trainer.beta, trainer.args.max_grad_norm) == (0.2, 0.0, task.MAX_GRAD_NORM)
    informative = 0
    for s in range(len(seeds)):
        correct = found.correct_SG[s]
        informative += bool(correct.any() and not correct.all())
        batch = {
            "prompt_ids": torch.full((8, 1), task.BEGIN),
            "prompt_mask": torch.ones(8, 1, dtype=torch.long),
            "completion_ids": found.ids_SGT[s],
            "completion_mask": torch.ones_like(found.ids_SGT[s]),
            "tool_mask": found.mask_SGT[s].long(),
            "advantages": trainer_advantages(correct),
            "num_items_in_batch": found.mask_SGT[s].sum(),
        }
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # transformers sets it when training begins
        judged = Verdicts(correct[None], torch.ones_like(correct)[None])
        trainer.token_credit.special_ids = ()
        trainer.token_credit.add_to(batch, [{}] * 8, judged)
        reference = Reference(p, s).train()
        hook(trainer, "loss")(reference, batch).backward()
        for name, g in reference.gradient().items():
            torch.testing.assert_close(gradient[name][s], g, rtol=1e-3, atol=1e-6, msg=f"{name} of seed {s}")
    assert informative >= 2


def trainer_advantages(correct: torch.Tensor) -> torch.Tensor:
    rewards = correct.double().numpy()
    return torch.tensor((rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)).float()


def test_entropies_and_probabilities_are_those_of_the_policies():
    """GTPO and OTB against the slow loops, from the distributions of the policies."""
    seeds = [1, 2, 3]
    p = policies(seeds)
    trace, found, _ = task.sample(p, 8, "all", FILLER, task.Noise(seeds), tree=False)
    kept = {}

    def loss(logps_SGT, logps_STGV):
        kept["logps_STGV"] = logps_STGV.detach()
        return logps_SGT.sum()

    model.gradients(p, trace, task.grammar(FILLER).allowed_TV, loss)
    found = found._replace(**kept)
    gtpo, otb = (ROWS[name].advantages(found) for name in ("gtpo", "otb"))
    for s in range(len(seeds)):
        probs_GTV = kept["logps_STGV"][s].transpose(0, 1).double().exp()
        entropies_GT = torch.distributions.Categorical(probs_GTV).entropy()
        mask, correct = found.mask_SGT[s].tolist(), found.correct_SG[s].tolist()
        wanted = gtpo_loop.token_advantages(entropies_GT.tolist(), mask, correct, together=True)
        torch.testing.assert_close(gtpo[s], torch.tensor(wanted), rtol=1e-3, atol=1e-4)
        returns = trainer_advantages(found.correct_SG[s]).tolist()
        wanted = otb_loop.token_advantages(probs_GTV.tolist(), found.ids_SGT[s].tolist(), mask, returns)
        torch.testing.assert_close(otb[s], torch.tensor(wanted), rtol=1e-3, atol=1e-4)


def test_oracles_credit_what_they_say():
    *_, found = rollouts([1, 2])
    decides = torch.zeros(3 * (FILLER + 3), dtype=torch.bool)
    decides[[FILLER + 1, 2 * FILLER + 4, 3 * FILLER + 7]] = True
    oracle, anti = (ROWS[name].advantages(found) for name in ("oracle", "anti_oracle"))
    torch.testing.assert_close(oracle + anti, ROWS["grpo"].advantages(found))
    assert (oracle[..., ~decides] == 0).all()
    assert (anti[..., decides] == 0).all()
    steps = ROWS["oracle_steps"].advantages(found)
    for s in range(2):
        for k, t in enumerate(decides.nonzero().flatten()):
            torch.testing.assert_close(steps[s, :, t], trainer_advantages(found.success_SGK[s, :, k]))


def test_focus_and_signal_by_hand():
    """Two rollouts of three steps without filler words; the decisions are at 1, 4 and 7."""
    ids = torch.tensor([[1, 5, 4, 2, 7, 4, 3, 9, 4], [1, 5, 4, 2, 8, 4, 3, 10, 4]])[None]
    decides = torch.arange(9) % 3 == 1
    found = Rollouts(ids, torch.ones_like(ids).bool(), decides, torch.ones(1, 2, 3).bool(), torch.zeros(1, 2))
    advantages = torch.tensor([[1.0] * 9, [-2.0] * 9])[None]
    advantages[0, 1, 1] = -3.0
    assert [x.item() for x in task.credit_of_decisions(advantages, found)] == [3 + 7, 3 - 3 + 4, 9 + 19]


def test_focus_of_oracles():
    focus = {row: task.train(task.Cell(row, 1e-3, FILLER), [1], steps=3) for row in ("grpo", "oracle", "anti_oracle")}
    assert focus["grpo"].focus_S.item() == pytest.approx(1)
    assert focus["oracle"].focus_S.item() == pytest.approx(FILLER + 3)
    assert focus["anti_oracle"].focus_S.item() == 0
    assert focus["oracle"].signal_S.item() > focus["grpo"].signal_S.item() * 2


def test_shuffled_labels_keep_the_split_and_change_the_values():
    *_, found = rollouts([1, 2, 3, 4])
    order = found.order_SG.argsort(1)
    assert all(len(set(one.tolist())) == 8 for one in order)
    for name in ("multiply", "add"):
        shuffled, plain = ROWS[f"{name}_shuffled"].advantages(found), ROWS[name].advantages(found)
        assert not torch.allclose(shuffled, plain)
        same = found._replace(order_SG=torch.arange(8.0).expand(4, -1))
        torch.testing.assert_close(ROWS[f"{name}_shuffled"].advantages(same), plain)


def test_variants_of_the_formula():
    """Each variant changes the values where it says, and only there."""
    *_, found = rollouts([1, 2, 3, 4])
    A_SG1 = found.advantages_SG[..., None]
    plain = ROWS["multiply"].advantages(found)
    supported = ROWS["multiply_supported"].advantages(found)
    for s, group in enumerate(found.ids_SGT.tolist()):
        times = [sum(token in rollout for rollout in group) for token in range(task.VOCABULARY)]
        alone = torch.tensor([[times[token] == 1 for token in rollout] for rollout in group])
        torch.testing.assert_close(supported[s], torch.where(alone, A_SG1[s], plain[s]))
    assert not torch.allclose(supported, plain)

    by_step = ROWS["multiply_by_step"].advantages(found)
    step_T = torch.arange(3).repeat_interleave(FILLER + 3)
    for k in range(3):
        elsewhere = found.ids_SGT + task.VOCABULARY * (1 + step_T)  # tokens of other steps are other tokens
        again = ROWS["multiply"].advantages(found._replace(ids_SGT=torch.where(step_T == k, found.ids_SGT, elsewhere)))
        torch.testing.assert_close(by_step[..., step_T == k], again[..., step_T == k])

    def change(advantages: torch.Tensor) -> float:
        return (advantages - A_SG1).abs().mean().item()

    for name in ("multiply_no_tf", "multiply_smoothed"):  # without the ratio that saturates for one-sided tokens
        assert 0 < change(ROWS[name].advantages(found)) < change(plain)


# The task


@pytest.mark.parametrize("filler", [0, 2])
def test_completions_follow_the_grammar(filler):
    _, found, _ = task.sample(policies([1]), 8, "all", filler, task.Noise([1]), tree=False)
    ids = found.ids_SGT[0].unflatten(1, (3, filler + 3))
    words, number, decision, stop = ids.split([filler, 1, 1, 1], 2)
    assert ((words >= task.FILLER) & (words < task.VOCABULARY)).all()
    assert (number.squeeze(2) == torch.tensor([1, 2, 3])).all()
    assert (stop == 4).all()
    assert all(set(decision[:, k].flatten().tolist()) == {5 + 2 * k, 6 + 2 * k} for k in range(3))
    assert found.decides_T.unflatten(0, (3, -1)).nonzero()[:, 1].tolist() == [filler + 1] * 3


@pytest.mark.parametrize(
    ("rule", "decisions", "expected"),
    [
        ("all", [1, 0, 1], 0.95 * 0.5 * 0.95),
        ("chain", [1, 0, 1], 0.95 * 0.5 * 0.5),
        ("chain", [0, 1, 1], 0.5**3),
        ("agree", [0, 0, 0], 0.95**3),
        ("agree", [0, 1, 0], 0.95 * 0.5 * 0.95),
    ],
)
def test_accuracy_by_hand(rule, decisions, expected):
    assert task.chances(torch.tensor(decisions).bool(), rule).prod().item() == pytest.approx(expected)


def test_verdicts_have_the_expected_accuracy():
    p = {name: value.expand(50, *value.shape[1:]) for name, value in policies([1]).items()}
    _, found, expected = task.sample(p, 16, "chain", FILLER, task.Noise(list(range(50))), tree=False)
    assert found.correct_SG.float().mean().item() == pytest.approx(expected.mean().item(), abs=0.06)


def test_sampled_tokens_have_the_probabilities_of_the_model():
    p = {name: value.expand(500, *value.shape[1:]) for name, value in policies([1]).items()}
    trace, found, _ = task.sample(p, 16, "all", FILLER, task.Noise(list(range(500))), tree=False)
    logps = model.log_distributions(p, trace, task.grammar(FILLER).allowed_TV)
    expected = logps[0, 0, 0].exp()[task.FILLER :]
    counts = found.ids_SGT[..., 0].flatten().bincount(minlength=task.VOCABULARY)[task.FILLER :]
    chi2 = ((counts - 8000 * expected).square() / (8000 * expected)).sum().item()
    assert chi2 < 99 + 4 * np.sqrt(2 * 99)


def test_trees_share_segments_and_train_each_once():
    p = policies([1, 2])
    _, found, _ = task.sample(p, 8, "all", FILLER, task.Noise([1, 2]), tree=True)
    ids, length = found.ids_SGT, FILLER + 3
    for k, block in enumerate((4, 2, 1)):
        segment = slice(k * length, (k + 1) * length)
        for row in range(8):
            assert (ids[:, row, segment] == ids[:, row // block * block, segment]).all()
            assert (found.mask_SGT[:, row, segment] == (row % block == 0)).all()
    assert (ids[:, 0, :length] != ids[:, 4, :length]).any()
    runs = task.train(task.Cell("tree", 1e-3, 1), [1])
    assert found.mask_SGT[0].sum() == 14 * length
    assert runs.tokens == 14 * 4
    assert runs.accuracy_SN.shape[1] == 1200 * 12 // (14 * 4)


def test_texts_of_the_warm_start(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ids = task.texts(4000, 0.8, generator)
    assert task.grammar(task.WARM_FILLER).allowed_TV[torch.arange(ids.shape[1]), ids].all()
    careful = task.is_careful(ids[:, task.grammar(task.WARM_FILLER).decisions_K]).float()
    assert careful.mean().item() == pytest.approx(0.5, abs=0.03)
    pairs = (careful[:, 0] == careful[:, 1]).float().mean().item()
    assert pairs == pytest.approx(0.9**2 + 0.1**2, abs=0.03)
    words = torch.stack([row.bincount(minlength=task.VOCABULARY) for row in ids])[:, task.FILLER :].float()
    association = [np.corrcoef(words[:, w], careful.mean(1))[0, 1] for w in range(20)]
    assert np.abs(association).mean() > 0.1


def test_tokens_to_the_target():
    accuracy = torch.tensor([[0.0] * 10 + [1.0] * 20, [0.0] * 30])
    assert task.tokens_to_target(accuracy, 100, 8, 0.75).tolist() == [1800, torch.inf]  # 8 of the last 10 steps


def test_a_policy_learns(monkeypatch):
    runs = task.train(task.Cell("oracle", 3e-3, 0), list(range(8)))
    assert runs.accuracy_SN[:, -10:].mean() > runs.accuracy_SN[:, :10].mean() + 0.25


# The programme


def small_config(tmp_path) -> dict:
    rows = ["grpo", "multiply", "oracle"]
    main = {"filler": 1}
    programme = [
        {"part": "tuning", "at": "tuning", "rows": rows, "settings": [main], "rates": [1e-3, 3e-3], "seeds": [91, 92]},
        {"part": "primary", "at": "best", "rows": rows, "settings": [main], "seeds": [1, 4]},
        {"part": "low", "at": "low", "rows": rows, "settings": [main, {"filler": 0}], "seeds": [1, 2]},
    ]
    return {
        **CONFIG,
        "results": str(tmp_path / "needle.jsonl"),
        "page": str(tmp_path / "page.md"),
        "plot": str(tmp_path / "needle.png"),
        "seeds_per_job": 2,
        "setting": main,
        "primary": {"at": "best", "rows": ["multiply"]},
        "secondary": [{"at": "best", "rows": ["oracle"]}, {"at": "low", "rows": ["multiply", "oracle"]}],
        "programme": programme,
    }


class InThisProcess:
    """Instead of a pool of processes."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, job):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(job))
        return future


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(needle, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(task, "ROLLOUTS", 400)


def test_the_programme_resumes_and_is_reported(tmp_path, in_this_process, monkeypatch):
    import needle_report

    config = small_config(tmp_path)
    file = Path(config["results"])
    needle.run(config, Console(quiet=True))
    lines = file.read_text().splitlines()
    assert len(lines) == 6 + 3 * 2 + 6
    needle.run(config, Console(quiet=True))
    assert file.read_text().splitlines() == lines  # nothing ran twice

    file.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:50])  # killed while it wrote
    needle.run(config, Console(quiet=True))
    assert sorted(json.loads(line)["area"] for line in file.read_text().splitlines() if line.endswith("}")) == sorted(
        json.loads(line)["area"] for line in lines
    )

    results = needle.Results(file)
    tuned = [json.loads(line) for line in lines[:6] if json.loads(line)["cell"]["row"] == "multiply"]
    best = max(tuned, key=lambda line: np.mean(line["area"]))["cell"]["rate"]
    assert needle.best_rate(config, results, "multiply", {"filler": 1}) == best
    assert all(a["seeds"] for a, _ in pairwise(results.lines))

    needle_report.write(config)
    page = Path(config["page"]).read_text()
    assert "<!--" not in page
    assert Path(config["plot"]).stat().st_size > 5000
    one, other = (
        results.of(needle.Cell(row, rate, 1))
        for row, rate in (("multiply", best), ("grpo", grpo_rate(config, results)))
    )
    difference = np.mean([one[seed] - other[seed] for seed in range(1, 5)])
    assert f"{100 * difference:+.2f}" in page


def grpo_rate(config, results):
    return needle.best_rate(config, results, "grpo", {"filler": 1})


def test_an_unfinished_programme_is_reported_too(tmp_path, in_this_process):
    import needle_report

    config = small_config(tmp_path)
    needle.run({**config, "programme": config["programme"][:2]}, Console(quiet=True))
    needle_report.write(config)
    assert "not run" in Path(config["page"]).read_text()


def test_the_programme_of_the_config():
    """Tuning seeds are not used again, every row is known, and each part uses whole jobs and known settings."""
    tuning = {seed for part in CONFIG["programme"] if part["at"] == "tuning" for seed in needle.seeds_of(part)}
    main = {seed for part in CONFIG["programme"] if part["at"] != "tuning" for seed in needle.seeds_of(part)}
    assert tuning.isdisjoint(main)
    for part in CONFIG["programme"]:
        assert set(part["rows"]) <= set(ROWS)
        assert all(needle.Cell("grpo", 1.0, **setting).rule in task.RULES for setting in part["settings"])
        if part["at"] == "best":  # the rate of every row is tuned, perhaps in another setting or for a relative
            for setting in part["settings"]:
                for row in part["rows"]:
                    relative = CONFIG["rate_of"].get(row, row)
                    assert needle.tuning_cells(CONFIG, relative, setting) or needle.tuning_cells(
                        CONFIG, relative, needle.tuned_at(CONFIG, setting)
                    )
    compared = [CONFIG["primary"], *CONFIG["secondary"]]
    for entry in compared:
        parts = [p for p in CONFIG["programme"] if p["at"] == entry["at"] and CONFIG["setting"] in p["settings"]]
        assert {"grpo", *entry["rows"]} <= {row for p in parts for row in p["rows"]}
