"""One process of a training for `test_two_processes.py`: run.py SETTINGS.json FOLDER [CHECKPOINT].

Writes, per process, what it is, the token credit of every generation and the final weights.
"""

import json
import sys
from pathlib import Path

import torch

from ktae_trl import tiny
from ktae_trl.evaluation.held_out import held_out_accuracy
from tests.training import make_trainer, prompts, replay, weights

# transformers reads an optimizer's state back to "cpu:0" if there are several processes, a name torch does not know.
torch.serialization.register_package(0, lambda _: None, lambda storage, name: storage if name == "cpu:0" else None)


def main(settings: dict, folder: Path, checkpoint: str | None = None) -> None:
    if settings.pop("replay"):
        settings["rollout_func"] = replay
    trainer = make_trainer(folder, train_dataset=prompts(settings.pop("prompts")), **settings)
    credits, generate = [], trainer._generate_and_score_completions

    def spy(inputs):
        batch = generate(inputs)
        credits.append(batch["credit"].clone())
        return batch

    trainer._generate_and_score_completions = spy
    trainer.train(resume_from_checkpoint=checkpoint)
    accelerator = trainer.accelerator
    held_out = held_out_accuracy(trainer, prompts(5, tiny.HELD_OUT), samples=2, batch_size=2)
    torch.save(
        {
            "processes": accelerator.num_processes,
            "distributed_type": str(accelerator.distributed_type.value),
            "wrapped": type(trainer.model_wrapped).__name__,
            "credits": credits,
            "held_out": held_out._asdict(),
            "weights": weights(trainer),
            "metrics": [entry for entry in trainer.state.log_history if "ktae/value_right" in entry],
        },
        folder / f"process_{accelerator.process_index}.pt",
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *sys.argv[3:])
