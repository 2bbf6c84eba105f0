"""For MkDocs: what is right on GitHub and not on the site, or the other way round."""

import re
from pathlib import Path


def on_config(config, **_):
    """List the pages of a folder in the navigation where it is named: a new method needs no line there."""
    for entry in config.nav:
        for title, pages in entry.items() if isinstance(entry, dict) else ():
            if isinstance(pages, list):
                found = sorted(Path(config.docs_dir, *pages).glob("*.md"))
                entry[title] = [path.relative_to(config.docs_dir).as_posix() for path in found]
    return config


def on_page_markdown(markdown: str, page, config, **_) -> str:
    """Lead links to the repository's files, which the site does not have, to `repo_url`; without one, keep the text."""
    where = rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)" if config.repo_url else r"\1"
    out = re.escape("../" * (page.file.src_uri.count("/") + 1))  # of docs/
    return re.sub(rf"\[([^\]]+)\]\({out}([^)\s]+)\)", where, markdown)


def on_page_content(html: str, **_) -> str:
    """Show "(`str`, *optional*, defaults to ...)", as its type: the default follows."""
    return re.sub(r"<code>`([^`<]+)`, \*optional\*[^<]*</code>", r"<code>\1</code>", html)
