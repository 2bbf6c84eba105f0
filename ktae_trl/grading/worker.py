"""The worker process: reads one comparison per line and writes its verdict. Never imports torch or the main script.

Input line: JSON [seconds, [gold, ...], answer or null]. Output lines: "ready" once, then for each comparison "gold"
when all accepted answers have been read, and the verdict: "equal", "different", "unparsable answer" or "unparsable
gold". "ready" and each verdict are followed by the processor time they took, in seconds.
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
    with contextlib.suppress(ValueError, OSError):  # macOS has this limit, but refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _verdict(golds: list[str], answer: str | None, say) -> str:
    from ktae_trl.grading import symbolic

    known = [gold for gold in golds if _surely(symbolic.parsable, gold)]
    say("gold")
    # An unparsable gold answer accepts nothing, not even the same text: if only correct completions had a verdict, the
    # problem would seem to be always solved.
    if not known:
        return "unparsable gold"
    if answer is not None and any(_surely(symbolic.equal, gold, answer) for gold in known):
        return "equal"
    return "different" if answer is None or _surely(symbolic.parsable, answer) else "unparsable answer"


def _surely(question: Callable[..., bool], *answers: str) -> bool:
    """Return the result of `question`, and False on any error: an answer that causes one is a wrong answer."""
    try:
        return question(*answers)
    except MemoryError:
        raise
    except Exception:
        return False


def main(megabytes: int) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C, the main process ends the workers
    # Keep the pipe to the main process for verdicts: what a library prints must not look like one.
    verdicts = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    _limit_memory(megabytes)
    # Import and parse once before "ready", so that the start-up does not count against the time limit.
    from ktae_trl.grading import confinement, symbolic

    symbolic.equal(r"\frac{x}{2}+1", "1+x/2")
    confinement.confine()

    def say(word: str) -> None:
        verdicts.write(word + "\n")

    say(f"ready {time.process_time():.6f}")
    for line in sys.stdin.buffer:
        begin = time.process_time()
        seconds, golds, answer = json.loads(line)
        # The timer counts this process's processor time and ends it without involving Python. No computation can delay
        # it, and a busy machine does not turn a correct answer into a wrong one.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = _verdict(golds, answer, say)
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(f"{verdict} {time.process_time() - begin:.6f}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
