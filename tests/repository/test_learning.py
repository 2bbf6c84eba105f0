"""The learning benchmark: its statistics, its variants of credit, and a whole small comparison."""

import copy
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from trl import ModelConfig, TrlParser

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import learning  # noqa: E402
import learning_report as report  # noqa: E402
import variants  # noqa: E402

from ktae_trl.config import KTAEGRPOConfig  # noqa: E402
from ktae_trl.credit import METHODS  # noqa: E402
from ktae_trl.credit.combine import combine  # noqa: E402
from ktae_trl.credit.ktae.method import KTAE  # noqa: E402
from ktae_trl.credit.ktae.values import key_token_values  # noqa: E402
from ktae_trl.credit.method import Groups  # noqa: E402
from ktae_trl.training.run import RunArguments  # noqa: E402

CONFIG = learning.read_config(ROOT / "benchmarks" / "learning.yaml")


def curve(tokens, accuracy, evaluations=2):
    return pd.DataFrame(
        {"tokens": tokens, "accuracy": accuracy, "budget": max(tokens[-1] - 10, 1), "evaluations": evaluations}
    )


# Statistics


def test_curves_are_read_at_the_marks_of_the_budget():
    """A budget of 40 in two: read at 0, 20 and 40, the last between the evaluations at 10 and at 50."""
    one = curve([0, 10, 50], [0.2, 0.4, 0.8])
    assert learning.on_grid(one).accuracy.tolist() == pytest.approx([0.2, 0.5, 0.7])
    assert learning.area(one) == pytest.approx((0.35 + 0.6) / 2)


def test_a_target_is_reached_between_two_evaluations():
    one = curve([0, 100, 200], [0.2, 0.6, 0.7])  # with a budget of 190
    assert report.tokens_to(one, 0.4) == pytest.approx(50)
    assert report.tokens_to(one, 0.2) == 0
    assert report.tokens_to(one, 0.68) == pytest.approx(180)
    assert report.tokens_to(one, 0.698) == np.inf  # at 198
    assert report.tokens_to(one, 0.8) == np.inf


def test_difference_is_paired_by_seed_and_its_p_value_is_that_of_all_flips():
    rng = np.random.default_rng(0)
    one, other = (pd.Series(rng.normal(mean, 1, 8), index=range(8)) for mean in (0.8, 0))
    found = report.difference(one.sample(frac=1, random_state=1), other)
    d = (one - other).to_numpy()
    flips = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=8)]
    assert found.p == pytest.approx(np.mean(np.array(flips) >= abs(d.sum()) - 1e-9))
    assert found.value == pytest.approx(d.mean())
    half = 2.364624 * d.std(ddof=1) / np.sqrt(8)  # t with 7 degrees of freedom
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half), rel=1e-5)
    assert report.difference(one, other.iloc[2:5]).value == pytest.approx(d[2:5].mean())


# The config


def test_every_method_is_compared():
    tiers = {name: method["tier"] for name, method in CONFIG["methods"].items()}
    assert [name for name, tier in tiers.items() if tier == "a"] == [
        "grpo",
        "ktae_multiply",
        "ktae_multiply_loo",
        "ktae_add",
        "grpo_scaled",
    ]
    assert {"ktae_add_loo", "dapo", "dapo_ktae", "oar_g", "oar_p", "tree"} == {n for n, t in tiers.items() if t == "b"}
    assert len(CONFIG["tiers"]["a"]["seeds"]) >= 12
    assert not set(CONFIG["search_seeds"]) & {seed for tier in CONFIG["tiers"].values() for seed in tier["seeds"]}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("learning*.yaml")), ids=lambda path: path.stem)
