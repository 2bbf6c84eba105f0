"""When a run stops before its end: the last line says why, and how to resume."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from tqdm import tqdm

from ktae_trl.checkpoints import ResumeError, last_checkpoint
from ktae_trl.guard import NotFiniteError
from ktae_trl.hub import HubError


class Advice:
    """What to do when `train.py` stops before its end.

    Attributes:
        saved: what to do once the model is saved, in place of resuming; None until then.
    """

    def __init__(self, trainer):
        self.trainer = trainer
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
        return f"train.py: {where}{who}: {reason}. {self.saved or self._resume()}"

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
def advice_at_the_end(trainer) -> Iterator[Advice]:
    """Around a run: if it stops before its end, the last line that the process writes says how to resume.

    An error passes, and its traceback comes first. Ctrl-C ends the process without one, SIGTERM at once. Errors that
    say themselves what to do are left alone: `ResumeError`, `HubError`.

    SIGTERM is left alone off the main thread, where Python sets no handlers, and where somebody handles it already (as
    transformers' `enable_jit_checkpoint` does).
    """
    advice, listening = Advice(trainer), ExitStack()
    reasons: list[str] = []  # one, until it is told

    def tell() -> None:
        with suppress(IndexError):
            os.write(2, f"\n{advice.line(reasons.pop())}\n".encode())

    def at_exit() -> None:
        tell()
        listening.close()

    def ended() -> None:
        reasons[:] = reasons or ["ended from outside (SIGTERM), as a launcher does when another process has died"]
        tell()

    # The last one registered is called first, so what a training starts, such as a tracker, writes before it.
    atexit.register(at_exit)
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        listening.enter_context(_on_sigterm(ended))
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
    except BaseException as error:
        reasons.append(reason_of(error))
        raise
    finally:
        for bar in list(tqdm._instances):  # they would be drawn once more when the process ends
            bar.close()
        if not reasons:
            atexit.unregister(at_exit)
            listening.close()


@contextmanager
def _on_sigterm(tell: Callable[[], None]) -> Iterator[None]:
    # A launcher sends SIGTERM to the others when a process has died. They may be waiting for it deep inside NCCL, where
    # no Python handler runs; so a thread answers.
    receive, send = os.pipe()
    os.set_blocking(send, False)

    def listen() -> None:
        while number := os.read(receive, 1)[0]:  # 0 ends it
            if number == signal.SIGTERM:
                try:
                    tell()
                finally:
                    os._exit(128 + signal.SIGTERM)

    def ignore(*_) -> None:
        pass

    # A forked worker, as of a reward function's pool, has the same pipe: until its SIGTERM is its own, it gets none.
    masks: dict[int, set] = {}

    def before_fork() -> None:
        if signal.getsignal(signal.SIGTERM) is ignore:
            masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def after_fork() -> None:
        if (mask := masks.pop(threading.get_ident(), None)) is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def after_fork_in_child() -> None:
        if signal.getsignal(signal.SIGTERM) is ignore:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        after_fork()

    os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=after_fork_in_child)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    fd = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, ignore)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(fd)
        os.write(send, b"\0")
        listener.join()
        os.close(send)
        os.close(receive)
