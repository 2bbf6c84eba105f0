"""If a run stops early, its last line of output says why and how to resume."""

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

# Signals that end a process from outside. Each is handled unless it is ignored (SIGHUP by nohup) or already handled.
FROM_OUTSIDE = {
    signal.SIGTERM: "received SIGTERM, for example because another process or the launcher has died",
    signal.SIGHUP: "the terminal was closed (SIGHUP). To keep a training running, use nohup or tmux",
}


class Advice:
    """The line to print when a training stops early.

    Attributes:
        program: name of the program in the line.
        saved: what to say instead of the advice to resume, once the model is saved; None until then.
    """

    def __init__(self, trainer, program: str = "train.py"):
        self.trainer, self.program = trainer, program
        self.saved: str | None = None

    def line(self, reason: str) -> str:
        """Return the line that says where and why the run stopped, and how to resume."""
        state, accelerator = self.trainer.state, self.trainer.accelerator
        if self.saved:
            where = "stopped after the model was saved"
        elif 0 < state.max_steps <= state.global_step:
            where = f"stopped after the last training step ({state.global_step}), before everything was saved"
        else:
            where = f"training stopped after step {state.global_step}"
        who = f" (process {accelerator.process_index})" if accelerator.num_processes > 1 else ""
        return f"{self.program}: {where}{who}: {reason}. {self.saved or self._resume()}"

    def _resume(self) -> str:
        folder = self.trainer.args.output_dir
        if checkpoint := last_checkpoint(folder):
            return f"Resume from the last checkpoint ({checkpoint}) with --resume_from_checkpoint true"
        return f"There is no checkpoint in {folder} yet. Start again"


def reason_of(error: BaseException) -> str:
    """Return a short explanation of an error, by default its type and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    # gloo has no error class for a peer that died. The message is "Connection closed by peer", "Connection reset by
    # peer" or "Broken pipe", and always names a source file of the transport layer.
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in first:
        return f"lost the connection to another process, which has probably died [{first.rstrip('.')}]"
    return f"{type(error).__name__}: {first}".rstrip(":. ")


@contextmanager
def advice_at_the_end(trainer, program: str = "train.py") -> Iterator[Advice]:
    """Wrap a run: if it stops early, the last line that the process writes says how to resume.

    Errors propagate, and the line follows their traceback. Ctrl-C, `UserError` and `NotFiniteError` end the process
    without a traceback, SIGTERM and SIGHUP end it at once. `ResumeError` and `HubError` contain their own advice and
    get no line.

    Signals are handled only if this runs on the main thread, since Python can set handlers only there. Signals that are
    already handled (SIGTERM by transformers' `enable_jit_checkpoint`) or ignored (SIGINT in a background job of a
    shell, SIGHUP by nohup) are left as they are.
    """
    advice = Advice(trainer, program)
    reasons: list[str] = []  # at most one; removed when printed

    def tell() -> None:
        with suppress(IndexError, OSError):  # already printed; the terminal is gone
            os.write(2, f"\n{advice.line(reasons.pop())}\n".encode())

    def end(number: int) -> None:
        reasons[:] = reasons or [FROM_OUTSIDE[number]]
        tell()

    def at_exit() -> None:
        tell()
        undo()

    undo = _end_on_signals(end)
    atexit.register(at_exit)  # registered first, so it runs after the exit handlers of trackers
    try:
        yield advice
    except (ResumeError, HubError):
        raise
    except KeyboardInterrupt:
        if trainer.accelerator.process_index == 0:  # all processes receive it
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
        for bar in list(tqdm._instances):  # otherwise they are drawn again when the process ends
            bar.close()
        if not reasons:
            atexit.unregister(at_exit)
            undo()


@contextmanager
def like_ctrl_c() -> Iterator[None]:
    """Handle the signals of `FROM_OUTSIDE` like Ctrl-C, so that what the process has started is ended too."""

    def as_ctrl_c(number, frame) -> None:
        handler = signal.getsignal(signal.SIGINT)  # asyncio sets its own
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
    """Receive SIGTERM when the launcher of this process dies. Linux only.

    A launcher that was killed cannot send it, and accelerate does not forward SIGTERM to a single process. The launcher
    is recognised as a parent process whose command line ends with that of this process.
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
    """End the process on each signal of `FROM_OUTSIDE`, after calling `tell`. Return a function that undoes this.

    When a process has died, the launcher sends SIGTERM to the others. They may be waiting for the dead process inside
    NCCL, where no Python handler runs. So a thread handles the signal: the C handler wakes it with a byte in a socket.
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
                    for child in multiprocessing.active_children():  # `_exit` does not end them
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

    # A forked worker inherits the handlers and the socket. Its signals are blocked until `undo` has run there.
    block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, numbers)
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=undo)
    threading.Thread(target=listen, daemon=True).start()
    signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)
    for number in numbers:
        signal.signal(number, ours)
    return undo
