"""The command `ktae`. Each command imports what it needs when it is called, so that help comes at once."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ktae_trl import __version__
from ktae_trl.arguments import NotFoundError, UserError, loading, nearest, need, user_errors

CONFIGS = Path(__file__).parent / "configs"
_HELP = {"-h", "--help"}
_OF_TRAIN = """CONFIG is a file or the name of a recipe, FILE one of accelerate's or the name of one of the package;
`ktae recipes` lists the names. Without FILE the training runs in this process, or in those that a launcher has started:
accelerate launch --config_file FILE -m ktae_trl train CONFIG"""


# Configs by name


def config_path(name: str, kind: str = "") -> Path:
    """Return the file of a config: `name` is its path, or the name of one that the package brings.

    Args:
        kind: the folder of `configs/`: "" for recipes, "eval" or "accelerate".

    Raises:
        NotFoundError: it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in sorted((CONFIGS / kind).glob("*.yaml"))}
    if name not in known:
        raise NotFoundError(
            f"There is no config {name!r}{nearest(name, known)}: neither a file (looked in {Path.cwd()}) nor one of "
            "those that `ktae recipes` lists"
        )
    return known[name]


def with_config(words: Sequence[str], kind: str = "") -> list[str]:
    """Return the words with CONFIG, if they begin with one, as `--config FILE`."""
    if not words or words[0].startswith("-"):
        return list(words)
    return ["--config", str(config_path(words[0], kind)), *words[1:]]


class Head(NamedTuple):
    """What the comment at the top of a recipe says."""

    what: str
    hardware: str  # and how long it takes


def head(path: Path) -> Head:
    """Read the second paragraph of a recipe's head: what it does, and a line that begins with `For`."""
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
        from ktae_trl.training import run

        return run.main(words, "ktae train")
    if "LOCAL_RANK" in os.environ:
        raise UserError("--accelerate starts processes, and this one was started by a launcher already: leave it out")
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


def evaluate(words: list[str]) -> None:
    """Measure a model on benchmarks: ktae eval CONFIG [--model_name_or_path MODEL] [--field value ...]"""
    from ktae_trl.evaluation import run

    run.main(with_config(words, "eval") or ["--help"], "ktae eval")


def compare(words: list[str]) -> None:
    """Compare models by the results of ktae eval: ktae compare FOLDER FOLDER [FOLDER ...]"""
    need("scipy", "eval")
    from ktae_trl.evaluation import run

    run.compare(words, "ktae compare")


def grade(words: list[str]) -> None:
    """Grade outputs of any program: ktae grade FILE"""
    need("scipy", "eval")
    from ktae_trl.evaluation import run

    run.grade(words, "ktae grade")


def report(words: list[str]) -> None:
    """Write the key tokens of a run as a page: ktae report RUN -o PAGE.html"""
    from ktae_trl.report.run import main as run

    run(words)


def explain(words: list[str]) -> None:
    """Write the key tokens of rollouts of any origin as a page: ktae explain FILE --tokenizer NAME -o PAGE.html"""
    report(["explain", *words])


def recipes(words: list[str]) -> None:
    """List the configs of the package, or print one: ktae recipes [NAME] > my.yaml"""
    parser = argparse.ArgumentParser(prog="ktae recipes", description=recipes.__doc__)
    parser.add_argument("name", nargs="?", help="of a recipe, or eval/NAME, or accelerate/NAME")
    name = parser.parse_args(words).name
    if name is not None:
        kind, _, stem = name.rpartition("/")
        return print(config_path(stem, kind).read_text(encoding="utf-8"), end="")
    lines = []
    for kind, command in (("", "ktae train NAME"), ("eval", "ktae eval NAME --model_name_or_path MODEL")):
        lines.append(f"{command}\n")
        for path in sorted((CONFIGS / kind).glob("*.yaml")):
            lines.append("  {0}\n      {1.hardware}\n      {1.what}".format(path.stem, head(path)))
        lines.append("")
    lines.append("ktae train NAME --accelerate FILE\n")
    for path in sorted((CONFIGS / "accelerate").glob("*.yaml")):
        lines.append(f"  {path.stem:<16}{path.read_text(encoding='utf-8')[2:].partition(':')[0]}")
    lines.append("\nTo change one: ktae recipes NAME > my.yaml (or eval/NAME, or accelerate/NAME)")
    print("\n".join(lines))


def methods(words: list[str]) -> None:
    """List the credit methods (--credit NAME)."""
    argparse.ArgumentParser(prog="ktae methods", description=methods.__doc__).parse_args(words)
    from ktae_trl.credit import METHODS
    from ktae_trl.credit.method import GRPO

    for method in (GRPO, *METHODS.values()):
        print(f"{method.name}\n    {method.card.does}")


def merge(words: list[str]) -> None:
    """Make one model folder of an adapter or of a checkpoint in shards: ktae merge SOURCE -o FOLDER"""
    from ktae_trl.hub.merge import main as run

    run(words)


def push(words: list[str]) -> None:
    """Upload a run's folder to the Hub: ktae push FOLDER [--repo_id USER/NAME]"""
    from ktae_trl.hub.upload import main as run

    run(words)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "compare": compare,
    "grade": grade,
    "report": report,
    "explain": explain,
    "recipes": recipes,
    "methods": methods,
    "merge": merge,
    "push": push,
}


def usage() -> str:
    lines = [f"  {name:<9}{' '.join(command.__doc__.split())}" for name, command in COMMANDS.items()]
    return "\n".join(["Token-level credit for GRPO. ktae COMMAND --help says more.\n", *lines])


def main(words: Sequence[str] | None = None) -> None:
    """Run the command that the words name, by default those of this process."""
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in _HELP:
        return print(usage())
    if name == "--version":
        return print(f"ktae-trl {__version__}")
    with user_errors("ktae"):
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}. There are: {', '.join(COMMANDS)}")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        with user_errors(f"ktae {name}"):
            COMMANDS[name](rest)
        sys.stdout.flush()
    except BrokenPipeError:
        if name in ("train", "eval"):  # not a list: work is cut off, which must be seen
            raise
        # The reader, such as `head`, has closed the pipe. Python would complain once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
