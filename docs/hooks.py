"""Hooks of MkDocs for the differences between GitHub, which shows `docs/` inside the repository, and the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File

PICTURES = "benchmarks/results"  # outside docs/: the plots of the benchmarks


def on_config(config, **_):
    """List all pages of a folder that the navigation names, so that a new method needs no entry."""
    for entry in config.nav:
        for title, pages in entry.items() if isinstance(entry, dict) else ():
            if isinstance(pages, list) and str(pages[0]).endswith("/"):
                found = sorted(
                    Path(config.docs_dir, *pages).glob("*.md"), key=lambda page: (page.stem != "index", page)
                )
                entry[title] = [path.relative_to(config.docs_dir).as_posix() for path in found]
    return config


def on_files(files, config, **_):
    """Add the plots of the benchmarks to the site."""
    root = Path(config.docs_dir).parent
    for path in sorted((root / PICTURES).glob("*.png")):
        files.append(File(f"{PICTURES}/{path.name}", str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Link files of the repository, which the site does not contain, at `repo_url`; without one, keep only the text."""
    where = rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)" if config.repo_url else r"\1"
    up = page.file.src_uri.count("/")
    out = re.escape("../" * (up + 1))  # of docs/
    markdown = re.sub(rf"(!\[[^\]]*\]\(){out}({PICTURES}/)", rf"\g<1>{'../' * up}\2", markdown)
    return re.sub(rf"(?<!!)\[([^\]]+)\]\({out}([^)\s]+)\)", where, markdown)


def on_page_content(html: str, **_) -> str:
    """Show "(`str`, *optional*, defaults to ...)" as the type only: the default follows."""
    html = re.sub(r"<code>`([^`<]+)`, \*optional\*[^<]*</code>", r"<code>\1</code>", html)
    # GitHub needs a backslash before a bar in a table's code. Python-Markdown would show the backslash.
    return re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace(r"\|", "|"), html)
