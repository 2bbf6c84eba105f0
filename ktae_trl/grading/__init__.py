r"""Decide whether the final answer of a completion is correct, for training and evaluation; built on math-verify.

Only the final answer counts, by default the content of the last `\boxed{...}` (`extraction`). Answers that can be
compared as text or as numbers are settled in this process. All others are compared by worker processes with hard
limits on time and memory. This package loads neither torch nor trl, and only the workers load SymPy.

    completion, answers -> extraction (last box) -> answers (lists, equations), literals (numbers, words)
                        -> pool -> worker -> answers again, with symbolic (math-verify) for expressions -> Grade
"""

import atexit
import hashlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ktae_trl.arguments import UserError
from ktae_trl.grading.answers import is_number, settle, surely_readable
from ktae_trl.grading.extraction import (
    ANSWER_FORMATS,
    INSTRUCTIONS,
    MAX_LENGTH,
    answered,
    check_format,
    find_answer,
    last_boxed,
    write_answer,
)
from ktae_trl.grading.golds import gold_answers
from ktae_trl.grading.pool import Pool, Task

logger = logging.getLogger(__name__)

BUDGET = 60.0  # seconds per 1,000 completions
# The least that a worker gets in a call: enough for an answer that takes its 2 s twice, and for five time-outs.
_LEAST_BUDGET = 10.0
# Number of cached verdicts: enough for 100 steps of 1,024 rollouts that all differ. About 15 MB, because the key is a
# hash of the answer. The least recently used verdict is dropped first.
_REMEMBERED = 100_000

__all__ = [
    "ANSWER_FORMATS",
    "BUDGET",
    "INSTRUCTIONS",
    "Grade",
    "answered",
    "check_format",
    "find_answer",
    "gold_answers",
    "gradable",
    "grade",
    "grade_full",
    "grade_many",
    "grade_many_full",
    "last_boxed",
    "write_answer",
]


class Grade(NamedTuple):
    verdict: bool | None  # None: none of the accepted answers could be parsed
    extracted: str | None  # the completion's final answer as written; None if it has none
    # The reason for the verdict: "equal", "different", "no boxed answer" ("no answer" in other answer formats),
    # "unparsable answer", "unparsable gold", "timeout" (over 2 s), "worker died" (the answer ended two workers, the
    # second one fresh: a crash; an answer that exceeds 500 MB mostly ends as "different" or "unparsable answer") or
    # "budget" (not compared, because other answers had used up the call's budget).
    reason: str


def grade(completion: str, answers: str | Sequence[str], answer_format: str = "boxed") -> bool | None:
    r"""Return whether the final answer of `completion` (by default the last `\boxed{...}`) equals one of `answers`.

    Args:
        completion: text written by a model.
        answers: the accepted answer, or several of which any one is correct, in the forms that datasets use: LaTeX or
            plain text, a number, or a whole solution (see `gold_answers`).
        answer_format: where to look for the answer: `boxed`, `tag`, `hash`, `last_number` or `auto` (see
            `find_answer`).

    Returns:
        True or False, or None if no accepted answer can be parsed. A completion is also False if it has no answer in
        this format, if its answer cannot be parsed, or if the comparison takes more than 2 s of processor time or
        500 MB.

    Raises:
        ValueError: `answer_format` is unknown.

    `ktae_trl.grading.answers.compare` describes what counts as equal.
    """
    return grade_full(completion, answers, answer_format).verdict


def grade_many(
    completions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    workers: int | None = None,
    answer_format: str = "boxed",
    budget: float | None = BUDGET,
) -> list[bool | None]:
    """Grade each completion against its own answers and return the verdicts of `grade`, in order.

    Most comparisons take milliseconds, but a model can write answers that take the full 2 s, and a thousand of those
    would take half an hour. Each call therefore has a budget: N completions may take `max(10, budget * N / 1000)`
    seconds of each worker's processor time. This equals wall time if each worker has a core to itself. On a busy
    machine the call takes longer, so that load never turns a correct answer into a wrong one. The first start of the
    workers is not counted; starting a worker to replace another one is. When the budget is used up, the remaining
    answers count as wrong with the reason "budget", and one warning per process says so. Answers that are likely to be
    slow, such as powers of powers, are compared last.

    The last 100,000 verdicts are cached: an answer that this process has already compared with the same accepted
    answers is not compared again, even if it timed out. Answers that ended their worker in another way are not cached.

    Args:
        workers: number of processes that compare in parallel. Default: this process's share of the cores (all cores,
            divided by the number of processes that torchrun or accelerate started on this machine).
        budget: seconds per 1,000 completions; None for no limit.

    Raises:
        ValueError: the two sequences differ in length, `workers` is below 1, `budget` is not above 0, or
            `answer_format` is unknown.
        TypeError: a completion is not a string, or `gold_answers` cannot read an answer.
    """
    return [grade.verdict for grade in grade_many_full(completions, answers, workers, answer_format, budget)]


def gradable(answers: Sequence[str | Sequence[str]], workers: int | None = None) -> list[bool]:
    """Return for each accepted answer, or list of accepted answers, whether it can be parsed.

    A list is True if any of its answers can be parsed. For False, `grade` returns None for every completion, so the
    problem is of no use for training or evaluation.
    """
    return [verdict is not None for verdict in grade_many([""] * len(answers), answers, workers, budget=None)]


