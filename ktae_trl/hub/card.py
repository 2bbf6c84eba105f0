"""The model card of a run: the method, the settings and the results.

The trainer calls `write`. `update` needs only the run's folder: it adds results, the link to the key-token page and the
model's name on the Hub, and can be called repeatedly.
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
_BEGIN, _END = "<!-- Results: written by ktae push FOLDER -->", "<!-- End of results -->"
_BEGINNING = re.compile(r"<!-- Results: [^<>]*-->")  # earlier versions had another text here
_QUICK_START = re.compile(r'(pipeline\("text-generation", model=)"(?:[^"\\\n]|\\.)*"')
# Settings of where and how the run was executed, which do not help readers of the card.
_LEFT_OUT = {"output_dir", "logging_dir", "run_name", "report_to", "disable_tqdm", "console"}
_LEFT_OUT |= {"resume_from_checkpoint", "push_to_hub"}
_SECRET_NAME = re.compile(r"(^|_)(token|password|secret|key)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\bhf_\w{16,}|(?<=://)[^/\s@][^/\s@:]*+:[^/\s@]++(?=@)")


def settings_of(arguments: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, as plain values without secrets."""
    found = {}
    for field in dataclasses.fields(arguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(arguments, field.name)
        untouched = value == default or not (value or default)  # "" and [] both mean that nothing is set
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
    return f".../{Path(text).name}" if a_path else text  # hides the home folder


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
    """Write the card of a trained model without results. Results are added by `update`.

    Args:
        method: card of the credit method: `name`, `does` (a sentence or ""), `tags`, and `paper` with `title`, `id`
            (arXiv) and `citation`.
        place: the model that the quick start loads: a Hub id or a folder.
        base: the base model: a Hub id, a path, or "" if it has no name.
        data: the training data: a Hub id, a path, or None if unknown.
        adapter: whether the model is a PEFT adapter.
        settings: settings of the run, as `settings_of` returns them.
        runs: URLs of the run in trackers, by tracker.
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
    card = ModelCard.from_template(  # also passes the metadata to the template
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
    """Add results, the link to the key-token page (if there is one) and the model's name on the Hub to a card.

    Results for the same benchmark and metric are replaced, all others are kept. Results measured during training
    (`held_out_results.json`) are added automatically. Nothing happens if the folder has no card or the card is a link.

    Raises:
        UserError: the card's metadata was edited and is no longer valid YAML or has no valid model-index.
    """
    path = folder / CARD
    if not path.exists() or path.is_symlink():  # the target of a link is not the card of this model
        return
    card = _load(path)
    card.data.model_name = card.data.model_name or folder.name
    held_out = measured.held_out(folder, card.data.datasets)
    found = measured.merged([*(card.data.eval_results or []), *held_out, *results])
    card.data.eval_results = found or None
    parts = [f"## Results\n\n{measured.table(found)}"] if found else []
    if (folder / PAGE).exists():
        parts.append(
            f"## Key tokens\n\n[{PAGE}]({PAGE}) shows groups of training rollouts with the value of each token. "
            "Download it and open it in a browser."
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
        raise UserError(f"The metadata at the top of {path} is not valid: {error}") from error


def _save(card: ModelCard, path: Path) -> None:
    """Write the card atomically."""
    with replacing(path) as draft:
        card.save(draft)
