"""Markdown tables, as a Markdown parser reads them."""

from html.parser import HTMLParser

from markdown_it import MarkdownIt

from ktae_trl.report import markdown

HOSTILE = ["a|b", "`code`", "*bold* _italic_ snake_case", "<b>html</b> &amp;", "[link](x)", "back\\slash", "two\nlines"]


class Cells(HTMLParser):
    """The texts of a table's cells, and the tags in them."""

    def __init__(self, html: str):
        super().__init__()
        self.texts, self.tags = [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag in ("td", "th"):
            self.texts.append("")
        else:
            self.tags.add(tag)

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] += data.strip("\n")


def cells(text: str) -> Cells:
    return Cells(MarkdownIt("gfm-like", {"linkify": False}).render(text))


def test_a_table_has_a_cell_for_each_value():
    found = cells(markdown.table(["name", "", "n"], [["x", "", 1], ["y", "z", 2.5]]))
    assert found.texts == ["name", "", "n", "x", "", "1", "y", "z", "2.5"]
    assert found.tags == {"table", "thead", "tbody", "tr"}


def test_escaped_text_is_shown_as_it_is():
    found = cells(markdown.table(["text"], [[markdown.escaped(text)] for text in HOSTILE]))
    assert found.texts == ["text", *(" ".join(text.split()) for text in HOSTILE)]
    assert found.tags == {"table", "thead", "tbody", "tr"}


def test_code_stays_in_its_cell():
    found = cells(markdown.table(["a", "b"], [[markdown.code("|`x` <b>"), 1]]))
    assert found.texts == ["a", "b", "¦'x' <b>", "1"]
    assert "b" not in found.tags
