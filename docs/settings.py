"""Writes the tables of settings on the pages of the credit methods, from the docstrings of their `Settings`.

python docs/settings.py

A page `docs/methods/NAME.md` of a method in `METHODS` has its table between the comments `BEGIN` and `END`.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path

from ktae_trl.credit import METHODS

PAGES = Path(__file__).parent / "methods"
BEGIN, END = "<!-- settings: python docs/settings.py -->", "<!-- end of settings -->"


def table(settings: type) -> str:
    """Return a Markdown table with the name, default and meaning of each field of a `Settings` dataclass.

    The meaning is the field's text in the docstring, or its help text if the docstring has none.
    """
    parts = re.findall(r"^    (\w+) \(.*\):\n((?: {8}.*\n?)+)", inspect.getdoc(settings) or "", re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in parts}
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(settings):
        default = field.default if isinstance(field.default, str) else json.dumps(field.default)
        meaning = texts.get(field.name, field.metadata["help"]).replace("|", r"\|")
        rows.append(f"| `{field.name}` | `{default}` | {meaning} |")
    return "\n".join(rows)


def written() -> dict[Path, str]:
    """Return the pages that have a table, each with its text, in which the table is up to date."""
    texts = {}
    for name, method in METHODS.items():
        page, new = PAGES / f"{name}.md", f"{BEGIN}\n\n{table(method.Settings)}\n\n{END}"
        text, found = re.subn(f"{BEGIN}.*?{END}", lambda _, new=new: new, page.read_text(), flags=re.DOTALL)
        if found:
            texts[page] = text
    return texts


if __name__ == "__main__":
    for page, text in written().items():
        page.write_text(text)
