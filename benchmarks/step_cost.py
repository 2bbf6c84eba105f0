"""What token credit costs a training step: `credit: ktae` against `credit: none` on the quickstart.

python benchmarks/step_cost.py [--steps 20] [--pairs 3]

The learning rate is 0, so that all runs generate the same rollouts. Each run is a process of its own; the two kinds
take turns.
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
    }
    line = ["--config", "configs/quickstart.yaml", *(str(x) for k, v in settings.items() for x in (f"--{k}", v))]
    trainer = build_trainer(*parse((RunArguments, KTAEGRPOConfig, ModelConfig), "train.py", line))
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "step_time" in entry][2:]  # the first two warm up
    return {
        "step": [entry["step_time"] for entry in log],
        "credit": [entry.get(f"{credit}/seconds", 0.0) for entry in log],
        "length": [entry["completions/mean_length"] for entry in log],
        "metrics": [{name: value for name, value in entry.items() if name.startswith("tree/")} for entry in log],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--credit", help=argparse.SUPPRESS)  # set in the processes that this one starts
    arguments = parser.parse_args()
    if arguments.credit:
        print(json.dumps(train(arguments.credit, arguments.steps)))
        return

    runs: dict[str, list[dict]] = {"none": [], "ktae": []}
    for pair in range(arguments.pairs):
        for credit, done in runs.items():
            print(f"pair {pair + 1} of {arguments.pairs}: {credit}", file=sys.stderr)
            command = [sys.executable, __file__, "--credit", credit, "--steps", str(arguments.steps)]
            output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            done.append(json.loads(output.splitlines()[-1]))
    assert all(run["length"] == runs["none"][0]["length"] for kind in runs.values() for run in kind)

    def figure(credit: str, of: str) -> list[float]:
        return [statistics.median(run[of]) if isinstance(run[of], list) else run[of] for run in runs[credit]]

    print(f"\n{'':14}{'none':>10}{'ktae':>10}{'ratio of the pairs':>26}")
    for label, of in (("s/step", "step"), ("peak MiB", "peak_mib")):
        none, ktae = figure("none", of), figure("ktae", of)
        ratios = sorted(b / a for a, b in zip(none, ktae, strict=True))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{label:14}{statistics.median(none):10.3f}{statistics.median(ktae):10.3f}{spread:>26}")
    share = [sum(run["credit"]) / sum(run["step"]) for run in runs["ktae"]]
    print(f"\ntime in key-token values: {statistics.median(share):.2%} of a step")


if __name__ == "__main__":
    main()
