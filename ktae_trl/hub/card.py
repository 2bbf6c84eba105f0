"""The model card of a run: what the method does, the run's settings, and what was measured.

`write` is for the trainer, which knows the run. `update` needs the folder only: it adds results, the link to the
key-token page and the model's name on the Hub, as often as one likes.
"""

import dataclasses
import enum
import json
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ktae_trl import __version__
from ktae_trl.arguments import UserError
from ktae_trl.files.model_files import CARD, PAGE
from ktae_trl.files.writing import replacing
from ktae_trl.hub import results as measured
from ktae_trl.hub.results import is_hub_id
from ktae_trl.report.markdown import escaped

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_BEGIN, _END = "<!-- Results: ktae push FOLDER writes them -->", "<!-- End of results -->"
_BEGINNING = re.compile(r"<!-- Results: [^<>]*-->")  # an earlier version named another command
_QUICK_START = re.compile(r'(pipeline\("text-generation", model=)"(?:[^"\\\n]|\\.)*"')
# Where the run was and what it was allowed to do: of no use to who reads the card.
_LEFT_OUT = {"output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "console"}
_LEFT_OUT |= {"resume_from_checkpoint", "push_to_hub"}
_SECRET_NAME = re.compile(r"(^|_)(token|password|secret|key)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bhf_\w{16,}|(?<=://)[^/\s@][^/\s@:]*+:[^/\s@]++(?=@)")


def settings_of(arguments: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, as plain values and without secrets."""
    found = {}
    for field in dataclasses.fields(arguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(arguments, field.name)
        untouched = value == default or not (value or default)  # "" and [] are both nothing
        if dataclasses.is_dataclass(value):  # such as accelerator_config
            value = settings_of(value)
            untouched = not value
        if not (untouched or field.name in _LEFT_OUT or field.name.startswith(("hub_", "vllm_server_"))):
            found[field.name] = value
    return _plain(found)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        some = {str(k): v for k, v in value.items() if v is not None}
        return {k: "<secret>" if _SECRET_NAME.search(k) else _plain(v) for k, v in some.items()}
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    text = _SECRET_VALUE.sub("<secret>", str(value))
    a_path = os.path.isabs(text) and not re.search(r"\s", text)
    return f".../{Path(text).name}" if a_path else text  # whose home it was is nobody's business


def write(
    path: Path,
    *,
    method: Any,
    model_name: str,
    place: str,
    base: str,
    data: str | None,
    tags: Sequence[str],
    adapter: bool,
    settings: dict[str, Any],
    runs: dict[str, str],
) -> None:
    """Write the card of a trained model, without results: see `update`.

    Args:
        method: what the credit method says of itself: `name`, `does` (a sentence or ""), `tags`, and `paper` with
            `title`, `id` (arXiv) and `citation`.
        place: what the quick start loads, a Hub id or a folder.
        base: the base model, by its Hub id or a path; "" if it has no name.
        data: the training data, by their Hub id or a path, if they are known.
        adapter: whether the weights are those of a PEFT adapter.
        settings: the run's, as `settings_of` returns them.
        runs: the training in a tracker, its URL by the tracker's name.
    """
    metadata = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        base_model_relation="adapter" if adapter and is_hub_id(base) else None,
        datasets=data if is_hub_id(data) else None,
        library_name="peft" if adapter else "transformers",
        model_name=" ".join(model_name.split()),
        tags=sorted({"generated_from_trainer", "trl", "grpo", *method.tags, *tags}),
    )
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)
    card = ModelCard.from_template(  # it gives the template the metadata too
        metadata,
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        method=method,
        place=place,
        base=Path(base).name,
        data=Path(data or "").name,
        results=f"{_BEGIN}\n{_END}",
        runs=runs,
        settings=text,
        few_shot=settings.get("few_shot"),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0)),
        version=version,
        ktae_trl_version=__version__,
        escaped=escaped,
        quoted=_quoted,
    )
    _save(card, path)


def update(folder: Path, *, repo_id: str | None = None, results: Sequence[EvalResult] = ()) -> None:
    """Add to the card of a folder: results, the link to the page if it is there, the model's name on the Hub.

    Results of the same benchmark and metric are replaced, all others stay. What was measured in training
    (`held_out_results.json`) is added by itself. A folder without a card of its own is left alone.

    Raises:
        UserError: somebody has edited the card's metadata, and they are no YAML or no model-index any more.
    """
    path = folder / CARD
    if not path.exists() or path.is_symlink():  # a card that lies elsewhere is not this model's
        return
    card = _load(path)
    card.data.model_name = card.data.model_name or folder.name
    held_out = measured.held_out(folder, card.data.datasets)
    found = measured.merged([*(card.data.eval_results or []), *held_out, *results])
    card.data.eval_results = found or None
    parts = [f"## Results\n\n{measured.table(found)}"] if found else []
    if (folder / PAGE).exists():
        parts.append(
            f"## Key tokens\n\n[{PAGE}]({PAGE}) shows groups of rollouts from the training, with the value of each "
            "token: download it and open it in a browser."
        )
    block = "\n\n".join([_BEGIN, *parts, _END])
    text, begins = card.text, _BEGINNING.search(card.text)
    if begins and (end := text.find(_END, begins.end())) >= 0:
        text = text[: begins.start()] + block + text[end + len(_END) :]
    elif parts:
        text = f"{text.rstrip()}\n\n{block}\n"
    if repo_id:
        text = _QUICK_START.sub(lambda found: found[1] + _quoted(repo_id), text, count=1)
    card.text = text
    _save(card, path)


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _load(path: Path) -> ModelCard:
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"The metadata at the top of {path} cannot be read: {error}") from error


def _save(card: ModelCard, path: Path) -> None:
    """Write the card whole: who is interrupted keeps the one before."""
    with replacing(path) as draft:
        card.save(draft)
