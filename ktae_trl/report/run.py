"""Write an HTML page with key tokens, from a run's records or from rollouts of any source.

ktae report runs/quickstart -o report.html
ktae explain rollouts/ --tokenizer Qwen/Qwen2.5-Math-1.5B -o page.html
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from ktae_trl.arguments import UserError
from ktae_trl.report.dumps.formats import add_options
from ktae_trl.report.records import Record
from ktae_trl.report.tokens import visible


def main(words: list[str]) -> None:
    """Run `ktae report`, or `ktae explain` if that is the first word."""
    explained = words[:1] == ["explain"]
    try:
        page = _explain(words[1:]) if explained else _report(words)
    except UserError as error:  # the message may quote an untrusted file
        sys.exit(f"ktae {'explain' if explained else 'report'}: {visible(' '.join(str(error).split()))}")
    size = page.stat().st_size
    Console(soft_wrap=True, highlight=False, markup=False, emoji=False).print(f"Saved {page} ({size / 1e6:.1f} MB)")


def _report(words: list[str]) -> Path:
    parser = argparse.ArgumentParser(
        prog="ktae report",
        description="Write one HTML page with a run's recorded rollouts, their key tokens, and the run's curves.",
    )
    parser.add_argument("run", type=Path, help="a run's folder, its folder of records, or one step_*.parquet file")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="the HTML file (default: report.html)"
    )
    parser.add_argument(
        "--max_groups",
        type=int,
        help="maximum number of groups on the page, but at least one per record (default: 400)",
    )
    options = vars(parser.parse_args(words))

    from ktae_trl.report.page import write_report

    return write_report(options.pop("run"), **{name: value for name, value in options.items() if value is not None})


def _explain(words: list[str]) -> Path:
    parser = argparse.ArgumentParser(
        prog="ktae explain",
        description="Write one HTML page with the key tokens of rollouts that any trainer saved. Rollouts of the same "
        "prompt and step form a group.",
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files and folders of one format: of TRL, verl, AReaL, open-instruct, ms-swift, prime-rl, Atropos, "
        "NeMo-RL, SkyRL, ROLL, lm-evaluation-harness or ktae; or JSON Lines with prompt, completion, and correct "
        "(true, false, null), answers or reward",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="the HTML file (default: report.html)"
    )
    add_options(parser)
    parser.add_argument(
        "--correct",
        metavar="NAME",
        help="the number that says whether a rollout is correct (default: correct or acc, or else the reward)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="a rollout is correct if this number is above X (default: the lower of two values)",
    )
    parser.add_argument(
        "--max_groups",
        type=int,
        help="maximum number of groups on the page, shared equally among the steps (default: 400)",
    )
    parser.add_argument(
        "--combine",
        choices=("multiply", "add", "importance"),
        default="multiply",
        help="token advantage: multiply is A + |A| K, add is A + K, importance is A w (default: multiply)",
    )
    parser.add_argument("--fisher_weight", type=float, default=1.0, help="weight h1 of F (default: 1.0)")
    parser.add_argument("--ig_weight", type=float, default=1.0, help="weight h2 of IG (default: 1.0)")
    parser.add_argument(
        "--tf_weight", type=float, default=1.0, help="weight h3 of the term frequencies in D (default: 1.0)"
    )
    parser.add_argument(
        "--leave_one_out", action="store_true", help="compute K for each rollout from the other rollouts of its group"
    )
    parser.add_argument(
        "--methods",
        metavar="NAME,...",
        help="credit methods to show side by side: ktae, ktae_loo, ktae_add, importance, importance_loo; with --model "
        "also oar_g, oar_p, gtpo, otb and hicra",
    )
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="the model that wrote the rollouts: a Hub id or a folder. Without --methods, and for each of several "
        "models, such as two checkpoints, the page has the log-probability of every token",
    )
    parser.add_argument(
        "--answer_format",
        default="boxed",
        help="how completions give their answer, for oar_g and oar_p (default: boxed)",
    )
    options = vars(parser.parse_args(words))

    from ktae_trl.report.contents import collect
    from ktae_trl.report.dumps.explaining import explain_files
    from ktae_trl.report.page import write
    from ktae_trl.report.rows import method_with

    paths, output = options.pop("paths"), options.pop("output")
    if output.is_dir():  # before gigabytes are read
        raise UserError(f"The output {output} is a folder. Give a file, such as {output / 'report.html'}")
    method = method_with(*(options.pop(name) for name in _METHOD))
    added = _further_values(options.pop("methods"), options.pop("models"), options.pop("answer_format"))
    added(Record(method, []))  # mistakes show before gigabytes are read
    explained = explain_files(paths, method, **{name: value for name, value in options.items() if value is not None})
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in explained.lines:
        console.print(visible(line))
    shown = collect(map(added, explained.records))
    shown.notes.extend(explained.notes)
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return write(output, f"{paths[0].resolve().name}{more}", shown)


def _further_values(methods: str | None, models: list[str], answer_format: str) -> Callable[[Record], Record]:
    """Return what adds to a record the values of methods, and log-probabilities of models, that the user asked for."""
    if methods is None and not models:
        return lambda record: record

    from ktae_trl.report import models as reading
    from ktae_trl.report.methods import compare
    from ktae_trl.training.console import quieten_libraries

    quieten_libraries()
    readers = {name: reading.load(path) for name, path in reading.named(models).items()}
    writer = next(iter(readers.values()), None)  # the first model wrote the rollouts

    def added(record: Record) -> Record:
        if methods is not None:
            record = compare(record, methods.split(","), writer, answer_format=answer_format)
        return record if methods is not None and len(readers) < 2 else reading.log_probabilities(record, readers)

    return added


_METHOD = ("combine", "fisher_weight", "ig_weight", "tf_weight", "leave_one_out")
