"""When training stops before its end: what to say, and which checkpoint to go on from."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from ktae_trl.arguments import last_checkpoint


def advice(trainer, reason: str) -> str:
    """Return the line that says after which step training stopped, for what reason, and how to go on."""
    who = f" (process {trainer.accelerator.process_index})" if trainer.accelerator.num_processes > 1 else ""
    checkpoint = last_checkpoint(trainer.args.output_dir)
    how = (
        f"Go on from the last checkpoint ({checkpoint}) with --resume_from_checkpoint true"
        if checkpoint
        else f"There is no checkpoint yet in {trainer.args.output_dir}: start again"
    )
    return f"train.py: training stopped after step {trainer.state.global_step}{who}: {reason}. {how}."


def reason_of(error: BaseException) -> str:
    """Return in a few words what an error means; its own first line otherwise."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    first = next(iter(str(error).strip().splitlines()), "")
    # gloo has no error class of its own: a peer that died is "Connection closed by peer", "Connection reset by peer" or
    # "Broken pipe", as the kernel noticed it, always with a source file of its transport layer.
    if isinstance(error, torch.distributed.DistError) or "gloo/transport" in first:
        return f"the connection to another process broke, which has probably died [{first.rstrip('.')}]"
    return f"{type(error).__name__}: {first}".rstrip(":. ")


@contextmanager
def telling_how_to_go_on(trainer) -> Iterator[None]:
    """Around `trainer.train()`: errors pass, and SIGTERM ends the process, but first one line says how to go on.

    SIGTERM is left alone off the main thread, where Python sets no handlers, and where somebody handles it already (as
    transformers' `enable_jit_checkpoint` does).
    """

    def tell(reason: str) -> None:
        os.write(2, f"\n{advice(trainer, reason)}\n".encode())

    main = threading.current_thread() is threading.main_thread()
    listens = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        with _on_sigterm(tell) if listens else nullcontext():
            yield
    except BaseException as error:
        tell(reason_of(error))
        raise


@contextmanager
def _on_sigterm(tell: Callable[[str], None]) -> Iterator[None]:
    # A launcher sends SIGTERM to the others when a process has died. They may be waiting for it deep inside NCCL, where
    # no Python handler runs; so a thread answers.
    receive, send = os.pipe()
    os.set_blocking(send, False)

    def listen() -> None:
        while number := os.read(receive, 1)[0]:  # 0 ends it
            if number == signal.SIGTERM:
                try:
                    tell("ended from outside (SIGTERM), as a launcher does when another process has died")
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
