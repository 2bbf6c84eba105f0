"""Compare tree sampling with GRPO with the same number of leaves, on the quickstart: tokens per prompt and step time.

python benchmarks/tree_cost.py [--steps 20] [--pairs 3]

The leaves of a tree share their beginnings, so fewer tokens are generated, one depth at a time. The forward pass still
reads full rows. The learning rate is 0, so that all runs sample from the same model. Each run has its own process, and
the two methods take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAVES = 8  # the quickstart's num_generations; by default a tree has a branching of 2 and a depth of 3


def run(credit: str, steps: int) -> dict:
    """Train in a subprocess; return for each step the seconds and the tokens per prompt."""
    command = [sys.executable, ROOT / "benchmarks/step_cost.py", "--credit", credit, "--steps", str(steps)]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    generated = [
        LEAVES * length for length in result["length"]
    ]  # in a tree, the length of a row is its number of trained tokens
    return {
        "seconds a step": result["step"],
        "tokens generated for a prompt": generated,
        "of these in the loss": generated,
        "tokens in a prompt's rows": [
            m.get("tree/row_tokens", g) for m, g in zip(result["metrics"], generated, strict=True)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    runs: dict[str, list[dict]] = {"none": [], "tree": []}
    for pair in range(arguments.pairs):
        for credit, done in runs.items():
            print(f"pair {pair + 1} of {arguments.pairs}: {credit}", file=sys.stderr)
            done.append(run(credit, arguments.steps))
    print(f"\n{'median of all steps':32}{'none':>10}{'tree':>10}{'ratio of the pairs':>26}")
    for label in runs["none"][0]:
        none, tree = (statistics.median(chain.from_iterable(one[label] for one in runs[credit])) for credit in runs)
        ratios = sorted(
            statistics.median(b[label]) / statistics.median(a[label])
            for a, b in zip(runs["none"], runs["tree"], strict=True)
        )
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{label:32}{none:10.2f}{tree:10.2f}{spread:>26}")


if __name__ == "__main__":
    main()
