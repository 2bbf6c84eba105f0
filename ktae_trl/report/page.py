"""One HTML file that shows a run's recorded groups, their key tokens, and the run's curves. It asks no network.

Model output never becomes markup: groups travel as compressed JSON in base64, each unpacked when it is shown, and the
page's script puts them in as text. The page's policy lets no other script run and loads nothing.
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

MAX_GROUPS = 400  # 0.13 MB each, for 16 rollouts of 1,000 tokens
LEVELS = 20  # shades on each side of 0
logger = logging.getLogger(__name__)
T = TypeVar("T")


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
    if panels and (missing := _without_plotly()):
        panels = []
        shown.notes.append(missing)
    if panels and not metrics:
        shown.notes.append("The curves are means over the groups of this page: there are no metrics of the trainer.")
    return write(output, name, shown, panels)


def _without_plotly() -> str:
    """Return what a page without Plotly says, and warn; empty if it is installed."""
    try:
        need("plotly", "report")
    except NotImportedError as error:
        logger.warning("The page is without the run's curves: %s", error)
        return f"The run's curves are not on this page: {error}"
    return ""


def write(output: str | Path, name: str, shown: Shown, panels: Sequence[dict[str, Any]] = ()) -> Path:
    """Write a page, atomically."""
    output = Path(output)
    if output.is_dir():
        raise UserError(f"{output} is a folder: name a file, such as {output / 'report.html'}")
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, render(name, shown, panels))
    return output


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
    console = Console(stderr=True, markup=False, emoji=False)
    return track(some, what, console=console, transient=True, disable=not (console.is_terminal and sys.stderr.isatty()))
