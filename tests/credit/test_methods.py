"""Every credit method, in every way of training: it runs, learns something, and survives groups without a signal."""

import math

import pytest
from peft import LoraConfig

from ktae_trl import tiny
from ktae_trl.credit import METHODS
from tests.trainers import difference, logged, make_trainer, prompts, weights


def by_turns(completions, **kwargs):
    """Of four groups of 8, one is all right, one all wrong, one cannot be scored, and one has both kinds."""
    return [{0: 1.0, 1: 0.0, 2: None, 3: float(i % 2)}[i // 8 % 4] for i in range(len(completions))]


METHOD_SETTINGS = {
    "max_steps": 3,
    "max_completion_length": 24,
    "per_device_train_batch_size": 32,
    "loss_type": "dapo",
    "oar_token_budget": 2000,
    "hicra_ngrams": "tiny",
}
# With settings of its own each.
EXAMPLES = {
    "tests.credit.examples.EntropyWeight": {"entropy_floor": 0.2},
    "tests.credit.examples.SegmentValues": {"segment_tokens": 12, "segment_samples": 2},
    "tests.credit.examples.SecondOpinion": {"second_model": str(tiny.MODEL)},
    "tests.credit.examples.early": {},
}
LORA = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


@pytest.mark.slow_after(5)
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("credit", ["none", *METHODS, *EXAMPLES])
def test_three_steps(tmp_path, credit, peft_config):
    settings = {**METHOD_SETTINGS, **EXAMPLES.get(credit, {})}
    data = {"reward_funcs": by_turns, "train_dataset": prompts(12)}
    trainer = make_trainer(tmp_path, credit=credit, peft_config=peft_config, **data, **settings)
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert difference(before, weights(trainer)) > 0
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            assert not isinstance(value, float) or math.isfinite(value), name


@pytest.mark.slow_after(9)
@pytest.mark.parametrize("reward", [1.0, 0.0, None], ids=["right", "wrong", "unscorable"])
@pytest.mark.parametrize("credit", ["none", *METHODS, *EXAMPLES])
def test_a_batch_without_any_signal_moves_nothing(tmp_path, credit, reward):
    trainer = make_trainer(
        tmp_path,
        credit=credit,
        reward_funcs=lambda completions, **kwargs: [reward] * len(completions),
        **{**METHOD_SETTINGS, **EXAMPLES.get(credit, {}), "max_steps": 1},
    )
    before = weights(trainer)
    trainer.train()
    assert difference(before, weights(trainer)) == 0
    assert logged(trainer, "loss") == [0.0]
