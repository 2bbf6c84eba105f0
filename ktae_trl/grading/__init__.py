r"""Is the final answer of a completion right? One function for training and evaluation, on math-verify.

Only the content of the last `\boxed{...}` counts. Plain matches are settled here as text; the rest is compared by
worker processes under hard limits on time and memory. This package loads neither torch nor trl; only the workers load
SymPy.

    completion, answers -> text (last box) -> answers (lists, equations), literals (numbers, words)
                        -> pool -> worker -> answers again, with symbolic (math-verify) for expressions -> Grade
"""

import atexit
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ktae_trl.grading.answers import is_number, settle, surely_readable
from ktae_trl.grading.pool import Pool, Task
from ktae_trl.grading.text import MAX_LENGTH, gold_text, last_boxed

__all__ = ["Grade", "gradable", "grade", "grade_full", "grade_many", "grade_many_full", "last_boxed"]


class Grade(NamedTuple):
    verdict: bool | None  # None: none of the accepted answers could be parsed
    extracted: str | None  # the completion's final answer as written, None if it has none
    # Why: "equal", "different", "no boxed answer", "unparsable answer", "unparsable gold", "timeout" (over 2 s) or
    # "worker died" (a crash; what runs into the 500 MB mostly ends as "different" or "unparsable answer").
    reason: str


def grade(completion: str, answers: str | Sequence[str]) -> bool | None:
    r"""Say whether the last `\boxed{...}` of `completion` equals one of `answers`.

    Args:
        completion: text of the model.
        answers: the accepted answer, or several of which any one is right. LaTeX, with or without `$` or `\boxed{}`.

    Returns:
        True or False; False too for a completion without a complete box, with an answer that cannot be parsed, or that
        takes more than 2 s of processor time or 500 MB to compare. None if no accepted answer can be parsed.

    What counts as equal: `ktae_trl.grading.answers.compare`.
    """
    return grade_full(completion, answers).verdict


def grade_many(
    completions: Sequence[str], answers: Sequence[str | Sequence[str]], workers: int | None = None
) -> list[bool | None]:
    """Grade each completion against its own answers: the verdicts of `grade`, in order.

    Args:
        workers: processes that compare at once; by default the cores of this process's share (all cores by the number
            of processes that torchrun or accelerate started on this machine).

    Raises:
        ValueError: the two sequences differ in length, or `workers` is below 1.
        TypeError: a completion or an answer that is not a string.
    """
    return [grade.verdict for grade in grade_many_full(completions, answers, workers)]


def gradable(answers: Sequence[str | Sequence[str]], workers: int | None = None) -> list[bool]:
    """Say for each accepted answer, or list of accepted answers, whether any completion gets a verdict with it.

    False if none of them can be parsed: such a problem teaches and measures nothing, since `grade` returns None for
    every completion, whatever its answer.
    """
    return [verdict is not None for verdict in grade_many([""] * len(answers), answers, workers)]


def grade_full(completion: str, answers: str | Sequence[str]) -> Grade:
    """Grade like `grade`, and say what was extracted and why the verdict is what it is."""
    return grade_many_full([completion], [answers])[0]


def grade_many_full(
    completions: Sequence[str], answers: Sequence[str | Sequence[str]], workers: int | None = None
) -> list[Grade]:
    """Grade like `grade_many`, and say what was extracted and why each verdict is what it is."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    tasks = [_task(completion, accepted) for completion, accepted in zip(completions, answers, strict=True)]
    distinct = dict.fromkeys(tasks)  # many rollouts of a group have the same answer
    reasons = {task: _settle(task) for task in distinct}
    hard = [task for task, reason in reasons.items() if reason is None]
    if hard:
        reasons |= dict(zip(hard, _compare(hard, workers), strict=True))
    return [_grade(task, reasons[task]) for task in tasks]


def _task(completion: str, answers: str | Sequence[str]) -> Task:
    accepted = [answers] if isinstance(answers, str) else list(answers)
    for text in (completion, *accepted):
        if not isinstance(text, str):
            raise TypeError(f"Completions and answers must be strings, not {type(text).__name__}: {str(text)[:80]}")
    return Task(tuple(gold_text(answer) for answer in accepted), last_boxed(completion))


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


def _grade(task: Task, reason: str) -> Grade:
    if reason == "different" and task.answer is None:
        reason = "no boxed answer"
    verdict = {"equal": True, "unparsable gold": None}.get(reason, False)
    return Grade(verdict, task.answer, reason)


# One pool a process. A forked child must not share its parent's pipes, and several threads take turns.
_pool: Pool | None = None
_lock = threading.Lock()


def _compare(tasks: list[Task], workers: int | None) -> list[str]:
    global _pool
    if workers is None:
        workers = max(1, _cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))
    with _lock:
        if _pool is None or _pool.size != workers:
            _close()
            _pool = Pool(workers)
        return _pool.run(tasks)


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
