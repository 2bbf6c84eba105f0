"""What a user writes: command lines, config files and names. A mistake is a `UserError`: one line, no traceback."""

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, get_args, get_type_hints

# What follows the extras in the argument of `pip install`. Once the package is on an index: "".
SOURCE = " @ git+https://github.com/ktae-trl/ktae-trl"
# Settings of earlier versions: what to do about them.
RETIRED = {"record_files": "remove it. A run has at most 100 records, as before"}
# The name of the package's own model (`model_name_or_path`) and problems (`dataset_name`; splits train and test).
TINY = "tiny"
# The name of the package's own word problems (`dataset_name`) and of worked examples of them (`few_shot`).
WORD_PROBLEMS = "word_problems"
_BUGS = (AssertionError, AttributeError, NameError, TypeError)


class UserError(ValueError):
    """A user's mistake. The message names it and the remedy; a command prints the message and no traceback."""


class NotFoundError(UserError, FileNotFoundError):
    """A file, folder, model or dataset that does not exist."""


class NotImportedError(UserError, ImportError):
    """A package that is not installed, or a name that a module lacks."""


@contextmanager
def user_errors(program: str) -> Iterator[None]:
    """End the program with one line and exit code 1 for a `UserError`. Other exceptions keep their traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: {error}")


@contextmanager
def loading(what: str, *, by: str | None = None) -> Iterator[None]:
    """Turn an error of a library that loads what a user named into a `UserError` with the first line of the error.

    Args:
        what: a description of what is loaded, such as "The tokenizer of 'my-model'".
        by: the setting that names it.

    Raises:
        UserError: it is missing or damaged, which libraries report by many types of exceptions. Types that mean a bug,
            such as `TypeError`, pass unchanged.
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
    """Return the first line of an error's message that is not blank, or the error's type if there is none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def pip_install(*extras: str) -> str:
    """Return the command that installs the package with these extras, for messages."""
    return f"pip install 'ktae-trl[{','.join(extras)}]{SOURCE}'"


def need(package: str, extra: str) -> None:
    """Check that a package of the extra `extra` is installed.

    Raises:
        NotImportedError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec(package) is None:
        raise NotImportedError(f"{package} is not installed: {pip_install(extra)}")


