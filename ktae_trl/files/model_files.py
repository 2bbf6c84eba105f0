"""Defines which files of a run's folder belong to the model. Only these are uploaded. None is written through a link.

All other files stay on this machine: other runs, logs and optimizer states may contain data and secrets.
"""

import json
import mmap
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ktae_trl.arguments import UserError

CARD = "README.md"
PAGE = "key_tokens.html"
HELD_OUT = "held_out_results.json"
ARGUMENTS = "training_args.bin"
TEMPLATES = "additional_chat_templates"  # of a tokenizer with several; the only sub-folder that transformers writes
# All files that `save_pretrained` of transformers and PEFT writes, with the VOCAB_FILES_NAMES of all tokenizers.
_NAMES = {
    "config.json", "generation_config.json", "adapter_config.json",
    "quantize_config.json", "quant_config.json", "hf_quant_config.json",
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tiktoken.model", "tekken.json",
    "spiece.model", "spm.model", "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model",
    "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "entity_vocab.json", "normalizer.json",
    "prophetnet.tokenizer", "source.spm", "target.spm", "target_vocab.json", "vocab-src.json", "vocab-tgt.json",
    "word_pronunciation.json", "word_shape.json",
    CARD, PAGE, HELD_OUT, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt",
}  # fmt: skip
_WEIGHTS = re.compile(r"(adapter_)?model((-\d{5}-of-\d{5})?\.safetensors|\.safetensors\.index\.json)", re.ASCII)
_OTHER = re.compile(rf"[\w.-]+\.tiktoken|{TEMPLATES}/[^/]+\.jinja", re.ASCII)
_CODE_OF = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_IMPORT = re.compile(
    r"^\s*(?:from\s+\.(\w+)\s+import|import\s+\.(\w+))", re.MULTILINE
)  # the pattern by which transformers finds them
_IMAGE = re.compile(r"""(?:\]\(|src=["'])([\w./ -]+\.(?:png|jpe?g|gif|svg|webp))[)"' ]""", re.IGNORECASE)
# Files of a checkpoint in addition to the model: from transformers, accelerate, DeepSpeed, TRL and this package.
_STATE = re.compile(
    r"trainer_state\.json|manifest\.json|latest|zero_to_fp32\.py|(scheduler|scaler)\.pt|optimizer(_\w+)?\.(pt|bin)|"
    r"pytorch_model_fsdp(_\w+)?\.bin|rng_state(_\d+)?\.pth|rollouts_\d+\.pt|global_step\d+/\w+_states\.pt|"
    r"(pytorch_model_fsdp|optimizer)_\d+/(\.metadata|__\d+_\d+\.distcp)|ref/adapter_(config\.json|model\.safetensors)",
    re.ASCII,
)
_RESULTS = re.compile(r"\w+_results\.json", re.ASCII)
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30}")
_TENSORS = {".safetensors", ".pt", ".pth", ".bin", ".distcp"}
_SHOWN = 40  # entries of a list in a message


class RefusedFileError(UserError):
    """A file must not be uploaded. The message says why."""


class Choice(NamedTuple):
    """The files of a folder to upload, as relative paths, and the others with the reason.

    The reason is "" for a file that is simply not part of the model.
    """

    sent: list[str]
    left_out: dict[str, str]


def of_model(folder: Path, include: Sequence[str] = ()) -> Choice:
    """Choose the files that belong to a model: weights, configs, tokenizer, code, card with its images, page, results.

    Args:
        include: additional files to upload, as paths relative to the folder.

    Raises:
        RefusedFileError: a file of `include` must not be uploaded, or a file contains a Hugging Face token.
    """
    known = _code(folder) | _images(folder)
    asked = {_asked(folder, name) for name in include}
    return _choose(folder, lambda name: name in asked or name in known or _is_model(name), asked)


def of_checkpoint(folder: Path) -> Choice:
    """Choose the files needed to resume from a checkpoint, except `training_args.bin`, which contains `hub_token`.

    Raises:
        RefusedFileError: a file contains a Hugging Face token.
    """
    code = _code(folder)
    return _choose(folder, lambda name: name in code or _is_model(name) or bool(_STATE.fullmatch(name)))


