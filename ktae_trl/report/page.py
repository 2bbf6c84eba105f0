"""Write a self-contained HTML page with a run's recorded groups, their key tokens, and the run's curves.

Model output never becomes markup: groups are stored as compressed JSON in base64, unpacked on display, and inserted as
text. The page's content security policy forbids all other scripts and all network requests.
"""

import base64
import hashlib
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.progress import track

from ktae_trl.arguments import NotFoundError, NotImportedError, UserError, need
from ktae_trl.files.writing import replace_text
from ktae_trl.report import records
from ktae_trl.report.contents import Shown, collect, pack
from ktae_trl.report.curves import curves
from ktae_trl.report.tokens import colour, visible

MAX_GROUPS = 400  # a group of 16 rollouts of 1,000 tokens takes 0.13 MB
LEVELS = 20  # colour shades on each side of 0
logger = logging.getLogger(__name__)
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
    shown = collect((records.read(path) for path in progress(paths, "Reading records")), share)
    metrics = records.read_metrics(folder)
    panels = curves(metrics or shown.by_step, shown.recorded)
    if panels and (missing := _without_plotly()):
        panels = []
        shown.notes.append(missing)
    if panels and not metrics:
        shown.notes.append("The trainer's metrics are missing: the curves are means over the groups on this page.")
    return write(output, name, shown, panels)


def _without_plotly() -> str:
    """Return the note for a page without curves and log a warning, or return "" if Plotly is installed."""
    try:
        need("plotly", "report")
    except NotImportedError as error:
        logger.warning("The page does not show the run's curves: %s", error)
        return f"This page does not show the run's curves: {error}"
    return ""


def write(output: str | Path, name: str, shown: Shown, panels: Sequence[dict[str, Any]] = ()) -> Path:
    """Write a page atomically and return its path."""
    output = Path(output)
    if output.is_dir():
        raise UserError(f"The output {output} is a folder. Give a file, such as {output / 'report.html'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, render(name, shown, panels))
    return output


def render(name: str, shown: Shown, panels: Sequence[dict[str, Any]] = ()) -> str:
    """Return the HTML of a page. It includes Plotly's script only if there are curves."""
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
    """Return a script as HTML parsers keep it, byte for byte, because the page's policy has its hash."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Markup(text.replace("</script", "<\\/script").replace("<!--", "<\\!--"))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def progress(some: Iterable[T], what: str) -> Iterable[T]:
    """Yield the items and show a progress bar on a terminal."""
    console = Console(stderr=True, markup=False, emoji=False)
    return track(some, what, console=console, transient=True, disable=not (console.is_terminal and sys.stderr.isatty()))
