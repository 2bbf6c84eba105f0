"""Run the quickstart with several seeds; print held-out accuracy before and after, one line per run, and the means.

python benchmarks/quickstart_seeds.py [--seeds 1 2 3] [--credit ktae none]

Finished runs in runs/seeds are not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from ktae_trl.report.markdown import table

ROOT = Path(__file__).parents[1]
FIGURES = ("before_sampled", "after_sampled", "before_greedy", "after_greedy")


def run(credit: str, seed: int) -> dict:
    output = ROOT / "runs" / "seeds" / f"{credit}-{seed}"
    results = output / "held_out_results.json"
    if not results.exists():
        print(f"training: credit {credit}, seed {seed}", file=sys.stderr)
        settings = {"credit": credit, "seed": seed, "output_dir": output, "report_to": "none", "save_strategy": "no"}
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        command += ["train.py", "--config", "configs/quickstart.yaml"]
        command += [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads(results.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--credit", nargs="+", default=["ktae"])
    arguments = parser.parse_args()
    rows = []
    for credit in arguments.credit:
        found = [run(credit, seed) for seed in arguments.seeds]
        mean = {name: statistics.mean(figures[name] for figures in found) for name in (*FIGURES, "train_seconds")}
        for seed, figures in zip([*arguments.seeds, "mean"], [*found, mean], strict=True):
            shares = [f"{figures[name]:.1%}" for name in FIGURES]
            rows.append([credit, seed, *shares, f"{figures['train_seconds']:.0f} s"])
    print(table(["credit", "seed", *(" ".join(reversed(name.split("_"))) for name in FIGURES), "training"], rows))


if __name__ == "__main__":
    main()
