"""The curves of a run: panels of metrics that the trainer logged or that are computed from the records."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

from ktae_trl.credit.ktae.method import KTAE, SATURATED
from ktae_trl.report.group_view import number
from ktae_trl.report.records import Method
from ktae_trl.report.tokens import visible

# Panel -> patterns of its metrics. The panels of the credit methods follow.
_PANELS = {
    "Reward": ["reward"],
    "Rewards by function": ["rewards/*/mean"],
    "Completion length (tokens)": ["completions/mean_length"],
    "Entropy": ["entropy"],
}


def curves(metrics: list[dict[str, float]], methods: Iterable[Method] = ()) -> list[dict[str, Any]]:
    """Return panels with the metrics that have finite values at two or more steps, each with its steps x and values y.

    Evaluation metrics (`eval_...`) are in the panel of the training metric. A panel whose lines are all drawn before is
    left out, such as the only reward function's.

    Args:
        methods: The methods of the records, which define further panels.
    """
    wanted = {title: list(patterns) for title, patterns in _PANELS.items()}
    for method in methods:
        for title, patterns in method.panels.items():
            wanted.setdefault(title, []).extend(patterns)
    panels, drawn = [], []
    names = list(dict.fromkeys(name for entry in metrics for name in entry))
    for title, patterns in wanted.items():
        traces = []
        for name in names:
            if not any(fnmatchcase(name.removeprefix("eval_"), pattern) for pattern in patterns):
                continue
            points = [(entry["step"], number(entry[name])) for entry in metrics if name in entry]
            points = [(step, value) for step, value in points if isinstance(value, (int, float))]
            if len(points) < 2:
                continue
            evaluated = name.startswith("eval_")
            x, y = zip(*points, strict=True)
            traces.append(
                {
                    "x": x,
                    "y": y,
                    "name": _short(visible(name.removeprefix("eval_"))),
                    "evaluated": evaluated,
                }
            )
        points_of = [(trace["x"], trace["y"], trace["evaluated"]) for trace in traces]
        if any(points not in drawn for points in points_of):
            drawn += points_of
            panels.append({"title": visible(title), "traces": traces})
    return panels


def _short(metric: str) -> str:
    """Return a metric's name without its family: `abs value` for `FAMILY/abs_value`."""
    inner = re.fullmatch(r"rewards/(.+)/mean", metric)
    return (inner[1] if inner else metric.rpartition("/")[2]).replace("_", " ")


def sums_of(group: dict[str, Any]) -> dict[str, list[float]]:
    """Return the values of a group by metric, whose means replace the trainer's metrics if there are none."""
    found: dict[str, list[float]] = {"completions/mean_length": [len(r["at"]) for r in group["rollouts"]]}
    for rollout in group["rollouts"]:
        for name, reward in rollout["rewards"].items():
            found.setdefault(f"rewards/{name}/mean", []).append(reward)
        if not (group["right"] and group["wrong"]):
            continue  # as in the trainer's metrics
        K = [group["tokens"]["K"][token] or 0.0 for token in rollout["cells"]["token"]]
        values = [K[cell] for cell in rollout["at"] if rollout["cells"]["trained"][cell]]
        if rollout["correct"] is not None:
            found.setdefault(f"{KTAE.family}/value_{'right' if rollout['correct'] else 'wrong'}", []).extend(values)
        found.setdefault(f"{KTAE.family}/saturated", []).extend(float(abs(v) > SATURATED) for v in values)
    return found


def means_of(some: list[dict[str, list[float]]], groups: list[dict[str, Any]]) -> dict[str, float]:
    pooled: dict[str, list[float]] = {}
    for found in some:
        for name, values in found.items():
            pooled.setdefault(name, []).extend(v for v in values if isinstance(v, (int, float)))
    pooled[f"{KTAE.family}/informative_groups"] = [float(group["right"] > 0 and group["wrong"] > 0) for group in groups]
    return {name: fmean(values) for name, values in pooled.items() if values}
