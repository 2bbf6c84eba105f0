"""The worker process: reads one comparison a line, answers with its verdict. Never imports torch or the main script.

Line in: JSON [seconds, [gold, ...], answer or null]. Lines out: "ready" once, then for each comparison "gold" when all
accepted answers have been read, and the verdict: "equal", "different", "unparsable answer" or "unparsable gold". After
"ready" and each verdict stand the seconds of processor time that it took.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable


def _limit_memory(megabytes: int) -> None:
    limit = megabytes << 20
    with contextlib.suppress(ValueError, OSError):  # macOS knows the limit, but does not take it
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _verdict(golds: list[str], answer: str | None, say) -> str:
    from ktae_trl.grading import symbolic

    known = [gold for gold in golds if _surely(symbolic.parsable, gold)]
    say("gold")
    # A gold answer that cannot be parsed accepts nothing, not even its own words: an answer that gets a verdict only if
    # it is right would look like one that is always right.
    if not known:
        return "unparsable gold"
    if answer is not None and any(_surely(symbolic.equal, gold, answer) for gold in known):
        return "equal"
    return "different" if answer is None or _surely(symbolic.parsable, answer) else "unparsable answer"


def _surely(question: Callable[..., bool], *answers: str) -> bool:
    """Ask, and take any error for a no: whatever a model writes is at most a wrong answer."""
    try:
        return question(*answers)
    except MemoryError:
        raise
    except Exception:
        return False


def main(megabytes: int) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the workers
    # The pipe to the main process is ours alone: what a library prints must not look like a verdict.
    verdicts = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    _limit_memory(megabytes)
    # Before "ready", so that start-up does not count against the limit: imports, and what the first parse sets up.
    from ktae_trl.grading import confinement, symbolic

    symbolic.equal(r"\frac{x}{2}+1", "1+x/2")
    confinement.confine()

    def say(word: str) -> None:
        verdicts.write(word + "\n")

    say(f"ready {time.process_time():.6f}")
    for line in sys.stdin.buffer:
        begin = time.process_time()
        seconds, golds, answer = json.loads(line)
        # The clock counts our own processor time and ends us without asking Python: no computation can miss it, and a
        # busy machine does not make a right answer wrong.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = _verdict(golds, answer, say)
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(f"{verdict} {time.process_time() - begin:.6f}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
