"""Which model is in a folder? A mark of all bytes that can change a sample: weights, config and tokenizer.

Saving the same model again gives the same mark. Digests of files are kept in the user's cache folder.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HTTPError  # of httpx, with huggingface_hub 2 of httpx2

from ktae_trl.arguments import NotFoundError, UserError, first_line, model_path
from ktae_trl.files.lock import locked
from ktae_trl.files.writing import replace_json

ADAPTER = "adapter_config.json"

# Keys that say how a file was written and nothing of the model, or that every call of a tokenizer sets.
_IGNORED = {
    "config.json": {"transformers_version", "_name_or_path", "use_cache"},
    ADAPTER: {"base_model_name_or_path", "revision", "peft_version", "inference_mode"},
    "tokenizer.json": {"padding", "truncation"},
    "tokenizer_config.json": {
        "name_or_path", "is_local", "local_files_only", "tokenizer_file", "special_tokens_map_file",
        "padding_side", "pad_to_multiple_of", "pad_token_type_id", "truncation_side", "truncation_strategy",
        "max_length", "stride",
    },
}  # fmt: skip
_USED = {"generation_config.json": {"eos_token_id"}}  # samples are drawn with the evaluation's own settings
_NAMES = {
    *_IGNORED, *_USED, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tekken.json", "chat_template.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json",
}  # fmt: skip
_SUFFIXES = {".safetensors", ".bin", ".jinja", ".model", ".tiktoken", ".py"}
_STATES = {"training_args.bin", "optimizer.bin", "scheduler.bin"}  # of a training, not of its model

logger = logging.getLogger(__name__)


def model_folder(model: str | Path, revision: str | None = None, *, download: bool = True) -> Path:
    """Return the folder of a model: its own, or the local cache's for a Hub id, which is downloaded first.

    Args:
        download: False looks into the cache only.

    Raises:
        FileNotFoundError: no such model, neither here nor on the Hub (or in the cache), or one without weights.
    """
    folder = Path(model_path(str(model))).expanduser()
    if not folder.is_dir():
        for weights in ("*.safetensors", "*.bin"):
            try:
                folder = Path(
                    snapshot_download(
                        str(model),
                        revision=revision,
                        local_files_only=constants.HF_HUB_OFFLINE or not download,
                        allow_patterns=[weights, "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.py"],
                        ignore_patterns=["*/*", "consolidated*", *_STATES],
                    )
                )
            except (OSError, ValueError, HTTPError) as error:
                raise NotFoundError(f"{model} is no folder here, and not on the Hub: {first_line(error)}") from error
            if list(folder.glob(weights)):
                break
    if not any(file.suffix in (".safetensors", ".bin") for file in _files(folder)):
        raise NotFoundError(f"{folder} holds no weights (*.safetensors or *.bin)")
    return folder


def adapter_base(folder: str | Path) -> str | None:
    """Return the base model that a PEFT adapter in `folder` names, None if it holds no adapter."""
    file = Path(folder) / ADAPTER
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]


def fingerprint(model: str | Path, revision: str | None = None, *, download: bool = True) -> str:
    """Return a mark of a model's weights, config and tokenizer: 32 hexadecimal digits, of all their bytes.

    An adapter's is its own mark and that of its base model, joined by "+". Where the same weights lie, when they were
    saved, and what else is in the folder (cards, optimizer states, rollouts) make no difference.

    Args:
        model, revision: a folder, or a Hub id, whose files are downloaded first.
        download: False looks for models of the Hub in the local cache only.

    Raises:
        FileNotFoundError: no such model, or one without weights.
        ValueError: a file changed while it was read.
    """
    folder = model_folder(model, revision, download=download)
    base = adapter_base(folder)
    return _own(folder) if base is None else f"{_own(folder)}+{fingerprint(base, download=download)}"


def is_of(mark: str, folder: str | Path) -> bool:
    """Return whether `mark` is the fingerprint of the model in `folder`.

    Where an adapter's base model is not on this machine, the adapter alone decides, and a warning says so.
    """
    try:
        return mark == fingerprint(folder, download=False)
    except FileNotFoundError as error:
        if adapter_base(folder) is None:
            raise
        logger.warning("The base model of %s could not be checked: %s", folder, error)
        return mark.partition("+")[0] == _own(Path(folder))


def is_old(mark: str | None) -> bool:
    """Return whether a fingerprint is one of version 0.1, which read the ends of the weights files only."""
    return mark is None or len(mark) == 16


def _own(folder: Path) -> str:
    files = _files(folder)
    lines = [f"{file.name} {digest}\n" for file, digest in zip(files, digests(files), strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that can change a sample."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if (file.name in _NAMES or file.suffix in _SUFFIXES) and file.name not in _STATES and file.is_file()
    ]
    if any(file.suffix == ".safetensors" for file in files):  # then nobody loads the other form of the same weights
        files = [file for file in files if file.suffix != ".bin" or file.name.startswith("adapter_model")]
    return [file for file in files if not file.name.startswith("consolidated")]


# Digests of files


def digests(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file's content, from the cache if its path, size and times are those of then.

    Raises:
        ValueError: a file changed while it was read.
    """
    cache = _cache_file()
    known = _read_cache(cache)
    stamps = {str(file.resolve()): _stamp(file) for file in files}
    missing = [path for path, stamp in stamps.items() if known.get(path, [])[:-1] != stamp]
    if missing:
        began = time.time_ns()
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as threads:  # hashlib leaves the others running
            read = dict(zip(missing, threads.map(_digest, map(Path, missing)), strict=True))
        for path in missing:
            if _stamp(Path(path)) != stamps[path]:
                raise UserError(f"{path} changed while it was read. Wait until it is written, then try again")
        # What was written a moment ago could be written again within the resolution of the file's times.
        kept = {path: [*stamps[path], read[path]] for path in missing if began - max(stamps[path][1:]) > 2e9}
        known |= {path: [*stamps[path], digest] for path, digest in read.items()}
        if kept:
            _write_cache(cache, kept)
    return [known[str(file.resolve())][-1] for file in files]


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]  # ctime: `cp -p` and `touch` set the other one


