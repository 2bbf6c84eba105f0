"""Print tables and draw plots of the learning benchmark, from its runs or from the stored results.

python benchmarks/learning_report.py                                            # the results stored in the repository
python benchmarks/learning_report.py --config benchmarks/learning.yaml          # the finished runs

The unit is the seed. Intervals are 95% t intervals over seeds, and differences are between runs with the same seed.
p-values come from the exact test that flips the sign of each seed's difference, with Holm's correction for the methods
of a table.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from learning import SEARCH, area, on_grid, read_config, search_runs, tier_runs  # noqa: E402

from ktae_trl.evaluation.statistics import Difference, Estimate, holm  # noqa: E402
from ktae_trl.report.markdown import table  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BASELINE, FULL = "grpo", "ktae_multiply"
COLOURS = plt.get_cmap("tab10").colors


def interval(values: np.ndarray) -> Estimate:
    """Return the mean and its 95% t interval; the bounds are NaN for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, np.nan, np.nan)
    half = stats.t.ppf(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def difference(one: pd.Series, other: pd.Series) -> Difference:
    """Return the paired difference `one - other`, both indexed by seed; only seeds in both are used."""
    seeds = sorted(set(one.index) & set(other.index))
    x, y = one[seeds].to_numpy(), other[seeds].to_numpy()
    if len(seeds) < 2:
        return Difference(float((x - y).mean()) if seeds else np.nan, np.nan, np.nan, np.nan)
    test = stats.permutation_test(
        (x, y),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=2**14,  # exact up to 14 seeds
        vectorized=True,
    )
    return Difference(*interval(x - y), float(test.pvalue))


def tokens_to(curve: pd.DataFrame, target: float) -> float:
    """Return after how many tokens the accuracy first reaches the target, interpolated linearly between evaluations.

    Infinite if it does not reach the target within the budget.
    """
    tokens, accuracy = curve["tokens"].to_numpy(), curve["accuracy"].to_numpy()
    reached = np.flatnonzero(accuracy >= target)
    if not len(reached):
        return np.inf
    i = reached[0]
    if i == 0:
        return float(tokens[0])
    share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    at = float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))
    return at if at <= curve["budget"].iloc[0] else np.inf


def collect(config: dict) -> pd.DataFrame:
    """Return the curves of all finished runs, including those of the learning-rate search."""
    runs = {SEARCH: search_runs(config)}
    if all(run.done for run in runs[SEARCH]):
        runs |= {tier: tier_runs(config, tier) for tier in config["tiers"]}
    curves = [run.curve().assign(tier=tier) for tier, some in runs.items() for run in some if run.done]
    if not curves:
        raise ValueError(f"{config['output']} has no finished run. Run benchmarks/learning.py first")
    return pd.concat(curves, ignore_index=True)


