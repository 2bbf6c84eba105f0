"""The model card of a run: TRL's, completed by what the method does, the run's settings, and what was measured.

`complete` is for the trainer, which knows the run. `update` needs the folder only: it adds results, the link to the
key-token page and the model's name on the Hub, as often as one likes.
"""

import dataclasses
import enum
import html
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard

from ktae_trl import __version__
from ktae_trl.arguments import UserError
from ktae_trl.files.model_files import CARD, HELD_OUT, PAGE
from ktae_trl.files.writing import replacing

_BEGIN, _END = "<!-- Results: python -m ktae_trl.hub.upload FOLDER writes them -->", "<!-- End of results -->"
_PROCEDURE, _VERSIONS = "\n## Training procedure\n", "\n### Framework versions\n"
# Where the run was and what it was allowed to do: of no use to who reads the card.
_LEFT_OUT = {
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "disable_tqdm",
    "resume_from_checkpoint",
    "push_to_hub",
}
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


def complete(
    path: Path,
    *,
    does: str,
    settings: dict[str, Any],
    local_base: str | None,
    local_data: str | None,
    adapter: bool,
    name: str,
) -> None:
    """Complete the card that TRL wrote to `path`.

    Args:
        does: what the method does, a sentence or "".
        settings: the run's, as `settings_of` returns them.
        local_base: name of the base model if it is not on the Hub.
        local_data: name of the training data if they are known and not on the Hub.
        adapter: whether the weights are those of a PEFT adapter.
        name: what the quick start loads, a Hub id or a folder.
    """
    card = _load(path)
    card.data.tags = sorted(set(card.data.tags or []))
    vars(card.data).pop("licence", None)  # TRL's, which says "license"
    if adapter:
        card.data.library_name = "peft"
        card.data.base_model_relation = "adapter" if card.data.base_model else None
    text = card.text
    text = re.sub(r"(?m)^(# Model Card for )(.*)$", lambda line: line[1] + escaped(line[2]), text, count=1)
    if local_base is not None:  # TRL writes None
        local = "version of a local model" + (f" ({escaped(local_base)})" if local_base else "")
        text = text.replace("version of [None](https://huggingface.co/None)", local, 1)
    if local_data is not None:
        text = text.replace(
            ".\nIt has been trained", f" on local data ({escaped(local_data)}).\nIt has been trained", 1
        )
    more = [does] if does else []
    if adapter:
        more.append("The weights are those of a PEFT adapter, which `transformers` loads on top of the base model.")
    if adapter and local_base is not None:
        more.append("That model is not on the Hub: `python -m ktae_trl.hub.merge` makes one model of both.")
    if settings:
        written = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", written)), default=0))
        words = "Those of the method, and what else differs from the defaults:"
        more.append(f"### Settings\n\n{words}\n\n{fence}yaml\n{written}{fence}")
    text = text.replace(_VERSIONS, f"{_VERSIONS}\n- ktae-trl: {__version__}", 1).replace("\n\n- TRL:", "\n- TRL:", 1)
    head, procedure, rest = text.partition(_PROCEDURE)
    before, versions, after = rest.partition(_VERSIONS)
    rest = "\n\n".join([before.strip(), *more]) + f"\n{versions}{after}"
    card.text = f"{name_model(head, name)}\n{_BEGIN}\n{_END}\n{procedure}\n{rest}"
    _save(card, path)


def update(folder: Path, *, repo_id: str | None = None, results: Sequence[EvalResult] = ()) -> None:
    """Add to the card of a folder: results, the link to the page if it is there, the model's name on the Hub.

    Results of the same benchmark and metric are replaced, all others stay. What was measured in training
    (`held_out_results.json`) is added by itself. A folder without a card of its own is left alone.

    Raises:
        ValueError: somebody has edited the card's metadata, and they are no YAML or no model-index any more.
    """
    path = folder / CARD
    if not path.exists() or path.is_symlink():  # a card that lies elsewhere is not this model's
        return
    card = _load(path)
    card.data.model_name = card.data.model_name or folder.name
    known = [*(card.data.eval_results or []), *held_out_results(folder, card.data.datasets), *results]
    card.data.eval_results = list({_identity(r): r for r in known}.values()) or None
    parts = [_BEGIN]
    if card.data.eval_results:
        parts.append(f"## Results\n\n{_table(card.data.eval_results)}")
    if (folder / PAGE).exists():
        parts.append(
            f"## Key tokens\n\n[{PAGE}]({PAGE}) shows groups of rollouts from the training, with the value of each "
            "token: download it and open it in a browser."
        )
    block = "\n\n".join([*parts, _END])
    text = card.text
    if _BEGIN in text and _END in text:
        begin, end = text.index(_BEGIN), text.index(_END) + len(_END)
        text = text[:begin] + block + text[end:]
    elif len(parts) > 1:
        text = f"{text.rstrip()}\n\n{block}\n"
    card.text = name_model(text, repo_id) if repo_id else text
    _save(card, path)


def name_model(text: str, name: str) -> str:
    """Return the card's text with this model in the quick start: a Hub id or a folder."""
    quick_start = re.compile(r'(pipeline\("text-generation", model=)"(?:[^"\\\n]|\\.)*"')
    return quick_start.sub(lambda found: found[1] + json.dumps(name, ensure_ascii=False), text, count=1)


