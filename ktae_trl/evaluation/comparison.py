"""Compare models by accuracy and completion length on the same problems, with paired tests."""

import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ktae_trl.arguments import NotFoundError, UserError
from ktae_trl.evaluation.samples import SETTINGS, graded, grader, read_samples, read_settings
from ktae_trl.evaluation.statistics import Difference, holm, paired_difference
from ktae_trl.evaluation.summary import Results, results
from ktae_trl.files.fingerprint import is_old

MEAN = "mean of benchmarks"
logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """The finished results of one model."""

    name: str
    settings: dict | None  # None: unknown, as for outputs of another program
    benchmarks: dict[str, Results]


class Comparison(NamedTuple):
    """Model B against model A, on one benchmark or on the mean of all benchmarks."""

    a: str
    b: str
    benchmark: str
    problems: int
    accuracy: Difference
    corrected_p: float  # Holm-corrected over the benchmarks (or the means) of all models compared
    tokens: Difference | None
    tokens_corrected_p: float | None


def labels(folders: Sequence[str]) -> list[str]:
    """Return a short name for each folder: the last parts of its path that distinguish it from the others.

    `runs/eval/A/math` and `runs/eval/B/math` become `A` and `B`. Identical folders get the same name.
    """
    paths = [Path(folder).resolve().parts[1:] for folder in folders]
    while len(paths) > 1 and min(map(len, paths)) > 1 and len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]
    for count in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def load_run(folder: str, name: str | None = None) -> Run:
    """Read a folder written by `eval.py` or `eval.py grade`.

    Samples that another version of the grader graded are graded again.

    Args:
        name: The model's name in the comparison. Default: the name of the folder.

    Raises:
        NotFoundError: The folder does not exist or holds no samples.
        UserError: A line is corrupt, or the samples are not graded.
    """
    path = Path(folder)
    files = sorted(path.glob("*.jsonl"))
    if not files:
        below = ", ".join(str(file.parent) for file in sorted(path.glob(f"*/{SETTINGS}")))
        raise NotFoundError(
            f"{folder} contains no results of ktae eval (looked in {Path.cwd()})"
            + (f". Its subfolders with results: {below}" if below else "")
        )
    try:
        settings = read_settings(path)
    except ValueError as error:  # the samples can be compared without the settings
        logger.warning("%s", error)
        settings = None
    return Run(name or path.resolve().name, settings, {file.stem: _read(file) for file in files})


def _read(file: Path) -> Results:
    rows = read_samples(file)
    if any(row.get("graded_by") != grader() for row in rows) and all("verdict" in row for row in rows):
        logger.warning("%s was graded by another version of the grader: grading it again for this comparison", file)
        rows = graded(rows, [row["answers"] for row in rows], rows[0].get("answer_format", "boxed"))
    return results(str(file), rows)


def compare(runs: Sequence[Run], seed: int = 0) -> list[Comparison]:
    """Compare every run with the first one, per benchmark and on the mean of benchmarks.

    Raises:
        UserError: There are fewer than two runs, two runs have the same name, or the runs have different problems. The
            message names the problems.
    """
    if len(runs) < 2:
        raise UserError("Only one folder to compare: give two or more")
    for one, other in combinations(runs, 2):
        if one.name == other.name:
            raise UserError(f"Two folders have the same name, {one.name!r}. Rename one, or remove the duplicate")
        _check_same_problems(one, other)
    found = []
    for run in runs[1:]:
        pairs = [(a, _in_order_of(a, run.benchmarks[name])) for name, a in runs[0].benchmarks.items()]
        found += [_compare(runs[0].name, run.name, a.name, [(a, b)], seed) for a, b in pairs]
        if len(pairs) > 1:
            found.append(_compare(runs[0].name, run.name, MEAN, pairs, seed))
    # Holm's correction treats the single benchmarks of all models as one family of tests, and the means as another.
    for of_means in (False, True):
        for figure, corrected in (("accuracy", "corrected_p"), ("tokens", "tokens_corrected_p")):
            members = [i for i, c in enumerate(found) if (c.benchmark == MEAN) == of_means and getattr(c, figure)]
            for i, p in zip(members, holm([getattr(found[i], figure).p for i in members]), strict=True):
                found[i] = found[i]._replace(**{corrected: p})
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
        tokens_corrected_p=None,
    )


