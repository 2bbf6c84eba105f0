"""Kills, a full disk, damaged files: whatever happens to a training, its resumed self ends with the same weights."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ktae_trl.files.checkpoints import newest_first, problem
from tests.files import fault_run

pytestmark = pytest.mark.slow
CHAINS, KILLS = 10, 3  # runs, and how often each is killed
DISKS = 10
CHECKPOINT = 4  # in the middle of a generation cycle

# Each training is forked from a process that has imported all: it starts in a fraction of a second.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.files.fault_run"])


def start(folder: Path, log: Path):
    training = processes.Process(target=fault_run.train, args=(folder, log))
    training.start()
    return training


def finish(folder: Path, log: Path) -> bytes:
    """Train to the end; return the weights as they were saved."""
    training = start(folder, log)
    training.join(120)
    training.kill()
    training.join()
    assert training.exitcode == 0, log.read_text()[-3000:]
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a training that nothing happened to, its weights, and the seconds that it took."""
    root = tmp_path_factory.mktemp("uninterrupted")
    finish(root / "warm-up", root / "log")
    began = time.monotonic()
    final = finish(root / "run", root / "log")
    return root / "run", final, time.monotonic() - began


@pytest.mark.parametrize("chain", range(CHAINS))
def test_killed_at_random_moments(uninterrupted, tmp_path, chain):
    _, final, seconds = uninterrupted
    moments = random.Random(chain)
    for _ in range(KILLS):
        training = start(tmp_path / "run", tmp_path / "log")
        training.join(moments.uniform(0, seconds))
        training.kill()
        training.join()
        assert training.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-3000:]
    assert finish(tmp_path / "run", tmp_path / "log") == final


def mount(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", folder], check=True, capture_output=True)


@pytest.mark.parametrize("disk", range(DISKS))
def test_disk_fills_up(uninterrupted, tmp_path, disk):
    folder, final, _ = uninterrupted
    checkpoint = sum(path.stat().st_size for path in (folder / "checkpoint-6").rglob("*"))
    # At most three checkpoints lie on the disk at once: the last moment to fill it up is while the third is written.
    size = round(checkpoint * 3 * (disk + 0.5) / DISKS)
    (tmp_path / "disk").mkdir()
    try:
        mount(tmp_path / "disk", f"size={size}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs rights that this process does not have")
    try:
        training = start(tmp_path / "disk" / "run", tmp_path / "log")
        training.join(120)
        assert training.exitcode == 1
        mount(tmp_path / "disk", "remount", f"size={20 * checkpoint}")
        assert finish(tmp_path / "disk" / "run", tmp_path / "log") == final
    finally:
        training.kill()
        training.join()
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def remove(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_every_file_of_a_checkpoint_is_damaged(uninterrupted, tmp_path):
    """Resume takes the older one."""
    final = uninterrupted[1]
    kept = tmp_path / "kept"
    training = start(kept, tmp_path / "log")
    while problem(kept / f"checkpoint-{CHECKPOINT}"):
        assert training.is_alive()
        time.sleep(0.01)
    training.kill()
    training.join()
    for checkpoint in newest_first(kept):
        if int(checkpoint.name.partition("-")[2]) > CHECKPOINT:
            shutil.rmtree(checkpoint)
    files = sorted(path.name for path in (kept / f"checkpoint-{CHECKPOINT}").iterdir())
    parts = [name for name in files if name != "training_args.bin"]  # no part of a checkpoint
    assert {"manifest.json", "model.safetensors", "optimizer.pt", "rollouts_0.pt", "trainer_state.json"} <= {*parts}
    damages = (remove, empty, cut, turn_a_bit)
    for i, name in enumerate(parts):
        for damage in {damages[i % 4], damages[(i + 1) % 4]}:
            run, log = tmp_path / "run", tmp_path / f"{name} {damage.__name__}"
            shutil.copytree(kept, run)
            damage(run / f"checkpoint-{CHECKPOINT}" / name)
            if (name, damage) == ("manifest.json", remove):
                shutil.rmtree(run)  # it is a checkpoint of another trainer then, and whole as far as can be seen
                continue
            assert finish(run, log) == final, (name, damage.__name__)
            if name != "manifest.json" and damage is turn_a_bit:
                assert f"Skipped {run / f'checkpoint-{CHECKPOINT}'}: {name} is damaged" in log.read_text()
            shutil.rmtree(run)
