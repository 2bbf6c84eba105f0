"""Render the Markdown and the formulas of a completion as a tree of allowed elements, which the page builds.

A node is a string, or a list: a tag, attributes as a dict if it has any, and child nodes. No text becomes markup: HTML,
links and images in a completion are text, and the page builds only the tags and attributes of `ALLOWED`.
"""

import html
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from xml.etree.ElementTree import Element

from ktae_trl.arguments import need
from ktae_trl.report.tokens import visible

LONGEST_FORMULA = 1000  # characters; longer ones stay as they are
Node = str | list[Any]

# Commands and environments that are written in other words, for latex2mathml.
_SAME = {r"{aligned}": r"{split}", r"\tfrac": r"\frac", r"\cfrac": r"\frac"}
# What the page may build, and nothing else.
ALLOWED = {
    "html": [
        "p", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre", "ul", "ol", "li", "blockquote",
        "hr", "br", "table", "thead", "tbody", "tr", "th", "td", "span",
    ],
    "math": [
        "math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "msup", "msub", "msubsup", "mfrac", "msqrt",
        "mroot", "mover", "munder", "munderover", "mtable", "mtr", "mtd", "mpadded", "mphantom", "mstyle",
        "mmultiscripts", "mprescripts",
    ],
    "attributes": [
        "start", "display", "displaystyle", "scriptlevel", "mathvariant", "stretchy", "fence", "separator", "form",
        "linethickness", "columnalign", "columnlines", "rowlines", "columnspacing", "rowspacing", "width", "height",
        "depth", "lspace", "rspace", "minsize", "maxsize", "accent", "accentunder", "movablelimits", "symmetric",
        "largeop", "notation",
    ],
}  # fmt: skip
_TAGS = {
    "paragraph": "p", "strong": "strong", "em": "em", "s": "s", "bullet_list": "ul", "ordered_list": "ol",
    "list_item": "li", "blockquote": "blockquote", "table": "table", "thead": "thead", "tbody": "tbody", "tr": "tr",
    "th": "th", "td": "td", "hr": "hr", "hardbreak": "br",
}  # fmt: skip


def rendered(text: str) -> list[Node] | None:
    """Return the nodes of a completion, or None if it has neither Markdown nor formulas.

    Formulas are what stands between `$`, `$$`, `\\(` and `\\)`, `\\[` and `\\]`, and a `\\boxed{...}` outside of them.

    Raises:
        NotImportedError: markdown-it-py or latex2mathml is not installed.
    """
    need("markdown_it", "report")
    need("latex2mathml", "report")
    nodes = _nodes(_parser().parse(text))
    return nodes if any(node[0] != "p" or not _is_text(node[1:]) for node in nodes) else None


def _is_text(nodes: list[Node]) -> bool:
    return all(isinstance(node, str) or node == ["br"] for node in nodes)


@lru_cache(maxsize=1)
def _parser():
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    # Indented text is not code: models indent steps.
    parser.disable(["code", "html_block", "html_inline", "autolink", "reference"])
    parser.inline.ruler.before("escape", "formula", _formula)
    parser.block.ruler.before("fence", "formula", _formula_block, {"alt": ["paragraph", "blockquote", "list"]})
    return parser


# Lengths are limited because many openings without an end would take quadratic time.
_SOME = f"{{1,{LONGEST_FORMULA}}}"
_INLINE = re.compile(
    rf"\$\$(?P<a>(?:[^$\\]|\\.){_SOME})\$\$|\$(?P<b>(?!\s)(?:[^$\\\n]|\\.){_SOME}?(?<!\s))\$(?!\d)"
    rf"|\\\((?P<c>.{_SOME}?)\\\)|\\\[(?P<d>.{_SOME}?)\\\]",
    re.DOTALL,
)
_BRACE = re.compile(r"[{}]")
_BLOCKS = {"$$": "$$", "\\[": "\\]"}


