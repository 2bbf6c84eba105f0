"""The start-up check of TRL: what is gone is named, what is merely untested is a warning."""

import warnings

import pytest
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler

from ktae_trl.trl_seam import TESTED_TRL, check_trl


def test_the_installed_trl_passes_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_trl(GRPOTrainer)


def test_another_version_with_the_contract_intact_is_a_warning():
    for version in ("1.15.0", "1.17.0", "2.0.0.dev0"):
        with pytest.warns(UserWarning, match=f"TRL {version} was not tested with ktae_trl .tested: {TESTED_TRL}"):
            check_trl(GRPOTrainer, version)


def test_a_sampler_that_is_told_its_epoch_would_break_resuming(monkeypatch):
    monkeypatch.setattr(RepeatSampler, "set_epoch", lambda self, epoch: None, raising=False)
    with pytest.raises(ImportError, match=r"RepeatSampler\.set_epoch is new"):
        check_trl(GRPOTrainer)


def test_a_limit_of_tokens_that_vllm_no_longer_reads(monkeypatch):
    monkeypatch.setattr(VLLMGeneration, "generate", lambda self, prompts, num_generations: prompts)
    with pytest.raises(ImportError, match=r"VLLMGeneration\.generate no longer uses 'max_completion_length'"):
        check_trl(GRPOTrainer)


def test_what_is_gone_is_named_with_the_tested_versions():
    class Gone(GRPOTrainer):
        _calculate_rewards = None

    class Renamed(GRPOTrainer):
        def _compute_loss(self, model, batch):
            return batch["advantages"].unsqueeze(1), batch["tool_mask"].dim()

    class Rewritten(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return inputs["tool_mask"]

    for trainer, words in (
        (Gone, "Gone._calculate_rewards is gone"),
        (Renamed, "Renamed._compute_loss has no parameter 'inputs'"),
        (Rewritten, "Rewritten._compute_loss no longer uses 'advantages'"),
    ):
        with pytest.raises(ImportError, match=f"TRL .* lacks .*{words}.*Tested with TRL {TESTED_TRL}"):
            check_trl(trainer)
