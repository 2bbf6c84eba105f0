"""Write an HTML page with key tokens, from a run's records or from rollouts of any source.

ktae report runs/quickstart -o report.html
ktae explain rollouts.jsonl --tokenizer Qwen/Qwen2.5-Math-1.5B -o page.html
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from ktae_trl.arguments import UserError, loading
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
        description="Write one HTML page with the key tokens of rollouts from any source. Rollouts with the same "
        "prompt form a group.",
    )
    parser.add_argument(
        "file",
        type=Path,
        help=".jsonl or .jsonl.gz file, one rollout per line, with prompt, completion, and correct (true, false, null) "
        "or answers",
    )
    parser.add_argument(
        "--tokenizer", required=True, help="tokenizer of the model that wrote the completions: a Hub id or a folder"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), help="the HTML file (default: report.html)"
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
    options = vars(parser.parse_args(words))

    from transformers import AutoTokenizer

    from ktae_trl.report.rows import explain, read_rows

    file, output = options.pop("file"), options.pop("output")
    rows = read_rows(file)
    name = options.pop("tokenizer")
    with loading(f"The tokenizer {name!r}", by="--tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    explained = explain(rows, tokenizer, **options)._replace(name=file.name)
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(explained.summary())
    return explained.save(output)