def _load(path: Path) -> ModelCard:
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"The metadata at the top of {path} cannot be read: {error}") from error


def _save(card: ModelCard, path: Path) -> None:
    """Write the card whole: who is interrupted keeps the one before."""
    with replacing(path) as draft:
        card.save(draft)


# Results: each is an entry of the metadata's model-index, from which the table is written.


def eval_results(summary: dict) -> list[EvalResult]:
    """Return the figures of a `summary.json` of eval.py: accuracy, pass@k and maj@k of each benchmark."""
    settings, found = summary["settings"], []
    samples = settings["samples"]
    how = "greedy"
    if settings["temperature"] > 0:
        each = f"mean of {samples} samples" if samples > 1 else "one sample"
        how = f"{each} at temperature {settings['temperature']:g}, top_p {settings['top_p']:g}"
    for name, figures in summary["benchmarks"].items():
        source = summary.get("datasets", {}).get(name, {})
        metrics = [("accuracy", f"accuracy, {how}", figures["accuracy"])]
        for kind in ("pass", "maj"):
            estimates = [(k, estimate) for k, estimate in figures[kind].items() if k != "1"]  # 1 is the accuracy
            metrics += [(f"{kind}@k", f"{kind}@{k} of {samples} samples", estimate) for k, estimate in estimates]
        for kind, metric, (value, low, high) in metrics:
            arguments = {"benchmark": name, "problems": figures["problems"], "samples": samples}
            if all(math.isfinite(x) for x in (low, high)):
                arguments["interval_95"] = [round(low, 5), round(high, 5)]
            arguments |= {key: settings[key] for key in ("temperature", "top_p", "max_new_tokens", "seed")}
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=_identifier(source.get("dataset") or name),
                    dataset_name=name,
                    dataset_config=source.get("config"),
                    dataset_split=source.get("split"),
                    metric_type=kind,
                    metric_name=metric,
                    metric_value=round(value, 5),
                    metric_args=arguments,
                )
            )
    return found


def held_out_results(folder: Path, datasets: str | list[str] | None) -> list[EvalResult]:
    """Return what train.py measured on its held-out problems, before and after training."""
    path = folder / HELD_OUT
    if not path.exists():
        return []
    figures = json.loads(path.read_text(encoding="utf-8"))
    first = datasets if isinstance(datasets, str) else next(iter(datasets or []), "held-out")
    what = figures.get("what", "accuracy")  # "accuracy by math_accuracy", or "mean reward by my_reward"
    found = []
    for kind in ("greedy", "sampled"):
        if (value := figures.get(f"after_{kind}")) is None:
            continue
        samples = figures["after_samples"] if kind == "sampled" else 1
        how = "greedy" if kind == "greedy" else f"mean of {samples} samples at temperature 1"
        arguments = {"benchmark": "held-out problems", "problems": figures.get("problems"), "samples": samples}
        before = figures.get(f"before_{kind}")
        arguments["before_training"] = None if before is None else round(before, 5)
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=_identifier(first),
                dataset_name="held-out problems",
                dataset_split="held_out",
                metric_type="accuracy" if what.startswith("accuracy") else "reward",
                metric_name=f"{what}, {how}, measured in training",
                metric_value=round(value, 5),
                metric_args={name: value for name, value in arguments.items() if value is not None},
            )
        )
    return found


def is_hub_id(name: str | None) -> bool:
    """Return whether a dataset's name is one on the Hub, and no file or folder."""
    if not name or Path(name).exists() or Path(name).suffix in (".jsonl", ".json", ".parquet", ".csv", ".gz"):
        return False
    return re.fullmatch(r"([\w-]+/)?\w[\w.-]*", name, re.ASCII) is not None


def _identifier(name: str) -> str:
    """Return a dataset's name as the Hub takes it: an id stays one; a file's or a benchmark's becomes a plain word."""
    name = name if is_hub_id(name) else Path(name).stem
    return re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII).strip("-.") or "local"


def _identity(result: EvalResult) -> tuple:
    benchmark = (result.metric_args or {}).get("benchmark", result.dataset_name)
    return (*result.unique_identifier, benchmark, result.metric_type, result.metric_name)


def _table(results: Sequence[EvalResult]) -> str:
    lines = ["| benchmark | metric | value | 95% interval | problems | before training |", "|---|---|---|---|---|---|"]
    for result in results:
        arguments = result.metric_args or {}
        interval, before = arguments.get("interval_95"), arguments.get("before_training")
        shown = _number if result.metric_type == "reward" else _percent
        cells = [
            arguments.get("benchmark", result.dataset_name),
            result.metric_name or result.metric_type,
            shown(result.metric_value),
            f"{_percent(interval[0])} to {_percent(interval[1])}" if interval else "",
            arguments.get("problems", ""),
            "" if before is None else shown(before),
        ]
        lines.append("| " + " | ".join(escaped(str(cell)) for cell in cells) + " |")
    return "\n".join(lines)


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, (int, float)) else str(value)


def _number(value: float) -> str:
    return f"{value:.3g}"


def escaped(text: str) -> str:
    """Return a line of text that Markdown shows as it is, also in a table."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
