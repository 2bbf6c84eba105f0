"""The output folder of a run: locked during training and cleared of unfinished files from earlier runs."""

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
    """Lock `output_dir` for the duration of a training. Collective.

    Raises:
        FolderInUseError: another program has locked it, or it is not writable. Raised on all processes.
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
    """Remove unfinished checkpoints and the held-out results of the model that an earlier run saved."""
    remove_unfinished(Path(output_dir))
    Path(output_dir, HELD_OUT).unlink(missing_ok=True)
