"""Compare the speed of `grade_many` with math-verify called for one output at a time in the same process.

python benchmarks/grading_throughput.py [OUTPUTS.jsonl.gz] [--outputs 10000] [--seed 0]

OUTPUTS has one object per line with `output` and `answers`, of which the first is used. Without OUTPUTS, solutions of
the offline task are graded, whose answers are small numbers. To reach the number of outputs, outputs are also graded
against randomly drawn answers of other problems; no pair is repeated.
"""

import argparse
import logging
import random
import time
from pathlib import Path

from math_verify import LatexExtractionConfig, parse, verify

from ktae_trl import tiny
from ktae_trl.files.lines import read_json_lines
from ktae_trl.grading import grade_many
from ktae_trl.tiny import task


def one_by_one(outputs: list[str], golds: list[str]) -> list[bool]:
    """Parse and compare as in TRL's `accuracy_reward`: the last box first, at most five seconds per step."""
    boxed = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    verdicts = []
    for output, gold in zip(outputs, golds, strict=True):
        accepted = parse(rf"\boxed{{{gold}}}")
        verdicts.append(verify(accepted, parse(output, extraction_config=boxed, extraction_mode="first_match")))
    return verdicts


def read(file: Path | None) -> list[dict]:
    """Return outputs with their answers, from the file or from the offline task."""
    if file is None:
        problems = [row for _, row in read_json_lines(tiny.TRAIN)]
        solutions = task.draw_solutions(problems, seed=0)
        return [{"output": text, "answers": [p["answer"]]} for text, p in zip(solutions, problems, strict=True)]
    return [row for _, row in read_json_lines(file)]


def pairs(rows: list[dict], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Pair each output with its own answer, then with answers of other problems."""
    draw = random.Random(seed)
    chosen = {(i, i): None for i in range(len(rows))}
    while len(chosen) < min(count, len(rows) ** 2):
        chosen[draw.randrange(len(rows)), draw.randrange(len(rows))] = None
    numbers = list(chosen)[:count]
    return [rows[i]["output"] for i, _ in numbers], [rows[j]["answers"][0] for _, j in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--outputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    outputs, golds = pairs(read(options.file), options.outputs, options.seed)

    seconds, verdicts = {}, {}
    for name, grader in {"math-verify, one by one": one_by_one, "grade_many": grade_many}.items():
        begin = time.perf_counter()  # includes the start of grade_many's workers
        verdicts[name] = grader(outputs, golds)
        seconds[name] = time.perf_counter() - begin
    slow, fast = seconds.values()
    for name, took in seconds.items():
        print(f"{name:24s} {took:8.2f} s   {len(outputs) / took:8.0f} outputs/s")
    print(f"{'ratio':24s} {slow / fast:8.1f}")
    different = [i for i, (a, b) in enumerate(zip(*verdicts.values(), strict=True)) if a != b]
    print(f"\n{len(different)} of {len(outputs)} verdicts differ (math-verify, grade_many, answer, end of the output)")
    for i in different:
        print(" ", *(v[i] for v in verdicts.values()), repr(golds[i]), repr(outputs[i][-60:]))


if __name__ == "__main__":
    main()
