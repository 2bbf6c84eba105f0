"""Compare how well credit methods learn: methods x tasks x seeds, with the same models and the same token budget.

python benchmarks/learning.py --config benchmarks/learning.yaml             # resumes after an interruption
python benchmarks/learning.py --config benchmarks/learning.yaml --tiers a   # only the learning-rate search and tier A
python benchmarks/learning_report.py --config benchmarks/learning.yaml      # tables and plots of the finished runs

Each run has a folder, OUTPUT/TASK/METHOD/RATE/SEED, with `run.yaml` (its settings), `curve.parquet` (one row per
evaluation) and `log.txt`. First, each method of tier A is trained with each learning rate, on seeds that are used only
for this search. All further runs of the method use the rate with the best mean area under the learning curve.
"""

import argparse
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ktae_trl.files.writing import replacing  # noqa: E402

CURVE, RUN, LOG = "curve.parquet", "run.yaml", "log.txt"
SEARCH = "rates"  # the learning-rate search, as the name of a tier
# Column of a curve -> metric of an evaluation, or of a training step (the mean since the last evaluation).
EVALUATED = {
    "accuracy": "eval_rewards/math_accuracy/mean",
    "boxed": "eval_rewards/boxed_format/mean",
    "length": "eval_completions/mean_length",
    "cut_off": "eval_completions/clipped_ratio",
    "entropy": "eval_entropy",
}
TRAINED = {
    "train_accuracy": "rewards/math_accuracy/mean",
    "train_length": "completions/mean_length",
    "train_entropy": "entropy",
    "uninformative": "frac_reward_zero_std",
    "grad_norm": "grad_norm",
    "advantage_ratio": "ktae/advantage_ratio",
    "saturated": "ktae/saturated",
    "zero_factor": "ktae/zero_factor",
    "value_right": "ktae/value_right",
    "value_wrong": "ktae/value_wrong",
}


