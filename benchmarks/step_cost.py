"""What token credit costs a training step: each method against `credit: none` on the quickstart.

python benchmarks/step_cost.py [ktae oar_g oar_p] [--steps 20] [--rounds 3]

The learning rate is 0, so that all runs generate the same rollouts. Each run is a process of its own; the methods take
turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train(credit: str, steps: int) -> dict:
    """Train and return the seconds of each step, those spent on credit, and the peak memory of this process."""
    sys.path.insert(0, str(ROOT))
    from trl import ModelConfig

    from ktae_trl import KTAEGRPOConfig
    from ktae_trl.arguments import parse
    from train import RunArguments, build_trainer

    settings = {
        "credit": credit,
        "max_steps": steps,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": "runs/step_cost",  # the quickstart's holds what a person may want to keep
        "record_steps": 0,
    }
    line = ["--config", "configs/quickstart.yaml", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]
    trainer = build_trainer(*parse((RunArguments, KTAEGRPOConfig, ModelConfig), "train.py", line))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "step_time" in entry][2:]  # the first two warm up
    return {
        "step": [entry["step_time"] for entry in log],
        "credit": [entry.get(f"{credit.partition('_')[0]}/seconds", 0.0) for entry in log],
        "length": [entry["completions/mean_length"] for entry in log],
        "metrics": [{name: value for name, value in entry.items() if name.startswith("tree/")} for entry in log],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=["ktae"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--credit", help=argparse.SUPPRESS)  # set in the processes that this one starts
    arguments = parser.parse_args()
    if arguments.credit:
        print(json.dumps(train(arguments.credit, arguments.steps)))
        return

    runs: dict[str, list[dict]] = {"none": [], **{method: [] for method in arguments.methods}}
    for number in range(arguments.rounds):
        for credit, done in runs.items():
            print(f"round {number + 1} of {arguments.rounds}: {credit}", file=sys.stderr)
            command = [sys.executable, __file__, "--credit", credit, "--steps", str(arguments.steps)]
            output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            done.append(json.loads(output.splitlines()[-1]))
    assert all(run["length"] == runs["none"][0]["length"] for kind in runs.values() for run in kind)

    print(f"\n{'':10}{'s/step':>8}{'times none (range)':>26}{'in credit':>11}{'peak MiB':>10}{'times none':>12}")
    for credit, done in runs.items():
        steps = [statistics.median(run["step"]) for run in done]
        ratios = sorted(own / statistics.median(run["step"]) for own, run in zip(steps, runs["none"], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        share = statistics.median(sum(run["credit"]) / sum(run["step"]) for run in done)
        peak, plain = (statistics.median(run["peak_mib"] for run in kind) for kind in (done, runs["none"]))
        print(f"{credit:10}{statistics.median(steps):8.3f}{spread:>26}{share:11.2%}{peak:10,.0f}{peak / plain:12.2f}")


if __name__ == "__main__":
    main()