def model_path(name: str) -> str:
    """Return what `from_pretrained` loads for a name: the offline model's folder for `tiny`, a path without `~`."""
    if name == TINY:
        return str(Path(__file__).parent / "tiny" / "model")
    return os.path.expanduser(name)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the choice most similar to `name`, or `""` if none is similar."""
    close = difflib.get_close_matches(str(name), list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def nearest_path(path: Path, others: Iterable[Path]) -> str:
    """Return `". Did you mean PATH?"` for the path whose name, without its ending, is most similar, or `""`."""
    by_stem = {other.name.partition(".")[0]: other for other in others}
    close = difflib.get_close_matches(path.name.partition(".")[0], by_stem, n=1)
    return f". Did you mean {by_stem[close[0]]}?" if close else ""


def imported(path: str, what: str) -> object:
    """Import the object that a dotted path names. Modules in the working directory are found too.

    Args:
        path: such as `my_package.rewards.brevity`.
        what: a description of the object for messages, such as "The reward function".

    Raises:
        NotImportedError: the module or the name does not exist, or importing the module fails.
    """
    module_name, _, name = path.rpartition(".")
    here = os.getcwd()
    if here not in sys.path:  # a launcher adds the script's folder instead; TRL's scripts add the working directory
        sys.path.insert(0, here)
    problem = f"{what} {path!r} could not be imported: "
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code
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


def config_file(words: Sequence[str]) -> str | None:
    """Return the file that follows `--config` on a command line, None without the option."""
    if "--config" not in words:
        return None
    file = words[words.index("--config") + 1 :][:1]
    if not file:
        raise UserError("--config needs a file: --config FILE.yaml")
    return file[0]


def read_yaml(file: str) -> dict[str, object]:
    """Return the settings in a config file.

    Raises:
        NotFoundError: there is no such file.
        UserError: it cannot be read, is not YAML (with the line), or holds something else than settings.
    """
    import yaml

    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = nearest_path(Path(file), Path(file).parent.glob("*.y*ml"))
        remedy = near or ". `ktae recipes` lists the package's configs"
        raise NotFoundError(f"There is no file {file} (looked in {Path.cwd()}){remedy}") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(_not_yaml(file, error)) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(settings, dict):
        found = "is empty" if settings is None else f"holds a {type(settings).__name__}, not settings"
        raise UserError(f"{file} {found}. Write one setting per line, such as `learning_rate: 1.0e-6`")
    return settings


def _not_yaml(file: str, error: "yaml.MarkedYAMLError") -> str:  # noqa: F821
    """Return where a file is not YAML, why, and a remedy for the most frequent mistakes."""
    mark, problem = error.problem_mark or error.context_mark, error.problem or error.context or "cannot be parsed"
    where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else file
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    text = f": {lines[mark.line].strip()!r:.100}" if mark and mark.line < len(lines) else ""
    remedies = {
        "mapping values are not allowed": ". A value with a colon needs quotation marks",
        "\\t": ". Indent with spaces, not with tabs",
        "cannot start any token": ". A value that begins with this character needs quotation marks",
        "could not find expected ':'": ". A setting is written `name: value`, with a space after the colon",
        "expected ',' or": ". A bracket is not closed",
        "end of stream": ". A quotation mark or a bracket is not closed",
    }
    remedy = next((remedy for words, remedy in remedies.items() if words in problem), "")
    return f"{where} is not YAML: {problem}{text}{remedy}"


def parse(
    dataclass_types: Sequence[type], program: str, arguments: Sequence[str] | None = None, *, others: bool = False
) -> tuple:
    """Parse `--config FILE.yaml [--field value ...]` into dataclasses. The command line takes precedence over the file.

    `--field null` sets an optional field to None, as `field: null` does in the file.

    Args:
        others: ignore settings that none of the dataclasses has.

    Raises:
        UserError: a field that none of the dataclasses has, a value that one of them refuses, or a file that is not
            YAML.
        NotFoundError: there is no such config file.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if (config := config_file(words)) is not None:
        read_yaml(config)  # before the heavy import, and with better messages than TRL's
    from trl import TrlParser

    asked = "CONFIG" if program.startswith("ktae ") else "--config FILE.yaml"
    usage = f"{program} {asked} [--field value ...]"
    parser = TrlParser(
        dataclass_types, allow_abbrev=False, prog=program, usage=usage, formatter_class=argparse.HelpFormatter
    )
    _take_null(parser, dataclass_types)
    _tell_defaults(parser)

    def refuse(message: str) -> NoReturn:  # argparse would print the usage, too
        raise UserError(re.sub(r"--(\w+)/--[\w-]+", r"--\1", message))

    parser.error = refuse
    try:
        *parsed, from_file, from_line = parser.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UserError:
        raise
    except (OSError, ValueError) as error:  # TRL's and transformers' own checks of the settings
        raise UserError(" ".join(str(error).split())) from error
    # What is left of the file is a list --key, value, --key, value ...; a value may begin with dashes, too.
    unknown = from_file[::2] + [word for word in from_line if word.startswith("--")]
    if not others and (unknown or from_line):
        fields = [action.dest for action in parser._actions]
        names = [word.removeprefix("--").partition("=")[0] for word in unknown] or from_line
        if retired := [name for name in names if name in RETIRED]:
            raise UserError(f"{retired[0]} is no longer a setting: {RETIRED[retired[0]]}")
        raise UserError(
            "Unknown setting: " + ", ".join(f"{name!r}{nearest(name, fields)}" for name in dict.fromkeys(names))
        )
    return tuple(parsed)


def _take_null(parser: argparse.ArgumentParser, dataclass_types: Sequence[type]) -> None:
    """Read `null` on the command line as None, for every field that may be None."""
    may_be_none = {
        name for cls in dataclass_types for name, kind in get_type_hints(cls).items() if type(None) in get_args(kind)
    }
    for action in parser._actions:
        if action.dest in may_be_none and action.nargs != "+":
            action.type = _null_or(action.type)


def _tell_defaults(parser: argparse.ArgumentParser) -> None:
    """Add the defaults to the help texts, but not `(default: None)`, which does not say what then happens."""
    for action in parser._actions:
        if action.help and action.default not in (None, argparse.SUPPRESS):
            action.help += " (default: %(default)s)"


def _null_or(convert: Callable[[str], object]) -> Callable[[str], object]:
    def converted(word: str):
        return None if word == "null" else convert(word)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse's messages show it
    return converted


def settings_help(usage: str, groups: Mapping[str, Iterable[dataclasses.Field]]) -> str:
    """Return the help of a command whose settings are fields of dataclasses, with a section for each group."""
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
