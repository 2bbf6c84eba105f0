"""Measure how good a model is on mathematics, compare models, or grade outputs that are already there.

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
    """Run the command that the words name, by default a measurement; a user's mistake ends it with one line.

    Args:
        program: how the user calls it, for messages.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    commands = {"compare": compare, "grade": grade}
    with user_errors(program):
        need("scipy", "eval")  # which the commands import themselves
        if not words or words[0].startswith("-"):
            evaluate(words, program)
        elif words[0] in commands:
            commands[words[0]](words[1:], f"{program} {words[0]}")
        else:
            raise UserError(f"unknown command {words[0]!r}{nearest(words[0], commands)}\n{__doc__}")


def evaluate(words: Sequence[str], program: str) -> None:
    """Measure one model on benchmarks."""
    if program == "eval.py" and (not words or words[0] in ("-h", "--help")):
        print(__doc__)
    if not {"-h", "--help"} & set(words):
        check_command(words)
    # These load torch and transformers, which the other commands do without.
    from ktae_trl.evaluation.measure import measure
    from ktae_trl.evaluation.settings import EvalArguments
    from ktae_trl.training.stopping import like_ctrl_c

    (args,) = parse((EvalArguments,), program, words)
    try:
        with like_ctrl_c():
            measure(args, Path(words[words.index("--config") + 1]).stem if "--config" in words else "default")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: stopped; what was generated is saved. The same command resumes from there")


def compare(words: Sequence[str], program: str) -> None:
    """Say which of several models is better on the same problems, and plot their accuracy and length."""
    parser = argparse.ArgumentParser(prog=program, description="Compare models on the same problems.")
    parser.add_argument("folders", nargs="+", help="results of ktae eval; every other one is compared with the first")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/compare"), help="for comparison.json and the plots"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and the permutations")
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
        print("\np-values are corrected for the number of benchmarks and models (Holm); intervals are not.")
    for note in notes:
        print(f"Note: {note}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    files = [options.output_dir / "comparison.json"]
    replace_json(files[0], {"comparisons": [comparison.record(c) for c in compared], "notes": notes}, indent=2)
    try:
        files += plot(runs, options.output_dir)
    except NotImportedError as error:
        print(f"Note: there is no plot: {error}")
    else:
        if len(files) == 1:
            print("Note: there is no plot, because the lengths of completions are not known")
    print(f"\nWritten: {', '.join(map(str, files))}")


def grade(words: Sequence[str], program: str) -> None:
    """Grade outputs of any program."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Grade outputs of any origin, an object a line (also .gz). Rows of the same benchmark and id are "
        "samples of one problem; without an id, each row is a problem of its own.",
    )
    parser.add_argument("file", type=Path)
    default = Columns()
    parser.add_argument("--completion_column", default=default.completion, help="the first that is there")
    parser.add_argument("--answer_column", default=default.answer, help="a string or a list of strings")
    parser.add_argument("--benchmark_column", default=default.benchmark)
    parser.add_argument("--id_column", default=default.id)
    parser.add_argument("--answer_format", default="boxed", choices=ANSWER_FORMATS, help="where outputs have it")
    parser.add_argument("--k", type=int, nargs="*", default=[], help="of pass@k and maj@k")
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
        logger.warning("%s is left out: none of its answers can be parsed", name)
        del members[name]
    if not members:
        raise UserError(f"{file}: no answer can be parsed")
    found = [summary.results(name, judged) for name, judged in members.items()]
    for result in found:
        samples = result.right.shape[1]
        if result.unscorable:
            ids = ", ".join(result.unscorable)
            logger.warning(
                "%s: the answers of these problems cannot be parsed; they are left out: %s", result.name, ids
            )
        for k in options.k:
            if not 1 <= k <= samples:
                raise UserError(
                    f"k must lie between 1 and the samples of a problem ({samples} in {result.name}), not {k}"
                )
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(folder.glob("*.jsonl")) - {paths[name] for name in members}:
        path.unlink()  # of what this file held when it was graded before
    for name, judged in members.items():
        replace_json_lines(paths[name], judged)
    summary.finish(folder, summary.summarise(found, options.k) | {"file": str(file)}, str(file))


def _check_graded_folder(folder: Path, file: Path, paths: dict[str, Path]) -> None:
    """Raise UserError if the results would overwrite each other, the file itself, or results of another one."""
    if len(set(paths.values())) < len(paths):
        raise UserError(f"Two benchmarks of {file} would be written to one file: {', '.join(paths)}")
    if file.resolve() in {path.resolve() for path in paths.values()}:
        raise UserError(f"{file} would be overwritten. Choose another output_dir than {folder}")
    if there := sorted(folder.glob("*.jsonl")):
        try:
            before = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["file"]
        except (OSError, ValueError, KeyError, TypeError):
            before = None
        if before != str(file):
            whose = f"the results of {before}" if before else f"{there[0].name}, which ktae grade did not write"
            raise UserError(f"{folder} holds {whose}. Choose another --output_dir")
