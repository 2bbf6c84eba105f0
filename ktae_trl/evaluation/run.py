"""Measure a model on mathematics benchmarks, compare models, or grade existing outputs.

python eval.py --config configs/eval/math.yaml --model_name_or_path MODEL [--field value ...]
python eval.py compare FOLDER FOLDER [FOLDER ...] [--output_dir runs/compare]
python eval.py grade FILE [--output_dir FOLDER]
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import rich

from ktae_trl.arguments import NotImportedError, UserError, nearest, need, parse, user_errors
from ktae_trl.evaluation.outputs import Columns, read_outputs
from ktae_trl.evaluation.samples import graded, safe_name
from ktae_trl.files.writing import replace_json, replace_json_lines
from ktae_trl.grading import ANSWER_FORMATS
from ktae_trl.preflight import check_command

logger = logging.getLogger(__name__)


def main(words: Sequence[str], program: str = "eval.py") -> None:
    """Run the command named by the first word: `compare`, `grade`, or by default a measurement.

    Args:
        words: The command line without the program's name.
        program: The program's name in messages.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    commands = {"compare": compare, "grade": grade}
    with user_errors(program):
        need("scipy", "eval")  # the commands import it
        if not words or words[0].startswith("-"):
            evaluate(words, program)
        elif words[0] in commands:
            commands[words[0]](words[1:], f"{program} {words[0]}")
        else:
            raise UserError(f"unknown command {words[0]!r}{nearest(words[0], commands)}\n\n{__doc__}")


def evaluate(words: Sequence[str], program: str) -> None:
    """Measure one model on benchmarks."""
    if program == "eval.py" and (not words or words[0] in ("-h", "--help")):
        print(__doc__)
    if not {"-h", "--help"} & set(words):
        check_command(words)
    # These load torch and transformers, which the other commands do not need.
    from ktae_trl.evaluation.measure import measure
    from ktae_trl.evaluation.settings import EvalArguments
    from ktae_trl.training.console import quieten_libraries
    from ktae_trl.training.stopping import like_ctrl_c

    (args,) = parse((EvalArguments,), program, words)
    quieten_libraries()
    try:
        with like_ctrl_c():
            measure(args, Path(words[words.index("--config") + 1]).stem if "--config" in words else "default")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: stopped. The samples generated so far are saved. Run the same command to resume")


