"""The trainer on the offline model: what TRL does is left alone, what is added is right."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from ktae_trl import KTAEGRPOConfig, KTAEGRPOTrainer, tiny
from ktae_trl.credit.combine import combine
from ktae_trl.credit.ktae.method import KTAE
from ktae_trl.credit.ktae.values import key_token_values
from ktae_trl.rewards import boxed_format, math_accuracy
from tests.trainers import around, difference, hook, logged, make_trainer, prompts, replay, weights

LOSS_TYPES = ["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"]


def generate(trainer, rows: int = 16):
    """Generate and score one batch of `rows` prompts repeated per group, as the training loop would."""
    G = trainer.num_generations
    inputs = [dict(trainer.train_dataset[i // G]) for i in range(rows)]
    return hook(trainer, "batch")(inputs)


def rewards(trainer, batch, G: int = 8, function=math_accuracy) -> torch.Tensor:
    """What a reward function says of the completions of a batch of `generate`."""
    texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    solutions = [trainer.train_dataset[i // G]["solution"] for i in range(len(texts))]
    return torch.tensor(function(completions=texts, solution=solutions))


def special_ids(trainer) -> list[int]:
    return [trainer.processing_class.pad_token_id, trainer.processing_class.eos_token_id]


@pytest.fixture
def replaying(tmp_path):
    """A trainer that replays fixed rollouts, for looking at one batch."""

    def make(**settings):
        trainer = make_trainer(tmp_path, **{"rollout_func": replay, **settings})
        trainer.model.train()
        return trainer

    return make


# With `credit: none` it is TRL


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_steps": 3, "per_device_train_batch_size": 64, "steps_per_generation": 1},  # a batch of 8 prompts
        {"num_iterations": 2, "per_device_train_batch_size": 8, "steps_per_generation": 2, "max_steps": 6},
    ],
)
def test_credit_none_is_grpo_bit_for_bit(tmp_path, settings):
    ours = make_trainer(tmp_path / "a", credit="none", **settings)
    start = weights(ours)
    ours.train()
    theirs = make_trainer(tmp_path / "b", trainer=GRPOTrainer, config=GRPOConfig, **settings)
    theirs.train()
    assert difference(weights(ours), weights(theirs)) == 0
    assert difference(weights(ours), start) > 0
    assert logged(ours, "loss") == logged(theirs, "loss")
    assert not [key for entry in ours.state.log_history for key in entry if key.startswith("ktae/")]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_values_of_zero_leave_every_loss_as_it_is(tmp_path, loss_type, monkeypatch):
    """(B, T) advantages that are constant in a rollout give the same weights as TRL's (B,)."""
    settings = {"loss_type": loss_type, "rollout_func": replay, "max_steps": 2, "optim": "sgd"}
    plain = make_trainer(tmp_path / "a", credit="none", **settings)
    plain.train()

    monkeypatch.setattr(KTAE, "credit", lambda self, groups: torch.zeros_like(groups.mask_BT, dtype=torch.float32))
    zero = make_trainer(tmp_path / "b", **settings)
    start = weights(zero)
    zero.train()
    assert difference(weights(zero), weights(plain)) < 1e-7
    assert difference(weights(zero), start) > 1e-6


# Token credit in training


