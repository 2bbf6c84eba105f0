"""Samples on disk: one JSON Lines file a benchmark, written while it is generated, graded when it is complete."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO

from ktae_trl import grading
from ktae_trl.arguments import UserError
from ktae_trl.files.fingerprint import is_old
from ktae_trl.files.lines import read_json_lines
from ktae_trl.files.lock import locked
from ktae_trl.files.writing import open_to_append, replace_json, replace_text, replacing
from ktae_trl.grading import answered, grade_many_full

logger = logging.getLogger(__name__)

SETTINGS, SUMMARY = "settings.json", "summary.json"
_MORE = "more"
_NEEDED = ("id", "sample", "problem", "prompt", "completion", "tokens", "truncated")


class Store:
    """The samples of one model in one folder: `settings.json`, and NAME.jsonl for each benchmark.

    Samples are appended as they come, each in one write, so that nothing is lost when the process ends; `finish` grades
    and sorts what is asked for and puts the file in place at once. Samples that were made but are not asked for now (a
    smaller `limit`, fewer `samples`) are kept in `more/NAME.jsonl`.
    """

    def __init__(self, folder: Path, settings: dict, free: Iterable[str] = ()):
        """Open a new folder, or one that holds samples made with the same settings.

        Args:
            free: names of settings that change no sample: they may differ, and the new values are written down.

        Raises:
            UserError: the folder's samples were made with other settings, by version 0.1 or by another program, or
                another process is writing to it.
        """
        self.folder = folder
        self._open: dict[str, IO[str]] = {}
        with ExitStack() as held:
            held.enter_context(locked(folder, "eval.py"))
            if (folder / _MORE).is_symlink():
                raise UserError(
                    f"{folder / _MORE} is a link to {(folder / _MORE).readlink()}, where samples would be written. "
                    "Remove the link, or choose another output_dir"
                )
            there = sorted(folder.glob("*.jsonl")) + sorted(folder.glob(f"{_MORE}/*.jsonl"))
            if there:
                self._check(there[0], read_settings(folder), settings, set(free))
            replace_json(folder / SETTINGS, settings, indent=2)
            self._lock = held.pop_all()  # until `close`

    def _check(self, file: Path, before: dict | None, settings: dict, free: set[str]) -> None:
        remedy = "Choose another output_dir, or move that folder away"
        if before is None:
            raise UserError(
                f"{file} is there already, and no {SETTINGS} says how it was made: it may hold outputs of another "
                f"program. Choose another output_dir. To grade what is in it: ktae grade {file}"
            )
        if "fingerprint" in before and is_old(before["fingerprint"]):
            raise UserError(
                f"{self.folder} holds samples of version 0.1, which did not read all of the model's weights: they may "
                f"be of another model, and are not used. {remedy}"
            )
        for name in sorted((before.keys() | settings.keys()) - free):
            if before.get(name) != settings.get(name):
                other_model = "another model's samples, or its files have changed"
                what = other_model if name == "fingerprint" else "samples made with other settings"
                raise UserError(
                    f"{self.folder} holds {what}: {name} was {before.get(name)!r}, now it is {settings.get(name)!r}. "
                    f"{remedy}"
                )

    def path(self, benchmark: str) -> Path:
        return self.folder / f"{benchmark}.jsonl"

    def read(self, benchmark: str) -> list[dict]:
        """Return all samples there are; a last line that was cut off by a crash is removed.

        A link in the place of the file becomes a file, for samples may be added.
        """
        path = self.path(benchmark)
        data = path.read_bytes() if path.exists() else b""
        whole, _, last = data.rpartition(b"\n")
        if last and not _is_sample(last):
            logger.warning("%s: the last line was cut off and is generated again", path)
            last = b""
        kept = b"".join(part + b"\n" for part in (whole, last) if part)
        if kept != data or path.is_symlink():
            with replacing(path) as draft:
                draft.write_bytes(kept)
        rows = [read_samples(file) for file in (self._more(benchmark), path) if file.exists()]
        return list({(row["id"], row["sample"]): row for part in rows for row in part}.values())

    def _more(self, benchmark: str) -> Path:
        return self.folder / _MORE / f"{benchmark}.jsonl"

    def add(self, benchmark: str, rows: Iterable[dict]) -> None:
        """Append samples; they are with the operating system when this returns."""
        if benchmark not in self._open:
            self._open[benchmark] = open_to_append(self.path(benchmark))  # closed in `close`
        file = self._open[benchmark]
        file.write("".join(_line(row) for row in rows))
        file.flush()

    def finish(
        self,
        benchmark: str,
        answers: dict[str, Sequence[str]],
        samples: int,
        answer_format: str = "boxed",
        budget: float | None = None,
    ) -> list[dict]:
        """Grade the samples of a benchmark that are asked for, sort them, and put the file in place.

        Args:
            answers: the accepted answers of each problem, in the order that the file gets.
            samples: how many of each problem are asked for.
            budget: of grading (see `graded`).
        """
        order = {problem: number for number, problem in enumerate(answers)}
        rows, more = [], []
        for row in self.read(benchmark):
            (rows if row["id"] in order and row["sample"] < samples else more).append(row)
        rows.sort(key=lambda row: (order[row["id"]], row["sample"]))
        rows = graded(rows, [answers[row["id"]] for row in rows], answer_format, budget)
        if more:  # first: what is in both files for a moment is not lost
            self._more(benchmark).parent.mkdir(exist_ok=True)
            replace_text(self._more(benchmark), "".join(_line(row) for row in more))
        replace_text(self.path(benchmark), "".join(_line(row) for row in rows))
        if not more:
            self._more(benchmark).unlink(missing_ok=True)
        return rows

    def close(self) -> None:
        """Close the files, and let other processes write to the folder."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._lock.close()


