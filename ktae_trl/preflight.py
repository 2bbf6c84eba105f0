"""Checks that the config file, the model and the datasets of a command exist, before torch is imported.

Without them a missing model or an unreachable Hub shows only after the heavy imports, and after five retries of each
request that `from_pretrained` and `load_dataset` make.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ktae_trl.arguments import (
    TINY,
    WORD_PROBLEMS,
    NotFoundError,
    UserError,
    config_file,
    first_line,
    model_path,
    nearest_path,
    read_yaml,
)

# Data files that are read, also with .gz.
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# Data files that are not read: a missing one must not be taken for a dataset of the Hub.
NOT_READ = {".tsv", ".txt", ".xls", ".xlsx", ".arrow", ".feather", ".pkl", ".pickle", ".xml", ".yaml", ".yml", ".zip"}
_SECONDS = 4.0  # until the Hub counts as unreachable, unless HF_HUB_ETAG_TIMEOUT says otherwise

logger = logging.getLogger(__name__)
_in_command = False  # a notebook may be online again at its next call, a command does not wait for that
_unreachable = ""  # why, once the Hub could not be reached
_found: set[tuple] = set()  # repositories that the Hub has


def check_command(words: Sequence[str]) -> None:
    """Check the command line of `ktae train` or `ktae eval`: its config file, and the model and the datasets it names.

    If the Hub cannot be reached but its cache holds everything, this process uses the cache alone from then on.

    Raises:
        NotFoundError: a file, a model or a dataset does not exist, or the Hub cannot be reached and it is not cached.
        UserError: the config file is not YAML, or a data file has an unknown format.
    """
    global _in_command
    _in_command = True
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes of this machine
    try:
        _check(_settings(words))
    except UserError:
        if first:  # the launcher then ends the others
            raise
    if _unreachable:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the processes that this one starts
        if first:
            logger.warning("%s. Cached files are used, as with HF_HUB_OFFLINE=1", _unreachable)


def _check(settings: dict) -> None:
    def text(name: str) -> str | None:
        value = settings.get(name)
        return value if isinstance(value, str) and value not in ("", "null") else None

    if model := text("model_name_or_path"):
        check_model(model, text("model_revision"), "model_name_or_path")
    for name in ("dataset_name", "eval_dataset_name"):
        if dataset := text(name):
            check_dataset(dataset, name)
    benchmarks, only = settings.get("benchmarks"), settings.get("only")
    if isinstance(benchmarks, list) and not text("benchmark_folder"):
        only = [only] if isinstance(only, str) else only
        for entry in benchmarks:
            entry = entry if isinstance(entry, dict) else {}
            name, dataset = entry.get("name"), entry.get("dataset")
            if isinstance(dataset, str) and (not only or name in only):
                check_dataset(dataset, f"benchmark {name}")


def _settings(words: Sequence[str]) -> dict:
    """Return the settings of the config file, overridden by those of the command line (texts or lists of texts)."""
    file = config_file(words)
    settings = {} if file is None else read_yaml(file)
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            settings[name] = value if equals else None
        elif name is not None:
            before = settings[name]
            settings[name] = word if before is None else [*(before if isinstance(before, list) else [before]), word]
    return settings


def ending(path: Path) -> str:
    """Return what a file's name says about its format, such as `.jsonl` for `problems.jsonl.gz`."""
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def check_model(name: str, revision: str | None = None, by: str | None = None) -> None:
    """Check that a model is there: a folder with a configuration, or a repository on the Hub or in its cache.

    Args:
        by: the setting that names it, for messages.

    Raises:
        NotFoundError: it is not.
    """
    path = Path(model_path(name))
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            saved = sorted(path.glob("checkpoint-*"), key=lambda each: (len(each.name), each.name))
            remedy = f"Use its last checkpoint, {saved[-1]}" if saved else "Give the folder of a saved model"
            raise NotFoundError(f"{name}{_by(by)} contains neither config.json nor adapter_config.json. {remedy}")
    elif path.is_file():
        raise NotFoundError(f"{name}{_by(by)} is a file. Give the folder of the model instead")
    elif _looks_local(name):
        near = nearest_path(path, (each for each in path.parent.glob("*") if each.is_dir()))
        remedy = near or ". Give the folder of a saved model, or a model on the Hub as USER/NAME"
        raise NotFoundError(f"There is no model {name}{_by(by, f'looked in {Path.cwd()}')}{remedy}")
    else:
        try:
            _check_hub(name, "model", revision, by)
        except NotFoundError as error:  # of runs/NAME, which could also be on the Hub, a folder may have been meant
            own = (each for each in path.parent.glob("*") if each.is_dir()) if "/" in name else ()
            raise NotFoundError(f"{error}{nearest_path(path, own)}") from error


