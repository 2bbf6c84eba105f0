"""Read outputs of any program for `ktae grade`: JSON Lines with completions and accepted answers."""

import logging
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from ktae_trl.arguments import UserError
from ktae_trl.files.lines import read_json_lines
from ktae_trl.grading.golds import gold_answers

_REMEDY = "Correct this line, or grade a copy of the file without it"

logger = logging.getLogger(__name__)


class Columns(NamedTuple):
    """Possible names of each column, separated by commas. The first one present in a line is used."""

    completion: str = "completion,output,response"
    answer: str = "answers,answer,solution"
    benchmark: str = "benchmark,task"
    id: str = "id,problem_id"


class _Line(NamedTuple):
    where: str  # file and line number, for messages
    row: dict[str, Any]

    def value(self, names: str, default: str | None = None):
        """Return the value of the first column of `names` that the line has, or `default` if it has none."""
        name = next((name for name in names.split(",") if name in self.row), None)
        if name is None and default is None:
            raise UserError(
                f"{self.where}: no column {names.replace(',', ' or ')}. Its columns: {', '.join(self.row)}. Choose one "
                "with --completion_column, --answer_column, --benchmark_column or --id_column"
            )
        if name is not None and self.row[name] is None:
            raise UserError(f"{self.where}: {name} is null. {_REMEDY}")
        return default if name is None else self.row[name]


def read_outputs(file: Path, columns: Columns) -> list[dict]:
    """Return one row per output, in the format of `samples.graded` and with the accepted `answers`.

    A line contains one output or a list of outputs. Lines with the same benchmark and id are samples of one problem.
    Without an id, each line is a separate problem.

    Raises:
        NotFoundError: The file does not exist.
        UserError: A line is not a JSON object, lacks a column or has a value of the wrong type, two problems have the
            same id, a problem has no outputs, or the file is empty.
    """
    rows: list[dict] = []
    first: dict[tuple[str, str], tuple[int, dict]] = {}  # problem -> its first line's number and row
    counts: Counter[tuple[str, str]] = Counter()
    incomplete = 0
    for number, row in read_json_lines(file, remedy=_REMEDY, parse_float=Decimal):
        line = _Line(f"{file}, line {number}", row)
        answers = line.value(columns.answer)
        incomplete += isinstance(answers, list) and len(answers) > sum(a not in (None, "") for a in answers) > 0
        problem = {
            "benchmark": str(line.value(columns.benchmark, "outputs")),
            "id": str(line.value(columns.id, f"line {number}")),
            "problem": str(row.get("problem") or ""),
            "answers": _accepted(answers, line.where),
        }
        key = (problem["benchmark"], problem["id"])
        _check_same(*first.setdefault(key, (number, problem)), problem, line.where)
        outputs = line.value(columns.completion)
        one = isinstance(outputs, str)
        outputs = [outputs] if one else outputs
        if not isinstance(outputs, list) or not all(isinstance(output, str) for output in outputs):
            raise UserError(
                f"{line.where}: an output must be a string or a list of strings, not {str(outputs)[:60]}. {_REMEDY}"
            )
        if not outputs:
            raise UserError(
                f"{line.where}: problem {key[1]!r} has no outputs. To exclude it, grade a copy of the file without "
                'this line. To count it as wrong, give it an empty output, [""]'
            )
        # For a list of outputs it is unknown which one these columns describe.
        tokens = _tokens(row.get("tokens"), line.where) if one else None
        truncated = _truncated(row.get("truncated"), line.where) if one else None
        prompt = str(row.get("prompt") or "")
        for output in outputs:
            sample = {"sample": counts[key], "prompt": prompt, "completion": output}
            rows.append(problem | sample | {"tokens": tokens, "truncated": truncated})
            counts[key] += 1
    if not rows:
        raise UserError(f"{file} contains no outputs")
    if incomplete:
        logger.warning("Ignored null and empty answers in the lists of answers of %d lines of %s", incomplete, file)
    return rows


def _accepted(answers, where: str) -> list[str]:
    try:
        accepted = gold_answers(answers)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None
    if not accepted:
        raise UserError(f"{where}: the answer is empty ({answers!r}). {_REMEDY}")
    return accepted


def _check_same(line_before: int, before: dict, problem: dict, where: str) -> None:
    """Raise UserError if two lines with the same id have different answers or texts."""
    accepted, known = problem["answers"], before["answers"]
    remedy = "Give each problem its own id (--id_column)"
    if set(accepted) != set(known):
        raise UserError(
            f"{where}: problem {problem['id']!r} of {problem['benchmark']} has the answer {' or '.join(accepted)}, but "
            f"in line {line_before} the answer {' or '.join(known)}. {remedy}"
        )
    if problem["problem"] and before["problem"] and problem["problem"] != before["problem"]:
        raise UserError(
            f"{where}: problem {problem['id']!r} of {problem['benchmark']} has a different text than in line "
            f"{line_before}. {remedy}"
        )


def _tokens(value, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not (value >= 0 and value % 1 == 0):
        raise UserError(f"{where}: tokens must be a whole number, not {value!r}. {_REMEDY}")
    return int(value)


def _truncated(value, where: str) -> bool | None:
    known = {True: True, False: False, "true": True, "false": False, None: None}  # 1 and 0 equal True and False
    key = value.lower() if isinstance(value, str) else value
    if isinstance(key, list | dict) or key not in known:
        raise UserError(f"{where}: truncated must be true or false, not {value!r}. {_REMEDY}")
    return known[key]