def grade_full(completion: str, answers: str | Sequence[str], answer_format: str = "boxed") -> Grade:
    """Grade like `grade`, and also return the extracted answer and the reason for the verdict."""
    return grade_many_full([completion], [answers], answer_format=answer_format)[0]


def grade_many_full(
    completions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    workers: int | None = None,
    answer_format: str = "boxed",
    budget: float | None = BUDGET,
) -> list[Grade]:
    """Grade like `grade_many`, and also return each extracted answer and the reason for its verdict."""
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    check_budget("budget", budget)
    check_format(answer_format)
    tasks = [
        _task(completion, accepted, answer_format) for completion, accepted in zip(completions, answers, strict=True)
    ]
    distinct = dict.fromkeys(tasks)  # many rollouts of a group have the same answer
    reasons = {task: _settle(task) for task in distinct}
    hard = [task for task, reason in reasons.items() if reason is None]
    if hard:
        seconds = None if budget is None else max(_LEAST_BUDGET, budget * len(tasks) / 1000)
        reasons |= _compare(hard, workers, seconds)
        _tell(sum(reasons[task] == "budget" for task in tasks), len(tasks), budget)
    missing = "no boxed answer" if answer_format == "boxed" else "no answer"
    return [_grade(task, reasons[task], missing) for task in tasks]


def check_budget(name: str, budget: float | None) -> None:
    """Raise a ValueError that names the setting if `budget` is neither None nor above 0."""
    if budget is not None and not budget > 0:
        raise UserError(f"{name} must be above 0 (seconds per 1,000 answers) or None for no limit, not {budget}")


def _tell(left: int, answers: int, budget: float | None) -> None:
    global _told
    if left and not _told:
        _told = True
        logger.warning(
            "%d of %d answers were not compared and count as wrong, because other answers used up the grading budget "
            "of %s seconds per 1,000 answers. If answers that take so long can be correct, raise grading_budget (in "
            "Python: budget of grade_many). This warning is shown once; in training, the metric grading/budget is the "
            "share of answers that were not compared",
            *(left, answers, f"{budget:g}"),
        )


def _task(completion: str, answers, answer_format: str) -> Task:
    if not isinstance(completion, str):
        raise TypeError(f"A completion must be a string, not {type(completion).__name__}: {str(completion)[:80]}")
    found = find_answer(completion, answer_format)
    answers = tuple(answers) if isinstance(answers, list) else answers
    # Only strings are cached, because 1, 1.0 and True would be the same key.
    texts = all(isinstance(answer, str) for answer in (answers if isinstance(answers, tuple) else (answers,)))
    return Task((_golds if texts else _golds.__wrapped__)(answers), found and found.text)


@lru_cache(maxsize=4096)  # the rollouts of a group have the same gold answers
def _golds(answers) -> tuple[str, ...]:
    return tuple(gold_answers(answers))


def _settle(task: Task) -> str | None:
    """Return the reason if text and literal numbers decide the verdict; None if it needs computer algebra."""
    if task.answer is not None and any(settle(gold, task.answer) and surely_readable(gold) for gold in task.golds):
        return "equal"
    readable = [gold for gold in task.golds if gold and len(gold) <= MAX_LENGTH]
    if not readable:
        return "unparsable gold"
    if task.answer is None:
        return "different" if any(is_number(gold) for gold in readable) else None
    return "different" if all(settle(gold, task.answer) is False for gold in readable) else None


def _grade(task: Task, reason: str, missing: str) -> Grade:
    if reason == "different" and task.answer is None:
        reason = missing
    verdict = {"equal": True, "unparsable gold": None}.get(reason, False)
    return Grade(verdict, task.answer, reason)


# One pool per process, because a forked child must not share its parent's pipes. Threads take turns.
_pool: Pool | None = None
_lock = threading.Lock()
_verdicts: dict[bytes, str] = {}  # by a hash of the task, the least recently used first
_told = False  # whether the warning about the budget was shown


def _compare(tasks: list[Task], workers: int | None, budget: float | None) -> dict[Task, str]:
    global _pool
    if workers is None:
        workers = max(1, _cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))
    with _lock:
        found = {task: verdict for task in tasks if (verdict := _recall(task))}
        new = [task for task in tasks if task not in found]
        if not new:
            return found
        if _pool is None or _pool.size != workers:
            _close()
            _pool = Pool(workers)
        for task, outcome in zip(new, _pool.run(new, budget), strict=True):
            found[task] = outcome.verdict
            if outcome.lasting:
                _verdicts[_key(task)] = outcome.verdict
        while len(_verdicts) > _REMEMBERED:
            del _verdicts[next(iter(_verdicts))]
        return found


def _recall(task: Task) -> str | None:
    verdict = _verdicts.pop(key := _key(task), None)
    if verdict is not None:
        _verdicts[key] = verdict  # now the most recently used one
    return verdict


def _key(task: Task) -> bytes:
    return hashlib.blake2b(json.dumps(task).encode(), digest_size=16).digest()


def _cores() -> int:
    """Return how many cores this process may use: those it is bound to, or fewer if a container's quota is lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def _close() -> None:
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None


def _forget() -> None:
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


atexit.register(_close)
os.register_at_fork(after_in_child=_forget)
