"""A job of the test in test_methods_spread.py: trains with every method, full and LoRA."""

import json
import math
from pathlib import Path

from ktae_trl.credit import METHODS
from tests.credit.test_methods import EXAMPLES, LORA, METHOD_SETTINGS, by_turns
from tests.trainers import difference, make_trainer, prompts, weights


def main(folder: str) -> None:
    folder, done = Path(folder), {}
    for credit in ("none", *METHODS, *EXAMPLES):
        for kind, adapter in (("full", None), ("lora", LORA)):
            trainer = make_trainer(
                folder / credit / kind,
                credit=credit,
                reward_funcs=by_turns,
                train_dataset=prompts(12),
                peft_config=adapter,
                gradient_checkpointing=True,
                **{**METHOD_SETTINGS, **EXAMPLES.get(credit, {})},
            )
            before = weights(trainer)
            trainer.train()
            logged = [x for entry in trainer.state.log_history for x in entry.values() if isinstance(x, float)]
            done[f"{credit} {kind}"] = {
                "processes": trainer.accelerator.num_processes,
                "wrapped": type(trainer.model_wrapped).__name__,
                "steps": trainer.state.global_step,
                "moved": difference(before, weights(trainer)),
                "finite": all(math.isfinite(x) for x in logged),
            }
    (folder / f"process_{trainer.accelerator.process_index}.json").write_text(json.dumps(done))
