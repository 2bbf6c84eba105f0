"""For MkDocs: what is right on GitHub and not on the site, or the other way round."""

import re


def on_page_markdown(markdown: str, config, **_) -> str:
    """Lead links to the repository's files, which the site does not have, to `repo_url`; without one, keep the text."""
    where = rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)" if config.repo_url else r"\1"
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)", where, markdown)


def on_page_content(html: str, **_) -> str:
    """Show "(`str`, *optional*, defaults to ...)", as its type: the default follows."""
    return re.sub(r"<code>`([^`<]+)`, \*optional\*[^<]*</code>", r"<code>\1</code>", html)
