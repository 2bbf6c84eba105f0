r"""Is the final answer of a completion right? One function for training and evaluation, on math-verify.

Only the final answer counts, by default the content of the last `\boxed{...}` (`extraction`). Plain matches are settled
here as text; the rest is compared by worker processes under hard limits on time and memory. This package loads neither
torch nor trl; only the workers load SymPy.

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

BUDGET = 60.0  # seconds for 1,000 completions
# A worker gets this much in any call: one answer has its 2 s, and its second try, and five may time out.
_LEAST_BUDGET = 10.0
# Verdicts that are remembered: 100 steps of 1,024 rollouts of which no two are alike. About 15 MB, since an answer is
# remembered by a hash; the least recently used one is forgotten first.
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
    extracted: str | None  # the completion's final answer as written, None if it has none
    # Why: "equal", "different", "no boxed answer" (of other answer formats "no answer"), "unparsable answer",
    # "unparsable gold", "timeout" (over 2 s), "worker died" (it ended two workers, the second one fresh: a crash; what
    # runs into the 500 MB mostly ends as "different" or "unparsable answer") or "budget" (it was not compared, because
    # the others had used up the call's budget).
    reason: str


def grade(completion: str, answers: str | Sequence[str], answer_format: str = "boxed") -> bool | None:
    r"""Say whether the final answer of `completion`, by default the last `\boxed{...}`, equals one of `answers`.

    Args:
        completion: text of the model.
        answers: the accepted answer, or several of which any one is right, as datasets have them: LaTeX or plain text,
            a number, a whole solution (`gold_answers`).
        answer_format: where the answer stands: `boxed`, `tag`, `hash`, `last_number` or `auto` (see `find_answer`).

    Returns:
        True or False; False too for a completion without an answer in this format, with an answer that cannot be
        parsed, or that takes more than 2 s of processor time or 500 MB to compare. None if no accepted answer can be
        parsed.

    Raises:
        ValueError: an unknown `answer_format`.

    What counts as equal: `ktae_trl.grading.answers.compare`.
    """
    return grade_full(completion, answers, answer_format).verdict


def grade_many(
    completions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    workers: int | None = None,
    answer_format: str = "boxed",
    budget: float | None = BUDGET,
) -> list[bool | None]:
    """Grade each completion against its own answers: the verdicts of `grade`, in order.

    Most answers take milliseconds; a model can write ones that take their 2 s, and a thousand of them half an hour.
    So a call has a budget: N completions may take `max(10, budget * N / 1000)` seconds of each worker's processor time.
    That is wall time where each worker has a core for itself. Where it has not, wall time is longer: a busy machine
    must make no right answer wrong. The first start of the workers does not count; the starts of those that replace
    others do. What is left when the budget is used up is wrong with the reason "budget", and one warning a process
    says so. Powers of powers and the like are compared last. An answer that was compared in this process before, with
    the same accepted answers, is not compared again, whatever came out (the last 100,000 are remembered), unless it
    ended its worker other than by a time-out.

    Args:
        workers: processes that compare at once; by default the cores of this process's share (all cores by the number
            of processes that torchrun or accelerate started on this machine).
        budget: seconds for 1,000 completions; None for no limit.

    Raises:
        ValueError: the two sequences differ in length, `workers` is below 1, `budget` is not above 0, or
            `answer_format` is unknown.
        TypeError: a completion that is not a string, or an answer that `gold_answers` does not read.
    """
    return [grade.verdict for grade in grade_many_full(completions, answers, workers, answer_format, budget)]


def gradable(answers: Sequence[str | Sequence[str]], workers: int | None = None) -> list[bool]:
    """Say for each accepted answer, or list of accepted answers, whether any completion gets a verdict with it.

    False if none of them can be parsed: such a problem teaches and measures nothing, since `grade` returns None for
    every completion, whatever its answer.
    """
    return [verdict is not None for verdict in grade_many([""] * len(answers), answers, workers, budget=None)]


def grade_full(completion: str, answers: str | Sequence[str], answer_format: str = "boxed") -> Grade:
    """Grade like `grade`, and say what was extracted and why the verdict is what it is."""
    return grade_many_full([completion], [answers], answer_format=answer_format)[0]


def grade_many_full(
    completions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    workers: int | None = None,
    answer_format: str = "boxed",
    budget: float | None = BUDGET,
) -> list[Grade]:
    """Grade like `grade_many`, and say what was extracted and why each verdict is what it is."""
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
    """Raise a ValueError that names the setting if it is no budget."""
    if budget is not None and not budget > 0:
        raise UserError(f"{name} must be above 0 (seconds for 1,000 answers), or None for no limit; not {budget}")


def _tell(left: int, answers: int, budget: float | None) -> None:
    global _told
    if left and not _told:
        _told = True
        logger.warning(
            "%d of %d answers were not compared and count as wrong: others take so long that they used up the budget "
            "of %s seconds for 1,000 answers. Raise it if such answers can be right: grading_budget in a config, "
            "budget of grade_many. This is said once; in training the metric grading/budget counts them",
            *(left, answers, f"{budget:g}"),
        )


def _task(completion: str, answers, answer_format: str) -> Task:
    if not isinstance(completion, str):
        raise TypeError(f"A completion must be a string, not {type(completion).__name__}: {str(completion)[:80]}")
    found = find_answer(completion, answer_format)
    answers = tuple(answers) if isinstance(answers, list) else answers
    # Only texts are remembered: 1, 1.0 and True are the same key.
    texts = all(isinstance(answer, str) for answer in (answers if isinstance(answers, tuple) else (answers,)))
    return Task((_golds if texts else _golds.__wrapped__)(answers), found and found.text)


@lru_cache(maxsize=4096)  # a group's rollouts share theirs
def _golds(answers) -> tuple[str, ...]:
    return tuple(gold_answers(answers))


def _settle(task: Task) -> str | None:
    """Return the reason for what text and literal numbers can tell; None if it needs computer algebra."""
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


# One pool a process. A forked child must not share its parent's pipes, and several threads take turns.
_pool: Pool | None = None
_lock = threading.Lock()
_verdicts: dict[bytes, str] = {}  # by a hash of the task, the least recently used first
_told = False  # that answers were left


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
    """Return the cores this process may use: those it is bound to, or fewer if a container's quota says so."""
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
