"""Finds intact checkpoints: a manifest with the size and hash of each file is written last and seals a checkpoint."""

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
# Training can resume without these, though not exactly.
REPLACEABLE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "rollouts_*.pt")
# Not part of a checkpoint. `training_args.bin` may contain a token, so it is missing from checkpoints on the Hub.
_NO_PART = ("training_args.bin", MANIFEST)
_REMOVED = ".removed-"
_THREADS = 8
logger = logging.getLogger(__name__)


class ResumeError(UserError):
    """Training cannot resume as requested. Raised before the first step, on all processes."""


def begin(checkpoint: Path) -> None:
    """Create an empty folder for a checkpoint. It is not used as a checkpoint until it is sealed.

    If a link has this name, the link is removed and its target does not change.
    """
    _remove(checkpoint)  # left by an earlier run: none of its files may stay
    checkpoint.mkdir(parents=True)
    _write(checkpoint, files=None)


def seal(checkpoint: Path) -> None:
    """Write the manifest of all files in the checkpoint, which makes it valid."""
    parts = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in _NO_PART]
    with ThreadPoolExecutor(_THREADS) as pool:
        marks = pool.map(_mark, parts)
        files = {path.relative_to(checkpoint).as_posix(): mark for path, mark in zip(parts, marks, strict=True)}
    _write(checkpoint, files)


def is_sealed(checkpoint: Path) -> bool:
    return bool((_read(checkpoint) or {}).get("files"))


def remove_unfinished(output_dir: Path) -> None:
    """Remove checkpoints that were begun but never sealed."""
    for checkpoint in _all(output_dir):
        manifest = _read(checkpoint)
        if manifest and manifest["files"] is None:
            _remove(checkpoint)
    for rest in Path(output_dir).glob(f"{_REMOVED}*"):  # left by a process that was killed
        shutil.rmtree(rest, ignore_errors=True)


def keep_newest(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Remove checkpoints until at most `limit` are left (`save_total_limit`; None keeps all).

    Damaged checkpoints are removed first, then older ones. Before anything is removed, the newest checkpoint is flushed
    to disk.

    Args:
        best: a checkpoint to keep in any case (`best_model_checkpoint`).
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
    """Return a short description of what is wrong with a checkpoint, with the file's name. Empty if it is intact.

    A checkpoint without a manifest is from version 0.1 or another trainer. Only its trainer state is checked.

    Args:
        hashes: whether to read all files and compare their hashes, or to compare only their sizes.
        allow_missing: whether to accept a checkpoint that lacks `REPLACEABLE` files.
    """
    if not checkpoint.is_dir():
        return "the folder does not exist"
    manifest = _read(checkpoint)
    if manifest is None:
        return _state_problem(checkpoint / STATE)
    if not manifest:
        return f"{MANIFEST} is damaged"
    files = manifest["files"]
    if files is None:
        return "it was not written completely"
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
            return f"{name} is damaged ({now:,} bytes instead of {size:,}){_remedy(name)}"
    if hashes:
        with ThreadPoolExecutor(_THREADS) as pool:
            marks = pool.map(lambda name: _mark(checkpoint / name), there)
            for (name, mark), now in zip(there.items(), marks, strict=True):
                if now != mark:
                    return f"{name} is damaged (its hash differs from the manifest's){_remedy(name)}"
    return ""


def newest_first(output_dir: Path) -> list[Path]:
    """Return all checkpoints of a run, intact or not, from the one saved last to the one saved first.

    This differs from the order of their step numbers if the run was resumed from an earlier step or restarted.
    """
    return sorted(_all(Path(output_dir)), key=_saved, reverse=True)


def older(checkpoint: Path) -> list[Path]:
    """Return the checkpoints in the same folder that were saved before this one, newest first."""
    return [other for other in newest_first(checkpoint.parent) if _saved(other) < _saved(checkpoint)]


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest checkpoint that seems intact (only file sizes are compared), or None."""
    whole = (str(checkpoint) for checkpoint in newest_first(output_dir) if not problem(checkpoint, hashes=False))
    return next(whole, None)


def wants_to_resume(asked: str | os.PathLike | bool | None) -> bool:
    return asked is not None and str(asked).lower() not in ("false", "")


def candidates(asked: str | os.PathLike | bool, output_dir: str) -> list[Path]:
    """Return the checkpoints to consider for `resume_from_checkpoint`, the preferred one first.

    Args:
        asked: a checkpoint folder, or true for the newest intact checkpoint.

    Raises:
        ResumeError: there is no checkpoint, or none that could be intact.
    """
    if str(asked).lower() != "true":
        checkpoint = Path(asked)
        if why := problem(checkpoint, hashes=False, allow_missing=True):
            raise ResumeError(not_whole(checkpoint, why, last_checkpoint(output_dir)))
        return [checkpoint, *older(checkpoint)]
    found = newest_first(output_dir)
    if not found:
        raise ResumeError(f"{output_dir} contains no checkpoint to resume from. Start without resume_from_checkpoint")
    if all(problems := [problem(checkpoint, hashes=False, allow_missing=True) for checkpoint in found]):
        raise ResumeError(not_whole(found[0], problems[0], None))
    return found


def not_whole(checkpoint: Path, why: str, other: str | os.PathLike | None) -> str:
    """Return the error message for a checkpoint that is not intact, with the checkpoint to use instead."""
    remedy = (
        f"To resume from the newest complete checkpoint, use --resume_from_checkpoint {other}"
        if other
        else f"There is no complete checkpoint in {checkpoint.parent}. Start without resume_from_checkpoint"
    )
    return f"Cannot resume from {checkpoint}: {why}. {remedy}"


def _all(output_dir: Path) -> Iterator[Path]:
    # Excludes copies made by the user, such as checkpoint-100-best.
    return (path for path in sorted(Path(output_dir).glob("checkpoint-*")) if _step(path) is not None and path.is_dir())


def _step(checkpoint: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def _saved(checkpoint: Path) -> tuple[float, int]:
    # Checkpoints without a manifest count as older than all others. Their file times are unreliable after a copy.
    saved = (_read(checkpoint) or {}).get("saved", 0.0)
    return saved, _step(checkpoint) or 0


def _is_replaceable(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in REPLACEABLE)


def _remedy(name: str, first: str = "delete it and add") -> str:
    return f"; to resume without it, {first} --allow_inexact_resume true" if _is_replaceable(name) else ""


def _mark(path: Path) -> list:
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _flush(checkpoint: Path) -> None:
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, or a link with its name.

    The folder is renamed first, so that a partly deleted checkpoint is never mistaken for an intact one.
    """
    if checkpoint.is_symlink():
        checkpoint.unlink()
    elif checkpoint.exists():
        away = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}")
        shutil.rmtree(away, ignore_errors=True)
        try:
            checkpoint.rename(away)
            shutil.rmtree(away)
        except OSError as error:
            logger.warning("Could not remove %s: %s", checkpoint, error)


def _write(checkpoint: Path, files: dict | None) -> None:
    # Later than all existing checkpoints, even if the clock was set back.
    saved = max(time.time(), *(_saved(other)[0] + 1e-3 for other in _all(checkpoint.parent)))
    replace_json(checkpoint / MANIFEST, {"version": 1, "saved": saved, "files": files})


def _read(checkpoint: Path) -> dict | None:
    """Return the manifest: None if it does not exist, empty if it is damaged or from another program."""
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
    return "" if isinstance(state, dict) and "global_step" in state else f"{STATE} is damaged: it has no global_step"