def safe_name(name: str) -> str:
    """Return a name for the folder of a model (a path or a Hub id) or for the file of a benchmark."""
    return re.sub(r"[^\w.+-]+", "_", name.rstrip("/")).strip("_.") or "model"


@cache
def grader() -> str:
    """Return a mark that changes with the grader: verdicts of two graders cannot be compared."""
    mark = hashlib.sha256(version("math-verify").encode())
    for file in sorted(Path(grading.__file__).parent.glob("*.py")):
        mark.update(file.read_bytes())
    return mark.hexdigest()[:16]


def graded(
    rows: Sequence[dict],
    answers: Sequence[Sequence[str]],
    answer_format: str = "boxed",
    budget: float | None = None,
) -> list[dict]:
    """Return rows with `answers`, `extracted`, `verdict`, `reason`, `answer_format`, and the grader's mark `graded_by`.

    A problem none of whose answers can be parsed gets no verdict (None).

    Args:
        budget: seconds of grading for 1,000 rows (`ktae_trl.grading.grade_many`); by default no limit, since a
            measurement has to compare every answer. What is left when it is used up is wrong, and no grader's mark
            says that it was judged: `eval.py compare` grades it again.
    """
    completions = [answered(row["prompt"], row["completion"]) for row in rows]
    grades = grade_many_full(completions, answers, answer_format=answer_format, budget=budget)
    result = []
    for row, accepted, grade in zip(rows, answers, grades, strict=True):
        judged = {"extracted": grade.extracted, "verdict": grade.verdict, "reason": grade.reason}
        judged |= {"answer_format": answer_format, "graded_by": None if grade.reason == "budget" else grader()}
        result.append(row | {"answers": list(accepted)} | judged)
    return result


def read_samples(path: Path) -> list[dict]:
    """Read a file of samples.

    Raises:
        UserError: a line that is not a sample (with its number, and how to go on), or two of one problem and number.
    """
    remedy = "Move that line to another file and run ktae eval with the same settings: it generates what is missing"
    rows: dict[tuple[str, int], dict] = {}
    for number, row in read_json_lines(path, remedy=remedy):
        if missing := _missing(row):
            raise UserError(f"{path}, line {number} is not a sample (no {', '.join(missing)}). {remedy}")
        key = (row["id"], row["sample"])
        if key in rows:
            raise UserError(f"{path}, line {number} is problem {key[0]!r}, sample {key[1]} again. {remedy}")
        rows[key] = row
    return list(rows.values())


def _missing(row: dict) -> list[str]:
    return [key for key in _NEEDED if key not in row or isinstance(row[key], list | dict)]


def _is_sample(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and not _missing(row)


def read_settings(folder: Path) -> dict | None:
    """Return the settings of a folder's samples, None if it does not say.

    Where `settings.json` is missing or damaged they are those of `summary.json`, which a whole run has written: samples
    with others are never added to a folder.

    Raises:
        UserError: the file is damaged, and the summary has no settings.
    """
    file = folder / SETTINGS
    try:
        return _object(file)
    except FileNotFoundError:
        damage = None
    except ValueError as error:
        damage = f"{file} is damaged ({error})"
    try:
        settings = _object(folder / SUMMARY).get("settings")
    except (FileNotFoundError, ValueError):
        settings = None
    if isinstance(settings, dict):
        logger.warning("%s: the settings are taken from %s", damage or f"There is no {file}", SUMMARY)
        return settings
    if damage is None:
        return None
    raise UserError(
        f"{damage}, and no {SUMMARY} has the settings. The samples in {folder} are all there, but without the settings "
        "none are added to them. If you know the command that made them: run it with another output_dir, stop it when "
        f"it samples, and copy the {SETTINGS} from there. To measure again: choose another output_dir, or move that "
        "folder away"
    )


def _object(file: Path) -> dict:
    """Read a JSON object; what is none is a ValueError."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"it holds no object, but {str(found)[:40]}")
    return found


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"
