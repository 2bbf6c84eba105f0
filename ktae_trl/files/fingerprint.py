"""Fingerprints of models, computed from every byte that can change a sample: weights, config and tokenizer.

Saving the same model again gives the same fingerprint. Digests of files are cached in the user's cache folder.
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
from huggingface_hub.errors import HTTPError  # from httpx; from httpx2 with huggingface_hub 2

from ktae_trl.arguments import NotFoundError, UserError, first_line, model_path
from ktae_trl.files.lock import locked
from ktae_trl.files.writing import replace_json

ADAPTER = "adapter_config.json"

# Keys that describe how a file was written and not the model, or that every call of a tokenizer sets.
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
_USED = {"generation_config.json": {"eos_token_id"}}  # evaluation sets its own sampling parameters
_NAMES = {
    *_IGNORED, *_USED, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tekken.json", "chat_template.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json",
}  # fmt: skip
_SUFFIXES = {".safetensors", ".bin", ".jinja", ".model", ".tiktoken", ".py"}
_STATES = {"training_args.bin", "optimizer.bin", "scheduler.bin"}  # training state, not part of the model

logger = logging.getLogger(__name__)


def model_folder(model: str | Path, revision: str | None = None, *, download: bool = True) -> Path:
    """Return the folder of a model. A model of the Hub is downloaded to the local cache first.

    Args:
        model, revision: a local folder, or a Hub id.
        download: if False, use only the local cache for a Hub id.

    Raises:
        NotFoundError: the model does not exist locally or on the Hub (or in the cache), or has no weights.
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
                raise NotFoundError(f"{model} is neither a folder nor on the Hub: {first_line(error)}") from error
            if list(folder.glob(weights)):
                break
    if not any(file.suffix in (".safetensors", ".bin") for file in _files(folder)):
        raise NotFoundError(f"{folder} contains no weights (*.safetensors or *.bin)")
    return folder


def adapter_base(folder: str | Path) -> str | None:
    """Return the base model of the PEFT adapter in `folder`, as the adapter names it. None without an adapter."""
    file = Path(folder) / ADAPTER
    if not file.is_file():
        return None
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]


def fingerprint(model: str | Path, revision: str | None = None, *, download: bool = True) -> str:
    """Return the fingerprint of a model's weights, config and tokenizer: 32 hexadecimal digits.

    For an adapter, it is the adapter's fingerprint and that of the base model, joined by "+". The location of the
    files, the time they were saved and other files in the folder (cards, optimizer states, rollouts) do not matter.

    Args:
        model, revision: a local folder, or a Hub id, whose files are downloaded first.
        download: if False, use only the local cache for a Hub id.

    Raises:
        NotFoundError: the model does not exist or has no weights.
        UserError: a file changed while it was being read.
    """
    folder = model_folder(model, revision, download=download)
    base = adapter_base(folder)
    return _own(folder) if base is None else f"{_own(folder)}+{fingerprint(base, download=download)}"


def is_of(mark: str, folder: str | Path) -> bool:
    """Return whether `mark` is the fingerprint of the model in `folder`.

    If an adapter's base model is not on this machine, only the adapter is compared, with a warning.
    """
    try:
        return mark == fingerprint(folder, download=False)
    except FileNotFoundError as error:
        if adapter_base(folder) is None:
            raise
        logger.warning("Could not check the base model of %s: %s", folder, error)
        return mark.partition("+")[0] == _own(Path(folder))


def is_old(mark: str | None) -> bool:
    """Return whether a fingerprint is from version 0.1, which read only the ends of the weight files."""
    return mark is None or len(mark) == 16


def _own(folder: Path) -> str:
    files = _files(folder)
    lines = [f"{file.name} {digest}\n" for file, digest in zip(files, digests(files), strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder that can affect a sample."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if (file.name in _NAMES or file.suffix in _SUFFIXES) and file.name not in _STATES and file.is_file()
    ]
    if any(file.suffix == ".safetensors" for file in files):  # then *.bin files with the same weights are not loaded
        files = [file for file in files if file.suffix != ".bin" or file.name.startswith("adapter_model")]
    return [file for file in files if not file.name.startswith("consolidated")]


# Digests of files


def digests(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file. A cached digest is used if the file's path, size and times have not changed.

    Raises:
        UserError: a file changed while it was being read.
    """
    cache = _cache_file()
    known = _read_cache(cache)
    stamps = {str(file.resolve()): _stamp(file) for file in files}
    missing = [path for path, stamp in stamps.items() if known.get(path, [])[:-1] != stamp]
    if missing:
        began = time.time_ns()
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as threads:  # hashlib releases the GIL
            read = dict(zip(missing, threads.map(_digest, map(Path, missing)), strict=True))
        for path in missing:
            if _stamp(Path(path)) != stamps[path]:
                raise UserError(f"{path} changed while it was being read. Wait until it is complete, then try again")
        # A file written a moment ago could change again without a visible change of its times, so it is not cached.
        kept = {path: [*stamps[path], read[path]] for path in missing if began - max(stamps[path][1:]) > 2e9}
        known |= {path: [*stamps[path], digest] for path, digest in read.items()}
        if kept:
            _write_cache(cache, kept)
    return [known[str(file.resolve())][-1] for file in files]


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]  # ctime, since `cp -p` and `touch` set the other time


def _digest(file: Path) -> str:
    if file.name in _NAMES and file.suffix == ".json":
        try:
            return hashlib.sha256(_canonical(file).encode()).hexdigest()
        except ValueError:
            pass  # not JSON: hash the bytes
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _canonical(file: Path) -> str:
    """Return the content of a settings file that describes the model, in canonical order."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        ignored, used = _IGNORED.get(file.name, ()), _USED.get(file.name, content)
        content = {key: value for key, value in content.items() if key in used and key not in ignored}
        if file.name == ADAPTER:  # PEFT writes sets, in arbitrary order
            content = {
                key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
                for key, value in content.items()
            }
    return json.dumps(content, sort_keys=True)


def _cache_file() -> Path | None:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # there is no home folder
        return None
    return folder / "ktae_trl" / "digests-1.json"  # 1: version of the canonical form


def _read_cache(cache: Path | None) -> dict[str, list]:
    if cache is None:
        return {}
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        return {path: entry for path, entry in known.items() if len(entry) == 4 and isinstance(entry[-1], str)}
    except (OSError, ValueError, TypeError, AttributeError):  # missing or damaged: all files are read again
        return {}


def _write_cache(cache: Path | None, entries: dict[str, list]) -> None:
    """Add entries to the cache, and drop entries of deleted files. A failed write only costs time."""
    if cache is None:
        return
    try:
        with locked(cache.parent, "ktae_trl.files.fingerprint"):
            known = {path: entry for path, entry in _read_cache(cache).items() if os.path.exists(path)}
            replace_json(cache, known | entries)
    except (OSError, UserError) as error:  # another process is writing, or the folder cannot be created
        logger.debug("Could not write the cache of digests %s: %s", cache, error)
