"""Print the published accuracy of KTAE with intervals for its gains, based on the number of problems alone.

python benchmarks/published.py RESULTS.json

RESULTS is the authors' table: for each model, `accuracy` and `mean_tokens` per benchmark. It does not say which
problems a model solved, so the intervals treat the two models' problems as independent. Paired intervals, as in
`eval.py compare`, would be narrower.
"""

import argparse
import json
from pathlib import Path

from ktae_trl.evaluation.statistics import independent_difference, mean_of, wilson
from ktae_trl.report.markdown import table

PROBLEMS = {"aime24": 30, "amc23": 83, "math500": 500, "minerva": 272, "olympiadbench": 675}
PAIRS = [(f"{method}_{size}", f"{method}+KTAE_{size}") for size in ("1.5B", "7B") for method in ("GRPO", "DAPO")]


def points(estimate) -> str:
    value, low, high = (100 * x for x in estimate)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def gains(results: dict) -> str:
    """Return the table as Markdown."""
    rows = []
    for names in PAIRS:
        parts = [[wilson(results[name]["accuracy"][b], n) for b, n in PROBLEMS.items()] for name in names]
        without, with_ktae = (mean_of(part) for part in parts)
        tokens = [sum(results[name]["mean_tokens"].values()) / len(PROBLEMS) for name in names]
        cells = [names[0].replace("_", " "), f"{100 * without.value:.1f}", f"{100 * with_ktae.value:.1f}"]
        cells.append(points(independent_difference(without, with_ktae)))
        cells += [points(independent_difference(a, b)) for a, b in zip(*parts, strict=True)]
        rows.append([*cells, f"{tokens[0]:.0f} to {tokens[1]:.0f}"])
    benchmarks = [f"{name} ({n})" for name, n in PROBLEMS.items()]
    return table(["", "average, %", "+ KTAE", "difference, points", *benchmarks, "tokens"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    print(gains(json.loads(parser.parse_args().file.read_text())))


if __name__ == "__main__":
    main()
