"""The folder of a run: one training at a time, and nothing in it that an earlier one left half done."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ktae_trl.files.checkpoints import remove_unfinished
from ktae_trl.files.lock import FolderInUseError, locked
from ktae_trl.files.model_files import HELD_OUT


@contextmanager
def own_folder(output_dir: str, accelerator: Accelerator) -> Iterator[None]:
    """Hold `output_dir` for a training. Collective.

    Raises:
        FolderInUseError: another program holds it, or it cannot be written to. On all processes.
    """
    with ExitStack() as stack:
        refused = [None]
        if accelerator.is_main_process:
            try:
                stack.enter_context(locked(output_dir, "a training"))
            except (FolderInUseError, OSError) as error:
                refused = [str(error)]
        if said := broadcast_object_list(refused)[0]:
            raise FolderInUseError(said)
        yield


def remove_leftovers(output_dir: str) -> None:
    """Remove checkpoints that were never finished, and what was measured of the model that was there before."""
    remove_unfinished(Path(output_dir))
    Path(output_dir, HELD_OUT).unlink(missing_ok=True)
