"""Which of several models is better, by how much, how surely, and at what length: the same problems, paired."""

import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ktae_trl.evaluation.samples import SETTINGS, read_samples
from ktae_trl.evaluation.statistics import Difference, holm, mean_of, paired_difference, share
from ktae_trl.evaluation.summary import Results, results

MEAN = "mean of benchmarks"
# Colours that colour-blind people can tell apart (Okabe and Ito 2008).
_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
_MARKERS = "osD^vPX"


class Run(NamedTuple):
    """The finished results of one model."""

    name: str
    settings: dict
    benchmarks: dict[str, Results]


class Comparison(NamedTuple):
    """Model B against model A on one benchmark, or on the mean of all."""

    a: str
    b: str
    benchmark: str
    problems: int
    accuracy: Difference
    corrected_p: float  # Holm's, over the benchmarks and models of this comparison
    tokens: Difference | None


def load_run(folder: str) -> Run:
    """Read a folder that `eval.py` (or `eval.py grade`) has written.

    Raises:
        FileNotFoundError: no such folder, or no samples in it.
        ValueError: a corrupt line, or samples that are not graded.
    """
    path = Path(folder)
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no results of eval.py (looked in {Path.cwd()})")
    settings = json.loads((path / SETTINGS).read_text(encoding="utf-8")) if (path / SETTINGS).exists() else {}
    return Run(path.name, settings, {file.stem: results(str(file), read_samples(file)) for file in files})


def compare(runs: Sequence[Run], seed: int = 0) -> list[Comparison]:
    """Compare every run with the first one, per benchmark and on the mean of benchmarks.

    Raises:
        ValueError: fewer than two runs, two of one name, or runs on different problems (which are named).
    """
    if len(runs) < 2:
        raise ValueError("Give two or more folders to compare")
    for one, other in combinations(runs, 2):
        if one.name == other.name:
            raise ValueError(f"Two of the folders are named {one.name!r}: they could not be told apart. Rename one")
        _check_same_problems(one, other)
    found = []
    for run in runs[1:]:
        pairs = [(runs[0].benchmarks[name], run.benchmarks[name]) for name in runs[0].benchmarks]
        found += [_compare(runs[0].name, run.name, a.name, [(a, b)], seed) for a, b in pairs]
        if len(pairs) > 1:
            found.append(_compare(runs[0].name, run.name, MEAN, pairs, seed))
    # The single benchmarks of all models are one family of questions, their means another.
    for family in (lambda c: c.benchmark != MEAN, lambda c: c.benchmark == MEAN):
        members = [i for i, comparison in enumerate(found) if family(comparison)]
        for i, p in zip(members, holm([found[i].accuracy.p for i in members]), strict=True):
            found[i] = found[i]._replace(corrected_p=p)
    return found


def _compare(a: str, b: str, name: str, pairs: list[tuple[Results, Results]], seed: int) -> Comparison:
    lengths = [(x.tokens, y.tokens) for x, y in pairs]
    known = all(x is not None and y is not None for x, y in lengths)
    return Comparison(
        a,
        b,
        Path(name).stem if name != MEAN else name,
        problems=sum(len(x.ids) for x, _ in pairs),
        accuracy=paired_difference([(x.right.mean(1), y.right.mean(1)) for x, y in pairs], seed),
        corrected_p=1.0,
        tokens=paired_difference([(x.mean(1), y.mean(1)) for x, y in lengths], seed) if known else None,
    )


def _check_same_problems(one: Run, other: Run) -> None:
    if one.benchmarks.keys() != other.benchmarks.keys():
        raise ValueError(
            f"{one.name} and {other.name} were measured on different benchmarks: "
            f"{', '.join(one.benchmarks)} and {', '.join(other.benchmarks)}"
        )
    for name, a in one.benchmarks.items():
        b = other.benchmarks[name]
        if a.ids != b.ids:
            missing = [i for i in a.ids if i not in set(b.ids)] + [i for i in b.ids if i not in set(a.ids)]
            what = f"problems {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''} are only in one of them"
            raise ValueError(
                f"{one.name} and {other.name} have different problems in {name}: {what if missing else 'other order'}"
            )
        for i, x, y in zip(a.ids, a.problems, b.problems, strict=True):
            if x != y:
                raise ValueError(f"Problem {i!r} of {name} has another text in {one.name} than in {other.name}")


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Say which settings, other than the model, differ between runs: part of a difference may come from them."""
    own = {"model_name_or_path", "model_revision", "fingerprint"}
    names = sorted({name for run in runs for name in run.settings} - own)
    notes = []
    for name in names:
        values = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            notes.append(
                f"{name} differs: " + ", ".join(f"{v!r} in {r.name}" for r, v in zip(runs, values, strict=True))
            )
    return notes


def sentence(comparison: Comparison) -> str:
    """Say the result of a comparison in words: a difference is claimed only if the corrected p-value is below 5%."""
    value, low, high, _ = (100 * x for x in comparison.accuracy)
    p = comparison.corrected_p
    size = f"{value:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"
    size += ", p < 0.001" if p < 0.001 else f", p = {p:.2f}" if p >= 0.1 else f", p = {p:.3f}"
    better = comparison.b if value > 0 else comparison.a
    claim = f"{better} is better" if p < 0.05 else "no evidence of a difference"
    return f"{comparison.benchmark}: {claim}: {size}" + (
        f"; {length_sentence(comparison)}" if comparison.tokens else ""
    )


def length_sentence(comparison: Comparison) -> str:
    value, low, high, p = comparison.tokens
    claim = "no evidence of another length" if p >= 0.05 else "longer" if value > 0 else "shorter"
    value, low, high = (f"{x:+,.0f}" if abs(value) >= 10 else f"{x:+.1f}" for x in (value, low, high))
    return f"{claim}: {value} tokens ({low} to {high})"


def plot(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw accuracy against mean completion length, a panel a benchmark; returns the PNG and the SVG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(runs[0].benchmarks)
    if any(run.benchmarks[name].tokens is None for run in runs for name in names):
        return []
    panels = [*names, *([MEAN] if len(names) > 1 else [])]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3.3 * rows + 0.6), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for i, run in enumerate(runs):
            parts = [run.benchmarks[name] for name in (names if panel == MEAN else [panel])]
            accuracy = mean_of([share(part.right.mean(1)) for part in parts])
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
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel("mean completion length, tokens")
    figure.supylabel("accuracy, %")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"accuracy_and_length.{kind}" for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    plt.close(figure)
    return files


def safe_name(model: str) -> str:
    """Return a folder name for a model's path or Hub id."""
    return re.sub(r"[^\w.+-]+", "_", model.rstrip("/")).strip("_.") or "model"
