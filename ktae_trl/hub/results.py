"""Results for a model card: entries of the model-index in its metadata, and a table."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ktae_trl.arguments import TINY, WORD_PROBLEMS, NotFoundError, UserError
from ktae_trl.files.fingerprint import is_of, is_old
from ktae_trl.files.model_files import HELD_OUT
from ktae_trl.report import markdown


def of_evaluation(path: Path, folder: Path) -> list[EvalResult]:
    """Return the results of an evaluation, after checking that it measured the model in `folder`.

    Args:
        path: output folder of eval.py, or the `summary.json` in it.

    Raises:
        UserError: the file is not a summary of eval.py, or belongs to another model.
        NotFoundError: there is no summary.
    """
    file = path / "summary.json" if path.is_dir() else path
    if not file.is_file():
        raise NotFoundError(f"{path} contains no summary.json. Pass an output folder of ktae eval")
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}). The samples next to it are kept: run ktae eval again with the same settings "
            "to grade them and rewrite the summary"
        ) from None
    known = isinstance(summary, dict) and {"benchmarks", "model", "settings"} <= summary.keys()
    if not known or not isinstance(summary["settings"], dict):
        raise UserError(f"{file} does not say which model was evaluated. Pass results of ktae eval")
    mark = summary["settings"].get("fingerprint")
    again = f"Evaluate again: ktae eval CONFIG --model_name_or_path {folder}"
    if is_old(mark):
        raise UserError(
            f"{file} was written by version 0.1 of eval.py, which did not read all of a model's weights. It may not "
            f"belong to the weights in {folder}. {again}"
        )
    if not is_of(mark, folder):
        raise UserError(
            f"{file} has results of {summary['model']}, whose weights differ from those in {folder}. {again}"
        )
    return _of_summary(summary)


def _of_summary(summary: dict) -> list[EvalResult]:
    """Return accuracy, pass@k and maj@k of each benchmark."""
    settings, found = summary["settings"], []
    samples = settings["samples"]
    how = "greedy"
    if settings["temperature"] > 0:
        each = f"mean of {samples} samples" if samples > 1 else "one sample"
        how = f"{each} at temperature {settings['temperature']:g}, top_p {settings['top_p']:g}"
    few_shot = settings.get("few_shot")  # missing in summaries of older versions
    if few_shot:
        how = f"{how}, after worked examples"
    for name, figures in summary["benchmarks"].items():
        source = summary.get("datasets", {}).get(name, {})
        metrics = [("accuracy", f"accuracy, {how}", figures["accuracy"])]
        for kind in ("pass", "maj"):
            estimates = [(k, estimate) for k, estimate in figures[kind].items() if k != "1"]  # k = 1 is the accuracy
            metrics += [(f"{kind}@k", f"{kind}@{k} of {samples} samples", estimate) for k, estimate in estimates]
        for kind, metric, (value, low, high) in metrics:
            arguments = {"benchmark": name, "problems": figures["problems"], "samples": samples}
            if math.isfinite(low) and math.isfinite(high):
                arguments["interval_95"] = [round(low, 5), round(high, 5)]
            arguments |= {key: settings[key] for key in ("temperature", "top_p", "max_new_tokens", "seed")}
            arguments["few_shot"] = few_shot
            data = (source.get("dataset") or name, name, source.get("config"), source.get("split"))
            found.append(_result(data, kind, metric, value, arguments))
    return found


def held_out(folder: Path, datasets: str | list[str] | None) -> list[EvalResult]:
    """Return the accuracy (or reward) on the held-out problems before and after training."""
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
        metric = "accuracy" if what.startswith("accuracy") else "reward"
        data = (first, "held-out problems", None, "held_out")
        found.append(_result(data, metric, f"{what}, {how}, measured in training", value, arguments))
    return found


def _result(data: tuple, kind: str, metric: str, value: float, arguments: dict[str, Any]) -> EvalResult:
    """Return one result. `data` is the dataset's id or path, its name, config and split."""
    identifier, name, config, split = data
    return EvalResult(
        task_type="text-generation",
        dataset_type=_identifier(identifier),
        dataset_name=name,
        dataset_config=config,
        dataset_split=split,
        metric_type=kind,
        metric_name=metric,
        metric_value=round(value, 5),
        metric_args={name: value for name, value in arguments.items() if value is not None},
    )


def merged(results: Sequence[EvalResult]) -> list[EvalResult]:
    """Return the last result for each benchmark and metric."""

    def identity(result: EvalResult) -> tuple:
        return (*result.unique_identifier, _benchmark(result), result.metric_type, result.metric_name)

    return list({identity(result): result for result in results}.values())


def table(results: Sequence[EvalResult]) -> str:
    """Return results as a Markdown table."""
    rows = []
    for result in results:
        arguments = result.metric_args or {}
        interval, before = arguments.get("interval_95"), arguments.get("before_training")
        shown = "{:.3g}".format if result.metric_type == "reward" else _percent
        cells = [
            _benchmark(result),
            result.metric_name or result.metric_type,
            shown(result.metric_value),
            f"{_percent(interval[0])} to {_percent(interval[1])}" if interval else "",
            arguments.get("problems", ""),
            "" if before is None else shown(before),
        ]
        rows.append([markdown.escaped(str(cell)) for cell in cells])
    head = ["Benchmark", "Metric", "Value", "95% interval", "Problems", "Before training"]
    return markdown.table(head, rows)


def is_hub_id(name: str | None) -> bool:
    """Return whether the name of a model or dataset is a Hub id, and not a file, a folder or a name of this package."""
    files = (".jsonl", ".json", ".parquet", ".csv", ".gz")
    if not name or name in (TINY, WORD_PROBLEMS) or Path(name).exists() or Path(name).suffix in files:
        return False
    return re.fullmatch(r"([\w-]+/)?\w[\w.-]*", name, re.ASCII) is not None


def _identifier(name: str) -> str:
    """Return a dataset name that the Hub accepts: a Hub id unchanged, other names reduced to a plain word."""
    name = name if is_hub_id(name) else Path(name).stem
    return re.sub(r"[^\w./-]+", "-", name, flags=re.ASCII).strip("-.") or "local"


def _benchmark(result: EvalResult) -> str:
    return (result.metric_args or {}).get("benchmark", result.dataset_name)


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, (int, float)) else str(value)
