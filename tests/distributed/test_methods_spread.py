"""Every credit method on two processes, full and LoRA, with groups all right, all wrong, unscorable, and mixed."""

import json

from ktae_trl.credit import METHODS
from tests.credit.test_methods import EXAMPLES
from tests.distributed.launching import TWO_PROCESSES

pytestmark = TWO_PROCESSES


def test_three_steps_on_two_processes(crews, tmp_path):
    crews.do("ddp", "tests.distributed.all_methods:main", str(tmp_path))
    first, second = (json.loads((tmp_path / f"process_{rank}.json").read_text()) for rank in (0, 1))
    assert set(first) == {f"{credit} {kind}" for credit in ("none", *METHODS, *EXAMPLES) for kind in ("full", "lora")}
    for name, result in first.items():
        assert (result["processes"], result["wrapped"]) == (2, "DistributedDataParallel"), name
        assert result["steps"] == 3, name
        assert result["moved"] > 0, name
        assert result["finite"], name
        assert second[name]["moved"] == result["moved"], name
