"""Measure how much dynamic sampling generates for a full batch, against verl's rule: whole batches until it is full.

python benchmarks/dynamic_sampling.py [--groups 128 1024] [--shares 10 50 90]
python benchmarks/dynamic_sampling.py --quickstart [--steps 30]

The first command runs the package's `DynamicSampling` with made-up rollouts and verdicts, and verl's rule in a loop of
its own, on the same stream of prompts. A share of the prompts, at random, has correct and wrong rollouts. There is no
limit to the generations, so both rules fill each batch.

The time of a generation is modelled, not measured: the longest completion takes `SECONDS_A_TOKEN` for each of its
tokens, and all tokens together are generated at `TOKENS_A_SECOND`, so

    seconds = longest * SECONDS_A_TOKEN + tokens / TOKENS_A_SECOND

The second command trains the quickstart with dynamic sampling three times: with whole generations as before, with
generations by need, and with `dynamic_sampling_reuse`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch

from ktae_trl.rollouts import dynamic
from ktae_trl.rollouts.verdicts import verdicts

ROOT = Path(__file__).parents[1]
GROUPS = (128, 256, 512, 1024)  # in a batch
SHARES = (10, 20, 30, 50, 70, 80, 90)  # of informative groups, percent
ROLLOUTS = 8  # in a group
LONGEST = 3072  # tokens; the lengths of completions are log-normal with a median of 700, cut off here
SECONDS_A_TOKEN, TOKENS_A_SECOND = 0.015, 70_000


class Stream:
    """What comes of the prompts, in the order in which they are drawn: verdicts and lengths of completions."""

    def __init__(self, prompts: int, share: float, seed: int):
        rng = numpy.random.default_rng(seed)
        self.informative = rng.random(prompts) < share
        self.lengths = rng.lognormal(numpy.log(700), 0.6, (prompts, ROLLOUTS)).clip(1, LONGEST).astype(int)

    def seconds(self, drawn: slice) -> float:
        """Return the modelled time to generate the rollouts of these prompts."""
        return self.lengths[drawn].max() * SECONDS_A_TOKEN + self.lengths[drawn].sum() / TOKENS_A_SECOND


def whole_batches(stream: Stream, groups: int, batches: int) -> dict[str, float]:
    """verl's rule: generate whole batches until there are enough informative groups; drop the surplus."""
    position = rounds = 0
    generated = trained = seconds = 0.0
    for _ in range(batches):
        found: list[int] = []
        while len(found) < groups:
            drawn = slice(position, position + groups)
            position = drawn.stop
            found += [i for i in range(drawn.start, drawn.stop) if stream.informative[i]]
            rounds += 1
            seconds += stream.seconds(drawn)
            generated += stream.lengths[drawn].sum()
        trained += stream.lengths[found[:groups]].sum()
    return {"drawn": position, "rounds": rounds, "seconds": seconds, "tokens": generated / trained}