def compare(words: Sequence[str], program: str) -> None:
    """Compare models on the same problems, and plot their accuracy and completion length."""
    parser = argparse.ArgumentParser(prog=program, description="Compare models on the same problems.")
    parser.add_argument("folders", nargs="+", help="folders with results of ktae eval; the first is the baseline")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/compare"),
        help="folder for comparison.json and the plots (default: runs/compare)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and the permutations (default: 0)")
    options = parser.parse_args(words)

    from ktae_trl.evaluation import comparison
    from ktae_trl.evaluation.plot import plot

    names = comparison.labels(options.folders)
    runs = [comparison.load_run(*pair) for pair in zip(options.folders, names, strict=True)]
    compared = comparison.compare(runs, options.seed)
    notes = comparison.differing_settings(runs)
    for b in dict.fromkeys(c.b for c in compared):
        print(f"\n{b} against {runs[0].name}")
        for c in compared:
            if c.b == b:
                print(f"  {comparison.sentence(c)}")
                if c.tokens:
                    print(f"    {comparison.length_sentence(c)}")
    if len(compared) > 1:
        print("\nThe p-values are corrected for the number of benchmarks and models (Holm). The intervals are not.")
    for note in notes:
        print(f"Note: {note}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    files = [options.output_dir / "comparison.json"]
    replace_json(files[0], {"comparisons": [comparison.record(c) for c in compared], "notes": notes}, indent=2)
    try:
        files += plot(runs, options.output_dir)
    except NotImportedError as error:
        print(f"Note: no plot: {error}")
    else:
        if len(files) == 1:
            print("Note: no plot, because the completion lengths are unknown")
    print(f"\nSaved {', '.join(map(str, files))}")


def grade(words: Sequence[str], program: str) -> None:
    """Grade outputs of any program."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Grade outputs of any program. Lines with the same benchmark and id are samples of one problem. "
        "Without an id, each line is a separate problem. A column option may list several names, separated by commas: "
        "the first one present in a line is used.",
    )
    parser.add_argument("file", type=Path, help=".jsonl or .jsonl.gz file, one JSON object per line")
    default = Columns()
    for name, value, what in (
        ("completion", default.completion, "an output or a list of outputs"),
        ("answer", default.answer, "the accepted answer or a list of accepted answers"),
        ("benchmark", default.benchmark, "the benchmark's name"),
        ("id", default.id, "the problem's id"),
    ):
        parser.add_argument(f"--{name}_column", default=value, help=f"column with {what} (default: {value})")
    parser.add_argument(
        "--answer_format",
        default="boxed",
        choices=ANSWER_FORMATS,
        help="where an output states its answer (default: boxed)",
    )
    parser.add_argument("--k", type=int, nargs="*", default=[], help="values of k for pass@k and maj@k (default: none)")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: runs/graded/FILE")
    options = parser.parse_args(words)

    from ktae_trl.evaluation import summary

    file: Path = options.file
    folder = options.output_dir or Path("runs/graded") / safe_name(file.name.removesuffix(".gz").removesuffix(".jsonl"))
    columns = Columns(options.completion_column, options.answer_column, options.benchmark_column, options.id_column)
    rows = read_outputs(file, columns)
    paths = {row["benchmark"]: folder / f"{safe_name(row['benchmark'])}.jsonl" for row in rows}
    _check_graded_folder(folder, file, paths)
    with rich.get_console().status(f"Grading {len(rows)} outputs"):
        judged = graded(rows, [row.pop("answers") for row in rows], options.answer_format)
    members = {name: [row for row in judged if row["benchmark"] == name] for name in paths}
    for name in [name for name, found in members.items() if all(row["verdict"] is None for row in found)]:
        logger.warning("%s is excluded: none of its gold answers can be parsed", name)
        del members[name]
    if not members:
        raise UserError(f"{file}: none of its gold answers can be parsed. Set --answer_column")
    found = [summary.results(name, judged) for name, judged in members.items()]
    for result in found:
        samples = result.right.shape[1]
        if result.unscorable:
            ids = ", ".join(result.unscorable)
            logger.warning(
                "%s: the gold answers of these problems cannot be parsed. They are excluded: %s", result.name, ids
            )
        for k in options.k:
            if not 1 <= k <= samples:
                raise UserError(
                    f"k must be between 1 and the number of samples per problem ({samples} in {result.name}), not {k}"
                )
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(folder.glob("*.jsonl")) - {paths[name] for name in members}:
        path.unlink()  # a benchmark that the file contained when it was graded before
    for name, judged in members.items():
        replace_json_lines(paths[name], judged)
    summary.finish(folder, summary.summarise(found, options.k) | {"file": str(file)}, str(file))


def _check_graded_folder(folder: Path, file: Path, paths: dict[str, Path]) -> None:
    """Raise UserError if the results would overwrite each other, the file itself, or the results of another file."""
    if len(set(paths.values())) < len(paths):
        raise UserError(
            f"Two benchmarks of {file} would be written to the same file: {', '.join(paths)}. Rename one of them"
        )
    if file.resolve() in {path.resolve() for path in paths.values()}:
        raise UserError(f"{file} would be overwritten by its results. Choose an --output_dir other than {folder}")
    if there := sorted(folder.glob("*.jsonl")):
        try:
            before = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["file"]
        except (OSError, ValueError, KeyError, TypeError):
            before = None
        if before != str(file):
            whose = f"the results of {before}" if before else f"{there[0].name}, which ktae grade did not write"
            raise UserError(f"{folder} already contains {whose}. Choose another --output_dir")