def outcomes(curves: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run: the area under its curve, its values at the end of the budget, and means over training.

    Methods are in the order of the curves.
    """
    rows = []
    for (tier, task, method, rate, seed), curve in curves.groupby(["tier", "task", "method", "rate", "seed"]):
        curve = curve.sort_values("tokens")
        start, end, trained = curve.iloc[0], on_grid(curve).iloc[-1], curve.iloc[1:]
        row = {"tier": tier, "task": task, "method": method, "rate": rate, "seed": seed, "area": area(curve)}
        row |= {name: end[name] for name in ("accuracy", "length", "entropy", "boxed", "seconds", "steps")}
        row |= {name: trained[name].mean() for name in ("saturated", "advantage_ratio")}
        row |= {f"mean_{name}": area(curve, name) for name in ("length", "entropy")}
        row |= {f"start_{name}": start[name] for name in ("accuracy", "length", "boxed")}
        rows.append(row)
    order = {method: i for i, method in enumerate(dict.fromkeys(curves.method))}
    return pd.DataFrame(rows).sort_values(["method", "seed"], key=lambda x: x.map(order) if x.name == "method" else x)


def by_seed(runs: pd.DataFrame, task: str, method: str, column: str) -> pd.Series:
    return runs[(runs.task == task) & (runs.method == method)].set_index("seed")[column]


def show(x: Estimate | Difference, scale: float = 100, digits: int = 1, sign: bool = False) -> str:
    mark = "+" if sign else ""
    value = f"{x.value * scale:{mark}.{digits}f}"
    if np.isnan(x.low):
        return value
    return f"{value} ({x.low * scale:{mark}.{digits}f} to {x.high * scale:{mark}.{digits}f})"


def compare(runs: pd.DataFrame, task: str, methods: list[str], against: str, column: str) -> dict[str, Difference]:
    """Return the differences of these methods to `against`, paired by seed, with Holm-corrected p-values."""
    mine = runs[runs.task == task]
    found = {m: difference(by_seed(mine, task, m, column), by_seed(mine, task, against, column)) for m in methods}
    corrected = holm([d.p for d in found.values()])
    return {method: d._replace(p=p) for (method, d), p in zip(found.items(), corrected, strict=True)}


def comparison_table(runs: pd.DataFrame, task: str, methods: list[str], against: str, *, p_values: bool) -> str:
    """Return a table of area and final accuracy, with the paired differences to `against`."""
    differences = {column: compare(runs, task, methods, against, column) for column in ("area", "accuracy")}
    rows = []
    for method in [against, *methods]:
        one = runs[(runs.task == task) & (runs.method == method)]
        row = [f"`{method}`", f"{one.rate.iloc[0]:g}", str(len(one))]
        for column, found in differences.items():
            row.append(show(interval(one[column])))
            row.append("" if method == against else show_difference(found[method], p_values))
        rows.append(row)
    head = ["method", "rate", "seeds", "area, %", f"less `{against}`", "final accuracy, %", f"less `{against}`"]
    return table(head, rows)


def habits_table(runs: pd.DataFrame, task: str, methods: list[str]) -> str:
    """Return a table of the differences to GRPO in mean length and entropy over the budget."""
    digits = {"mean_length": 2, "mean_entropy": 4}
    found = {column: compare(runs, task, methods, BASELINE, column) for column in digits}
    own = [show(interval(by_seed(runs, task, BASELINE, column)), scale=1, digits=n) for column, n in digits.items()]
    rows = [[f"`{BASELINE}`, mean over the budget", *own]]
    for method in methods:
        differences = [(found[column][method], n) for column, n in digits.items()]
        cells = [f"{show(d, scale=1, digits=n, sign=True)}, p = {d.p:.3f}" for d, n in differences]
        rows.append([f"`{method}`, less `{BASELINE}`", *cells])
    return table(["", "tokens of a completion", "entropy, nats"], rows)


def show_difference(found: Difference, p_values: bool) -> str:
    return show(found, sign=True) + (f", p = {found.p:.3f}" if p_values else "")


def summary_table(runs: pd.DataFrame) -> str:
    """Return a table of the differences to GRPO in area, one column per task; p-values as in the tables of tasks."""
    tasks, tiers = list(dict.fromkeys(runs.task)), [tier for tier in ("a", "control", "b") if tier in set(runs.tier)]
    rows = []
    for tier in tiers:
        methods = [method for method in dict.fromkeys(runs[runs.tier == tier].method) if method != BASELINE]
        found = {}
        for task in tasks:
            there = [m for m in methods if len(by_seed(runs, task, m, "area"))]
            found[task] = compare(runs, task, there, BASELINE, "area") if there else {}
        for method in methods:
            seeds = runs[runs.method == method].seed.nunique()
            cells = [
                show_difference(found[task][method], p_values=tier != "b") if method in found[task] else ""
                for task in tasks
            ]
            rows.append([f"`{method}`", str(seeds), *cells])
    return table(["method", "seeds", *(f"{task}, points" for task in tasks)], rows)


def quartiles(values: np.ndarray, digits: int = 0) -> str:
    """Return the median and the quartiles of numbers; infinite ones are shown as "not reached"."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
    return f"{show_finite(middle, digits)} ({show_finite(low, digits)} to {show_finite(high, digits)})"


def show_finite(x: float, digits: int) -> str:
    return f"{x:,.{digits}f}" if np.isfinite(x) else "not reached"


def behaviour_table(curves: pd.DataFrame, runs: pd.DataFrame, task: str) -> str:
    """Return a table of speed (median and quartiles over seeds) and of the state at the end (means and intervals)."""
    mine, curves = runs[runs.task == task], curves[curves.task == task]
    start, end = (by_seed(mine, task, BASELINE, name).mean() for name in ("start_accuracy", "accuracy"))
    targets = (start + 0.8 * (end - start), end)
    rows = [
        [
            *("at the start", "", "", "", ""),
            *(f"{mine.start_length.mean():.1f}", "", f"{mine.start_boxed.mean():.1%}"),
            *(f"{(mine.start_boxed - mine.start_accuracy).mean():.1%}", "", ""),
        ]
    ]
    for method in dict.fromkeys(mine.method):
        one = mine[mine.method == method]
        of_seeds = [curve.sort_values("tokens") for _, curve in curves[curves.method == method].groupby("seed")]
        rows.append(
            [
                f"`{method}`",
                *(quartiles(np.array([tokens_to(curve, target) for curve in of_seeds])) for target in targets),
                quartiles(one.seconds.dropna().to_numpy()),
                f"{one.steps.median():.0f}",
                show(interval(one.length), scale=1),
                show(interval(one.entropy), scale=1, digits=3),
                f"{one.boxed.mean():.1%}",
                f"{(one.boxed - one.accuracy).mean():.1%}",
                "" if one.saturated.isna().all() else show(interval(one.saturated), scale=1, digits=2),
                "" if one.advantage_ratio.isna().all() else f"{one.advantage_ratio.mean():.2f}",
            ]
        )
    head = [
        *("method", f"tokens to {targets[0]:.1%}, 80% of GRPO's gain", f"tokens to {end:.1%}, GRPO's final"),
        *("seconds of training", "steps", "length", "entropy", "with an answer", "with a wrong answer"),
        *("saturated", "mean A' / mean A, sizes"),
    ]
    return table(head, rows)


def rates_table(searched: pd.DataFrame) -> str:
    """Return a table of the mean area of each method at each learning rate."""
    means = searched.groupby(["task", "method", "rate"]).area.mean().unstack()
    rows = [
        [task, f"`{method}`", *("" if np.isnan(x) else f"**{x:.1%}**" if x == row.max() else f"{x:.1%}" for x in row)]
        for (task, method), row in means.iterrows()
    ]
    return table(["task", "method", *(f"{rate:g}" for rate in means.columns)], rows)


def band(axis: plt.Axes, curves: pd.DataFrame, x: str, y: str, label: str, colour) -> None:
    """Draw the mean over seeds at the marks of the budget, with its 95% interval. x is the median over seeds."""
    read = pd.concat(
        [on_grid(curve).assign(n=range(curve.evaluations.iloc[0] + 1)) for _, curve in curves.groupby("seed")]
    )
    at = read.groupby("n")[x].median()
    intervals = pd.DataFrame([interval(values.to_numpy()) for _, values in read.groupby("n")[y]])
    axis.plot(at, intervals.value, label=label, color=colour, linewidth=1.6)
    axis.fill_between(at, intervals.low, intervals.high, color=colour, alpha=0.13, linewidth=0)


def plot_curves(curves: pd.DataFrame, path: Path) -> None:
    """Draw accuracy and length over tokens and over time, and entropy over tokens; one row of panels per task."""
    tasks, methods = list(dict.fromkeys(curves.task)), list(dict.fromkeys(curves.method))
    panels = [
        ("tokens", "accuracy", "generated tokens", "held-out accuracy"),
        ("seconds", "accuracy", "seconds of training", "held-out accuracy"),
        ("tokens", "length", "generated tokens", "tokens of a completion"),
        ("seconds", "length", "seconds of training", "tokens of a completion"),
        ("tokens", "entropy", "generated tokens", "entropy, nats"),
    ]
    figure, axes = plt.subplots(len(tasks), 5, figsize=(19, 3.7 * len(tasks)), squeeze=False, layout="constrained")
    for row, task in zip(axes, tasks, strict=True):
        for axis, (x, y, x_label, y_label) in zip(row, panels, strict=True):
            for number, method in enumerate(methods):
                one = curves[(curves.task == task) & (curves.method == method)]
                if len(one):
                    band(axis, one, x, y, method, COLOURS[number % len(COLOURS)])
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
    """Draw each method's difference to GRPO in area, with its interval; one panel per task."""
    runs = runs[runs.tier != SEARCH]
    tasks = list(dict.fromkeys(runs.task))
    methods = [method for method in dict.fromkeys(runs.method) if method != BASELINE]
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
            one = by_seed(runs, task, method, "area")
            seeds = len(set(one.index) & set(baseline.index))
            if seeds == 0:
                continue
            found = difference(one, baseline)
            tier = runs[runs.method == method].tier.iloc[0]
            colour = {"a": COLOURS[0], "b": COLOURS[2], "ablation": COLOURS[7], "control": COLOURS[3]}[tier]
            axis.plot([found.low * 100, found.high * 100], [place, place], color=colour, linewidth=2)
            axis.plot(found.value * 100, place, "o", color=colour, markersize=5)
            axis.annotate(f"{seeds} seeds", (1, place), xycoords=("axes fraction", "data"), fontsize=7, va="center")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(methods)), methods)
        axis.set(xlabel="area under the curve less GRPO's, points", title=task)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(curves: pd.DataFrame, runs: pd.DataFrame) -> str:
    """Return all tables as Markdown."""
    compared = runs[runs.tier != SEARCH]
    searched = runs[runs.tier == SEARCH]
    parts = [f"## Learning rates: mean area by rate\n\n{rates_table(searched)}"] if len(searched) else []
    if BASELINE in set(compared.method):
        parts.append(f"## Area less that of `{BASELINE}`\n\n{summary_table(compared)}")
    for task in dict.fromkeys(compared.task):
        parts.append(f"## {task}")
        of_task = compared[compared.task == task]
        there = list(dict.fromkeys(of_task.method))
        tiers = {
            tier: list(dict.fromkeys(of_task[of_task.tier == tier].method)) for tier in dict.fromkeys(of_task.tier)
        }
        for title, methods, against, p_values in (
            ("Tier A", [m for m in tiers.get("a", []) if m != BASELINE], BASELINE, True),
            ("At the same mean size of the advantages", [FULL], "grpo_scaled", True),
            ("Control: shuffled labels", tiers.get("control", []), BASELINE, True),
            ("Tier B: estimates and intervals only", tiers.get("b", []), BASELINE, False),
            ("Ablation, against the whole method", ["ktae_multiply_loo", *tiers.get("ablation", [])], FULL, False),
        ):
            methods = [method for method in methods if method in there]
            if methods and against in there:
                parts.append(f"### {title}\n\n{comparison_table(compared, task, methods, against, p_values=p_values)}")
        if BASELINE in there:
            methods = [m for tier in ("a", "control") for m in tiers.get(tier, []) if m != BASELINE]
            parts.append(f"### Length and entropy\n\n{habits_table(compared, task, methods)}")
            parts.append(f"### Speed and health\n\n{behaviour_table(curves[curves.tier != SEARCH], compared, task)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="config of the runs (default: read the stored results)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for results and plots")
    arguments = parser.parse_args()
    kept = arguments.output / "learning.parquet"
    try:
        curves = collect(read_config(arguments.config)) if arguments.config else pd.read_parquet(kept)
    except FileNotFoundError as error:
        sys.exit(f"learning_report.py: {error.filename or kept} does not exist. To read the runs, give --config")
    except ValueError as error:
        sys.exit(f"learning_report.py: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.config:
        curves.to_parquet(kept, index=False, compression="zstd")

    runs = outcomes(curves)
    print(report(curves, runs))
    for tier in dict.fromkeys(runs[runs.tier != SEARCH].tier):
        beside = FULL if tier == "ablation" else BASELINE  # on the same seeds
        drawn = curves[(curves.tier == tier) | ((curves.tier == "a") & (curves.method == beside))]
        drawn = drawn[drawn.seed.isin(curves[curves.tier == tier].seed)]
        plot_curves(drawn, arguments.output / f"learning_{tier}.png")
    plot_differences(runs, arguments.output / "learning_differences.png")
    print(f"Plots: {arguments.output}/learning_*.png")


if __name__ == "__main__":
    main()
