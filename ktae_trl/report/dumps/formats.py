"""The formats of rollouts, and which of them a file has: the set of its keys says so."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from ktae_trl.arguments import UserError, nearest
from ktae_trl.report.dumps import (
    areal,
    atropos,
    eval_samples,
    lm_eval,
    ms_swift,
    nemo_rl,
    open_instruct,
    own_records,
    prime_rl,
    roll,
    rows,
    skyrl,
    trl,
    verl,
)
from ktae_trl.report.dumps.rollout import Place, Read, Rollout, Row, encodable


class Format(NamedTuple):
    """A format: how to recognise a file and read its rows."""

    name: str  # for --format
    title: str
    needs: set[str]  # keys that every row has
    read: Read
    tokenizer: Callable[[list[Path]], str | None] = lambda paths: None  # name of the tokenizer that the files name
    files: Callable[[list[Path]], list[Path]] = lambda paths: paths  # which files of a folder to read
    has_tokens: bool = False  # the rows have the strings of their tokens, so no tokenizer is needed
    answer_format: str = "boxed"  # how a completion gives its answer, if it is graded
    repeats: bool = False  # a file may repeat the rollouts of another one

    def rollouts(self, row: Row, place: Place) -> list[Rollout]:
        """Return the rollouts of a row.

        Raises:
            UserError: The row lacks a key, or has a value of the wrong type.
        """
        if lacking := self.needs - row.keys():
            there = ", ".join(map(encodable, row)) or "nothing"
            raise UserError(f"{', '.join(sorted(lacking))} is missing. The row has: {there}")
        return self.read(row, place)


FORMATS = [
    Format("trl", "TRL completions", trl.NEEDS, trl.read, trl.tokenizer, repeats=True),
    Format("verl", "verl rollouts", verl.NEEDS, verl.read),
    Format("areal", "AReaL rollouts", areal.NEEDS, areal.read),
    Format("open_instruct", "open-instruct rollouts", open_instruct.NEEDS, open_instruct.read, open_instruct.tokenizer),
    Format("ms_swift", "ms-swift completions", ms_swift.NEEDS, ms_swift.read),
    Format("prime_rl", "prime-rl traces", prime_rl.NEEDS, prime_rl.read, files=prime_rl.files),
    Format("prime_rl_tokens", "prime-rl token exports", prime_rl.NEEDS_TOKENS, prime_rl.read_tokens),
    Format("atropos", "Atropos groups", atropos.NEEDS, atropos.read),
    Format("nemo_rl", "NeMo-RL data", nemo_rl.NEEDS, nemo_rl.read),
    Format("skyrl", "SkyRL rollouts", skyrl.NEEDS, skyrl.read),
    Format("roll", "ROLL rollouts", roll.NEEDS, roll.read),
    Format("lm_eval", "lm-evaluation-harness samples", lm_eval.NEEDS, lm_eval.read, answer_format="auto"),
    Format("eval_samples", "samples of ktae eval", eval_samples.NEEDS, eval_samples.read, eval_samples.tokenizer),
    Format("records", "records of this package", own_records.NEEDS, own_records.read, has_tokens=True),
    Format("rows", "rows with prompt and completion", rows.NEEDS, rows.read),
]
BY_NAME = {one.name: one for one in FORMATS}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that reads files of these formats: --format, --map (as `names`) and --tokenizer."""
    *names, last = BY_NAME
    parser.add_argument(
        "--format",
        metavar="NAME",
        help=f"name of the format (default: the one whose keys the files have): {', '.join(names)} or {last}",
    )
    parser.add_argument(
        "--map",
        dest="names",
        metavar="FIELD=KEY,...",
        help="the keys of files of another format: prompt=input,completion=output,reward=score",
    )
    parser.add_argument(
        "--tokenizer",
        help="tokenizer of the model that wrote the completions: a Hub id or a folder (default: the one that the files "
        "name, if they do)",
    )


def recognised(keys: set[str]) -> Format | None:
    """Return the format whose keys are all there, the one with the most keys if several fit, or None."""
    return max((one for one in FORMATS if one.needs <= keys), key=lambda one: len(one.needs), default=None)


def unknown(path: Path, keys: set[str], chosen: Format | None = None) -> UserError:
    """Return the error for a file of no known format, or not of the chosen one: its keys and the nearest format."""
    near = chosen or max(FORMATS, key=lambda one: (len(one.needs & keys) / len(one.needs), -len(one.needs)))
    lacks = ", ".join(sorted(near.needs - keys))
    what = f"does not have the format {near.name}: it lacks {lacks}." if chosen else "has no known format."
    similar = not chosen and near.needs & keys
    hint = f" The nearest format is {near.name}, for which it lacks {lacks}." if similar else ""
    return UserError(
        f"{path} {what} Its keys: {', '.join(sorted(map(str, keys))[:30]) or 'none'}.{hint} To name the fields of "
        f"another format: --map {rows.suggested_mapping(keys)}"
    )


def named(name: str | None, mapping: Mapping[str, str] | None) -> Format | None:
    """Return the format that the user chose with --format or --map, or None."""
    if mapping is not None:
        if name not in (None, "rows"):
            raise UserError(f"--map describes rows of no known format, so it cannot be used with --format {name}")
        kind = BY_NAME["rows"]
        needs = {theirs for theirs in mapping.values() if "." not in theirs}
        return kind._replace(needs=needs, read=lambda row, place: kind.read(rows.renamed(row, mapping), place))
    if name is not None and name not in BY_NAME:
        raise UserError(f"--format {name!r} is unknown{nearest(name, BY_NAME)}. Formats: {', '.join(BY_NAME)}")
    return BY_NAME.get(name)
