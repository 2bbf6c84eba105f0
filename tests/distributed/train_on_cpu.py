"""train.py as it is, with what FSDP needs on a CPU only. Takes the arguments of train.py.

Says in the end what it ran as, because several ways of launching silently run as something else.
"""

import json
import runpy
import sys
from pathlib import Path

from ktae_trl import KTAEGRPOTrainer
from tests.distributed import cpu

train = KTAEGRPOTrainer.train


def train_and_say(trainer, *args, **kwargs):
    result = train(trainer, *args, **kwargs)
    accelerator, model = trainer.accelerator, type(trainer.model_wrapped).__name__
    accelerator.print("\nran as", accelerator.num_processes, accelerator.distributed_type.value, model)
    return result


if __name__ == "__main__":
    for name, value in cpu.fsdp_settings().items():
        sys.argv += [f"--{name}", json.dumps(value)]
    KTAEGRPOTrainer.train = train_and_say
    sys.argv[0] = str(Path(__file__).parents[2] / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