@contextmanager
def without_links(folder: Path) -> Iterator[None]:
    """Remove links from a folder while a library writes to it, so that the targets of the links do not change.

    At the end, links whose names were not written are restored. Their targets are never copied: that would bring files
    from outside into the folder, and from there to the Hub.
    """
    links = {}
    for path in [*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")]:
        if path.is_symlink() and _is_written(folder, path.relative_to(folder).as_posix()):
            links[path] = os.readlink(path)
    for path in links:
        path.unlink()
    try:
        yield
    finally:
        for path, target in links.items():
            if not os.path.lexists(path):
                path.symlink_to(target)


def in_words(left_out: dict[str, str]) -> str:
    """Return the omitted files as one line for a message. Files in sub-folders are counted, not named."""
    tops = Counter(name.partition("/")[0] for name in left_out)
    entries = []
    for top, count in sorted(tops.items()):
        name = top if top.isprintable() else repr(top)
        if top in left_out:
            reason = left_out[top]
            entries.append((not reason, f"{name} ({reason})" if reason else name))
        else:
            entries.append((False, f"{name}/ ({count} file{'s' if count > 1 else ''})"))
    entries = [entry for _, entry in sorted(entries, key=lambda entry: entry[0])]  # folders and reasons first
    more = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return ", ".join([*entries[:_SHOWN], *more])


def _is_model(name: str) -> bool:
    return name in _NAMES or bool(_WEIGHTS.fullmatch(name) or _OTHER.fullmatch(name))


def _is_written(folder: Path, name: str) -> bool:
    own = name in (ARGUMENTS, TEMPLATES, "ref") or _is_model(name) or _STATE.fullmatch(name) or _RESULTS.fullmatch(name)
    return bool(own) or name in _code(folder)


def _choose(folder: Path, is_own: Callable[[str], bool], asked: set[str] = frozenset()) -> Choice:
    choice = Choice([], {})
    for name, link in _entries(folder):
        if link:
            choice.left_out[name] = "a symbolic link"
        elif not stat.S_ISREG((folder / name).lstat().st_mode):
            choice.left_out[name] = "not a regular file"
        elif not is_own(name):
            choice.left_out[name] = _reason(name)
        else:
            choice.sent.append(name)
            if name in asked or PurePosixPath(name).suffix not in _TENSORS:
                _check_content(folder, name)
    return choice


def _reason(name: str) -> str:
    if name == ARGUMENTS:
        return "contains hub_token"
    return "a pickle" if re.fullmatch(r"(pytorch|adapter)_model.*\.bin", name) else ""


def _entries(folder: Path) -> Iterator[tuple[str, bool]]:
    """Yield the relative path of everything in a folder except folders, and whether it is a link.

    Links are not followed; a link to a folder is yielded as a link.
    """
    for where, folders, names in os.walk(folder):
        links = [name for name in folders if Path(where, name).is_symlink()]
        for name in sorted([*names, *links]):
            path = Path(where, name)
            yield path.relative_to(folder).as_posix(), path.is_symlink()


def _asked(folder: Path, name: str) -> str:
    """Return the normalised path of a file from `include`, after checking that it may be uploaded."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise RefusedFileError(
            f"{name} is not inside {folder}. Copy it there first, and give its path relative to that folder"
        )
    for part in (path, *path.parents[:-1]):
        if (folder / part).is_symlink():
            raise RefusedFileError(f"{part} in {folder} is a symbolic link, which is not followed. Copy the file")
    if path.name == ARGUMENTS:
        raise RefusedFileError(f"{name} contains all training arguments, including hub_token, and is never uploaded")
    if any(part.startswith(".") for part in path.parts):
        raise RefusedFileError(f"{name} is a hidden file or in a hidden folder, and is never uploaded")
    if (folder / path).is_dir():
        raise RefusedFileError(f"{name} in {folder} is a folder. Name its files instead")
    if not (folder / path).is_file():
        raise RefusedFileError(f"There is no file {name} in {folder}")
    return path.as_posix()


def _check_content(folder: Path, name: str) -> None:
    with open(folder / name, "rb") as file:
        if not file.seek(0, 2):
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found = _TOKEN.search(data)
    if found:
        raise RefusedFileError(f"{folder / name} seems to contain a Hugging Face token. Remove the token first")


def _code(folder: Path) -> set[str]:
    """Return the Python files of the model's own code: the files that `auto_map` names, and what they import."""
    wanted = set()
    for name in _CODE_OF:
        try:
            text = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else "{}"
            entries = json.loads(text)["auto_map"].values()
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        for entry in entries:
            for reference in entry if isinstance(entry, list) else [entry]:
                if isinstance(reference, str) and "--" not in reference:  # "--" refers to another repository
                    wanted.add(reference.partition(".")[0])
    found: set[str] = set()
    while wanted:
        file = f"{wanted.pop()}.py"
        if file in found or not re.fullmatch(r"\w+\.py", file) or not (folder / file).is_file():
            continue
        found.add(file)
        text = (folder / file).read_text(encoding="utf-8", errors="replace")
        wanted |= {one or other for one, other in _IMPORT.findall(text)}
    return found


def _images(folder: Path) -> set[str]:
    """Return the images that the folder's card shows."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    paths = {PurePosixPath(link) for link in _IMAGE.findall(text)}
    return {path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)}
