"""When a run stops before its end: the last line says why, and how to resume."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import dropwhile
from pathlib import Path

import torch
from tqdm import tqdm

from ktae_trl.arguments import UserError
from ktae_trl.files.checkpoints import ResumeError, last_checkpoint
from ktae_trl.hub.upload import HubError
from ktae_trl.training.guard import NotFiniteError

# What ends a process from outside: each is answered unless it is ignored (SIGHUP by nohup) or somebody's already.
FROM_OUTSIDE = {
    signal.SIGTERM: "ended from outside (SIGTERM), as when another process or the launcher has died",
    signal.SIGHUP: "its terminal was closed (SIGHUP). nohup or tmux would keep it running",
}


class Advice:
    """What to do when a training stops before its end.

    Attributes:
        program: what the user called, for messages.
        saved: what to do once the model is saved, in place of resuming; None until then.
    """

    def __init__(self, trainer, program: str = "train.py"):
        self.trainer, self.program = trainer, program
        self.saved: str | None = None

    def line(self, reason: str) -> str:
        """Return the line that says where the run stopped, for what reason, and how to resume."""
        state, accelerator = self.trainer.state, self.trainer.accelerator
        if self.saved:
            where = "stopped after the model was saved"
        elif 0 < state.max_steps <= state.global_step:
            where = f"stopped after the last training step ({state.global_step}), before all was saved"
        else:
            where = f"training stopped after step {state.global_step}"
        who = f" (process {accelerator.process_index})" if accelerator.num_processes > 1 else ""
        return f"{self.program}: {where}{who}: {reason}. {self.saved or self._resume()}"

    def _resume(self) -> str:
        folder = self.trainer.args.output_dir
        if checkpoint := last_checkpoint(folder):
            return f"Resume from the last checkpoint ({checkpoint}) with --resume_from_checkpoint true"
        return f"There is no checkpoint in {folder} yet: start again"


def reason_of(error: BaseException) -> str:
    """Return in a few words what an error means; its own first line otherwise."""
    first = next(iter(str(error).strip().splitlines()), "")
    # gloo has no error class of its own: a peer that died is "Connection closed by peer", "Connection reset by peer" or
    # "Broken pipe", as the kernel noticed it, always with a source file of its transport layer.
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in first:
        return f"the connection to another process broke, which has probably died [{first.rstrip('.')}]"
    return f"{type(error).__name__}: {first}".rstrip(":. ")


@contextmanager
def advice_at_the_end(trainer, program: str = "train.py") -> Iterator[Advice]:
    """Around a run: if it stops before its end, the last line that the process writes says how to resume.

    An error passes, and its traceback comes first. Ctrl-C ends the process without one, SIGTERM and SIGHUP at once.
    Errors that say themselves what to do are left alone: `ResumeError`, `HubError`.

    Signals are left alone off the main thread, where Python sets no handlers, and where somebody handles them already
    (as transformers' `enable_jit_checkpoint` does SIGTERM) or ignores them (a shell SIGINT of a background job, nohup
    SIGHUP).
    """
    advice = Advice(trainer, program)
    reasons: list[str] = []  # one, until it is told

    def tell() -> None:
        with suppress(IndexError, OSError):  # told already; the terminal is gone
            os.write(2, f"\n{advice.line(reasons.pop())}\n".encode())

    def end(number: int) -> None:
        reasons[:] = reasons or [FROM_OUTSIDE[number]]
        tell()

    def at_exit() -> None:
        tell()
        undo()

    undo = _end_on_signals(end)
    atexit.register(at_exit)  # the first is called last: what a training starts, such as a tracker, writes before it
    try:
        yield advice
    except (ResumeError, HubError):
        raise
    except KeyboardInterrupt:
        if trainer.accelerator.process_index == 0:  # all processes get it
            reasons.append("interrupted")
        sys.exit(128 + signal.SIGINT)
    except NotFiniteError as error:
        if trainer.accelerator.process_index == 0:  # all processes raise it
            reasons.append(str(error))
        sys.exit(1)
    except UserError as error:
        reasons.append(str(error).rstrip("."))
        sys.exit(1)
    except BaseException as error:
        reasons.append(reason_of(error))
        raise
    finally:
        for bar in list(tqdm._instances):  # they would be drawn once more when the process ends
            bar.close()
        if not reasons:
            atexit.unregister(at_exit)
            undo()


@contextmanager
def like_ctrl_c() -> Iterator[None]:
    """Let what ends a process from outside do what Ctrl-C does at that time, so that what it started is ended too."""

    def as_ctrl_c(number, frame) -> None:
        handler = signal.getsignal(signal.SIGINT)  # asyncio has one of its own
        (handler if callable(handler) else signal.default_int_handler)(number, frame)

    free = _free_signals()
    for number in free:
        signal.signal(number, as_ctrl_c)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)


def end_with_launcher() -> None:
    """Get SIGTERM when the launcher dies that started this process: one that was killed could not send it.

    accelerate does not pass on a SIGTERM either when it launches a single process. A launcher is a parent whose command
    ends with ours. On Linux only.
    """
    own = list(dropwhile(lambda word: word.startswith("-"), sys.orig_argv[1:]))  # without Python and its options
    with suppress(OSError):
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
        if own and parent[-len(own) :] == own:
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _free_signals() -> list[int]:
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in FROM_OUTSIDE if signal.getsignal(number) is signal.SIG_DFL]


def _end_on_signals(tell: Callable[[int], None]) -> Callable[[], None]:
    """From now on each signal of `FROM_OUTSIDE` ends the process, after `tell`; return what undoes this.

    A launcher sends SIGTERM to the others when a process has died. They may be waiting for it deep inside NCCL, where
    no Python handler runs. So a thread answers; the handler in C, which runs anywhere, wakes it by a byte in a socket.
    """
    if not (numbers := _free_signals()):
        return lambda: None
    receive, send = socket.socketpair()
    send.setblocking(False)

    def ours(*_) -> None:
        pass

    def listen() -> None:
        while byte := receive.recv(1):
            if signal.getsignal(byte[0]) is ours:
                try:
                    tell(byte[0])
                    for child in multiprocessing.active_children():  # `_exit` does not end them, as an exit does
                        child.terminate()
                finally:
                    os._exit(128 + byte[0])

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def undo() -> None:
        for number in numbers:
            if signal.getsignal(number) is ours:
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        send.close()
        unblock()

    # A forked worker has all of this, and the socket is the same one: its signals wait until it is undone there.
    block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, numbers)
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=undo)
    threading.Thread(target=listen, daemon=True).start()
    signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, ours)
    return undo
