"""Does token credit learn better? Methods x tasks x seeds, from the same models, on as many generated tokens.

python benchmarks/learning.py --config benchmarks/learning.yaml             # goes on where it was stopped
python benchmarks/learning.py --config benchmarks/learning.yaml --tiers a   # the learning rates and tier A only
python benchmarks/learning_report.py --config benchmarks/learning.yaml      # tables and plots of what there is

A run is a folder, OUTPUT/TASK/METHOD/RATE/SEED, with `run.yaml` (all that it was told), `curve.parquet` (a row per
evaluation) and `log.txt`. First every method of tier A is tried at every learning rate, on seeds of its own; the rate
with the best area under the curve is that method's for all that follows.
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
SEARCH = "rates"  # the stage that looks for learning rates, named as a tier
# Column of a curve -> metric of an evaluation, and of a training step (whose mean since the last evaluation is taken).
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
    """One training: where its results lie, and all that it is told."""

    folder: Path
    told: dict  # task, method, tier, rate, seed, budget, evaluations, settings of the trainer

    @property
    def name(self) -> str:
        return " ".join(str(self.told[key]) for key in ("task", "method", "rate", "seed"))

    @property
    def done(self) -> bool:
        """Whether its curve is there.

        Raises:
            ValueError: the folder holds a run that was told something else.
        """
        if not (self.folder / CURVE).exists():
            return False
        there = yaml.safe_load((self.folder / RUN).read_text())
        different = [key for key in {*there, *self.told} - {"tier"} if there.get(key) != self.told.get(key)]
        if different:
            raise ValueError(
                f"{self.folder} holds a run with other {', '.join(sorted(different))} than the config asks for: give "
                "the config another `output`, or move that folder away"
            )
        return True

    def curve(self) -> pd.DataFrame:
        """Return its evaluations, and what it was told in each row."""
        told = {key: self.told[key] for key in ("task", "method", "rate", "seed", "budget", "evaluations")}
        return pd.read_parquet(self.folder / CURVE).assign(**told)


def read_config(path: Path) -> dict:
    """Read the config; raise a ValueError that names a method, task or tier which is not described."""
    config = yaml.safe_load(path.read_text())
    for name, method in config["methods"].items():
        if method["tier"] not in config["tiers"]:
            raise ValueError(f"{path}: method {name!r} is of tier {method['tier']!r}; there are {[*config['tiers']]}")
        base = method.get("rate_of", name)
        if config["methods"].get(base, {}).get("tier") != "a":
            raise ValueError(f"{path}: method {name!r} must be of tier a, or say `rate_of` a method that is")
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
    """Return the runs that look for learning rates."""
    first = [name for name, method in config["methods"].items() if method["tier"] == "a"]
    return [
        make_run(config, task, method, rate, seed, SEARCH)
        for seed in config["search_seeds"]
        for task, described in config["tasks"].items()
        for rate in described["rates"]
        for method in first
    ]


def on_grid(curve: pd.DataFrame) -> pd.DataFrame:
    """Return the curve at the even marks of its budget, between evaluations in a line.

    A run ends with the step that exceeds the budget, by up to ten generations with dynamic sampling, and such a step
    may pass several marks. So the curves of all methods are read at the same numbers of tokens.
    """
    budget, marks = int(curve["budget"].iloc[0]), int(curve["evaluations"].iloc[0])
    grid, curve = np.linspace(0, budget, marks + 1), curve.sort_values("tokens")
    numbers = curve.select_dtypes("number").columns
    return pd.DataFrame({name: np.interp(grid, curve["tokens"], curve[name]) for name in numbers})


def area(curve: pd.DataFrame, column: str = "accuracy") -> float:
    """Return the mean accuracy (or another column) over the budget: the area under the curve, by trapezoids."""
    values = on_grid(curve)[column].to_numpy()
    return float((values[1:] + values[:-1]).mean() / 2)


def chosen_rates(config: dict) -> dict[tuple[str, str], float]:
    """Return the learning rate of each (task, method) with the best mean area on the seeds of the search.

    Raises:
        ValueError: runs of the search are missing, so that rates would be compared on different seeds.
    """
    runs = search_runs(config)
    if missing := [run.name for run in runs if not run.done]:
        raise ValueError(f"The search for learning rates lacks {len(missing)} of {len(runs)} runs: {missing[0]}, ...")
    areas = pd.DataFrame([{**run.told, "area": area(run.curve())} for run in runs])
    best = areas.groupby(["task", "method", "rate"]).area.mean().groupby(["task", "method"]).idxmax()
    return {
        (task, name): best[task, method.get("rate_of", name)][-1]
        for name, method in config["methods"].items()
        for task in config["tasks"]
    }


def tier_runs(config: dict, tier: str) -> list[Run]:
    """Return the runs of a tier, a seed after the other, so that what was stopped early has whole pairs."""
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
    key_token_values(few, few == 0, torch.tensor([[True, False]]))  # compiled here, and not in the first step's time
    settings = {**run.told["settings"], "max_steps": 1_000_000, "eval_strategy": "no", "eval_on_start": True}
    settings |= {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    trainer = build_trainer(*TrlParser((RunArguments, KTAEGRPOConfig, ModelConfig)).parse_dict(settings))

    generated = 0  # tokens of training, all of them: also those that dynamic sampling throws away
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

    # On a CPU the processor time of this process (of all its threads): what else the machine does does not count.
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
    """Train in a process of its own, what it prints in its folder; return the last accuracy."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that what was started here is ended too
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
                    raise RuntimeError(f"{launch} ended with {code}")
            finally:
                launched.terminate()
        else:
            train(run, threads)
    except Exception:
        traceback.print_exc()  # into the log
        raise
    return float(run.curve()["accuracy"].iloc[-1])


