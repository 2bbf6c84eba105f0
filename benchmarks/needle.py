"""When does token credit help? Many short runs of a task in which it is known which tokens matter.

python benchmarks/needle.py run       # runs the programme of needle.yaml; can be stopped, and the same command resumes
python benchmarks/needle.py report    # tables, plot and docs/evidence/needle.md from the finished runs

The task and the training are in needle_task.py, the methods in needle_rows.py. The programme is a list of parts in
order of importance, so that an interrupted programme still answers the main question. Each job (25 seeds of a cell)
appends a line to the results file.
"""

import argparse
import itertools
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import needle_task  # noqa: E402
from needle_task import Cell  # noqa: E402

CONFIG = ROOT / "benchmarks" / "needle.yaml"
TUNING, BEST, LOW = "tuning", "best", "low"
MARKS = 30  # points of a stored learning curve
Job = tuple[Cell, tuple[int, ...]]


class Results:
    """The finished jobs, one JSON line each."""

    def __init__(self, path: Path):
        self.path, self.lines = path, []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:  # an interrupted write: this job runs again
                    continue

    def add(self, result: dict) -> None:
        self.lines.append(result)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * torn + json.dumps(result) + "\n")

    def done(self, job: Job) -> bool:
        cell, seeds = asdict(job[0]), list(job[1])
        return any(line["cell"] == cell and line["seeds"] == seeds for line in self.lines)

    def of(self, cell: Cell, column: str = "area") -> dict[int, float]:
        """Return the values of a cell by seed. A missing value (target not reached) is infinite."""
        return {
            seed: float("inf") if value is None else value
            for line in self.lines
            if line["cell"] == asdict(cell)
            for seed, value in zip(line["seeds"], line[column], strict=True)
        }

    def curve(self, cell: Cell) -> np.ndarray:
        """Return the mean learning curve of a cell, (MARKS,)."""
        found = [(line["curve"], len(line["seeds"])) for line in self.lines if line["cell"] == asdict(cell)]
        return np.average([curve for curve, _ in found], axis=0, weights=[seeds for _, seeds in found])


def run_job(job: Job) -> dict:
    """Train the seeds of a job in this process."""
    torch.set_num_threads(1)
    started = time.process_time()
    cell, seeds = job
    runs = needle_task.train(cell, list(seeds))
    goal = needle_task.target(cell.rule)
    reached = needle_task.tokens_to_target(runs.accuracy_SN, runs.tokens, cell.group, goal).tolist()
    marks = np.linspace(0, runs.accuracy_SN.shape[1], MARKS + 1).astype(int)
    return {
        "cell": asdict(cell),
        "seeds": list(seeds),
        "area": [round(x, 5) for x in runs.accuracy_SN.mean(1).tolist()],
        "focus": [round(x, 4) for x in runs.focus_S.tolist()],
        "signal": [round(x, 4) for x in runs.signal_S.tolist()],
        "tokens_to_target": [None if x == float("inf") else x for x in reached],
        "curve": [round(float(runs.accuracy_SN[:, a:b].mean()), 4) for a, b in itertools.pairwise(marks)],
        "budget": runs.tokens * runs.accuracy_SN.shape[1],
        "seconds": round(time.process_time() - started, 1),
    }


def seeds_of(part: dict) -> range:
    first, last = part["seeds"]
    return range(first, last + 1)


def tuning_cells(config: dict, row: str, setting: dict) -> list[tuple[Cell, range]] | None:
    """Return the cells in which the rate of a row was searched in this setting, with their seeds."""
    for part in config["programme"]:
        if part["at"] == TUNING and row in part["rows"] and setting in part["settings"]:
            return [(Cell(row, rate, **setting), seeds_of(part)) for rate in part["rates"]]
    return None


def best_rate(config: dict, results: Results, row: str, setting: dict) -> float:
    """Return the rate with the best mean area on the tuning seeds.

    A row or a setting that was not tuned uses the rate of its relative in `rate_of` or `tuned_at`.

    Raises:
        LookupError: the tuning runs are not finished.
    """
    row = config["rate_of"].get(row, row)
    cells = tuning_cells(config, row, setting) or tuning_cells(config, row, tuned_at(config, setting))
    if cells is None:
        raise LookupError(f"{config['results']}: no part of the programme tunes the rate of {row} for {setting}")
    means = {}
    for cell, seeds in cells:
        areas = results.of(cell)
        if not set(seeds) <= set(areas):
            raise LookupError(f"{config['results']}: the tuning of {row} for {setting} is not finished")
        means[cell.rate] = np.mean([areas[seed] for seed in seeds])
    return max(means, key=means.get)


def tuned_at(config: dict, setting: dict) -> dict:
    """Return the tuned setting whose rates this setting uses."""
    return {"filler": config["tuned_at"][setting["filler"]]}


def rate_of(config: dict, results: Results, row: str, at: str | float, setting: dict) -> float:
    """Return the rate of a row: `at` is "best", "low" or the rate itself. LookupError: see `best_rate`."""
    if at == BEST:
        return best_rate(config, results, row, setting)
    return config["low_rate"] if at == LOW else at


def cells_of(part: dict, config: dict, results: Results) -> list[Cell]:
    """Return the cells of a part. Those of a tuned rate need the results of the tuning."""
    cells = []
    for setting, row in itertools.product(part["settings"], part["rows"]):
        tuning = part["at"] == TUNING
        rates = part["rates"] if tuning else [rate_of(config, results, row, part["at"], setting)]
        cells += [Cell(row, rate, **setting) for rate in rates]
    return cells


def jobs_of(part: dict, config: dict, results: Results) -> Iterator[Job]:
    """Yield the jobs of a part, all cells for the first seeds first."""
    seeds, size = seeds_of(part), config["seeds_per_job"]
    cells = cells_of(part, config, results)
    for begin in range(0, len(seeds), size):
        for cell in cells:
            yield cell, tuple(seeds[begin : begin + size])


def run(config: dict, console: Console) -> None:
    """Run the unfinished jobs, part after part."""
    results = Results(ROOT / config["results"])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    processes = multiprocessing.get_context("forkserver")
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        ProcessPoolExecutor(config["processes"], processes) as pool,
    ):
        for part in config["programme"]:
            waiting = [job for job in jobs_of(part, config, results) if not results.done(job)]
            bar = progress.add_task(part["part"], total=len(waiting))
            futures = [pool.submit(run_job, job) for job in waiting]
            try:
                for future in as_completed(futures):
                    result = future.result()
                    results.add(result)
                    cell = Cell(**result["cell"])
                    area = np.mean(result["area"])
                    progress.print(f"{part['part']}: {cell.row} {cell.rate:g} {cell.setting} {area:.1%}", markup=False)
                    progress.advance(bar)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():  # an interrupted job starts again next time
                    process.terminate()
                raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--config", type=Path, default=CONFIG)
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text())
    if arguments.command == "run":
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        run(config, Console())
    else:
        import needle_report

        needle_report.write(config)


if __name__ == "__main__":
    main()