@dataclass(frozen=True)
class Run:
    """One training run: the folder of its results, and its settings."""

    folder: Path
    told: dict  # task, method, tier, rate, seed, budget, evaluations, settings of the trainer

    @property
    def name(self) -> str:
        return " ".join(str(self.told[key]) for key in ("task", "method", "rate", "seed"))

    @property
    def done(self) -> bool:
        """Whether the run is finished.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        if not (self.folder / CURVE).exists():
            return False
        there = yaml.safe_load((self.folder / RUN).read_text())
        different = [key for key in {*there, *self.told} - {"tier"} if there.get(key) != self.told.get(key)]
        if different:
            raise ValueError(
                f"{self.folder} holds a run with other settings than the config ({', '.join(sorted(different))}). Set "
                "another `output` in the config, or move that folder away"
            )
        return True

    def curve(self) -> pd.DataFrame:
        """Return the evaluations of the run, with its settings in each row."""
        told = {key: self.told[key] for key in ("task", "method", "rate", "seed", "budget", "evaluations")}
        return pd.read_parquet(self.folder / CURVE).assign(**told)


def read_config(path: Path) -> dict:
    """Read the config; raise a ValueError if a method has an unknown tier or no learning rates."""
    config = yaml.safe_load(path.read_text())
    for name, method in config["methods"].items():
        if method["tier"] not in config["tiers"]:
            raise ValueError(
                f"{path}: method {name!r} has the unknown tier {method['tier']!r}. Tiers: {', '.join(config['tiers'])}"
            )
        base = method.get("rate_of", name)
        if config["methods"].get(base, {}).get("tier") != "a":
            raise ValueError(f"{path}: method {name!r} must be in tier a or have `rate_of` with a method of tier a")
    return config


def make_run(config: dict, task: str, method: str, rate: float, seed: int, tier: str) -> Run:
    described, how = config["tasks"][task], config["methods"][method]
    folder = ROOT / config["output"] / task / method / f"rate_{rate:g}" / f"seed_{seed}"
    settings = {
        **config["settings"],
        **described["settings"],
        **how.get("settings", {}),
        "learning_rate": rate,
        "seed": seed,
        "output_dir": os.path.relpath(folder, ROOT),
    }
    told = {
        "task": task,
        "method": method,
        "tier": tier,
        "rate": rate,
        "seed": seed,
        "budget": described["budget"],
        "evaluations": described["evaluations"],
        "settings": settings,
    }
    return Run(folder, told)


def search_runs(config: dict) -> list[Run]:
    """Return the runs of the learning-rate search. A task with one rate needs none."""
    first = [name for name, method in config["methods"].items() if method["tier"] == "a"]
    return [
        make_run(config, task, method, rate, seed, SEARCH)
        for seed in config["search_seeds"]
        for task, described in config["tasks"].items()
        for rate in described["rates"] * (len(described["rates"]) > 1)
        for method in first
    ]


def on_grid(curve: pd.DataFrame) -> pd.DataFrame:
    """Return the curve at evenly spaced marks of its budget, interpolated linearly between evaluations.

    This makes the curves of all methods comparable at the same numbers of tokens: a run ends with the step that exceeds
    the budget (with dynamic sampling, by up to ten generations), and one step may pass several marks.
    """
    budget, marks = int(curve["budget"].iloc[0]), int(curve["evaluations"].iloc[0])
    grid, curve = np.linspace(0, budget, marks + 1), curve.sort_values("tokens")
    numbers = curve.select_dtypes("number").columns
    return pd.DataFrame({name: np.interp(grid, curve["tokens"], curve[name]) for name in numbers})


def area(curve: pd.DataFrame, column: str = "accuracy") -> float:
    """Return the mean of a column over the budget: the area under the curve, by the trapezoidal rule."""
    values = on_grid(curve)[column].to_numpy()
    return float((values[1:] + values[:-1]).mean() / 2)


def chosen_rates(config: dict) -> dict[tuple[str, str], float]:
    """Return for each (task, method) the learning rate with the best mean area on the seeds of the search.

    Raises:
        ValueError: runs of the search are missing, so the rates could not be compared on the same seeds.
    """
    runs = search_runs(config)
    if missing := [run.name for run in runs if not run.done]:
        raise ValueError(f"The learning-rate search lacks {len(missing)} of {len(runs)} runs: {missing[0]}, ...")
    areas: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        of_method = areas.setdefault((run.told["task"], run.told["method"]), {})
        of_method.setdefault(run.told["rate"], []).append(area(run.curve()))

    def best(task: str, method: str) -> float:
        found = areas.get((task, method))
        return max(found, key=lambda rate: np.mean(found[rate])) if found else config["tasks"][task]["rates"][0]

    return {
        (task, name): best(task, method.get("rate_of", name))
        for name, method in config["methods"].items()
        for task in config["tasks"]
    }


def tier_runs(config: dict, tier: str) -> list[Run]:
    """Return the runs of a tier, seed by seed, so that an interrupted comparison has complete pairs."""
    described, rates = config["tiers"][tier], chosen_rates(config)
    methods = [name for name, method in config["methods"].items() if method["tier"] == tier]
    return [
        make_run(config, task, method, rates[task, method], seed, tier)
        for seed in described["seeds"]
        for task in config["tasks"]
        for method in methods
    ]


def train(run: Run, threads: int) -> None:
    """Train in this process and write the curve."""
    import torch
    import variants
    from transformers import TrainerCallback
    from trl import ModelConfig, TrlParser

    from ktae_trl import KTAEGRPOConfig
    from ktae_trl.credit.ktae.values import key_token_values
    from ktae_trl.training.run import RunArguments, build_trainer

    torch.set_num_threads(threads)
    variants.register()
    few = torch.zeros(1, 2, 1, dtype=torch.int32)
    key_token_values(few, few == 0, torch.tensor([[True, False]]))  # compiles, outside of the timed steps
    settings = {**run.told["settings"], "max_steps": 1_000_000, "eval_strategy": "no", "eval_on_start": True}
    settings |= {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    trainer = build_trainer(*TrlParser((RunArguments, KTAEGRPOConfig, ModelConfig)).parse_dict(settings))

    generated = 0  # all tokens generated in training, including those that dynamic sampling discards
    generate = trainer._generate_single_turn

    def counting(*args, **kwargs):
        nonlocal generated
        output = generate(*args, **kwargs)
        if trainer.model.training:
            own = torch.tensor(sum(map(len, output[0])), device=trainer.accelerator.device)
            generated += trainer.accelerator.reduce(own).item()
        return output

    trainer._generate_single_turn = counting
    budget, marks = run.told["budget"], run.told["evaluations"]

    # On a CPU, the processor time of this process (all threads), which other processes do not affect.
    clock = time.process_time if trainer.accelerator.device.type == "cpu" else time.perf_counter

    class Curve(TrainerCallback):
        rows, seconds, evaluated, logged = [], 0.0, 0, 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.started = clock()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds += clock() - self.started
            mark = generated * marks // budget
            control.should_evaluate = mark > self.evaluated
            self.evaluated = mark
            control.should_training_stop = generated >= budget

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            steps = [entry for entry in state.log_history[self.logged :] if "loss" in entry]
            self.logged = len(state.log_history)
            row = {"tokens": generated, "steps": state.global_step, "seconds": self.seconds}
            row |= {column: metrics[name] for column, name in EVALUATED.items()}
            for column, name in TRAINED.items():
                values = [entry[name] for entry in steps if entry.get(name) is not None]
                row[column] = sum(values) / len(values) if values else math.nan
            self.rows.append(row)

    curve = Curve()
    trainer.add_callback(curve)
    trainer.train()
    if trainer.is_world_process_zero():
        (run.folder / RUN).write_text(yaml.safe_dump(run.told, sort_keys=False))
        with replacing(run.folder / CURVE) as draft:
            pd.DataFrame(curve.rows).to_parquet(draft)


def train_apart(run: Run, launch: str | None, threads: int) -> float:
    """Train in this worker process, with its output in the log of the run; return the final accuracy."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that `finally` ends the launched process
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / LOG).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    try:
        if launch:
            order = run.folder / "asked.yaml"
            order.write_text(yaml.safe_dump(run.told, sort_keys=False))
            command = [*shlex.split(launch), __file__, "--run", str(order)]
            launched = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            try:
                if code := launched.wait():
                    raise RuntimeError(f"{launch} ended with exit code {code}")
            finally:
                launched.terminate()
        else:
            train(run, threads)
    except Exception:
        traceback.print_exc()  # written to the log
        raise
    return float(run.curve()["accuracy"].iloc[-1])