def work_off(runs: list[Run], config: dict, title: str, console: Console) -> list[str]:
    """Train what is not there yet, so many at once as the config says; return the names of runs that failed."""
    waiting = [run for run in runs if not run.done]
    console.print(f"[bold]{title}[/bold]: {len(runs)} runs, {len(runs) - len(waiting)} of them there")
    failed = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A forked process has the imports already, and no trace of the run before.
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
            for process in multiprocessing.active_children():  # a run that is cut off is done again
                process.terminate()
            raise
    return failed


def prepare(config: dict, console: Console) -> None:
    """Make the models and problems that are not there."""
    for name, task in config["tasks"].items():
        if "prepare" in task and not (ROOT / task["settings"]["model_name_or_path"] / "model.safetensors").exists():
            console.print(f"Making the model and the problems of {name}: {task['prepare']}")
            subprocess.run([sys.executable, *shlex.split(task["prepare"])], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "learning.yaml")
    parser.add_argument("--tiers", nargs="+", help="only these, after the search for learning rates (default: all)")
    parser.add_argument("--tasks", nargs="+", help="only these (default: all)")
    parser.add_argument("--processes", type=int, help="in the place of the config's")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # in the processes that `launch` starts
    arguments = parser.parse_args()
    if arguments.run:
        told = yaml.safe_load(arguments.run.read_text())
        train(Run(ROOT / told["settings"]["output_dir"], told), threads=int(os.environ.get("OMP_NUM_THREADS", 1)))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    console = Console()
    try:
        config = read_config(arguments.config)
        for kind in ("tiers", "tasks"):
            if asked := getattr(arguments, kind):
                if unknown := set(asked) - set(config[kind]):
                    raise ValueError(
                        f"No such {kind}: {', '.join(sorted(unknown))}. There are: {', '.join(config[kind])}"
                    )
                config[kind] = {name: config[kind][name] for name in asked}
        config["processes"] = arguments.processes or config["processes"]
        prepare(config, console)
        if failed := work_off(search_runs(config), config, "learning rates", console):
            sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}. The same command tries them again.")
        for (task, method), rate in chosen_rates(config).items():
            tried = config["tasks"][task]["rates"]
            edge = " (at the edge of the list)" if rate in (min(tried), max(tried)) and len(tried) > 1 else ""
            console.print(f"  {task} {method}: {rate:g}{edge}")
        for tier in config["tiers"]:
            failed += work_off(tier_runs(config, tier), config, f"tier {tier}", console)
    except ValueError as error:
        sys.exit(f"learning.py: {error}")
    except KeyboardInterrupt:
        console.print("\nStopped. The same command goes on.")
        os._exit(130)  # at an ordinary exit the pool's thread would wait for the workers that were ended
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}. The same command tries them again.")


if __name__ == "__main__":
    main()
