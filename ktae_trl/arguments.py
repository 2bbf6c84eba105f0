"""What a user writes: command lines and names. A mistake is a `UserError`, which a command ends with as one line."""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args, get_type_hints

# Settings of earlier versions, and what to do about them.
RETIRED = {"record_files": "remove it. A run has at most 100 records, as before"}
# Stands for the package's own model (`model_name_or_path`) and problems (`dataset_name`; splits train and test).
TINY = "tiny"
# Stands for the package's own problems in words (`dataset_name`) and worked examples of them (`few_shot`).
WORD_PROBLEMS = "word_problems"
_BUGS = (AssertionError, AttributeError, NameError, TypeError)


class UserError(ValueError):
    """What a user did wrong: the message names it and the remedy, and a command shows nothing else."""


class NotFoundError(UserError, FileNotFoundError):
    """A file, a folder or a dataset that is not there."""


class NotImportedError(UserError, ImportError):
    """A package that is not installed, or a name that a module does not have."""


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """End the program with one line for a `UserError`. Every other exception keeps its traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: {error}")


@contextmanager
def loading(what: str, *, by: str | None = None) -> Iterator[None]:
    """Turn an error of a library that loads what a user named into a `UserError` with the first line of its cause.

    Args:
        what: was to be loaded, such as "the tokenizer of 'my-model'".
        by: the setting that names it.

    Raises:
        UserError: something is missing or damaged, for which libraries have many exceptions. Those that are bugs,
            whatever was named, pass.
    """
    try:
        yield
    except (UserError, *_BUGS):
        raise
    except Exception as error:
        named = f" ({by})" if by else ""
        kind = NotFoundError if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{what}{named} could not be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def need(package: str, extra: str) -> None:
    """Check that a package is installed that only the extra `extra` brings.

    Raises:
        NotImportedError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise NotImportedError(f"{package} is not installed: pip install 'ktae-trl[{extra}]'")


def model_path(name: str) -> str:
    """Return where a model is: the offline model's folder for `tiny`, else the name itself."""
    return str(Path(__file__).parent / "tiny" / "model") if name == TINY else name


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the choice most like `name`, or nothing if none is like it."""
    close = difflib.get_close_matches(str(name), list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def imported(path: str, what: str) -> object:
    """Import what a dotted path names, from the working directory too.

    Args:
        path: such as `my_package.rewards.brevity`.
        what: it is, for messages: "The reward function".

    Raises:
        NotImportedError: there is no such module or name, or the module fails when it is imported.
    """
    module_name, _, name = path.rpartition(".")
    here = os.getcwd()
    if here not in sys.path:  # a launcher puts the script's folder there; TRL's own scripts add this one
        sys.path.insert(0, here)
    problem = f"{what} {path!r} could not be imported: "
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise NotImportedError(
                f"{problem}there is no module {missing!r} (looked in {here} and sys.path)"
            ) from error
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename[0] != "<"]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})"
        raise NotImportedError(f"{problem}{module_name} fails with {type(error).__name__}: {error}{where}") from error
    if not hasattr(module, name):
        raise NotImportedError(
            f"{problem}the module {module_name!r} ({getattr(module, '__file__', None)}) has no "
            f"{name!r}{nearest(name, dir(module))}"
        )
    return getattr(module, name)


def parse(
    dataclass_types: Sequence[type], program: str, arguments: Sequence[str] | None = None, *, others: bool = False
) -> tuple:
    """Parse `--config FILE.yaml [--field value ...]` into the dataclasses; the command line wins over the file.

    `--field null` sets a field that may be None to None, as `field: null` does in the file.

    Args:
        others: whether there may be settings that none of the dataclasses has.

    Raises:
        UserError: a field that none of the dataclasses has, a value that one of them refuses, a file that is no YAML.
        NotFoundError: no such config file.
    """
    import yaml  # these two are heavy: not for those who only want `nearest`
    from trl import TrlParser

    parser = TrlParser(
        dataclass_types, allow_abbrev=False, prog=program, usage=f"{program} --config FILE.yaml [--field value ...]"
    )
    _take_null(parser, dataclass_types)
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[-1:] == ["--config"]:
        raise UserError("--config needs a file")
    config = words[words.index("--config") + 1] if "--config" in words else None
    try:
        *parsed, from_file, from_line = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
    except yaml.YAMLError as error:
        raise UserError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no file {error.filename} (looked in {Path.cwd()})") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:  # of a file that cannot be read; TRL's checks of the settings
        raise UserError(" ".join(str(error).split())) from error
    # The file's leftovers come as --key, value, --key, value ...; a value may itself begin with dashes.
    unknown = from_file[::2] + [word for word in from_line if word.startswith("--")]
    if not others and (unknown or from_line):
        fields = [action.dest for action in parser._actions]
        names = [word.removeprefix("--").partition("=")[0] for word in unknown] or from_line
        if retired := [name for name in names if name in RETIRED]:
            raise UserError(f"{retired[0]} is no setting any more: {RETIRED[retired[0]]}")
        raise UserError(
            "Unknown setting: " + ", ".join(f"{name!r}{nearest(name, fields)}" for name in dict.fromkeys(names))
        )
    return tuple(parsed)


def _take_null(parser: argparse.ArgumentParser, dataclass_types: Sequence[type]) -> None:
    """Let `null` on the command line stand for None, for every field that may be None."""
    may_be_none = {
        name for cls in dataclass_types for name, kind in get_type_hints(cls).items() if type(None) in get_args(kind)
    }
    for action in parser._actions:
        if action.dest in may_be_none and action.nargs != "+":
            action.type = _null_or(action.type)


def _null_or(convert: Callable[[str], object]) -> Callable[[str], object]:
    def converted(word: str):
        return None if word == "null" else convert(word)

    converted.__name__ = getattr(convert, "__name__", "value")  # for argparse's messages
    return converted


def settings_help(usage: str, groups: Mapping[str, Iterable[dataclasses.Field]]) -> str:
    """Return the help of a command whose settings are the fields of dataclasses, a section a group."""
    parser = argparse.ArgumentParser(usage=usage, add_help=False)
    for title, fields in groups.items():
        group = parser.add_argument_group(title)
        for field in fields:
            value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            default = "" if value in (None, dataclasses.MISSING) else f" (default: {getattr(value, 'value', value)})"
            group.add_argument(
                f"--{field.name}",
                metavar=getattr(field.type, "__name__", str(field.type)),
                help=f"{field.metadata.get('help', '')}{default}",
            )
    return parser.format_help()
