"""Outputs of any program as graded samples: a JSON object a line, with completions and accepted answers."""

import logging
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from ktae_trl.arguments import UserError
from ktae_trl.files.lines import read_json_lines
from ktae_trl.grading.golds import gold_answers

_REMEDY = "Correct that line, or grade a copy of the file without it"

logger = logging.getLogger(__name__)


class Columns(NamedTuple):
    """Names that a column may have, joined by commas; the first that is there counts."""

    completion: str = "completion,output,response"
    answer: str = "answers,answer,solution"
    benchmark: str = "benchmark,task"
    id: str = "id,problem_id"


class _Line(NamedTuple):
    where: str  # for messages
    row: dict[str, Any]

    def value(self, names: str, default: str | None = None):
        """Return the value of a column, or `default` if there is no such column."""
        name = next((name for name in names.split(",") if name in self.row), None)
        if name is None and default is None:
            raise UserError(f"{self.where}: no column {names.replace(',', ' or ')}. There are: {', '.join(self.row)}")
        if name is not None and self.row[name] is None:
            raise UserError(f"{self.where}: {name} is null")
        return default if name is None else self.row[name]


def read_outputs(file: Path, columns: Columns) -> list[dict]:
    """Return a row for each output, as `samples.graded` takes them, with the accepted `answers`.

    A line holds one output, or a list of several. Lines of the same benchmark and id are samples of one problem;
    without an id, each line is a problem of its own.

    Raises:
        NotFoundError: there is no such file.
        UserError: a line that is no JSON object, lacks a column or has a value of another kind, two problems of one id,
            a problem without outputs, or none at all.
    """
    rows: list[dict] = []
    first: dict[tuple[str, str], tuple[int, dict]] = {}  # of each problem: the line where it came first, and its row
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
            raise UserError(f"{line.where}: an output must be a text or a list of texts, not {str(outputs)[:60]}")
        if not outputs:
            raise UserError(
                f"{line.where}: problem {key[1]!r} has no outputs. Grade a copy of the file without that line, to "
                'leave the problem out, or give it an empty output, [""], to count it as wrong'
            )
        # They are of a single output: of several in a list, it is not known which.
        tokens = _tokens(row.get("tokens"), line.where) if one else None
        truncated = _truncated(row.get("truncated"), line.where) if one else None
        prompt = str(row.get("prompt") or "")
        for output in outputs:
            sample = {"sample": counts[key], "prompt": prompt, "completion": output}
            rows.append(problem | sample | {"tokens": tokens, "truncated": truncated})
            counts[key] += 1
    if not rows:
        raise UserError(f"{file} holds no outputs")
    if incomplete:
        logger.warning("%d lines of %s have lists of answers with null or empty ones: left out", incomplete, file)
    return rows


def _accepted(answers, where: str) -> list[str]:
    try:
        accepted = gold_answers(answers)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from None
    if not accepted:
        raise UserError(f"{where}: no answer, only {answers!r}. {_REMEDY}")
    return accepted


def _check_same(line_before: int, before: dict, problem: dict, where: str) -> None:
    """Raise UserError if two lines of one id are not of the same problem."""
    accepted, known = problem["answers"], before["answers"]
    remedy = "Two problems need two ids (--id_column)"
    if set(accepted) != set(known):
        raise UserError(
            f"{where}: problem {problem['id']!r} of {problem['benchmark']} has the answer {' or '.join(accepted)}, and "
            f"in line {line_before} {' or '.join(known)}. {remedy}"
        )
    if problem["problem"] and before["problem"] and problem["problem"] != before["problem"]:
        raise UserError(
            f"{where}: problem {problem['id']!r} of {problem['benchmark']} has another text than in line "
            f"{line_before}. {remedy}"
        )


def _tokens(value, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not (value >= 0 and value % 1 == 0):
        raise UserError(f"{where}: tokens must be a whole number, not {value!r}")
    return int(value)


def _truncated(value, where: str) -> bool | None:
    known = {True: True, False: False, "true": True, "false": False, None: None}  # 1 and 0 are equal to the first two
    key = value.lower() if isinstance(value, str) else value
    if isinstance(key, list | dict) or key not in known:
        raise UserError(f"{where}: truncated must be true or false, not {value!r}")
    return known[key]
