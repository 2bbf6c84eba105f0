"""Tables and plots of the learning benchmark, from its runs or from the results that were kept of them.

python benchmarks/learning_report.py                                            # of the results that the repository has
python benchmarks/learning_report.py --config benchmarks/learning.yaml          # of the runs that are there

The seed is the unit: intervals are 95% t intervals over seeds, differences are between runs of the same seed, p-values
are those of the exact test that flips the sign of each seed's difference, after Holm for the methods of tier A.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from learning import SEARCH, area, read_config, search_runs, tier_runs  # noqa: E402

from ktae_trl.evaluation.statistics import holm  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BASELINE, FULL = "grpo", "ktae_multiply"
COLOURS = plt.get_cmap("tab10").colors


class Interval(NamedTuple):
    """A mean over seeds and its 95% interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """A mean difference between runs of the same seed, its 95% interval and p-value."""

    value: float
    low: float
    high: float
    p: float
    seeds: int


def interval(values: np.ndarray) -> Interval:
    """Return the mean and its t interval; without a width if there is one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    half = stats.t.ppf(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(one: pd.Series, other: pd.Series) -> Difference:
    """Return how much `one` is above `other`, both by seed; seeds that one of them lacks are left out."""
    seeds = sorted(set(one.index) & set(other.index))
    x, y = one[seeds].to_numpy(), other[seeds].to_numpy()
    if len(seeds) < 2:
        return Difference(float((x - y).mean()) if seeds else np.nan, np.nan, np.nan, np.nan, len(seeds))
    test = stats.permutation_test(
        (x, y),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=2**14,  # exact up to 14 seeds
        vectorized=True,
    )
    return Difference(*interval(x - y), float(test.pvalue), len(seeds))


def first_reached(curve: pd.DataFrame, target: float, over: str) -> float:
    """Return at how many tokens (or seconds) the accuracy first reaches the target, between evaluations in a line."""
    x, accuracy = curve[over].to_numpy(), curve["accuracy"].to_numpy()
    reached = np.flatnonzero(accuracy >= target)
    if not len(reached):
        return np.inf
    i = reached[0]
    if i == 0:
        return float(x[0])
    share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def collect(config: dict) -> pd.DataFrame:
    """Return the curves of all runs that are there, the search for learning rates too."""
    runs = {SEARCH: search_runs(config), **{tier: tier_runs(config, tier) for tier in config["tiers"]}}
    curves = [run.curve().assign(tier=tier) for tier, some in runs.items() for run in some if run.done]
    if not curves:
        raise ValueError(f"There is no run yet in {config['output']}: begin with benchmarks/learning.py")
    return pd.concat(curves, ignore_index=True)


def outcomes(curves: pd.DataFrame) -> pd.DataFrame:
    """Return a row a run: what its curve comes to."""
    rows = []
    for (tier, task, method, rate, seed), curve in curves.groupby(["tier", "task", "method", "rate", "seed"]):
        curve = curve.sort_values("tokens")
        last, trained = curve.iloc[-1], curve.iloc[1:]
        row = {"tier": tier, "task": task, "method": method, "rate": rate, "seed": seed, "area": area(curve)}
        row |= {name: last[name] for name in ("accuracy", "length", "entropy", "boxed", "cut_off", "seconds", "steps")}
        row |= {name: trained[name].mean() for name in ("saturated", "advantage_ratio", "zero_factor", "uninformative")}
        row |= {f"start_{name}": curve.iloc[0][name] for name in ("accuracy", "length", "boxed")}
        rows.append(row)
    return pd.DataFrame(rows)


def by_seed(runs: pd.DataFrame, task: str, method: str, column: str) -> pd.Series:
    return runs[(runs.task == task) & (runs.method == method)].set_index("seed")[column]


def show(x: Interval | Difference, scale: float = 100, digits: int = 1, sign: bool = False) -> str:
    mark = "+" if sign else ""
    value = f"{x.value * scale:{mark}.{digits}f}"
    if np.isnan(x.low):
        return value
    return f"{value} ({x.low * scale:{mark}.{digits}f} to {x.high * scale:{mark}.{digits}f})"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison_table(runs: pd.DataFrame, task: str, tier: str, against: str, *, p_values: bool) -> str:
    """Return the table of a tier: area, final accuracy, and their differences to `against`."""
    mine = runs[runs.task == task]
    methods = list(dict.fromkeys(mine[mine.tier == tier].method))
    others = [method for method in methods if method != against]
    differences = {
        column: {m: difference(by_seed(mine, task, m, column), by_seed(mine, task, against, column)) for m in others}
        for column in ("area", "accuracy")
    }
    corrected = {
        column: dict(zip(found, holm([d.p for d in found.values()]), strict=True))
        for column, found in differences.items()
    }
    rows = []
    for method in [against, *others]:
        one = mine[mine.method == method]
        row = [f"`{method}`", f"{one.rate.iloc[0]:g}", str(len(one))]
        for column in ("area", "accuracy"):
            row.append(show(interval(one[column])))
            if method == against:
                row.append("")
                continue
            found = differences[column][method]
            p = f", p = {corrected[column][method]:.3f}" if p_values else ""
            row.append(show(found, sign=True) + p)
        rows.append(row)
    head = ["method", "rate", "seeds", "area, %", f"less `{against}`", "final accuracy, %", f"less `{against}`"]
    return markdown(head, rows)


def behaviour_table(curves: pd.DataFrame, runs: pd.DataFrame, task: str) -> str:
    """Return the table of speed and of signs of ill health: means over seeds at the end of the budget."""
    mine = runs[runs.task == task]
    target = by_seed(mine, task, BASELINE, "accuracy").mean()
    rows = []
    for method in dict.fromkeys(mine.method):
        one = mine[mine.method == method]
        of_seeds = [
            c.sort_values("tokens")
            for _, c in curves[(curves.task == task) & (curves.method == method)].groupby("seed")
        ]
        reached = np.array([first_reached(curve, target, "tokens") for curve in of_seeds])
        middle = f"{np.median(reached):,.0f}" if np.isfinite(np.median(reached)) else "not reached"
        rows.append(
            [
                f"`{method}`",
                f"{middle} ({np.isfinite(reached).sum()} of {len(reached)})",
                f"{one.seconds.mean():.0f}",
                f"{one.length.mean():.1f}",
                f"{one.entropy.mean():.3f}",
                f"{one.boxed.mean():.1%}",
                f"{(one.boxed - one.accuracy).mean():.1%}",
                *(
                    "" if one[name].isna().all() else f"{one[name].mean():.{digits}f}"
                    for name, digits in (("saturated", 2), ("advantage_ratio", 2))
                ),
            ]
        )
    rows.insert(
        0,
        [
            "at the start",
            "",
            "",
            f"{mine.start_length.mean():.1f}",
            "",
            f"{mine.start_boxed.mean():.1%}",
            f"{(mine.start_boxed - mine.start_accuracy).mean():.1%}",
            "",
            "",
        ],
    )
    head = [
        "method",
        f"tokens to {target:.1%} (seeds)",
        "seconds",
        "length",
        "entropy",
        "with an answer",
        "a wrong answer",
        "saturated",
        "mean size of A' / A",
    ]
    return markdown(head, rows)


def rates_table(searched: pd.DataFrame) -> str:
    """Return the mean area of each method at each learning rate."""
    means = searched.groupby(["task", "method", "rate"]).area.mean().unstack()
    rows = [
        [task, f"`{method}`", *(f"**{x:.1%}**" if x == row.max() else f"{x:.1%}" for x in row)]
        for (task, method), row in means.iterrows()
    ]
    return markdown(["task", "method", *(f"{rate:g}" for rate in means.columns)], rows)


def band(axis: plt.Axes, curves: pd.DataFrame, x: str, y: str, label: str, colour) -> None:
    """Draw the mean over seeds, evaluation by evaluation, with its 95% interval."""
    numbered = curves.sort_values("tokens").assign(n=lambda c: c.groupby("seed").cumcount())
    points = numbered.groupby("n").agg(x=(x, "mean"), count=(y, "size"))
    intervals = pd.DataFrame([interval(values.to_numpy()) for _, values in numbered.groupby("n")[y]])
    axis.plot(points.x, intervals.value, label=label, color=colour, linewidth=1.6)
    axis.fill_between(points.x, intervals.low, intervals.high, color=colour, alpha=0.13, linewidth=0)


def plot_curves(curves: pd.DataFrame, path: Path) -> None:
    """Draw tier A: accuracy over tokens and over time, length, entropy; a row of panels a task."""
    curves = curves[curves.tier == "a"]
    tasks, methods = list(dict.fromkeys(curves.task)), list(dict.fromkeys(curves.method))
    panels = [
        ("tokens", "accuracy", "generated tokens", "held-out accuracy"),
        ("seconds", "accuracy", "seconds of training", "held-out accuracy"),
        ("tokens", "length", "generated tokens", "tokens of a completion"),
        ("tokens", "entropy", "generated tokens", "entropy, nats"),
    ]
    figure, axes = plt.subplots(len(tasks), 4, figsize=(16, 3.7 * len(tasks)), squeeze=False, layout="constrained")
    for row, task in zip(axes, tasks, strict=True):
        for axis, (x, y, x_label, y_label) in zip(row, panels, strict=True):
            for colour, method in zip(COLOURS, methods, strict=False):
                band(axis, curves[(curves.task == task) & (curves.method == method)], x, y, method, colour)
            axis.set(xlabel=x_label, ylabel=y_label)
            if x == "tokens":
                axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_title(task, loc="left", fontweight="bold")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_differences(runs: pd.DataFrame, path: Path) -> None:
    """Draw each method's difference to GRPO in area, with its interval; a panel a task."""
    runs = runs[runs.tier != SEARCH]
    tasks = list(dict.fromkeys(runs.task))
    methods = [method for method in dict.fromkeys(runs.sort_values("order").method) if method != BASELINE]
    figure, axes = plt.subplots(
        1,
        len(tasks),
        figsize=(5.5 * len(tasks) + 1, 0.34 * len(methods) + 1.3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        baseline = by_seed(runs, task, BASELINE, "area")
        for place, method in enumerate(methods):
            found = difference(by_seed(runs, task, method, "area"), baseline)
            if found.seeds == 0:
                continue
            tier = runs[runs.method == method].tier.iloc[0]
            colour = {"a": COLOURS[0], "b": COLOURS[2], "ablation": COLOURS[7], "control": COLOURS[3]}[tier]
            axis.plot([found.low * 100, found.high * 100], [place, place], color=colour, linewidth=2)
            axis.plot(found.value * 100, place, "o", color=colour, markersize=5)
            axis.annotate(
                f"{found.seeds} seeds", (1, place), xycoords=("axes fraction", "data"), fontsize=7, va="center"
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(methods)), methods)
        axis.set(xlabel="area under the curve less GRPO's, points", title=task)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="of the runs; without it the kept results are read")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results and plots")
    arguments = parser.parse_args()
    kept = arguments.output / "learning.parquet"
    try:
        curves = collect(read_config(arguments.config)) if arguments.config else pd.read_parquet(kept)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"learning_report.py: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.config:
        curves.to_parquet(kept, index=False, compression="zstd")

    order = {method: i for i, method in enumerate(dict.fromkeys(curves.method))}
    runs = outcomes(curves).assign(order=lambda r: r.method.map(order)).sort_values(["order", "seed"])
    compared = runs[runs.tier != SEARCH]
    print(f"## Learning rates: mean area by rate\n\n{rates_table(runs[runs.tier == SEARCH])}\n")
    for task in dict.fromkeys(compared.task):
        print(f"## {task}\n")
        for tier, title, against in (
            ("a", "Tier A", BASELINE),
            ("b", "Tier B: estimates and intervals only", BASELINE),
            ("ablation", "Ablation, against the whole method", FULL),
            ("control", "Control: shuffled labels", BASELINE),
        ):
            if (compared[compared.task == task].tier == tier).any():
                table = comparison_table(compared, task, tier, against, p_values=tier in ("a", "control"))
                print(f"### {title}\n\n{table}\n")
        of_task = curves[(curves.tier != SEARCH) & (curves.task == task)]
        print(f"### Speed and health\n\n{behaviour_table(of_task, compared, task)}\n")
    plot_curves(curves, arguments.output / "learning_curves.png")
    plot_differences(runs, arguments.output / "learning_differences.png")
    print(f"Plots: {arguments.output}/learning_curves.png, learning_differences.png")


if __name__ == "__main__":
    main()
