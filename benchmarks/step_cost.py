"""Measure the cost of credit methods per training step, against `credit: none`, and the time of each phase of a step.

python benchmarks/step_cost.py [ktae oar_g oar_p tree] [--steps 20] [--rounds 3]       # the quickstart
python benchmarks/step_cost.py ktae oar_g --model 100m --steps 3 --rounds 1            # 100M parameters
python benchmarks/step_cost.py ktae --config configs/NAME.yaml [-- --field value ...]  # any recipe

The learning rate is 0, so that all runs sample from the same model (only tree sampling draws other samples). Each run
has its own process, and the methods take turns. If the machine has a GPU, the runs use it, in bf16. The models with
100M and 500M parameters have random weights: their generation is timed, and then replaced by correct and wrong
solutions of the offline task, so that grading and credit have work to do.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHASES = ("generation", "grading", "credit", "forward", "backward", "optimizer", "synchronisation")
MODELS = {
    "quickstart": {},
    "100m": {"per_device_train_batch_size": 16, "max_completion_length": 48},
    "500m": {"per_device_train_batch_size": 16, "max_completion_length": 1024, "gradient_checkpointing": True},
}
# Qwen2 configurations, used with random weights. 500m has the shape of Qwen2.5-0.5B.
SHAPES = {
    "100m": {
        "hidden_size": 768,
        "num_hidden_layers": 11,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    },
    "500m": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "max_position_embeddings": 2048,
    },
}


class Clock:
    """Measure the seconds of each phase, without the phases nested in it. `wait` waits for the GPU at both ends."""

    def __init__(self, wait: Callable[[], None]):
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]
        self.wait = wait

    def watch(self, owner, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            self.wait()
            started = time.perf_counter()
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                self.wait()
                taken = time.perf_counter() - started
                self.seconds[phase] += taken - self.inner.pop()
                self.inner[-1] += taken

        setattr(owner, name, timed)


def large_model(folder: str, shape: dict) -> None:
    """Save a Qwen2 with random weights and the tokenizer of the offline model."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from ktae_trl import tiny

    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            **{"vocab_size": len(tokenizer), **shape},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def substitute(trainer) -> None:
    """Run each generation as usual, but return solutions of the offline task in its place."""
    from ktae_trl import tiny
    from ktae_trl.data import load
    from ktae_trl.tiny import task

    tokenizer, generate = trainer.processing_class, trainer._generate_single_turn
    rows = list(load(str(tiny.TRAIN)))
    texts = iter(task.draw_solutions(rows * 20, seed=0))
    joined = max(1, trainer.max_completion_length // 48)  # several solutions fill a long completion

    def solutions(prompt_ids, *args, **kwargs):
        completion_ids, *rest = generate(prompt_ids, *args, **kwargs)
        drawn = [tokenizer("\n".join(islice(texts, joined)) + tokenizer.eos_token)["input_ids"] for _ in completion_ids]
        return [new[: len(old)] for new, old in zip(drawn, completion_ids, strict=True)], *rest

    trainer._generate_single_turn = solutions


def _words(settings: dict) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def train(credit: str, steps: int, model: str, config: str, own: list[str]) -> dict:
    """Train and return, per step, the seconds in total and in each phase, and the peak memory of this process.

    Args:
        own: further arguments for train.py.
    """
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers import TrainerCallback
    from trl import ModelConfig

    from ktae_trl import KTAEGRPOConfig
    from ktae_trl import trainer as hooks
    from ktae_trl.arguments import parse
    from ktae_trl.training.recorder import Recorder
    from ktae_trl.training.run import RunArguments, build_trainer

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "credit": credit,
            "max_steps": steps,
            "learning_rate": 0.0,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "output_dir": "runs/step_cost",  # keeps the user's runs/quickstart intact
            "record_steps": 0,
            "use_cpu": not on_gpu,
            **({"bf16": True} if on_gpu else {}),
        }
        if model in SHAPES:
            large_model(folder, SHAPES[model])
            settings["model_name_or_path"] = folder
        words = ["--config", config, *_words(MODELS[model]), *own, *_words(settings)]
        trainer = build_trainer(*parse((RunArguments, KTAEGRPOConfig, ModelConfig), "train.py", words))
    if model in SHAPES:
        substitute(trainer)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    clock, generate, tokens, steps_taken = Clock(wait), trainer._generate_single_turn, [], []

    def counting(*args, **kwargs):
        output = generate(*args, **kwargs)
        tokens[-1] += sum(map(len, output[0]))
        return output

    trainer._generate_single_turn = counting

    class Steps(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            clock.watch(trainer.optimizer, "step", "optimizer")

        def on_step_begin(self, args, state, control, **kwargs):
            clock.seconds.clear()
            tokens.append(0)
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            steps_taken.append({"step": time.perf_counter() - self.started, **clock.seconds})

    watched = {
        "_generate_single_turn": "generation",
        "_calculate_rewards": "grading",
        "_compute_loss": "forward",
    }
    for name, phase in watched.items():
        clock.watch(trainer, name, phase)
    clock.watch(trainer.token_credit, "add_to", "credit")
    clock.watch(Recorder, "look", "credit")
    clock.watch(hooks, "combine", "credit")
    clock.watch(trainer.accelerator, "backward", "backward")
    for name in ("gather", "reduce"):
        clock.watch(trainer.accelerator, name, "synchronisation")
    trainer.add_callback(Steps())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "step_time" in entry]
    warm = min(2, steps - 1)  # steps to warm up
    phases = {phase: [step.get(phase, 0.0) for step in steps_taken[warm:]] for phase in PHASES}
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "step": [step["step"] for step in steps_taken[warm:]],
        "phases": phases,
        "tokens": tokens[warm:],
        "length": [entry["completions/mean_length"] for entry in log[warm:]],
        "metrics": [{name: value for name, value in entry.items() if name.startswith("tree/")} for entry in log[warm:]],
        "peak_mib": (
            torch.cuda.max_memory_allocated() / 2**20
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", default=["ktae"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=MODELS, default="quickstart")
    parser.add_argument("--config", default="configs/quickstart.yaml", help="recipe; further settings follow after --")
    parser.add_argument("--credit", help=argparse.SUPPRESS)  # set by the parent process
    end = [*sys.argv, "--"].index("--")
    words, settings = sys.argv[1:end], sys.argv[end + 1 :]
    arguments = parser.parse_args(words)
    if arguments.credit:
        print(json.dumps(train(arguments.credit, arguments.steps, arguments.model, arguments.config, settings)))
        return

    runs: dict[str, list[dict]] = {"none": [], **{method: [] for method in arguments.methods}}
    for number in range(arguments.rounds):
        for credit, done in runs.items():
            print(f"round {number + 1} of {arguments.rounds}: {credit}", file=sys.stderr)
            command = [sys.executable, __file__, "--credit", credit, "--steps", str(arguments.steps)]
            command += ["--model", arguments.model, "--config", arguments.config, "--", *settings]
            output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            done.append(json.loads(output.splitlines()[-1]))
    first = runs["none"][0]
    assert all(run["length"] == first["length"] for credit, kind in runs.items() if credit != "tree" for run in kind)

    print(f"\n{first['parameters'] / 1e6:.1f}M parameters, {statistics.mean(first['tokens']):.0f} tokens a step\n")
    head = f"{'':8}{'s/step':>8}{'times none (range)':>26}{'tokens/s':>10}{'peak MiB':>10}{'times none':>12}"
    print(head)
    for credit, done in runs.items():
        steps = [statistics.median(run["step"]) for run in done]
        ratios = sorted(own / statistics.median(run["step"]) for own, run in zip(steps, runs["none"], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        speed = statistics.median(sum(run["tokens"]) / sum(run["step"]) for run in done)
        peak, plain = (statistics.median(run["peak_mib"] for run in kind) for kind in (done, runs["none"]))
        print(f"{credit:8}{statistics.median(steps):8.3f}{spread:>26}{speed:10,.0f}{peak:10,.0f}{peak / plain:12.2f}")

    print(f"\n{'share of a step':18}" + "".join(f"{phase:>16}" for phase in PHASES) + f"{'rest':>8}")
    for credit, done in runs.items():
        shares = [statistics.median(sum(run["phases"][phase]) / sum(run["step"]) for run in done) for phase in PHASES]
        print(f"{credit:18}" + "".join(f"{share:16.2%}" for share in shares) + f"{1 - sum(shares):8.1%}")


if __name__ == "__main__":
    main()