def test_every_run_of_every_config_has_valid_settings(path):
    before = dict(METHODS)
    variants.register()
    try:
        config = learning.read_config(path)
        for task, name in itertools.product(config["tasks"], config["methods"]):
            told = learning.make_run(config, task, name, 1e-4, 1, "a").told
            settings = {**told["settings"], "use_cpu": True, "bf16": False, "use_vllm": False}
            parser = TrlParser((RunArguments, KTAEGRPOConfig, ModelConfig))
            run, args, _ = parser.parse_dict(settings)
            assert len(run.reward_funcs) == len(args.reward_weights)
            assert args.credit == config["methods"][name]["settings"]["credit"]
    finally:
        METHODS.clear()
        METHODS.update(before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tier": "c"}, "'grpo' has the unknown tier 'c'"),
        ({"tier": "b"}, "'grpo' must be in tier a or have `rate_of`"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(change, words, tmp_path):
    path = tmp_path / "learning.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "methods": {"grpo": change}}))
    with pytest.raises(ValueError, match=words):
        learning.read_config(path)


def test_rates_are_chosen_by_the_mean_area_on_seeds_of_their_own(monkeypatch, tmp_path):
    config = copy.deepcopy({**CONFIG, "output": str(tmp_path)})
    del config["tasks"]["gsm_symbolic"]
    config["tasks"]["chain_sum"]["rates"] = low, middle, high = 1e-5, 1e-4, 1e-3
    heights = {low: (0.5, 0.5, 0.5), middle: (0.9, 0.1, 0.3), high: (0.6, 0.6, 0.1)}
    for run in learning.search_runs(config):
        run.folder.mkdir(parents=True)
        (run.folder / learning.RUN).write_text(yaml.safe_dump(run.told))
        height = (
            heights[run.told["rate"]][run.told["seed"] - 101]
            + (run.told["method"] == "ktae_add") * run.told["rate"] * 1e4
        )
        curve([0, 1], [height] * 2).to_parquet(run.folder / learning.CURVE)
    rates = learning.chosen_rates(config)
    assert (rates["chain_sum", "grpo"], rates["chain_sum", "ktae_add"]) == (low, high)
    assert (rates["chain_sum", "oar_p"], rates["chain_sum", "ktae_add_loo"]) == (low, high)  # as their `rate_of`
    found = {run.told["method"]: run.told["rate"] for run in learning.tier_runs(config, "b")}
    assert (found["dapo"], found["ktae_add_loo"]) == (low, high)
    other = copy.deepcopy(config)
    other["tasks"]["chain_sum"]["evaluations"] += 1
    with pytest.raises(ValueError, match=r"holds a run with other settings than the config \(evaluations\)"):
        learning.chosen_rates(other)
    (learning.search_runs(config)[4].folder / learning.CURVE).unlink()
    with pytest.raises(ValueError, match="lacks 1 of 45 runs"):
        learning.chosen_rates(config)


def test_a_task_with_one_rate_needs_no_search(tmp_path):
    config = learning.read_config(ROOT / "benchmarks" / "learning_length.yaml")
    assert learning.search_runs(config) == []
    assert set(learning.chosen_rates(config).values()) == {5e-5}
    runs = learning.tier_runs(config, "a")
    assert len(runs) == 36
    earlier = {seed for tier in CONFIG["tiers"].values() for seed in tier["seeds"]} | {*CONFIG["search_seeds"]}
    assert not earlier & {run.told["seed"] for run in runs}
    for run in runs:  # the same task and settings as in the comparison, but for the number of problems
        name = run.told["method"]
        before = learning.make_run(CONFIG, "gsm_symbolic", name, 5e-5, run.told["seed"], "a").told
        mine, theirs = run.told["settings"], before["settings"]
        assert {key for key in mine if mine[key] != theirs[key]} == {"eval_size", "output_dir"}
        assert mine.keys() == theirs.keys()


# Variants of credit


@pytest.fixture
def rollouts():
    generator = torch.Generator().manual_seed(0)
    P, G, T = 3, 8, 20
    ids = torch.randint(0, 30, (P, G, T), generator=generator)
    mask = torch.rand(P, G, T, generator=generator) < 0.8
    mask[0, 0] = False
    correct = torch.rand(P, G, generator=generator) < 0.5
    scored = torch.rand(P, G, generator=generator) < 0.9
    advantages = torch.where(correct, 0.7, -1.1).flatten()
    prompts = torch.zeros(P * G, 1, dtype=torch.long)
    return Groups(
        ids, mask, correct, scored, advantages, prompts, prompts + 1, mask.sum(2).flatten(), (3, 40), slice(0, P * G)
    )


@pytest.fixture
def args(tmp_path):
    return KTAEGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)


def as_values(rollouts, **options):
    r = rollouts
    scored = options.pop("scored", r.scored_PG)
    return key_token_values(r.ids_PGT, r.mask_PGT, r.correct_PG, scored=scored, ignore_ids=(3, 40), **options)


def test_dense_values_without_a_variant_are_those_of_the_package(rollouts):
    expected = as_values(rollouts)
    assert expected.abs().max() > 0.5
    for p, values in enumerate(expected):
        group = (x[p] for x in (rollouts.ids_PGT, rollouts.mask_PGT, rollouts.correct_PG, rollouts.scored_PG))
        torch.testing.assert_close(variants.dense_values(*group, special_ids=(3, 40)), values)


def test_supported_values_are_zero_for_tokens_of_one_rollout(rollouts, args):
    values = variants.Supported(args, None).credit(rollouts).values_BT.view(3, 8, 20)
    plain = as_values(rollouts)
    votes = rollouts.scored_PG[..., None] & rollouts.mask_PGT
    changed = 0
    for p, g, t in itertools.product(range(3), range(8), range(20)):
        having = ((rollouts.ids_PGT[p] == rollouts.ids_PGT[p, g, t]) & votes[p]).any(1).sum()
        assert values[p, g, t] == pytest.approx(0 if having < 2 else plain[p, g, t].item(), abs=1e-6)
        changed += bool(having < 2 and plain[p, g, t] != 0)
    assert changed > 0


def test_smoothed_values_by_hand():
    """Right: (1 2), (1 1); wrong: (2 2), (3 2). One token more on each side for each: 1 has 3 + 1 of 4 and 0 + 1 of 4.

    The sides are of one length, so TF = 3 f / (f + 2): with f = 1 it is 1, with f = 1/4 it is 1/3: 3 - 1/3.
    a = 2, b = 0: D = pi / 2 + 8 / 3, p = 1 / 3, IG = 1, S = (exp(-2/3) + 1) / 2.
    """
    ids = torch.tensor([[1, 2], [1, 1], [2, 2], [3, 2]])
    ones = torch.ones_like(ids, dtype=torch.bool)
    values = variants.dense_values(ids, ones, torch.tensor([1, 1, 0, 0]).bool(), ones[:, 0], smoothing=1.0)
    strength = (np.exp(-2 / 3) + 1) / 2
    assert values[0, 0].item() == pytest.approx(np.tanh(strength * (np.pi / 2 + 8 / 3) / 2), rel=1e-5)


def test_centred_values_have_no_mean_over_a_rollout(rollouts, args):
    values = variants.Centred(args, None).credit(rollouts).values_BT.view(3, 8, 20)
    plain, mask = as_values(rollouts), rollouts.mask_PGT
    mean = (plain * mask).sum(2) / mask.sum(2).clamp(min=1)
    torch.testing.assert_close(values, ((plain - mean[..., None]).clamp(-1, 1) * mask))


def test_the_metrics_of_a_variant_are_its_own(rollouts, args):
    credit = variants.Centred(args, None).credit(rollouts)
    total, count = credit.sums["ktae/saturated"]
    informative = (rollouts.correct_PG & rollouts.scored_PG).any(1) & (~rollouts.correct_PG & rollouts.scored_PG).any(1)
    mask = (rollouts.mask_PGT & informative[:, None, None]).flatten(0, 1)
    assert total / count == (credit.values_BT[mask].abs() > 0.9).float().mean()
    assert total / count < (as_values(rollouts).flatten(0, 1)[mask].abs() > 0.9).float().mean()


def test_scaled_advantages_are_as_large_as_those_of_ktae(rollouts, args):
    method = variants.Scaled(args, None)
    credit = method.credit(rollouts)
    scaled = combine(rollouts.advantages_B, credit.values_BT, method.how)
    ktae = combine(rollouts.advantages_B, as_values(rollouts).flatten(0, 1), "multiply")
    mask = rollouts.mask_PGT.flatten(0, 1)
    assert scaled.abs()[mask].mean() == pytest.approx(ktae.abs()[mask].mean())
    assert (scaled / rollouts.advantages_B[:, None]).unique().numel() == 1


def test_shuffled_labels_keep_the_class_split(rollouts, args, monkeypatch):
    seen = []
    monkeypatch.setattr(KTAE, "credit", lambda self, groups: seen.append(groups.correct_PG))
    torch.manual_seed(0)
    for _ in range(3):
        variants.Shuffled(args, None).credit(rollouts)
    assert all(torch.equal(x.sum(1), rollouts.correct_PG.sum(1)) for x in seen)
    assert any(not torch.equal(x, rollouts.correct_PG) for x in seen)


def test_the_tables_of_the_readmes_are_those_of_the_kept_results():
    runs = report.outcomes(curves := pd.read_parquet(report.RESULTS / "learning.parquet"))
    tables = [part for part in report.report(curves, runs).split("\n\n") if part.startswith("|")]
    # Of a task: tier A, the same size, control, tier B, ablation, length and entropy, speed and health.
    assert len(tables) == 2 + 2 * 7
    results = (ROOT / "benchmarks" / "README.md").read_text()
    for table in tables:
        assert table in results
    assert report.summary_table(runs[runs.tier != learning.SEARCH]) in (ROOT / "docs/evidence/learning.md").read_text()


# The whole


@pytest.mark.slow
def test_a_small_comparison_from_nothing_to_the_tables(tmp_path, monkeypatch, capsys):
    """Two methods, two rates, two seeds: stopped after the search, gone on, nothing done twice, tables and plots."""
    config = {
        **CONFIG,
        "output": str(tmp_path / "runs"),
        "processes": 2,
        "tasks": {
            "chain_sum": {
                **copy.deepcopy(CONFIG["tasks"]["chain_sum"]),
                "budget": 3000,
                "evaluations": 2,
                "rates": [5e-5, 1e-4],
            }
        },
        "search_seeds": [101],
        "tiers": {"a": {"seeds": [1, 2]}, "b": {"seeds": [1, 2]}},
        "methods": {name: CONFIG["methods"][name] for name in ("grpo", "ktae_multiply", "grpo_scaled", "dapo", "tree")},
    }
    config["settings"] = {**config["settings"], "per_device_train_batch_size": 32}
    config["tasks"]["chain_sum"]["settings"]["eval_size"] = 32
    path = tmp_path / "learning.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["learning.py", "--config", str(path), "--tiers", "b"])
    learning.main()
    searched = sorted((tmp_path / "runs").rglob(learning.CURVE))
    assert len(searched) == 3 * 2 + 2 * 2
    before = {file: file.stat().st_mtime_ns for file in searched}
    monkeypatch.setattr(sys, "argv", ["learning.py", "--config", str(path)])
    learning.main()
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())

    curves = report.collect(config)
    ends = curves.groupby(["tier", "method", "rate", "seed"]).tokens.max()
    assert ((ends >= 3000) & (ends < 3000 + 4 * 32 * 80)).all()
    assert (curves.groupby(["tier", "method", "rate", "seed"]).tokens.min() == 0).all()
    trained = curves[curves.tokens > 0]
    assert trained[trained.method == "ktae_multiply"].saturated.notna().any()
    assert trained[trained.method == "grpo"].saturated.isna().all()
    for _, one in curves[curves.method == "grpo"].groupby(["tier", "rate", "seed"]):
        rows = one.sort_values("tokens")
        trained = rows.steps.diff() * 32 * rows.train_length  # TRL's own count of what it generated
        np.testing.assert_allclose(rows.tokens.diff()[1:], trained[1:])

    monkeypatch.setattr(sys, "argv", ["report", "--config", str(path), "--output", str(tmp_path / "out")])
    report.main()
    first = capsys.readouterr().out
    for words in ("| `grpo` |", "| `ktae_multiply` |", "### Tier B", "tokens to"):
        assert words in first
    monkeypatch.setattr(sys, "argv", ["report", "--output", str(tmp_path / "out")])
    report.main()
    assert capsys.readouterr().out in first
    assert all(
        (tmp_path / "out" / name).stat().st_size > 10_000 for name in ("learning_a.png", "learning_differences.png")
    )
