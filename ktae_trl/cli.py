"""The command `ktae`. Each command imports what it needs when it runs, so that `ktae --help` is fast."""

import argparse
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ktae_trl import __version__
from ktae_trl.arguments import NotFoundError, UserError, loading, nearest, need, user_errors
from ktae_trl.preflight import check_command

CONFIGS = Path(__file__).parent / "configs"
DOCS = "https://github.com/ktae-trl/ktae-trl/tree/main/docs"
_HELP = {"-h", "--help"}
_DEFAULT_METHOD = "ktae"  # that of KTAEGRPOConfig, whose module imports trl
_OF_TRAIN = """CONFIG is a file or the name of a recipe. FILE is a config file of accelerate, or the name of one in the
package. `ktae recipes` lists the names. Without --accelerate, training runs in this process, or in the processes of a
launcher: accelerate launch --config_file FILE -m ktae_trl train CONFIG"""


# Configs by name


def config_path(name: str, kind: str = "") -> Path:
    """Return the file of a config.

    Args:
        name: the path of a file, or the name of a config in the package.
        kind: the folder in `configs/`: "" for recipes, "eval" or "accelerate".

    Raises:
        NotFoundError: there is neither such a file nor such a name.
    """
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in sorted((CONFIGS / kind).glob("*.yaml"))}
    if name not in known:
        raise NotFoundError(
            f"There is no config {name!r}{nearest(name, known)}, neither as a file (looked in {Path.cwd()}) nor in the "
            "package. `ktae recipes` lists the package's configs"
        )
    return known[name]


def with_config(words: Sequence[str], kind: str = "") -> list[str]:
    """Return the words of a command line with a leading CONFIG replaced by `--config FILE`."""
    if not words or words[0].startswith("-"):
        return list(words)
    return ["--config", str(config_path(words[0], kind)), *words[1:]]


class Head(NamedTuple):
    """A recipe's description, from the comment at its top."""

    what: str
    hardware: str  # and the time it takes


def head(path: Path) -> Head:
    """Read the second paragraph of a recipe's comment: what the recipe does, then a line that begins with `For`."""
    comment = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0].replace("# ", "").replace("#", "")
    what, hardware = re.match(r"(.*?)^(For .*?)$", comment.split("\n\n")[1], re.DOTALL | re.MULTILINE).groups()
    return Head(" ".join(what.split()), hardware)


# Commands


