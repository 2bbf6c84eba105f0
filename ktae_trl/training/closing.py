"""The last lines of a training: what was measured, where everything is, and what to do next."""

import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from transformers.integrations import TensorBoardCallback

from ktae_trl.arguments import TINY, WORD_PROBLEMS, pip_install
from ktae_trl.files.model_files import PAGE
from ktae_trl.training.held_out import Accuracy

# The package's problems -> the configuration of `ktae eval` that measures them. Other models get the public benchmarks,
# asked by their own chat template as in training: the configuration's template is Qwen2.5-Math's.
_EVALUATIONS = {TINY: "quickstart", WORD_PROBLEMS: "smollm2_135m"}
_OTHERS = "math --prompt chat"


def accuracies(before: Accuracy | None, after: Accuracy, problems: int) -> str:
    """Return the accuracies before and after training, as a small table."""
    lines = [f"Held-out {after.what} ({problems} problems; sampled: {after.samples} per problem at temperature 1)"]
    columns = ("before", *(before.figures if before else ["not measured"] * 2)), ("after", *after.figures)
    widths = [max(8, *map(len, column)) + 2 for column in columns]
    for label, *cells in zip(("", "greedy", "sampled"), *columns, strict=True):
        lines.append(f"  {label:<8}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    for name, accuracy in (("before", before), ("after", after)):
        if accuracy and accuracy.unscored:
            lines.append(f"  {name}: completions excluded because they have no score: {accuracy.unscored}")
    return "\n".join(lines)


def places(trainer) -> str:
    """Return where the model, the page of key tokens and the logs are."""
    folder = Path(trainer.args.output_dir)
    lines = [f"Saved model, tokenizer and card in {folder}"]
    if (folder / PAGE).exists():
        lines.append(f"Key-token page: {folder / PAGE}")
    callbacks = trainer.callback_handler.callbacks
    logs = [str(each.logging_dir) for each in callbacks if isinstance(each, TensorBoardCallback) and each.logging_dir]
    logs += [name for name in trainer.args.report_to if name != "tensorboard"]
    if (metrics := folder / "rollouts" / "metrics.jsonl").exists():
        logs.append(str(metrics))
    if logs:
        lines.append(f"Logs: {', '.join(logs)}")
    return "\n".join(lines)


def next_steps(output_dir: str, dataset: str, held_out: str | None) -> str:
    """Return what to do with a trained model, as commands with a comment each.

    Args:
        dataset: `dataset_name` of the run.
        held_out: its `eval_dataset_name`.
    """
    ktae, page = _command(), Path(output_dir, PAGE)
    install = "" if find_spec("scipy") else f" (first: {pip_install('eval')})"
    model = f"--model_name_or_path {shlex.quote(output_dir)}"
    steps = [(f"{ktae} eval {_EVALUATIONS.get(held_out, _OTHERS)} {model}", f"accuracy with intervals{install}")]
    if page.exists():
        steps.append((f"{_opener()} {shlex.quote(str(page))}", "look at the key tokens, in a browser"))
    if not Path(dataset).exists():  # else it is the user's own already
        steps.append((f"{ktae} recipes own_data > my.yaml", "for your own data: edit the lines marked CHANGE"))
    width = max(len(command) for command, _ in steps)
    return "\n".join(["Next:", *(f"  {command:<{width}}  # {comment}" for command, comment in steps)])


def _command() -> str:
    """Return how to call `ktae`, which may be in a virtual environment that is not activated."""
    if shutil.which("ktae"):
        return "ktae"
    script = Path(sys.executable).with_name("ktae")
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m ktae_trl"
    return shlex.quote(os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script))


def _opener() -> str:
    """Return the command that opens a file in a browser."""
    found = (command for command in ("xdg-open", "open") if shutil.which(command))
    return next(found, "python3 -m webbrowser")
