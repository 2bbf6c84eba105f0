"""Samples on disk: one JSON Lines file per benchmark, appended to during generation and graded when complete."""

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

    Each sample is appended in one write, so no sample is lost if the process dies. `finish` grades and sorts the
    requested samples and replaces the file atomically. Samples that are not requested any more (a smaller `limit`,
    fewer `samples`) are kept in `more/NAME.jsonl`.
    """

    def __init__(self, folder: Path, settings: dict, free: Iterable[str] = ()):
        """Open a new folder, or one with samples of the same settings.

        Args:
            free: Names of settings that do not change a sample. They may differ, and the new values are saved.

        Raises:
            UserError: The folder's samples were generated with other settings, by version 0.1 or by another program, or
                another process is writing to the folder.
        """
        self.folder = folder
        self._open: dict[str, IO[str]] = {}
        with ExitStack() as held:
            held.enter_context(locked(folder, "eval.py"))
            if (folder / _MORE).is_symlink():
                raise UserError(
                    f"{folder / _MORE} is a symbolic link to {(folder / _MORE).readlink()}. Samples are not written "
                    "through it. Remove the link, or choose another output_dir"
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
                f"{file} already exists, but the folder has no {SETTINGS}: the file may contain outputs of another "
                f"program. Choose another output_dir. To grade the file: ktae grade {file}"
            )
        if "fingerprint" in before and is_old(before["fingerprint"]):
            raise UserError(
                f"{self.folder} contains samples of version 0.1, which did not check all of the model's weights. They "
                f"may come from another model and are not used. {remedy}"
            )
        for name in sorted((before.keys() | settings.keys()) - free):
            if before.get(name) != settings.get(name):
                other_model = "samples of another model, or the model's files have changed"
                what = other_model if name == "fingerprint" else "samples generated with other settings"
                raise UserError(
                    f"{self.folder} contains {what}: {name} was {before.get(name)!r} and is now "
                    f"{settings.get(name)!r}. {remedy}"
                )

    def path(self, benchmark: str) -> Path:
        return self.folder / f"{benchmark}.jsonl"

    def read(self, benchmark: str) -> list[dict]:
        """Return all samples of a benchmark, and remove a last line that a crash cut off.

        If the file is a link, it is replaced by a copy, because samples may be appended to it.
        """
        path = self.path(benchmark)
        data = path.read_bytes() if path.exists() else b""
        whole, _, last = data.rpartition(b"\n")
        if last and not _is_sample(last):
            logger.warning("%s: the last line is incomplete. Its sample is generated again", path)
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
        """Append samples, and flush them to the operating system."""
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
        """Grade and sort the requested samples of a benchmark, replace its file atomically, and return them.

        Args:
            answers: The accepted answers of each problem, in the order of the new file.
            samples: Requested number of samples per problem.
            budget: Grading budget (see `graded`).
        """
        order = {problem: number for number, problem in enumerate(answers)}
        rows, more = [], []
        for row in self.read(benchmark):
            (rows if row["id"] in order and row["sample"] < samples else more).append(row)
        rows.sort(key=lambda row: (order[row["id"]], row["sample"]))
        rows = graded(rows, [answers[row["id"]] for row in rows], answer_format, budget)
        if more:  # before the main file: a crash in between leaves these samples in both files, not in neither
            self._more(benchmark).parent.mkdir(exist_ok=True)
            replace_text(self._more(benchmark), "".join(_line(row) for row in more))
        replace_text(self.path(benchmark), "".join(_line(row) for row in rows))
        if not more:
            self._more(benchmark).unlink(missing_ok=True)
        return rows

    def close(self) -> None:
        """Close the files and release the folder's lock."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._lock.close()


def safe_name(name: str) -> str:
    """Return a file name for a model (a path or a Hub id) or a benchmark."""
    return re.sub(r"[^\w.+-]+", "_", name.rstrip("/")).strip("_.") or "model"


@cache
def grader() -> str:
    """Return a hash of the grader's code and of math-verify's version. Verdicts are comparable if it is the same."""
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
    """Return rows with `answers`, `extracted`, `verdict`, `reason`, `answer_format` and `graded_by` (see `grader`).

    The verdict is None if no gold answer of the problem can be parsed.

    Args:
        budget: Seconds for grading 1,000 rows (see `ktae_trl.grading.grade_many`). Default: no limit, because a
            measurement must compare every answer. Rows left when it is used up count as wrong and get `graded_by`
            None, so `eval.py compare` grades them again.
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
        UserError: A line is not a sample, or two lines have the same problem and sample number. The message has the
            line number and the remedy.
    """
    remedy = "Move this line to another file and run ktae eval with the same settings to fill the gap"
    rows: dict[tuple[str, int], dict] = {}
    for number, row in read_json_lines(path, remedy=remedy):
        if missing := _missing(row):
            raise UserError(f"{path}, line {number} is not a sample: it lacks {', '.join(missing)}. {remedy}")
        key = (row["id"], row["sample"])
        if key in rows:
            raise UserError(f"{path}, line {number} repeats problem {key[0]!r}, sample {key[1]}. {remedy}")
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
    """Return the settings of a folder's samples, or None if the folder has no settings.

    If `settings.json` is missing or damaged, they are read from `summary.json`, which a finished run writes.

    Raises:
        UserError: The file is damaged, and `summary.json` has no settings.
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
        logger.warning("%s. Using the settings in %s", damage or f"{file} is missing", SUMMARY)
        return settings
    if damage is None:
        return None
    raise UserError(
        f"{damage}, and {SUMMARY} has no settings either. The samples are intact, but without the settings none can "
        "be added. If you know the command that generated them, run it with another output_dir, stop it when "
        f"sampling has begun, and copy {SETTINGS} from there to {folder}. To measure again, choose another output_dir "
        "or move that folder away"
    )


def _object(file: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: The file does not contain one.
    """
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise UserError(f"a JSON object was expected, not {str(found)[:40]}")
    return found


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"