def work_off(runs: list[Run], config: dict, title: str, console: Console) -> list[str]:
    """Train the unfinished runs, `processes` in parallel; return the names of the runs that failed."""
    waiting = [run for run in runs if not run.done]
    console.print(f"[bold]{title}[/bold]: {len(runs)} runs, {len(runs) - len(waiting)} of them finished")
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A process forked from the server has the imports already, but no state of earlier runs.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train", "variants"])
    with (
        Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as progress,
        ProcessPoolExecutor(config["processes"], processes, max_tasks_per_child=1) as pool,
    ):
        bar = progress.add_task(title, total=len(waiting))
        futures = {pool.submit(train_apart, run, config.get("launch"), config["threads"]): run for run in waiting}
        try:
            for future in as_completed(futures):
                run = futures[future]
                if error := future.exception():
                    failed.append(run.name)
                    progress.print(f"[red]{run.name} failed: {type(error).__name__}: {error}. See {run.folder / LOG}")
                else:
                    progress.print(f"{run.name}: {future.result():.1%}")
                progress.advance(bar)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # an interrupted run starts again next time
                process.terminate()
            raise
    return failed


def prepare(config: dict, console: Console) -> None:
    """Make the models and problems that do not exist yet."""
    for name, task in config["tasks"].items():
        if "prepare" in task and not (ROOT / task["settings"]["model_name_or_path"] / "model.safetensors").exists():
            console.print(f"Making the model and the problems of {name}: {task['prepare']}")
            subprocess.run([sys.executable, *shlex.split(task["prepare"])], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "learning.yaml")
    parser.add_argument("--tiers", nargs="+", help="tiers to run after the learning-rate search (default: all)")
    parser.add_argument("--tasks", nargs="+", help="tasks to run (default: all)")
    parser.add_argument("--processes", type=int, help="runs in parallel (default: as in the config)")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # in the processes that `launch` starts
    arguments = parser.parse_args()
    if arguments.run:
        told = yaml.safe_load(arguments.run.read_text())
        train(Run(ROOT / told["settings"]["output_dir"], told), threads=int(os.environ.get("OMP_NUM_THREADS", 1)))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    console = Console()
    try:
        config = read_config(arguments.config)
        for kind in ("tiers", "tasks"):
            if asked := getattr(arguments, kind):
                if unknown := set(asked) - set(config[kind]):
                    raise ValueError(
                        f"Unknown {kind}: {', '.join(sorted(unknown))}. Choose from: {', '.join(config[kind])}"
                    )
                config[kind] = {name: config[kind][name] for name in asked}
        config["processes"] = arguments.processes or config["processes"]
        prepare(config, console)
        if failed := work_off(search_runs(config), config, "learning rates", console):
            sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}. Run the same command to retry them.")
        for (task, method), rate in chosen_rates(config).items():
            tried = config["tasks"][task]["rates"]
            edge = " (at the edge of the list)" if rate in (min(tried), max(tried)) and len(tried) > 1 else ""
            console.print(f"  {task} {method}: {rate:g}{edge}")
        for tier in config["tiers"]:
            failed += work_off(tier_runs(config, tier), config, f"tier {tier}", console)
    except ValueError as error:
        sys.exit(f"learning.py: {error}")
    except KeyboardInterrupt:
        console.print("\nStopped. Run the same command to resume.")
        os._exit(130)  # on an ordinary exit, the pool's thread would wait for the terminated workers
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}. Run the same command to retry them.")


if __name__ == "__main__":
    main()
