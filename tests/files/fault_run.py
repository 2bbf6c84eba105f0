"""The training that tests/files/test_faults.py kills, starves of disk and resumes: six steps, each saved."""

import os
import sys
from pathlib import Path

from ktae_trl.files.checkpoints import last_checkpoint
from tests.trainers import make_trainer, prompts

# A generation serves four forward passes, so that most checkpoints lie inside a generation cycle and hold rollouts.
SETTINGS = {
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "max_completion_length": 12,
    "record_steps": 1,
}


def train(folder: Path, log: Path) -> None:
    """Train, from the newest whole checkpoint if there is one, and save the model. What it says goes to `log`."""
    with open(log, "a") as said:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(said.fileno(), stream.fileno())
    trainer = make_trainer(folder, train_dataset=prompts(12), **SETTINGS)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) is not None)
    trainer.save_model()