def check_dataset(name: str, by: str | None = None) -> None:
    """Check that a dataset is there: the package's own, a file, a folder, or a repository on the Hub or in its cache.

    Args:
        by: the setting that names it, for messages.

    Raises:
        NotFoundError: it is not.
        UserError: a file of a format that is not read.
    """
    path, kind, here = Path(name), ending(Path(name)), f"looked in {Path.cwd()}"
    if name in (TINY, WORD_PROBLEMS) or path.is_dir():
        return
    if kind in ENDINGS:
        check_file(path, by)
    elif path.is_file() or kind in NOT_READ:
        raise UserError(
            f"{name}{_by(by)} has an unsupported format. Supported endings: {', '.join(ENDINGS)}, also with .gz"
        )
    elif _looks_local(name):
        raise NotFoundError(
            f"{name}{_by(by, here)} is neither a data file ({', '.join(ENDINGS)}) nor a folder. Check the path"
        )
    else:
        _check_hub(name, "dataset", None, by)


def check_file(path: Path, by: str | None = None) -> None:
    """Check that a data file is there.

    Raises:
        NotFoundError: it is not.
    """
    if not path.is_file():
        near = nearest_path(path, (each for each in path.parent.glob("*") if ending(each) in ENDINGS))
        remedy = near or ". Give its path from this folder, or its absolute path"
        raise NotFoundError(f"There is no data file {path}{_by(by, f'looked in {Path.cwd()}')}{remedy}")


def _looks_local(name: str) -> bool:
    """Return whether a name can only be a path. Names on the Hub are NAME or USER/NAME."""
    return name.count("/") > 1 or name.startswith((".", "/", "~"))


def _by(*parts: str | None) -> str:
    said = "; ".join(filter(None, parts))
    return f" ({said})" if said else ""


# The Hub


def _check_hub(name: str, kind: str, revision: str | None, by: str | None) -> None:
    """Check that a repository is on the Hub, or in the cache if the Hub must not be asked or cannot be reached.

    Other answers, such as 503, pass: the library that loads the repository retries, and reports them.

    Raises:
        NotFoundError: it is not.
    """
    from huggingface_hub import HfApi, constants, errors, get_token
    from huggingface_hub.utils import validate_repo_id

    repository = (name, kind, None if revision == "main" else revision)
    if repository in _found:
        return None
    what, here = f"The {kind} {name!r}{_by(by)}", f"neither in {Path.cwd()}"
    gated = (
        f"{what} is gated: accept its terms on {constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}, then "
        "log in with hf auth login"
    )

    def without_hub(why: str, remedy: str) -> None:
        if not _cached(name, kind):
            raise NotFoundError(f"{what} is {here} nor in the cache, and {why}. {remedy}")

    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        raise NotFoundError(f"{what} is {here} nor a valid name on the Hub (USER/NAME)") from None
    for variable, off in (("HF_HUB_OFFLINE", constants.is_offline_mode()), ("HF_DATASETS_OFFLINE", _no_datasets(kind))):
        if off:
            return without_hub(f"{variable} is set", "Unset it to download, or give the path of a copy")
    global _unreachable
    unreachable = "Check the network and HF_ENDPOINT, or give the path of a copy"
    if _unreachable and _in_command:
        return without_hub(_unreachable, unreachable)
    try:
        found = _asked(lambda: HfApi().repo_info(name, repo_type=kind, revision=repository[2], timeout=_seconds()))
    except errors.GatedRepoError:
        raise NotFoundError(gated) from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"{what} has no revision {revision!r} on the Hub. Check model_revision") from None
    except errors.RepositoryNotFoundError:
        raise NotFoundError(
            f"{what} is {here} nor on the Hub. Check the name. If it is private, log in with hf auth login"
        ) from None
    except errors.HfHubHTTPError:
        return None
    except (TimeoutError, errors.HTTPError) as error:  # the latter is httpx's: there was no answer
        _unreachable = f"the Hub ({constants.ENDPOINT}) cannot be reached: {first_line(error)}"
        return without_hub(_unreachable, unreachable)
    except Exception:  # an answer in another form than the Hub's
        return None
    if getattr(found, "gated", False) and get_token() is None and not _cached(name, kind):
        raise NotFoundError(gated)
    _found.add(repository)


def _no_datasets(kind: str) -> bool:
    return kind == "dataset" and os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _seconds() -> float:
    return float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _SECONDS)


def _asked(ask: Callable[[], object]) -> object:
    """Ask the Hub, a second time if there is no connection. In a thread: looking up an address has no time limit."""
    from huggingface_hub import errors

    outcome: dict[str, Any] = {}
    done = threading.Event()

    def run() -> None:
        for attempt in (1, 2):
            try:
                outcome["value"] = ask()
            except Exception as error:
                outcome["error"] = error
                answered = isinstance(error, errors.HfHubHTTPError) or not isinstance(error, errors.HTTPError)
            else:
                answered = True
            if answered or attempt == 2:
                return done.set()
            time.sleep(1)

    threading.Thread(target=run, daemon=True).start()
    if not done.wait(_seconds()):
        raise TimeoutError(f"no answer in {_seconds():g} s (HF_HUB_ETAG_TIMEOUT)")
    if "value" not in outcome:
        raise outcome["error"]
    return outcome["value"]


def _cached(name: str, kind: str) -> bool:
    """Return whether the cache holds anything of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folders = [Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "snapshots")]
    if kind == "dataset":
        prepared = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
        folders.append(Path(prepared, name.replace("/", "___")))
    return any(folder.is_dir() and any(folder.iterdir()) for folder in folders)