def by_need(stream: Stream, groups: int, batches: int, reuse: bool) -> dict[str, float]:
    """The package's `DynamicSampling`, with the groups of the stream."""
    position = rounds = 0
    generated = trained = seconds = 0.0

    def generate(rows):
        nonlocal position, rounds, generated, seconds
        drawn = slice(position, position + len(rows) // ROLLOUTS)
        position, rounds = drawn.stop, rounds + 1
        seconds += stream.seconds(drawn)
        generated += stream.lengths[drawn].sum()
        return [{"completion_ids": range(length)} for length in stream.lengths[drawn].flatten()]

    def grade(rows, rollouts):
        groups = len(rows) // ROLLOUTS
        rewards = torch.zeros(groups, ROLLOUTS)
        rewards[:, 0] = torch.from_numpy(stream.informative[position - groups : position])
        return rewards.view(-1, 1), verdicts(rewards, 0.0)

    sampling = dynamic.DynamicSampling(
        range(len(stream.informative)),  # the rows
        generate,
        grade,
        groups=groups,
        num_generations=ROLLOUTS,
        max_batches=1_000,
        keep=(lambda rollouts: None) if reuse else None,
        seed=0,
        shuffle=False,
    )
    for step in range(batches):
        trained += sum(len(rollout["completion_ids"]) for rollout in sampling.batch(step).rollouts)
    assert position == sampling.stream.position
    return {"drawn": position, "rounds": rounds, "seconds": seconds, "tokens": generated / trained}


def simulate(sizes: list[int], shares: list[int]) -> None:
    print(f"{ROLLOUTS} rollouts a group. `groups`: generated, over needed / share. `tokens`: generated per trained.")
    print("`time`: modelled, relative to whole batches. `rounds`: generations per batch.\n")
    print(f"{'':16}{'whole batches':^24}{'by need':^30}{'by need, with reuse':^30}")
    columns = f"{'groups':>8}{'tokens':>8}{'rounds':>8}"
    timed = columns + f"{'time':>6}"
    print(f"{'batch':>8}{'share':>7} {columns}{timed}{timed}")
    worst = dict.fromkeys((False, True), 0.0)
    for groups in sizes:
        batches = max(8, 4096 // groups)
        for share in shares:
            prompts = round(groups * batches / (share / 100) * 1.3 + 20 * groups)
            stream = Stream(prompts, share / 100, seed=groups + share)
            needed = groups * batches / (share / 100)
            before = whole_batches(stream, groups, batches)
            line = f"{groups:8,}{share:6}% "
            line += f"{before['drawn'] / needed:8.2f}{before['tokens']:8.2f}{before['rounds'] / batches:8.1f}"
            for reuse in (False, True):
                now = by_need(stream, groups, batches, reuse)
                worst[reuse] = max(worst[reuse], now["drawn"] / needed)
                line += f"{now['drawn'] / needed:8.2f}{now['tokens']:8.2f}{now['rounds'] / batches:8.1f}"
                line += f"{now['seconds'] / before['seconds']:6.2f}"
            print(line, flush=True)
    print(f"\nlargest `groups`: {worst[False]:.3f} by need, {worst[True]:.3f} with reuse")


def train(how: str, steps: int) -> dict[str, float]:
    """Train the quickstart; return means over the steps."""
    from trl import ModelConfig

    from ktae_trl import KTAEGRPOConfig
    from ktae_trl.arguments import parse
    from ktae_trl.training.run import RunArguments, build_trainer

    if how == "whole":  # as before generations were sized
        dynamic.groups_to_generate = lambda missing, informative, generated, most, unit: most
    settings = {
        "dynamic_sampling": True,
        "dynamic_sampling_reuse": how == "reuse",
        "max_steps": steps,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "record_steps": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": "runs/dynamic_sampling",
    }
    words = ["--config", str(ROOT / "configs/quickstart.yaml")]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    trainer = build_trainer(*parse((RunArguments, KTAEGRPOConfig, ModelConfig), "train.py", words))
    seconds = dict.fromkeys(("generate", "grade"), 0.0)

    def timed(name):
        function = getattr(trainer.dynamic_sampling, name)

        def call(*arguments):
            started = time.perf_counter()
            output = function(*arguments)
            seconds[name] += time.perf_counter() - started
            return output

        setattr(trainer.dynamic_sampling, name, call)

    for name in seconds:
        timed(name)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "step_time" in entry]

    def mean(name):
        return statistics.mean(entry[name] for entry in log)

    step = mean("step_time")
    return {
        "groups generated for a needed one": mean("dynamic_sampling/groups_per_needed"),
        "1 / share of mixed groups": 1 / mean("dynamic_sampling/informative_groups"),
        "tokens generated for a trained one": mean("dynamic_sampling/tokens_per_trained"),
        "generations for a batch": mean("dynamic_sampling/generations"),
        "groups reused in a batch": mean("dynamic_sampling/reused"),
        "seconds a step": step,
        "share of generation in the step": seconds["generate"] / steps / step,
        "share of grading in the step": seconds["grade"] / steps / step,
    }


def quickstart(steps: int) -> None:
    found = {}
    for how in ("whole", "need", "reuse"):
        print(f"quickstart: {how}", file=sys.stderr)
        command = [sys.executable, __file__, "--quickstart", "--how", how, "--steps", str(steps)]
        output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[how] = json.loads(output.splitlines()[-1])
    print(f"\nquickstart with dynamic_sampling, {steps} steps of 16 groups of 8, mean")
    print(f"{'':36}{'whole batches':>15}{'by need':>15}{'with reuse':>15}")
    for label in found["whole"]:
        print(f"{label:36}" + "".join(f"{one[label]:15.3f}" for one in found.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS, help="in a batch")
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES, help="of informative groups, percent")
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--steps", type=int, default=30, help="of the quickstart")
    parser.add_argument("--how", choices=("whole", "need", "reuse"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.how:
        print(json.dumps(train(arguments.how, arguments.steps)))
    elif arguments.quickstart:
        quickstart(arguments.steps)
    else:
        simulate(arguments.groups, arguments.shares)


if __name__ == "__main__":
    main()