def train(words: list[str]) -> None:
    """Train a model: ktae train CONFIG [--accelerate FILE] [--field value ...]"""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate")
    options, words = parser.parse_known_args(words)
    if not words or _HELP & set(words):
        from ktae_trl.training import run

        words = with_config([word for word in words if word not in _HELP])
        return run.show_help("ktae train CONFIG [--accelerate FILE] [--field value ...]\n\n" + _OF_TRAIN, words)
    words = with_config(words)
    if options.accelerate is None:
        return _train(words, "ktae train")
    if "LOCAL_RANK" in os.environ:
        raise UserError("--accelerate starts processes, but a launcher has already started this one. Remove it")
    check_command(words)
    import psutil
    from accelerate.commands.config.config_args import load_config_from_file

    file = str(config_path(options.accelerate, "accelerate"))
    with loading(f"The accelerate file {file}", by="--accelerate"):
        settings = load_config_from_file(file)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--quiet"]
    if getattr(settings, "use_cpu", False) and "OMP_NUM_THREADS" not in os.environ:
        # As many as accelerate would choose, which warns if it has to.
        processes = max(1, settings.num_processes // settings.num_machines)
        threads = max(1, (psutil.cpu_count(logical=False) or 1) // processes)
        launcher += ["--num_cpu_threads_per_process", str(threads)]
    sys.stdout.flush()
    os.execv(sys.executable, [*launcher, "-m", "ktae_trl", "train", *words])


def train_script() -> None:
    """Do what `train.py` does: train as its command line says."""
    _train(sys.argv[1:], "train.py")


def _train(words: list[str], program: str) -> None:
    if not _HELP & set(words):
        with user_errors(program):
            check_command(words)
    from ktae_trl.training import run  # heavy: it imports torch and trl

    run.main(words, program)


def evaluate(words: list[str]) -> None:
    """Evaluate a model on benchmarks: ktae eval CONFIG [--model_name_or_path MODEL] [--field value ...]"""
    from ktae_trl.evaluation import run

    run.main(with_config(words, "eval") or ["--help"], "ktae eval")


def compare(words: list[str]) -> None:
    """Compare models by their results of ktae eval: ktae compare FOLDER FOLDER [FOLDER ...]"""
    need("scipy", "eval")
    from ktae_trl.evaluation import run

    run.compare(words, "ktae compare")


def grade(words: list[str]) -> None:
    """Grade completions that any program generated: ktae grade FILE"""
    need("scipy", "eval")
    from ktae_trl.evaluation import run

    run.grade(words, "ktae grade")


def report(words: list[str]) -> None:
    """Show the key tokens of a training run on an HTML page: ktae report RUN -o PAGE.html"""
    from ktae_trl.report.run import main as run

    run(words)


def explain(words: list[str]) -> None:
    """Show the key tokens of any trainer's rollouts on an HTML page: ktae explain PATH --tokenizer NAME -o PAGE.html"""
    report(["explain", *words])


def mine_ngrams(words: list[str]) -> None:
    """Mine a list of planning n-grams from rollouts, for the credit method HICRA: ktae mine-ngrams RUN -o FILE"""
    from ktae_trl.report.mining import main as run

    run(words)


def recipes(words: list[str]) -> None:
    """List the package's recipes and other configs, or print one: ktae recipes [NAME] > my.yaml"""
    parser = argparse.ArgumentParser(prog="ktae recipes", description=_description(recipes))
    parser.add_argument("name", nargs="?", help="a recipe's name, eval/NAME or accelerate/NAME; default: list all")
    name = parser.parse_args(words).name
    if name is not None:
        kind, _, stem = name.rpartition("/")
        return print(config_path(stem, kind).read_text(encoding="utf-8"), end="")
    lines = []
    for kind, heading in (
        ("", "Recipes for training: ktae train NAME"),
        ("eval", "Configs for evaluation: ktae eval NAME --model_name_or_path MODEL"),
    ):
        lines += [heading, ""]
        for path in sorted((CONFIGS / kind).glob("*.yaml")):
            lines += [f"  {path.stem}", *_wrapped(head(path).what), *_wrapped(head(path).hardware)]
        lines.append("")
    lines += ["Launch configs for a CPU, one GPU or several: ktae train NAME --accelerate FILE", ""]
    for path in sorted((CONFIGS / "accelerate").glob("*.yaml")):
        lines += [f"  {path.stem}", *_wrapped(path.read_text(encoding="utf-8")[2:].partition(":")[0])]
    lines += ["", "To adapt one, save it to a file and edit the file, for example:"]
    lines += ["  ktae recipes own_data > my.yaml", "  ktae recipes eval/math > my_eval.yaml"]
    print("\n".join(lines))


def methods(words: list[str]) -> None:
    """List the credit methods: ktae methods"""
    argparse.ArgumentParser(prog="ktae methods", description=_description(methods)).parse_args(words)
    from ktae_trl.credit import METHODS
    from ktae_trl.credit.method import GRPO

    lines = ["Credit methods: `credit: NAME` in a recipe, or --credit NAME on the command line.", ""]
    for method in (GRPO, *METHODS.values()):
        default = ", the default" * (method.name == _DEFAULT_METHOD)
        paper = f", arXiv {method.card.paper['id']}" if method.card.paper else ""
        lines += [f"  {method.name}: {method.card.name}{paper}{default}", *_wrapped(method.card.does)]
    lines += [
        "",
        "Your own method: --credit my_package.my_credit, the dotted path of a function or a class.",
        "The settings of each method: ktae train --help",
        f"How each method works: {DOCS}/methods",
    ]
    print("\n".join(lines))


def _description(command: Callable) -> str:
    return command.__doc__.partition(":")[0] + "."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)


def merge(words: list[str]) -> None:
    """Merge an adapter, or the shards of a checkpoint, into one model folder: ktae merge SOURCE -o FOLDER"""
    from ktae_trl.hub.merge import main as run

    run(words)


def push(words: list[str]) -> None:
    """Upload the folder of a training run to the Hub: ktae push FOLDER [--repo_id USER/NAME]"""
    from ktae_trl.hub.upload import main as run

    run(words)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "compare": compare,
    "grade": grade,
    "report": report,
    "explain": explain,
    "mine-ngrams": mine_ngrams,
    "recipes": recipes,
    "methods": methods,
    "merge": merge,
    "push": push,
}


def usage() -> str:
    """Return the help of `ktae`: what each command does, and how it is called."""
    lines = ["Token-level credit assignment for GRPO, on top of TRL.", "", "usage: ktae COMMAND [arguments]", ""]
    for name, command in COMMANDS.items():
        what, _, call = " ".join(command.__doc__.split()).partition(": ")
        lines += [f"  {name:<13}{what}", f"{'':<15}{call}"]
    lines += [
        "",
        "`ktae COMMAND --help` shows the arguments of a command. `ktae --version` shows the version.",
        "",
        "First steps:",
        "    ktae train quickstart                 trains a small model on a CPU, in minutes",
        "    ktae recipes own_data > my.yaml       saves a recipe: change the lines marked CHANGE",
        "    ktae train my.yaml --dry_run true     shows prompts, rewards, batches and memory; needs no GPU",
        "    ktae train my.yaml                    trains",
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        words: the command line without the program's name. Default: that of this process.
    """
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in _HELP:
        return print(usage())
    if name == "--version":
        return print(f"ktae-trl {__version__}")
    with user_errors("ktae"):
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}. Choose from {', '.join(COMMANDS)}")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        with user_errors(f"ktae {name}"):
            COMMANDS[name](rest)
        sys.stdout.flush()
    except BrokenPipeError:
        if name in ("train", "eval") and not _HELP & set(rest):  # the work was interrupted, and the user must see it
            raise
        # The reader, such as `head`, closed the pipe. Without this, Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
