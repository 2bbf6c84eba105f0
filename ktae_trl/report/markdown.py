"""Markdown tables for model cards, trackers and benchmarks."""

import html
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table. Cells are Markdown: pass untrusted text through `escaped` or `code` first."""
    heading, *body = (f"| {' | '.join(map(str, row))} |" for row in [head, *rows])
    return "\n".join([heading, "|---" * len(head) + "|", *body])


def escaped(text: str) -> str:
    """Return text on one line, escaped so that Markdown shows it literally, even in a table."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def code(text: str) -> str:
    """Return text as code in a table cell. `¦` replaces bars, which would end the cell, and `'` replaces backticks."""
    return "`" + text.replace("|", "¦").replace("`", "'") + "`"