def _formula(state, silent: bool) -> bool:
    """Parse a formula within a paragraph (a rule of markdown-it)."""
    if state.src[state.pos] not in "$\\":
        return False
    found = _INLINE.match(state.src, state.pos, state.posMax)
    end, latex = (found.end(), found[found.lastgroup]) if found else _boxed(state.src, state.pos, state.posMax)
    if latex is None:
        return False
    if not silent:
        state.push("formula", "math", 0).content = latex
    state.pos = end
    return True


def _boxed(text: str, begin: int, end: int) -> tuple[int, str | None]:
    """Return the end and the text of a `\\boxed{...}` with its matching brace, or None."""
    if not text.startswith("\\boxed{", begin):
        return begin, None
    depth = 0
    for brace in _BRACE.finditer(text, begin, min(end, begin + LONGEST_FORMULA)):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.end(), text[begin : brace.end()]
    return begin, None


def _formula_block(state, first: int, last: int, silent: bool) -> bool:
    """Parse a formula of its own lines, between `$$` or `\\[` and their ends (a rule of markdown-it)."""
    begin = state.bMarks[first] + state.tShift[first]
    opening = state.src[begin : begin + 2]
    if opening not in _BLOCKS:
        return False
    for line in range(first, last):
        start, end = state.bMarks[line] + state.tShift[line], state.eMarks[line]
        row = state.src[start + 2 if line == first else start : end].rstrip()
        if row.endswith(_BLOCKS[opening]):
            break
        if line > first and not row:
            return False  # formulas have no empty lines
    else:
        return False
    if not silent:
        rows = state.getLines(first, line + 1, state.tShift[first], False).strip()
        token = state.push("formula", "math", 0)
        token.content, token.block = rows[2:-2], True
        state.line = line + 1
    return True


def _nodes(tokens: Iterable) -> list[Node]:
    """Return the nodes of markdown-it's flat list of tokens."""
    root: list[Node] = []
    open_nodes = [root]
    for token in tokens:
        kind = token.type.removesuffix("_open").removesuffix("_close")
        if token.nesting < 0:
            open_nodes.pop()
        elif token.nesting > 0:
            node = [token.tag if kind == "heading" else _TAGS.get(kind, "span")]
            if kind == "ordered_list" and token.attrGet("start"):
                node.append({"start": str(token.attrGet("start"))})
            open_nodes[-1].append(node)
            open_nodes.append(node)
        elif kind == "inline":
            open_nodes[-1].extend(_nodes(token.children))
        else:
            open_nodes[-1].append(_leaf(kind, token))
    return root


def _leaf(kind: str, token) -> Node:
    if kind == "formula":
        return _math(token.content, token.block)
    if kind in ("fence", "code_block"):
        return ["pre", _shown(token.content.rstrip("\n"))]
    if kind == "code_inline":
        return ["code", _shown(token.content)]
    if kind == "softbreak":
        return ["br"]
    return [_TAGS[kind]] if kind in _TAGS else _shown(token.content)


def _shown(text: str) -> str:
    """Return text with invisible characters made visible, but with its newlines and tabs as they are."""
    return re.sub(r"[^\n\t]+", lambda part: visible(part[0]), text)


def _math(latex: str, block: bool) -> Node:
    """Return a formula as MathML, or as code if it cannot be converted."""
    from latex2mathml.converter import convert_to_element

    written = latex
    for name, same in _SAME.items():
        written = written.replace(name, same)
    try:
        if len(latex) <= LONGEST_FORMULA:
            return _element(convert_to_element(written.strip(), display="block" if block else "inline"))
    except Exception:  # the converter's own errors, IndexError and the like: models write broken formulas
        pass
    return ["code", _shown(latex)]


def _element(element: Element) -> Node:
    attributes = {name: str(value) for name, value in element.attrib.items() if name in ALLOWED["attributes"]}
    text = _shown(html.unescape(element.text)) if element.text else ""
    children = [text, *map(_element, element)] if text else list(map(_element, element))
    # Browsers that know menclose draw it, others do not: the page's style draws its notation around an mrow.
    tag = element.tag if element.tag in ALLOWED["math"] else "mrow"
    return [tag, *([attributes] if attributes else []), *children]