def _digest(file: Path) -> str:
    if file.name in _NAMES and file.suffix == ".json":
        try:
            return hashlib.sha256(_canonical(file).encode()).hexdigest()
        except ValueError:
            pass  # no JSON: as it is
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _canonical(file: Path) -> str:
    """Return what a file of settings says of the model, in one order."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        ignored, used = _IGNORED.get(file.name, ()), _USED.get(file.name, content)
        content = {key: value for key, value in content.items() if key in used and key not in ignored}
        if file.name == ADAPTER:  # PEFT writes sets, in any order
            content = {
                key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
                for key, value in content.items()
            }
    return json.dumps(content, sort_keys=True)


def _cache_file() -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return None
    return folder / "ktae_trl" / "digests-1.json"  # 1: the form of what is digested


def _read_cache(cache: Path | None) -> dict[str, list]:
    if cache is None:
        return {}
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        return {path: entry for path, entry in known.items() if len(entry) == 4 and isinstance(entry[-1], str)}
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or damaged: all is read again
        return {}


def _write_cache(cache: Path | None, entries: dict[str, list]) -> None:
    """Add entries, and leave out those of files that are gone. A home that cannot be written costs time only."""
    if cache is None:
        return
    try:
        with locked(cache.parent, "ktae_trl.files.fingerprint"):
            known = {path: entry for path, entry in _read_cache(cache).items() if os.path.exists(path)}
            replace_json(cache, known | entries)
    except (OSError, UserError) as error:  # another process writes, or the folder cannot be made
        logger.debug("No cache of digests at %s: %s", cache, error)
