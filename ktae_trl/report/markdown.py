"""Markdown tables: for model cards, trackers and benchmarks."""

import html
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table. Cells are Markdown: text of any origin goes through `escaped` or `code` first."""
    heading, *body = (f"| {' | '.join(map(str, row))} |" for row in [head, *rows])
    return "\n".join([heading, "|---" * len(head) + "|", *body])


def escaped(text: str) -> str:
    """Return a line of text that Markdown shows as it is, also in a table."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def code(text: str) -> str:
    """Return a line of text as code in a table: `¦` stands for a bar, which would end the cell, `'` for a backtick."""
    return "`" + text.replace("|", "¦").replace("`", "'") + "`"
