"""Plot accuracy against completion length, with confidence intervals. Needs matplotlib (extra `eval`)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ktae_trl.arguments import need
from ktae_trl.evaluation.comparison import MEAN, Run
from ktae_trl.evaluation.statistics import mean_of, share
from ktae_trl.files.writing import replacing

# A palette for colour-blind readers (Okabe and Ito 2008).
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS = "osD^vPX"


def plot(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Plot accuracy against mean completion length, one panel per benchmark, and return the PNG and SVG files.

    Returns `[]` without plotting if the lengths of some completions are unknown.

    Raises:
        NotImportedError: matplotlib is not installed.
    """
    names = list(runs[0].benchmarks)
    if any(run.benchmarks[name].tokens is None for run in runs for name in names):
        return []
    need("matplotlib", "eval")
    from matplotlib.figure import Figure

    panels = [*names, *([MEAN] if len(names) > 1 else [])]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.3 * rows + 0.6), layout="constrained")
    for place, panel in enumerate(panels, 1):
        axis = figure.add_subplot(rows, columns, place)
        for i, run in enumerate(runs):
            parts = [run.benchmarks[name] for name in (names if panel == MEAN else [panel])]
            accuracy = mean_of([share(part.right.mean(1), part.right.shape[1]) for part in parts])
            means = [part.tokens.mean(1) for part in parts]
            length = float(np.mean([m.mean() for m in means]))
            error = 1.96 * np.sqrt(sum(m.var() / len(m) for m in means)) / len(means)
            axis.errorbar(
                length,
                100 * accuracy.value,
                xerr=error,
                yerr=[[100 * (accuracy.value - accuracy.low)], [100 * (accuracy.high - accuracy.value)]],
                color=_COLOURS[i % len(_COLOURS)],
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=7,
                capsize=3,
                label=run.name,
            )
        axis.set_title(
            panel if panel == MEAN else f"{panel} ({len(runs[0].benchmarks[panel].ids)} problems)", fontsize=10
        )
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("mean completion length, tokens")
    figure.supylabel("accuracy, %")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(runs), 4), frameon=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"accuracy_and_length.{kind}" for kind in ("png", "svg")]
    for file in files:
        with replacing(file) as draft:
            figure.savefig(draft, dpi=150)
    return files
