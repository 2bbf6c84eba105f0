"""Every credit method on two processes, full and LoRA, with groups all right, all wrong, unscorable, and mixed."""

import json
from pathlib import Path

import pytest

from ktae_trl.credit import METHODS
from tests.distributed.launching import ROOT, accelerate, environment
from tests.processes import run

pytestmark = pytest.mark.slow


def test_three_steps_on_two_processes(tmp_path):
    script = str(Path(__file__).with_name("all_methods.py"))
    words = [*accelerate(tmp_path, "ddp"), script, str(tmp_path)]
    done = run(words, cwd=ROOT, env=environment("ddp"), timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (json.loads((tmp_path / f"process_{rank}.json").read_text()) for rank in (0, 1))
    assert set(first) == {f"{credit} {kind}" for credit in ("none", *METHODS) for kind in ("full", "lora")}
    for name, result in first.items():
        assert (result["processes"], result["wrapped"]) == (2, "DistributedDataParallel"), name
        assert result["steps"] == 3, name
        assert result["moved"] > 0, name
        assert result["finite"], name
        assert second[name]["moved"] == result["moved"], name