@pytest.mark.parametrize("how", ["multiply", "add"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_trains(tmp_path, loss_type, how):
    trainer = make_trainer(tmp_path, loss_type=loss_type, ktae_combine=how, rollout_func=replay, max_steps=2)
    start = weights(trainer)
    trainer.train()
    assert all(torch.isfinite(torch.tensor(logged(trainer, "grad_norm"))))
    assert difference(weights(trainer), start) > 1e-4


def test_sampled_training_logs_every_metric(tmp_path):
    def by_turns(completions, **_):  # each group has right and wrong rollouts, so that no mean is over nothing
        return [float(i % 2) for i in range(len(completions))]

    held_out = {"eval_dataset": prompts(4, tiny.HELD_OUT), "credit_in_evaluation": True}
    trainer = make_trainer(tmp_path, num_iterations=2, steps_per_generation=2, reward_funcs=by_turns, **held_out)
    start = weights(trainer)
    trainer.train()
    assert difference(weights(trainer), start) > 1e-4
    metrics = trainer.evaluate() and trainer.state.log_history
    for prefix in ("", "eval_"):
        for name, low, high in (
            ("value_right", -1, 1),
            ("value_wrong", -1, 1),
            ("abs_value", 0, 1),
            ("saturated", 0, 1),
            ("zero_factor", 0, 1),
            ("advantage_ratio", 0, 2),
            ("informative_groups", 0, 1),
            ("seconds", 0, 60),
        ):
            found = [entry[f"{prefix}ktae/{name}"] for entry in metrics if f"{prefix}ktae/{name}" in entry]
            assert found
            assert all(low <= value <= high for value in found)


def test_metrics_by_hand(replaying):
    def first_group_all_right(completions, solution, **_):
        return [1.0 if i < 8 else float(i % 2) for i in range(len(completions))]

    trainer = replaying(reward_funcs=first_group_all_right)
    batch = generate(trainer)
    values, mask, advantages = batch["credit"], batch["completion_mask"].bool(), batch["advantages"]
    right = torch.tensor(first_group_all_right(batch["completion_ids"], None)) > 0
    final = combine(advantages, values, "multiply")
    trainer.log({})
    own = {name.removeprefix("ktae/"): value for name, value in trainer.state.log_history[-1].items()}
    valued = mask & (torch.arange(16) >= 8)[:, None]  # the first group has no values
    assert own["value_right"] == pytest.approx(values[right][valued[right]].mean().item(), rel=1e-5)
    assert own["value_wrong"] == pytest.approx(values[~right][valued[~right]].mean().item(), rel=1e-5)
    assert own["abs_value"] == pytest.approx(values[valued].abs().mean().item(), rel=1e-5)
    assert own["saturated"] == pytest.approx((values[valued].abs() > 0.9).float().mean().item(), rel=1e-5)
    judged = mask & (advantages != 0)[:, None]
    silenced = final.abs() <= 1e-3 * advantages.abs()[:, None]
    assert own["zero_factor"] == pytest.approx(silenced[judged].float().mean().item(), rel=1e-5)
    assert own["advantage_ratio"] == pytest.approx(
        (final.abs()[mask].sum() / advantages.abs()[:, None].expand_as(final)[mask].sum()).item(), rel=1e-5
    )
    groups = right.view(-1, 8)
    assert own["informative_groups"] == (groups.any(1) & ~groups.all(1)).float().mean().item()


def test_a_mean_over_nothing_is_not_logged(replaying):
    """None in a log makes TensorBoard's writer complain at every step."""
    trainer = replaying(reward_funcs=lambda completions, **_: [0.0] * len(completions))
    generate(trainer)
    trainer.log({})
    logged = trainer.state.log_history[-1]
    assert logged["ktae/informative_groups"] == 0
    assert "ktae/value_right" not in logged
    assert not [name for name, value in logged.items() if value is None]


def test_credit_is_that_of_the_pure_function_with_the_options_of_the_config(replaying):
    seen = []
    for change in (
        {},
        {"ktae_fisher_weight": 0.0},
        {"ktae_ig_weight": 3.0},
        {"ktae_tf_weight": 0.0},
        {"ktae_leave_one_out": True},
        {"correctness_threshold": 1.5},
        {"correctness_reward": "boxed_format"},
    ):
        trainer = replaying(reward_funcs=[math_accuracy, boxed_format], **change)
        batch = generate(trainer)
        function = boxed_format if "correctness_reward" in change else math_accuracy
        correct = rewards(trainer, batch, function=function) > change.get("correctness_threshold", 0.0)
        options = {k.removeprefix("ktae_"): v for k, v in change.items() if k.startswith("ktae_")}
        expected = key_token_values(
            batch["completion_ids"].view(2, 8, -1),
            batch["completion_mask"].view(2, 8, -1),
            correct.view(2, 8),
            ignore_ids=special_ids(trainer),
            **options,
        )
        torch.testing.assert_close(batch["credit"], expected.view(16, -1), atol=1e-6, rtol=0)
        seen.append(batch["credit"])
    assert not any(torch.equal(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("how", ["multiply", "add"])
def test_the_loss_gets_combined_advantages_and_leaves_the_buffer_alone(replaying, monkeypatch, how):
    trainer = replaying(ktae_combine=how)
    batch = generate(trainer)
    before = {k: v.clone() for k, v in batch.items()}
    given = {}

    def spy(compute, self, model, inputs):
        given.update(inputs)
        return torch.zeros(())

    around(GRPOTrainer, "loss", spy, monkeypatch.setattr)
    hook(trainer, "loss")(trainer.model, batch)
    torch.testing.assert_close(given["advantages"], combine(batch["advantages"], batch["credit"], how))
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[k], before[k]) for k in batch)
    if how == "multiply":
        assert (given["advantages"] * batch["advantages"][:, None] >= 0).all()
        assert (given["advantages"].abs() <= 2 * batch["advantages"].abs()[:, None]).all()


def test_num_iterations_reuse_the_same_batch(tmp_path, monkeypatch):
    used = []

    def spy(compute_loss, self, model, inputs):
        used.append((inputs["completion_ids"].clone(), inputs["advantages"].clone()))
        return compute_loss(self, model, inputs)

    trainer = make_trainer(
        tmp_path, num_iterations=2, steps_per_generation=2, per_device_train_batch_size=8, max_steps=4
    )
    around(GRPOTrainer, "loss", spy, monkeypatch.setattr)  # not before: the trainer probes the loss when it starts
    trainer.train()
    for first, again in ((0, 2), (1, 3)):
        assert torch.equal(used[first][0], used[again][0])
        assert torch.equal(used[first][1], used[again][1])
    assert not torch.equal(used[0][0], used[1][0])


def test_lora(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    start = weights(trainer)
    trainer.train()
    changed = {name for name, p in weights(trainer).items() if not torch.equal(p, start[name])}
    assert changed
    assert all("lora" in name for name in changed)


def test_evaluation_has_groups_of_its_own_size(replaying):
    trainer = replaying(num_generations_eval=4, credit_in_evaluation=True)
    trainer.model.eval()
    inputs = [dict(trainer.train_dataset[i // 4]) for i in range(32)]
    batch = hook(trainer, "batch")(inputs)
    expected = key_token_values(
        batch["completion_ids"].view(8, 4, -1),
        batch["completion_mask"].view(8, 4, -1),
        (rewards(trainer, batch, G=4) > 0).view(8, 4),
        ignore_ids=special_ids(trainer),
    )
    torch.testing.assert_close(batch["credit"], expected.view(32, -1))
    assert (expected != 0).any()
    trainer.log({})
    assert "eval_ktae/value_right" in trainer.state.log_history[-1]
    assert "ktae/value_right" not in trainer.state.log_history[-1]


def test_credit_is_not_computed_in_evaluation_unless_it_is_asked_for(tmp_path, monkeypatch):
    seen, credit = [], KTAE.credit
    monkeypatch.setattr(KTAE, "credit", lambda self, groups: seen.append(groups) or credit(self, groups))
    held_out = {"eval_dataset": prompts(4, tiny.HELD_OUT)}
    for settings, asked in (({}, False), ({"credit_in_evaluation": True}, True)):
        metrics = make_trainer(tmp_path, **held_out, **settings).evaluate()
        assert bool(seen) == asked
        assert ("eval_ktae/value_right" in metrics) == asked


def test_groups_of_one_have_no_credit(tmp_path):
    held_out = {"eval_dataset": prompts(4, tiny.HELD_OUT), "credit_in_evaluation": True}
    trainer = make_trainer(tmp_path, num_generations_eval=1, **held_out)
    trainer.evaluate()
    assert not [key for entry in trainer.state.log_history for key in entry if "ktae/" in key]


def test_every_end_of_sequence_id_is_special(replaying):
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    (newline,) = tokenizer("\n")["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, newline]
    batch = generate(replaying(model=model))
    others = (batch["completion_ids"] != newline) & (batch["completion_mask"] == 1)
    assert (batch["credit"][batch["completion_ids"] == newline] == 0).all()
    assert (batch["credit"][batch["completion_ids"] == tokenizer.eos_token_id] == 0).all()
    assert (batch["credit"][others] != 0).any()
    plain = generate(replaying())
    assert (plain["credit"][plain["completion_ids"] == newline] != 0).any()


# Rollouts that do not vote


def test_tool_output_is_neither_counted_nor_valued(replaying):
    def with_tool_output(prompts, trainer):
        output = replay(prompts, trainer)
        output["env_mask"] = [[int(t % 5 != 2) for t in range(len(ids))] for ids in output["completion_ids"]]
        return output

    trainer = replaying(rollout_func=with_tool_output)
    batch = generate(trainer)
    mask = batch["completion_mask"] * batch["tool_mask"]
    assert (batch["tool_mask"] == 0).any()
    assert (batch["credit"][mask == 0] == 0).all()
    expected = key_token_values(
        batch["completion_ids"].view(2, 8, -1),
        mask.view(2, 8, -1),
        (rewards(trainer, batch) > 0).view(2, 8),
        ignore_ids=special_ids(trainer),
    )
    torch.testing.assert_close(batch["credit"], expected.view(16, -1))


def test_truncated_rollouts_vote_only_if_they_are_trained_on(replaying):
    for mask_truncated in (False, True):
        trainer = replaying(mask_truncated_completions=mask_truncated)
        batch = generate(trainer, rows=64)
        cut = ~torch.isin(batch["completion_ids"][:, -1], torch.tensor(special_ids(trainer)))
        assert cut.any()
        assert (batch["credit"][cut] != 0).any().item() == (not mask_truncated)


def test_unscorable_rollouts_and_uninformative_groups_get_no_credit(replaying):
    def some(completions, **kwargs):
        """First group: half unscorable, one right. Second group: all right."""
        return [None] * 4 + [1.0] + [0.0] * 3 + [1.0] * 8

    trainer = replaying(reward_funcs=[some, boxed_format])
    batch = generate(trainer)
    assert (batch["credit"][:4] == 0).all()
    assert (batch["credit"][4:8] != 0).any()
    assert (batch["credit"][8:] == 0).all()
    trainer.log({})
    assert logged(trainer, "ktae/informative_groups") == [0.5]


def test_training_goes_on_when_no_group_says_anything(tmp_path):
    for reward in (1.0, 0.0, None):

        def same(completions, value=reward, **kwargs):
            return [value] * len(completions)

        trainer = make_trainer(tmp_path, reward_funcs=[same, boxed_format], rollout_func=replay, max_steps=2)
        trainer.train()
        assert trainer.state.global_step == 2
        assert logged(trainer, "ktae/informative_groups") == [0, 0]
        assert logged(trainer, "ktae/value_right") == []


# What a user sees


def test_model_card(tmp_path):
    for credit, words, others in (
        ("ktae", ["KTAE", "2505.16826", "sun2025ktae", "- ktae\n", "- grpo", "raised or lowered"], ["DeepSeekMath"]),
        ("none", ["GRPO", "DeepSeekMath", "- grpo"], ["2505.16826", "- ktae\n"]),
        ("oar_g", ["OAR-G", "2601.07408", "li2026oar", "- oar", "- grpo"], ["2505.16826", "- ktae\n"]),
        ("oar_p", ["OAR-P", "2601.07408", "li2026oar", "- oar", "- grpo"], ["2505.16826", "- ktae\n"]),
        ("hicra", ["HICRA", "2509.03646", "wang2026hicra", "- hicra", "- grpo"], ["2505.16826", "- ktae\n"]),
        ("tree", ["TreeRPO", "2506.05183", "yang2025treerpo", "- treerpo", "- grpo"], ["2505.16826", "- ktae\n"]),
    ):
        trainer = make_trainer(tmp_path, credit=credit)
        trainer.create_model_card()
        card = (tmp_path / "README.md").read_text()
        assert f"Model Card for {tmp_path.name}" in card
        assert "None" not in card
        assert all(word in card for word in words)
        assert "vonwerra2020trl" in card
        assert not any(word in card for word in others)


def test_names_and_defaults():
    args = KTAEGRPOConfig(output_dir="x", use_cpu=True, bf16=False)
    assert (args.credit, args.ktae_combine, args.ktae_leave_one_out) == ("ktae", "multiply", False)
    assert (args.ktae_fisher_weight, args.ktae_ig_weight, args.ktae_tf_weight) == (1, 1, 1)
    assert issubclass(KTAEGRPOTrainer, GRPOTrainer)


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"credit": "ktea"}, r"credit='ktea' is unknown \(did you mean 'ktae'\?\). Choose from: none, ktae"),
        ({"ktae_combine": "times"}, "ktae_combine='times' is unknown. Choose from: multiply, add"),
        ({"ktae_tf_weight": -1.0}, "tf_weight must be a finite number >= 0, not -1.0"),
        ({"ktae_fisher_weight": 0.0, "ktae_ig_weight": 0.0}, "both 0"),
        ({"num_generations": 1}, "at least 2 generations"),
        (
            {"correctness_reward": "math_acuracy", "reward_funcs": [math_accuracy, boxed_format]},
            r"'math_acuracy' is not one of the reward functions \(did you mean 'math_accuracy'\?\). "
            "Choose from: math_accuracy, boxed_format",
        ),
    ],
)
def test_bad_settings(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, **settings)


def test_a_plain_grpo_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"must be a KTAEGRPOConfig, not a GRPOConfig\. KTAEGRPOConfig takes the same"):
        make_trainer(tmp_path, config=GRPOConfig)


def test_columns_whose_names_are_taken_do_not_crash_a_training(tmp_path):
    """As they reach the trainer of somebody who does not use `to_prompts`."""
    seen = []

    def mine(completions, data_completions, **kwargs):
        seen.extend(data_completions)
        return [float(i % 2) for i in range(len(completions))]

    names = ("completions", "prompts", "completion_ids", "trainer_state", "log_metric", "environments")
    rows = [row | dict.fromkeys(names, "mine") | {"image": None} for row in prompts()]
    make_trainer(tmp_path, reward_funcs=mine, train_dataset=Dataset.from_list(rows), max_steps=1).train()
    assert set(seen) == {"mine"}
