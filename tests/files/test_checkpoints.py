"""A checkpoint counts when it is whole, and the newest whole one is taken."""

import hashlib
import json
import os
import shutil

import pytest

from ktae_trl.files import checkpoints
from ktae_trl.files.checkpoints import ResumeError, candidates, last_checkpoint, newest_first, problem

FILES = {
    "model.safetensors": b"weights" * 99,
    "optimizer.pt": b"moments",
    "rollouts_1.pt": b"rollouts",
    "global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": b"shard",
    "trainer_state.json": b'{"global_step": 7}',
}


@pytest.fixture
def clock(monkeypatch):
    """Time goes on by a second with each look."""
    ticks = iter(range(1, 10**6))
    monkeypatch.setattr(checkpoints.time, "time", lambda: float(next(ticks)))


def write(folder, step, *, sealed=True):
    """Write a checkpoint as a trainer does: begin, files, seal."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoints.begin(checkpoint)
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(content)
    (checkpoint / "training_args.bin").write_bytes(b"a pickle with a token")
    if sealed:
        checkpoints.seal(checkpoint)
    return checkpoint


def write_foreign(folder, step, state='{"global_step": 1}'):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_manifest_holds_size_and_sha256_of_every_part(tmp_path):
    checkpoint = write(tmp_path, 7)
    expected = {name: [len(content), hashlib.sha256(content).hexdigest()] for name, content in FILES.items()}
    assert json.loads((checkpoint / "manifest.json").read_text())["files"] == expected
    assert problem(checkpoint) == ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "cut", "longer", "changed"])
def test_damage_of_any_part_is_found_and_named(tmp_path, name, how):
    file = write(tmp_path, 7) / name
    content = FILES[name]
    if how == "missing":
        file.unlink()
    else:
        damaged = {"empty": b"", "cut": content[:-1], "longer": content + b"\0", "changed": b"X" + content[1:]}
        file.write_bytes(damaged[how])
    assert problem(tmp_path / "checkpoint-7").startswith(f"{name} is {'missing' if how == 'missing' else 'damaged'}")
    if how != "changed":
        assert problem(tmp_path / "checkpoint-7", hashes=False)
        assert last_checkpoint(tmp_path) is None
    if how != "missing":
        assert problem(tmp_path / "checkpoint-7", allow_missing=True)


def test_only_parts_that_can_start_anew_may_be_missing(tmp_path):
    for name in FILES:
        checkpoint = write(tmp_path, 7)
        (checkpoint / name).unlink()
        may_go = name in ("optimizer.pt", "rollouts_1.pt")
        assert (problem(checkpoint, allow_missing=True) == "") == may_go
        assert ("--allow_inexact_resume true" in problem(checkpoint)) == may_go


def test_what_is_no_part_may_come_and_go(tmp_path):
    checkpoint = write(tmp_path, 7)
    (checkpoint / "training_args.bin").unlink()
    (checkpoint / "notes.txt").touch()
    assert problem(checkpoint) == ""


def test_checkpoint_that_was_not_sealed_does_not_count(tmp_path, clock):
    write(tmp_path, 7)
    cut = write(tmp_path, 8, sealed=False)
    assert problem(cut) == "it was not written completely"
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-7")
    checkpoints.remove_unfinished(tmp_path)
    assert not cut.exists()


@pytest.mark.parametrize("manifest", ["", '{"version": 1', "[]", '{"tool": "backup", "files": null}'])
def test_checkpoint_whose_manifest_is_damaged_or_not_ours_is_left_alone(tmp_path, manifest):
    checkpoint = write(tmp_path, 7)
    (checkpoint / "manifest.json").write_text(manifest)
    assert problem(checkpoint) == "manifest.json is damaged"
    assert last_checkpoint(tmp_path) is None
    checkpoints.remove_unfinished(tmp_path)
    assert checkpoint.exists()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_limit_keeps_the_newest_whole_ones_and_the_best(tmp_path, clock):
    for step in (40, 10, 20, 30):
        write(tmp_path, step)
    (tmp_path / "checkpoint-20" / "optimizer.pt").write_bytes(b"cut")
    write_foreign(tmp_path, 99)
    theirs = write(tmp_path / "theirs", 5, sealed=False)
    os.symlink(theirs, tmp_path / "checkpoint-5")
    (tmp_path / ".removed-checkpoint-1").mkdir()  # a process was killed there
    checkpoints.keep_newest(tmp_path, None)
    assert names(tmp_path) == [*(f"checkpoint-{step}" for step in (10, 20, 30, 40, 99)), "theirs"]
    checkpoints.keep_newest(tmp_path, 3, str(tmp_path / "checkpoint-99"))
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-30", "checkpoint-99", "theirs"]
    checkpoints.keep_newest(tmp_path, 1, str(tmp_path / "checkpoint-99"))
    assert names(tmp_path) == ["checkpoint-30", "checkpoint-99", "theirs"]
    assert theirs.exists()


def test_one_that_cannot_be_removed_or_read_is_told(tmp_path, clock, monkeypatch, caplog):
    for step in (1, 2):
        write(tmp_path, step)

    def refused(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoints.Path, "rename", refused)
    checkpoints.keep_newest(tmp_path, 1)
    assert f"Could not remove {tmp_path / 'checkpoint-1'}: " in caplog.text
    monkeypatch.setattr(checkpoints, "_mark", refused)
    assert "cannot be read (Permission denied)" in problem(tmp_path / "checkpoint-2")


def test_newest_does_not_go_by_a_clock_that_was_set_back(tmp_path, monkeypatch):
    for step, now in ((1, 1000.0), (2, 500.0)):
        monkeypatch.setattr(checkpoints.time, "time", lambda now=now: now)
        write(tmp_path, step)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("state", [None, "", "{", "[]", "{}"])
def test_of_a_checkpoint_without_a_manifest_the_state_is_read(tmp_path, state):
    write_foreign(tmp_path, 9)
    bad = write_foreign(tmp_path, 10, state)
    assert "trainer_state.json" in problem(bad)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")


def test_newest_is_the_one_saved_last(tmp_path, clock):
    for step in (2, 10, 4):  # resumed from an earlier step, or started anew
        write(tmp_path, step)
    for step in (5, 30):  # of version 0.1
        write_foreign(tmp_path, step)
    for name in ("checkpoint-best", "checkpoint-200-copy", "checkpoint-"):
        shutil.copytree(tmp_path / "checkpoint-4", tmp_path / name)
    shutil.copytree(tmp_path, tmp_path / "copy")  # with the times of now
    for folder in (tmp_path, tmp_path / "copy"):
        assert [path.name for path in newest_first(folder)] == [f"checkpoint-{step}" for step in (4, 10, 2, 30, 5)]


def test_beginning_again_leaves_nothing_of_what_was_there(tmp_path):
    checkpoint = write(tmp_path, 7)
    (checkpoint / "rollouts_9.pt").touch()  # of a run of ten processes
    write(tmp_path, 7)
    assert not (checkpoint / "rollouts_9.pt").exists()


def test_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    theirs = write(tmp_path / "theirs", 7)
    os.symlink(theirs, tmp_path / "checkpoint-7")
    write(tmp_path, 7, sealed=False)
    assert not (tmp_path / "checkpoint-7").is_symlink()
    assert problem(theirs) == ""


def test_which_checkpoints_are_meant(tmp_path, clock):
    with pytest.raises(ResumeError, match="contains no checkpoint to resume from"):
        candidates("true", str(tmp_path))
    for step in (8, 9, 10):
        write(tmp_path, step)
    (tmp_path / "checkpoint-10" / "model.safetensors").unlink()
    eight, nine, ten = (tmp_path / f"checkpoint-{step}" for step in (8, 9, 10))
    for asked in (True, "true", "True"):
        assert candidates(asked, str(tmp_path)) == [ten, nine, eight]  # all are read later
    assert candidates(str(nine), "elsewhere") == [nine, eight]
    for asked, why in (
        (ten, "model.safetensors is missing"),
        (tmp_path / "checkpoint-11", "the folder does not exist"),
    ):
        with pytest.raises(ResumeError, match=f"Cannot resume from {asked}: {why}.*resume_from_checkpoint {nine}"):
            candidates(asked, str(tmp_path))
    for checkpoint in (eight, nine):
        shutil.rmtree(checkpoint)
    with pytest.raises(ResumeError, match=f"Cannot resume from {ten}: .*There is no complete checkpoint"):
        candidates("true", str(tmp_path))
    assert [checkpoints.wants_to_resume(asked) for asked in (None, False, "false", "", True, ten)] == 4 * [False] + [
        True
    ] * 2
