"""One HTML file that shows a run's recorded groups, their key tokens, and the run's curves. It asks no network.

Model output never becomes markup: groups travel as compressed JSON in base64, each unpacked when it is shown, and the
page's script puts them in as text. The page's policy lets no other script run and loads nothing.
"""

import base64
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.progress import track

from ktae_trl.arguments import NotFoundError, UserError
from ktae_trl.credit.ktae.method import KTAE, SATURATED
from ktae_trl.files.writing import replace_text
from ktae_trl.report import records
from ktae_trl.report.groups import describe, is_key_token_value, number, split
from ktae_trl.report.records import Method, Record
from ktae_trl.report.tokens import colour, visible

MAX_GROUPS = 400  # 0.13 MB each, for 16 rollouts of 1,000 tokens
LEVELS = 20  # shades on each side of 0
_FORMULA = {"multiply": "A' = A + |A| {}", "add": "A' = A + {}", "scale": "A' = A {}", "replace": "A' = {}"}
# Panel -> the metrics it shows, `*` for any letters. Those of the credit methods come after them.
_PANELS = {
    "Reward": ["reward"],
    "Rewards by function": ["rewards/*/mean"],
    "Completion length (tokens)": ["completions/mean_length"],
    "Entropy": ["entropy"],
}
_PREVIEW = 160  # characters of a prompt in the list of groups
T = TypeVar("T")


class Shown(NamedTuple):
    """What a page holds."""

    groups: list[dict[str, Any]]  # an entry of the page's list each
    blocks: list[str]  # their data, packed
    methods: list[dict[str, Any]]
    recorded: list[Method]  # these, as the records have them
    by_step: list[dict[str, float]]  # what the records say of each step, named like the trainer's metrics
    notes: list[str]  # what of the records is not in it


def write_report(source: str | Path, output: str | Path, max_groups: int = MAX_GROUPS) -> Path:
    """Write the page of a run: its curves, and its recorded groups with their tokens coloured by their values.

    Args:
        source: a run's folder, its folder of records, or one record.
        output: the HTML file; its folder is made if need be.
        max_groups: of a run that recorded more, each record gives an equal share of so many, and at least one: the
            groups whose right and wrong rollouts are nearest to half and half. The page says so.

    Raises:
        FileNotFoundError: there are no records.
        ValueError: a file is not a record, or of another schema version; or `max_groups` is below 1.
    """
    if max_groups < 1:
        raise UserError(f"max_groups must be at least 1, not {max_groups}")
    source = Path(source)
    paths = [source] if source.is_file() else records.files(source)
    if not paths:
        raise NotFoundError(
            f"{source} holds no records (step_*.parquet, also in its folder {records.FOLDER!r})"
            if source.is_dir()
            else f"There is no {source} (looked in {Path.cwd()})"
        )
    folder = source.parent if source.is_file() else source
    run = folder.resolve()
    name = run.parent.name if run.name == records.FOLDER else run.name
    share = max(1, max_groups // len(paths))
    shown = collect((records.read(path) for path in progress(paths, "Reading records")), share)
    metrics = records.read_metrics(folder)
    panels = curves(metrics or shown.by_step, shown.recorded)
    if panels and not metrics:
        shown.notes.append("The curves are means over the groups of this page: there are no metrics of the trainer.")
    return write(output, name, shown, panels)


def write(output: str | Path, name: str, shown: Shown, panels: Sequence[dict[str, Any]] = ()) -> Path:
    """Write a page; who opens it at the same time sees the old one or the new."""
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder: name a file, such as {output / 'report.html'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, render(name, shown, panels))
    return output


def collect(some: Iterable[Record], most: int | None = None) -> Shown:
    """Describe and pack the groups of these records, one record at a time and at most so many of each."""
    shown = Shown([], [], [], [], [], [])
    recorded, known, generated = 0, 0, 0  # groups; those of generations whose size is known; in these generations
    methods = shown.recorded
    prompts: list[str] = []
    for record in some:
        settings = record.method._replace(generated_groups=None)
        if settings not in methods:
            methods.append(settings)
            shown.methods.append(_method(settings))
        begin = len(shown.groups)
        means: list[dict[str, list[float]]] = []
        groups = list(split(record))
        recorded += len(groups)
        if record.method.generated_groups:
            known, generated = known + len(groups), generated + record.method.generated_groups
        for rows in _nearest_to_half(groups, most):
            group = describe(record.method, rows)
            means.append(_sums(group))
            prompts.append(visible(rows[0]["prompt"]))
            shown.blocks.append(pack(group))
            shown.groups.append(
                {
                    **{key: group[key] for key in ("step", "group", "score", "unscored")},
                    "right": sum(row["correct"] is True for row in rows),
                    "wrong": sum(row["correct"] is False for row in rows),
                    "method": methods.index(settings),
                }
            )
        if shown.groups[begin:]:
            step = shown.groups[begin]["step"]
            shown.by_step.append({"step": step, **_means(means, shown.groups[begin:])})
    if known < generated:
        shown.notes.append(f"Recorded: {known} of the {generated} groups of these generations.")
    if len(shown.groups) < recorded:
        shown.notes.append(
            f"This page holds {len(shown.groups)} of {recorded} recorded groups: of each step those whose right and "
            "wrong rollouts are nearest to half and half. All of one step: make the page of its file, or raise "
            "max_groups."
        )
    begin, end = _own_part(prompts)
    for group, prompt in zip(shown.groups, prompts, strict=True):
        group |= {"prompt": prompt, "preview": prompt[begin : len(prompt) - end][:_PREVIEW]}
    return shown


def _nearest_to_half(groups: list[list[dict[str, Any]]], most: int | None) -> list[list[dict[str, Any]]]:
    """Return so many of the groups, in their order: those with most rollouts on their smaller side, right or wrong."""

    def smaller_side(i: int) -> int:
        return min(sum(row["correct"] is side for row in groups[i]) for side in (True, False))

    return [groups[i] for i in sorted(sorted(range(len(groups)), key=smaller_side, reverse=True)[:most])]


def _own_part(prompts: list[str]) -> tuple[int, int]:
    """Return how many characters all prompts begin and end with: a template, which tells nothing in a list of them."""
    if len(set(prompts)) < 2:
        return 0, 0
    begin = _same_beginning(prompts)
    return begin, _same_beginning([prompt[begin:][::-1] for prompt in prompts])


def _same_beginning(texts: list[str]) -> int:
    """Return how many characters all texts begin with, up to the end of a word."""
    first, last = min(texts), max(texts)
    same = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return max(first.rfind(" ", 0, same), first.rfind("\n", 0, same)) + 1


def _method(method: Method) -> dict[str, Any]:
    """Return a method's names for the page."""
    settings = {}
    if method.how is not None:
        settings["advantage of a token"] = _FORMULA[method.how].format(visible(method.symbol))
    settings |= {visible(name): visible(str(value)) for name, value in method.settings.items()}
    key_tokens = is_key_token_value(method)
    return {
        "title": visible(method.title or method.credit),
        "how": method.how,
        "value": method.how and {"symbol": visible(method.symbol), "name": visible(method.value_name)},
        "key_tokens": key_tokens,
        "leave_one_out": key_tokens and KTAE.options(method.settings)["leave_one_out"],
        "shares_tokens": method.shares_tokens,
        "settings": settings,
    }


def _sums(group: dict[str, Any]) -> dict[str, list[float]]:
    """Return what the curves need of a group, when the trainer left no metrics: lists to take means of."""
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


def _means(some: list[dict[str, list[float]]], groups: list[dict[str, Any]]) -> dict[str, float]:
    pooled: dict[str, list[float]] = {}
    for found in some:
        for name, values in found.items():
            pooled.setdefault(name, []).extend(v for v in values if isinstance(v, (int, float)))
    pooled[f"{KTAE.family}/informative_groups"] = [float(group["right"] > 0 and group["wrong"] > 0) for group in groups]
    return {name: fmean(values) for name, values in pooled.items() if values}


def curves(metrics: list[dict[str, float]], methods: Iterable[Method] = ()) -> list[dict[str, Any]]:
    """Return the panels with Plotly's traces of the metrics that are known at two steps or more.

    Metrics of the evaluation (`eval_...`) go beside those of the training, dashed.

    Args:
        methods: those of the records, which have panels of their own.
    """
    wanted = {title: list(patterns) for title, patterns in _PANELS.items()}
    for method in methods:
        for title, patterns in method.panels.items():
            wanted.setdefault(title, []).extend(patterns)
    panels = []
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
                    "mode": "lines+markers" if len(points) < 20 else "lines",
                    "line": {"width": 1.6, "dash": "dot" if evaluated else "solid"},
                }
            )
        if traces:
            panels.append({"title": visible(title), "traces": traces})
    return panels


