"""What a user writes: command lines and names. A mistake is a `UserError`, which a command ends with as one line."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import get_args, get_type_hints


class UserError(ValueError):
    """What a user did wrong: the message names it and the remedy, and a command shows nothing else."""


class NotFoundError(UserError, FileNotFoundError):
    """A file, a folder or a dataset that is not there."""


class NotImportedError(UserError, ImportError):
    """A package that is not installed, or a name that a module does not have."""


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


def parse(dataclass_types: Sequence[type], program: str, arguments: Sequence[str] | None = None) -> tuple:
    """Parse `--config FILE.yaml [--field value ...]` into the dataclasses; the command line wins over the file.

    `--field null` sets a field that may be None to None, as `field: null` does in the file.

    Raises:
        ValueError: a field that none of the dataclasses has, or a value that one of them refuses.
        FileNotFoundError: no such config file.
    """
    parser = make_parser(dataclass_types, usage=f"{program} --config FILE.yaml [--field value ...]")
    *parsed, from_file, from_line = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    # The file's leftovers come as --key, value, --key, value ...; a value may itself begin with dashes.
    unknown = from_file[::2] + [word for word in from_line if word.startswith("--")]
    if unknown or from_line:
        fields = [action.dest for action in parser._actions]
        names = [word.removeprefix("--").partition("=")[0] for word in unknown] or from_line
        raise UserError(
            "Unknown setting: " + ", ".join(f"{name!r}{nearest(name, fields)}" for name in dict.fromkeys(names))
        )
    return tuple(parsed)


def make_parser(dataclass_types: Sequence[type], **options):
    """Return TRL's parser, which takes `null` on the command line too, for every field that may be None."""
    from trl import TrlParser  # heavy: not for those who only want `nearest`

    parser = TrlParser(dataclass_types, allow_abbrev=False, **options)
    may_be_none = {
        name for cls in dataclass_types for name, kind in get_type_hints(cls).items() if type(None) in get_args(kind)
    }
    for action in parser._actions:
        if action.dest in may_be_none and action.nargs != "+":
            action.type = _null_or(action.type)
    return parser


def _null_or(convert: Callable[[str], object]) -> Callable[[str], object]:
    def converted(word: str):
        return None if word == "null" else convert(word)

    converted.__name__ = getattr(convert, "__name__", "value")  # for argparse's messages
    return converted
