"""Which checkpoints are whole: each is sealed by a manifest of its files' sizes and hashes, which is written last."""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from types import NoneType

from ktae_trl.arguments import UserError
from ktae_trl.files.writing import replace_json

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
# A training can resume without these, though not exactly.
REPLACEABLE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "rollouts_*.pt")
# No part of a checkpoint: a pickle that may hold a token, so that a checkpoint on the Hub comes without it.
_NO_PART = ("training_args.bin", MANIFEST)
_REMOVED = ".removed-"
_THREADS = 8
logger = logging.getLogger(__name__)


class ResumeError(UserError):
    """Training cannot resume as asked. Raised before the first step, by all processes alike."""


def begin(checkpoint: Path) -> None:
    """Make an empty folder for a checkpoint, which does not count as one until it is sealed.

    A link of its name is removed, and what it points to stays as it is.
    """
    _remove(checkpoint)  # of a run that took another way from an earlier step: nothing of it may stay
    checkpoint.mkdir(parents=True)
    _write(checkpoint, files=None)


def seal(checkpoint: Path) -> None:
    """Write the manifest of all files that are there: from now on the checkpoint counts."""
    parts = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in _NO_PART]
    with ThreadPoolExecutor(_THREADS) as pool:
        marks = pool.map(_mark, parts)
        files = {path.relative_to(checkpoint).as_posix(): mark for path, mark in zip(parts, marks, strict=True)}
    _write(checkpoint, files)


def is_sealed(checkpoint: Path) -> bool:
    return bool((_read(checkpoint) or {}).get("files"))


def remove_unfinished(output_dir: Path) -> None:
    """Remove checkpoints that were begun and never sealed: they hold nothing that a training could use."""
    for checkpoint in _all(output_dir):
        manifest = _read(checkpoint)
        if manifest and manifest["files"] is None:
            _remove(checkpoint)
    for rest in Path(output_dir).glob(f"{_REMOVED}*"):  # of a process that was killed
        shutil.rmtree(rest, ignore_errors=True)


def keep_newest(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Remove checkpoints until at most `limit` are left (`save_total_limit`; None keeps all).

    Whole ones stay before damaged ones, and newer before older. The newest is on the disk itself, and not only with the
    operating system, before any other goes.

    Args:
        best: a checkpoint that stays, too (`best_model_checkpoint`).
    """
    remove_unfinished(output_dir)
    found = newest_first(output_dir)
    whole = [checkpoint for checkpoint in found if not problem(checkpoint, hashes=False)]
    protected = [*whole[:1], *(path for path in whole[1:] if best and path == Path(best))]
    order = list(dict.fromkeys([*protected, *whole, *found]))
    if limit and limit > 0 and (surplus := order[max(limit, len(protected)) :]):
        _flush(order[0])
        for checkpoint in surplus:
            _remove(checkpoint)


def problem(checkpoint: Path, *, hashes: bool = True, allow_missing: bool = False) -> str:
    """Return what is wrong with a checkpoint, in a few words that name the file; empty if it is whole.

    Of one without a manifest, as version 0.1 and other trainers write them, only the trainer's state is looked at.

    Args:
        hashes: read all files; else only their sizes are compared.
        allow_missing: whether one that has lost `REPLACEABLE` parts passes, too.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    manifest = _read(checkpoint)
    if manifest is None:
        return _state_problem(checkpoint / STATE)
    if not manifest:
        return f"{MANIFEST} is damaged"
    files = manifest["files"]
    if files is None:
        return "it was not written to its end"
    try:
        return _damage(checkpoint, files, hashes, allow_missing)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror or error})"


def _damage(checkpoint: Path, files: dict, hashes: bool, allow_missing: bool) -> str:
    lost = [name for name in files if not (checkpoint / name).is_file()]
    if found := [name for name in lost if not (allow_missing and _is_replaceable(name))]:
        return f"{found[0]} is missing{_remedy(found[0], 'add')}"
    there = {name: mark for name, mark in files.items() if name not in lost}
    for name, (size, _) in there.items():
        if (now := (checkpoint / name).stat().st_size) != size:
            return f"{name} is damaged, it has {now:,} bytes and not {size:,}{_remedy(name)}"
    if hashes:
        with ThreadPoolExecutor(_THREADS) as pool:
            marks = pool.map(lambda name: _mark(checkpoint / name), there)
            for (name, mark), now in zip(there.items(), marks, strict=True):
                if now != mark:
                    return f"{name} is damaged, its content is not what was saved{_remedy(name)}"
    return ""


