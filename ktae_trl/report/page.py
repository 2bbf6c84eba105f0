"""Write a self-contained HTML page with a run's recorded groups, their key tokens, and the run's curves.

Model output never becomes markup: groups are stored as compressed JSON in base64, unpacked on display, and inserted as
text. The page's content security policy forbids all other scripts and all network requests.
"""

import base64
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.progress import track

from ktae_trl.arguments import NotFoundError, UserError
from ktae_trl.files.writing import replace_text
from ktae_trl.report import records
from ktae_trl.report.contents import MOST_RENDERED, Shown, collect, pack
from ktae_trl.report.curves import curves
from ktae_trl.report.over_steps import RULE, over_steps
from ktae_trl.report.rendered import ALLOWED
from ktae_trl.report.tokens import amount, colour, visible

MAX_GROUPS = 400  # a group of 16 rollouts of 1,000 tokens takes 0.13 MB
LEVELS = 20  # colour shades on each side of 0
_WEB = Path(__file__).parent / "web"
_SCRIPTS = ("base", "series", "list", "group", "tables", "tokens", "run", "rendered", "curves", "begin")  # joined
T = TypeVar("T")


def write_report(source: str | Path, output: str | Path, max_groups: int = MAX_GROUPS) -> Path:
    """Write a page with a run's curves and its recorded groups, with tokens coloured by their values.

    Args:
        source: A run's folder, its folder of records, or one record.
        output: The HTML file. Its folder is created if it does not exist.
        max_groups: Maximum number of groups on the page. If the run recorded more, each record contributes an equal
            share, but at least one group: those closest to equal numbers of correct and wrong rollouts. A note on the
            page says so.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: There are no records.
        ValueError: A file is not a record or has an unsupported schema version, or `max_groups` is below 1.
    """
    if max_groups < 1:
        raise UserError(f"max_groups must be at least 1, not {max_groups}")
    source = Path(source)
    paths = [source] if source.is_file() else records.files(source)
    if not paths:
        raise NotFoundError(
            f"{source} contains no records (no step_*.parquet in it or in its folder {records.FOLDER!r}). To record "
            "rollouts during training, set record_steps"
            if source.is_dir()
            else f"{source} does not exist (looked in {Path.cwd()})"
        )
    folder = source.parent if source.is_file() else source
    run = folder.resolve()
    name = run.parent.name if run.name == records.FOLDER else run.name
    share = max(1, max_groups // len(paths))
    read = (records.read(path) for path in progress(paths, "Reading records"))
    shown = collect(read, share, MOST_RENDERED // len(paths))
    metrics = records.read_metrics(folder)
    panels = curves(metrics or shown.by_step, shown.recorded)
    if panels and not metrics:
        shown.notes.append("The trainer's metrics are missing: the curves are means over the groups on this page.")
    return write(output, name, shown, panels)


def write(output: str | Path, name: str, shown: Shown, panels: Sequence[dict[str, Any]] = ()) -> Path:
    """Write a page atomically and return its path."""
    output = Path(output)
    if output.is_dir():
        raise UserError(f"The output {output} is a folder. Give a file, such as {output / 'report.html'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, render(name, shown, panels))
    return output


def render(name: str, shown: Shown, panels: Sequence[dict[str, Any]] = ()) -> str:
    """Return the HTML of a page. What its first group needs is at the beginning, so that browsers show it early."""
    environment = Environment(
        loader=PackageLoader("ktae_trl.report", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    javascript = script("".join((_WEB / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS))
    index = {
        "groups": shown.groups,
        "methods": shown.methods,
        "panels": panels,
        "levels": LEVELS,
        "run": any(shown.keys),
        "allowed": ALLOWED,
        "rendered": sorted(shown.rendered),
    }
    packed = {"index": pack(index), **{f"block-{i}": block for i, block in enumerate(shown.blocks)}}
    packed |= {f"rendered-{i}": nodes for i, nodes in shown.rendered.items()}
    if any(shown.keys):
        packed["run-data"] = pack(over_steps(shown.keys))
    opened = f"block-{_most_telling(shown.groups)}"
    first = {name: packed[name] for name in ("index", opened) if name in packed}
    steps = {group["step"] for group in shown.groups}
    return environment.get_template("page.html.jinja").render(
        name=visible(name),
        methods=[
            {**method, "role": role}
            for own in shown.methods
            for method, role in [(own, "method"), *((other, "compared with") for other in own["compared"])]
        ],
        groups=len(shown.groups),
        rollouts=sum(group["right"] + group["wrong"] + group["unscored"] for group in shown.groups),
        steps=sorted(steps),
        notes=shown.notes,
        curves=bool(panels),
        key_rule=RULE,
        first=first,
        rest={name: data for name, data in packed.items() if name not in first},
        css=Markup((_WEB / "page.css").read_text(encoding="utf-8")),
        shades=_shades(),
        script=javascript,
        hash=f"'sha256-{_sha256(javascript)}'",
    )


def _most_telling(groups: list[dict[str, Any]]) -> int | None:
    """Return the group that the page opens, with the largest mean |K| of the most balanced ones.

    Groups with at least a quarter of the rollouts on each side come first, then others with both sides. (With one
    rollout on a side, nearly all of its tokens are one-sided, so |K| is large and says little.)
    """

    def rank(i: int) -> tuple[bool, bool, float]:
        right, wrong = groups[i]["right"], groups[i]["wrong"]
        return 4 * min(right, wrong) >= right + wrong > 0, min(right, wrong) > 0, groups[i]["score"]

    return max(range(len(groups)), key=rank, default=None)


def _shades() -> list[tuple[str, tuple[int, int, int], tuple[int, int, int]]]:
    """Return the classes of the shades with their colours on light and dark pages: v0 to v40, s0 to s20."""
    signed = [(f"v{i + LEVELS}", colour, i / LEVELS) for i in range(-LEVELS, LEVELS + 1)]
    unsigned = [(f"s{i}", amount, i / LEVELS) for i in range(LEVELS + 1)]
    return [(name, of(value), of(value, dark=True)) for name, of, value in (*signed, *unsigned)]


def script(text: str) -> Markup:
    """Return a script with its own scope as HTML parsers keep it, byte for byte: the page's policy has its hash."""
    text = f'"use strict";\n(() => {{\n{text}}})();\n'.replace("\r\n", "\n").replace("\r", "\n")
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def progress(some: Iterable[T], what: str) -> Iterable[T]:
    """Yield the items and show a progress bar on a terminal."""
    console = Console(stderr=True, markup=False, emoji=False)
    return track(some, what, console=console, transient=True, disable=not (console.is_terminal and sys.stderr.isatty()))