def _check_same_problems(one: Run, other: Run) -> None:
    if one.benchmarks.keys() != other.benchmarks.keys():
        raise UserError(
            f"{one.name} and {other.name} were measured on different benchmarks: "
            f"{', '.join(one.benchmarks)} and {', '.join(other.benchmarks)}. Measure both on the same ones"
        )
    for name, a in one.benchmarks.items():
        b = other.benchmarks[name]
        if set(a.ids) != set(b.ids):
            missing = [i for i in a.ids if i not in set(b.ids)] + [i for i in b.ids if i not in set(a.ids)]
            raise UserError(
                f"{one.name} and {other.name} have different problems in {name}. Only one of them has: "
                f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Measure both on the same problems"
            )
        aligned = _in_order_of(a, b)
        for i, x, y, mine, theirs in zip(a.ids, a.problems, aligned.problems, a.answers, aligned.answers, strict=True):
            if x and y and x != y:
                raise UserError(
                    f"The text of problem {i!r} of {name} differs between {one.name} and {other.name}. Measure both on "
                    "the same problems"
                )
            if mine != theirs:
                raise UserError(
                    f"The accepted answers of problem {i!r} of {name} differ between {one.name} and {other.name}. "
                    "Measure both on the same problems"
                )


def _in_order_of(first: Results, other: Results) -> Results:
    """Return `other` with its problems sorted as in `first`."""
    place = {name: i for i, name in enumerate(other.ids)}
    order = [place[name] for name in first.ids]
    return other._replace(
        ids=first.ids,
        problems=[other.problems[i] for i in order],
        answers=[other.answers[i] for i in order],
        right=other.right[order],
        extracted=[other.extracted[i] for i in order],
        tokens=None if other.tokens is None else other.tokens[order],
        truncated=None if other.truncated is None else other.truncated[order],
    )


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Return a note for each setting, other than the model, that differs between runs and may explain a difference."""
    unknown = [run.name for run in runs if run.settings is None]
    if unknown:
        return [f"the sampling settings are unknown for: {', '.join(unknown)}"]
    own = {"model_name_or_path", "model_revision", "fingerprint"}
    names = sorted({name for run in runs for name in run.settings} - own)
    notes = [
        f"{run.name} was measured by version 0.1, which did not check all of the model's weights: its samples may come "
        "from another model. Measure it again"
        for run in runs
        if "fingerprint" in run.settings and is_old(run.settings["fingerprint"])
    ]
    for name in names:
        values = [run.settings.get(name) for run in runs]
        if any(value != values[0] for value in values):
            notes.append(
                f"{name} differs: " + ", ".join(f"{v!r} in {r.name}" for r, v in zip(runs, values, strict=True))
            )
    return notes


def sentence(comparison: Comparison) -> str:
    """Return the result of a comparison as a sentence. It claims a difference only if the corrected p is below 0.05."""
    better = comparison.b if comparison.accuracy.value > 0 else comparison.a
    claim = f"{better} is better" if comparison.corrected_p < 0.05 else "no evidence of a difference"
    points = Difference(*(100 * x for x in comparison.accuracy[:3]), comparison.accuracy.p)
    return f"{comparison.benchmark}: {claim}: {_size(points, comparison.corrected_p, 'points', 1)}"


def length_sentence(comparison: Comparison) -> str:
    """Return the difference in completion length as a sentence, by the same rule as `sentence`."""
    tokens, p = comparison.tokens, comparison.tokens_corrected_p
    longer = f"{comparison.b} is {'longer' if tokens.value > 0 else 'shorter'}"
    claim = longer if p < 0.05 else "no evidence of a difference in length"
    return f"{claim}: {_size(tokens, p, 'tokens', int(abs(tokens.value) < 10))}"


def _size(difference: Difference, p: float, unit: str, places: int) -> str:
    if difference[:3] == (0, 0, 0):
        return "identical on every problem"
    value, low, high = (f"{round(x, places) + 0.0:+,.{places}f}" for x in difference[:3])  # + 0.0: no -0.0
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"
    return f"{value} {unit}, 95% interval {low} to {high}, {shown}"


def record(comparison: Comparison) -> dict:
    """Return a comparison with its sentences as a dictionary for JSON."""
    return {
        **comparison._asdict(),
        "accuracy": comparison.accuracy._asdict(),
        "tokens": comparison.tokens and comparison.tokens._asdict(),
        "sentence": sentence(comparison),
        "length_sentence": comparison.tokens and length_sentence(comparison),
    }
