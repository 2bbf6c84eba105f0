"""When training stops before its end: what to say, and which checkpoint to go on from."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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
    """Around `trainer.train()`: errors pass, and SIGTERM ends the process, but first one line says how to go on."""

    def tell(reason: str) -> None:
        os.write(2, f"\n{advice(trainer, reason)}\n".encode())

    def listen() -> None:
        while number := os.read(receive, 1):
            if number[0] == signal.SIGTERM:
                tell("ended from outside (SIGTERM), as a launcher does when another process has died")
                os._exit(128 + signal.SIGTERM)

    # A launcher sends SIGTERM to the others when a process has died. They may be waiting for it deep inside NCCL, where
    # no Python handler runs; so a thread answers.
    receive, send = os.pipe()
    os.set_blocking(send, False)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    fd = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    except BaseException as error:
        tell(reason_of(error))
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(fd)
        os.close(send)  # ends the listener
        listener.join()
        os.close(receive)