def _short(metric: str) -> str:
    """Return a metric's name without its family: `value_right` of `ktae/value_right`."""
    inner = re.fullmatch(r"rewards/(.+)/mean", metric)
    return (inner[1] if inner else metric.rpartition("/")[2]).replace("_", " ")


def pack(data: Any) -> str:
    """Return data as compressed JSON in base64, which is safe in a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def render(name: str, shown: Shown, panels: Sequence[dict[str, Any]] = ()) -> str:
    """Return the page. Plotly's script is in it only if there are curves."""
    environment = Environment(
        loader=PackageLoader("ktae_trl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, javascript = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    scripts = [script(javascript)]
    if panels:
        from plotly.offline import get_plotlyjs

        scripts.insert(0, script(get_plotlyjs()))
    steps = {group["step"] for group in shown.groups}
    return environment.get_template("page.html.jinja").render(
        name=visible(name),
        methods=shown.methods,
        groups=len(shown.groups),
        rollouts=sum(group["right"] + group["wrong"] + group["unscored"] for group in shown.groups),
        steps=sorted(steps),
        notes=shown.notes,
        curves=bool(panels),
        index=pack({"groups": shown.groups, "methods": shown.methods, "panels": panels, "levels": LEVELS}),
        blocks=shown.blocks,
        css=Markup(css),
        shades=[(i + LEVELS, colour(i / LEVELS), colour(i / LEVELS, dark=True)) for i in range(-LEVELS, LEVELS + 1)],
        scripts=scripts,
        hashes=[f"'sha256-{_sha256(text)}'" for text in scripts],
    )


def script(text: str) -> Markup:
    """Return the text of a script so that HTML leaves it as it is, to the byte: its hash is in the page's policy."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def progress(some: Iterable[T], what: str) -> Iterable[T]:
    """Show on a terminal how far the work on these has come."""
    console = Console(stderr=True)
    return track(some, what, console=console, transient=True, disable=not (console.is_terminal and sys.stderr.isatty()))
