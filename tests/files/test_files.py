"""Files of a run's folder: written at once, never through a link, by one program at a time."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest

from ktae_trl.files import lock, writing
from ktae_trl.files.model_files import of_model
from ktae_trl.hub import upload as hub
from tests.trainers import make_trainer

HOLD = """
import sys
from pathlib import Path
from ktae_trl.files import lock

with lock.locked(Path(sys.argv[1]), "train.py"):
    if "fork" in sys.argv and not __import__("os").fork():
        __import__("time").sleep(60)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder, *words):
    """Another process that holds the folder; yields it once it does."""
    command = [sys.executable, "-c", HOLD, str(folder), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0) as other:
        try:
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            with suppress(ProcessLookupError):
                os.killpg(other.pid, signal.SIGKILL)


def take(folder) -> None:
    with lock.locked(folder, "a test"):
        pass


def test_second_program_is_told_who_holds_the_folder(tmp_path):
    with holder(tmp_path) as other, pytest.raises(lock.FolderInUseError) as error:
        take(tmp_path)
    assert f"train.py (process {other.pid} on {socket.gethostname()}, since 20" in str(error.value)
    take(tmp_path)  # the process is dead by now


@pytest.mark.parametrize("words", [(), ("fork",)])
def test_lock_of_a_killed_program_is_taken_over(tmp_path, words):
    with holder(tmp_path, *words) as other:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        take(tmp_path)  # a child of it may still be there


def test_same_process_may_take_it_again_and_keeps_it_until_the_last_one_is_done(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with lock.locked(tmp_path, "outer"):
        take(tmp_path / ".")
        refused = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        assert "FolderInUseError" in refused.stderr
        assert f"outer (process {os.getpid()}" in refused.stderr
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


def test_file_is_replaced_at_once_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    writing.replace_text(file, "old")

    def write_half():
        with writing.replacing(file) as draft:
            draft.write_text("half of the n")
            assert file.read_text() == "old"
            assert draft.suffix == ".json"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert file.read_text() == "old"
    writing.replace_text(file, "new\r\n")
    assert file.read_bytes() == b"new\r\n"
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_is_written_through_a_link(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    for name in ("a", ".part-b", "c", lock.LOCK):
        (tmp_path / name).symlink_to(theirs)
    writing.replace_text(tmp_path / "a", "ours")
    writing.replace_text(tmp_path / "b", "ours")
    with pytest.raises(OSError, match=r"c is a symbolic link to .*theirs"):
        writing.open_to_append(tmp_path / "c")
    with pytest.raises(OSError, match="lock"):
        take(tmp_path)
    assert theirs.read_text() == "theirs"
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "ours"
    assert not (tmp_path / "a").is_symlink()


def test_second_training_is_refused_before_it_touches_anything(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    (tmp_path / "held_out_results.json").write_text("of the first one")
    with (
        holder(tmp_path) as other,
        pytest.raises(lock.FolderInUseError, match=rf"process {other.pid} on .* output_dir"),
    ):
        trainer.train()
    assert (tmp_path / "held_out_results.json").read_text() == "of the first one"
    trainer.train()  # the other one is dead
    take(tmp_path)  # this one is done


def test_folder_stays_locked_while_it_is_uploaded(tmp_path):
    """The system lets go of a lock when its process closes any descriptor of the file."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with lock.locked(tmp_path, "a training"):
        sent = of_model(tmp_path).sent
        hub.api()._prepare_upload_folder_additions(tmp_path, path_in_repo="", allow_patterns=sent)
        refused = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert sent == ["config.json", "model.safetensors"]
    assert "FolderInUseError" in refused.stderr
