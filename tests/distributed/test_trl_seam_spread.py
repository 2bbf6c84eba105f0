"""The check of TRL on two processes: what it asks of the others, all ask."""

import pytest
import torch

from ktae_trl import trl_seam
from tests.distributed import cpu
from tests.distributed.launching import TWO_PROCESSES
from tests.trainers import make_trainer

pytestmark = TWO_PROCESSES


def check(folder: str, settings: dict) -> None:
    """In each process: the features pass, in milliseconds, and random numbers go on as they would."""
    trainer = make_trainer(folder, **settings, **cpu.fsdp_settings())
    before = torch.get_rng_state()
    trl_seam.passed.clear()
    for feature in trl_seam.FEATURES:
        trl_seam.need(feature, trainer)
    assert trl_seam.passed == set(trl_seam.FEATURES)
    assert torch.equal(torch.get_rng_state(), before)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()


@pytest.mark.parametrize("mode", ["ddp", "zero3", "fsdp2"])
@pytest.mark.parametrize("settings", [{"top_entropy_quantile": 0.5}, {"scale_rewards": "batch", "loss_type": "grpo"}])
def test_all_processes_check_together(crews, tmp_path, mode, settings):
    crews.do(mode, f"{__name__}:check", str(tmp_path), settings)