def newest_first(output_dir: Path) -> list[Path]:
    """Return a run's checkpoints, whole or not, in the order in which they were saved, the newest first.

    That is not the order of their numbers if a run was resumed from an earlier step, or started again.
    """
    return sorted(_all(Path(output_dir)), key=_saved, reverse=True)


def older(checkpoint: Path) -> list[Path]:
    """Return the checkpoints in the same folder that were saved before this one, the newest first."""
    return [other for other in newest_first(checkpoint.parent) if _saved(other) < _saved(checkpoint)]


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest checkpoint that seems whole (its files are not read), or None."""
    whole = (str(checkpoint) for checkpoint in newest_first(output_dir) if not problem(checkpoint, hashes=False))
    return next(whole, None)


def wants_to_resume(asked: str | os.PathLike | bool | None) -> bool:
    return asked is not None and str(asked).lower() not in ("false", "")


def candidates(asked: str | os.PathLike | bool, output_dir: str) -> list[Path]:
    """Return the checkpoints that `resume_from_checkpoint` may mean, the first choice first.

    Args:
        asked: a folder, or true for the newest whole one.

    Raises:
        ResumeError: there is none, or none that could be whole.
    """
    if str(asked).lower() != "true":
        checkpoint = Path(asked)
        if why := problem(checkpoint, hashes=False, allow_missing=True):
            raise ResumeError(not_whole(checkpoint, why, last_checkpoint(output_dir)))
        return [checkpoint, *older(checkpoint)]
    found = newest_first(output_dir)
    if not found:
        raise ResumeError(f"{output_dir} holds no checkpoint to resume from: start without resume_from_checkpoint")
    if all(problems := [problem(checkpoint, hashes=False, allow_missing=True) for checkpoint in found]):
        raise ResumeError(not_whole(found[0], problems[0], None))
    return found


def not_whole(checkpoint: Path, why: str, other: str | os.PathLike | None) -> str:
    """Return what to say of a checkpoint that cannot be resumed from, and which one to take instead."""
    remedy = (
        f"The newest whole one is {other}: resume from it with --resume_from_checkpoint {other}"
        if other
        else f"There is no whole one in {checkpoint.parent}: start without resume_from_checkpoint"
    )
    return f"{checkpoint} is not a whole checkpoint: {why}. {remedy}"


def _all(output_dir: Path) -> Iterator[Path]:
    # Not a copy that somebody made, as checkpoint-100-best.
    return (path for path in sorted(Path(output_dir).glob("checkpoint-*")) if _step(path) is not None and path.is_dir())


def _step(checkpoint: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def _saved(checkpoint: Path) -> tuple[float, int]:
    # Those without a manifest are older than all with one; the times of their files may be those of a copy.
    saved = (_read(checkpoint) or {}).get("saved", 0.0)
    return saved, _step(checkpoint) or 0


def _is_replaceable(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in REPLACEABLE)


def _remedy(name: str, first: str = "delete it and add") -> str:
    return f" (to resume without it, {first} --allow_inexact_resume true)" if _is_replaceable(name) else ""


def _mark(path: Path) -> list:
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _flush(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, or a link of its name: half a checkpoint must not look like a whole one."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    elif checkpoint.exists():
        away = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
        shutil.rmtree(away, ignore_errors=True)
        try:
            checkpoint.rename(away)
            shutil.rmtree(away)
        except OSError as error:
            logger.warning("%s could not be removed: %s", checkpoint, error)


def _write(checkpoint: Path, files: dict | None) -> None:
    # Later than all that is there, also where the clock was set back.
    saved = max(time.time(), *(_saved(other)[0] + 1e-3 for other in _all(checkpoint.parent)))
    replace_json(checkpoint / MANIFEST, {"version": 1, "saved": saved, "files": files})


def _read(checkpoint: Path) -> dict | None:
    """Return the manifest: None if there is none, an empty one if it is damaged or not ours."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        is_ours = manifest["version"] == 1 and manifest["saved"] + 0 and isinstance(manifest["files"], dict | NoneType)
        return manifest if is_ours else {}
    except FileNotFoundError:
        return None
    except (ValueError, OSError, LookupError, TypeError):
        return {}


def _state_problem(file: Path) -> str:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE}"
    except (ValueError, OSError) as error:
        return f"{STATE} is damaged ({error})" if file.stat().st_size else f"{STATE} is empty"
    return "" if isinstance(state, dict) and "global_step" in state else f"{STATE} is damaged: it says no global_step"
