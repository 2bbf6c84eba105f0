"""Markdown and formulas become a tree of allowed elements, whatever a model writes."""

import time

import pytest

from ktae_trl.report.rendered import ALLOWED, LONGEST_FORMULA, rendered
from tests.reporting import HOSTILE


def text_of(nodes) -> str:
    return "".join(node if isinstance(node, str) else text_of(inner(node)) for node in nodes)


def inner(node: list) -> list:
    return node[2:] if len(node) > 1 and isinstance(node[1], dict) else node[1:]


def elements(nodes):
    for node in nodes:
        if not isinstance(node, str):
            yield node[0], node[1] if len(node) > 1 and isinstance(node[1], dict) else {}
            yield from elements(inner(node))


def math(*children, block: bool = False) -> list:
    return ["math", {"display": "block" if block else "inline"}, ["mrow", *children]]


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("a **b** *c* `d<e`", [["p", "a ", ["strong", "b"], " ", ["em", "c"], " ", ["code", "d<e"]]]),
        ("# T\n\n> q", [["h1", "T"], ["blockquote", ["p", "q"]]]),
        ("3. x\n4. y", [["ol", {"start": "3"}, ["li", ["p", "x"]], ["li", ["p", "y"]]]]),
        ("```python\nf()\n\tg\n```", [["pre", "f()\n\tg"]]),
        ("|a|b|\n|-|-|\n|1|2|", [["table", ["thead", ["tr", ["th", "a"], ["th", "b"]]],
                                  ["tbody", ["tr", ["td", "1"], ["td", "2"]]]]]),
        ("$x^2$", [["p", math(["msup", ["mi", "x"], ["mn", "2"]])]]),
        (r"so \(1+y\)", [["p", "so ", math(["mn", "1"], ["mo", "+"], ["mi", "y"])]]),
        ("$$\n\\frac{1}{2}\n$$", [math(["mfrac", ["mrow", ["mn", "1"]], ["mrow", ["mn", "2"]]], block=True)]),
        ("\\[\nx\n\\]\nend", [math(["mi", "x"], block=True), ["p", "end"]]),
        (r"It is \boxed{4}.", [["p", "It is ", math(["mrow", {"notation": "box"}, ["mrow", ["mn", "4"]]]), "."]]),
        (r"*a* $\frac{$", [["p", ["em", "a"], " ", ["code", r"\frac{"]]]),
    ],
)  # fmt: skip
def test_what_is_rendered(text, nodes):
    assert rendered(text) == nodes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1: 8+0=8\n2: 8-4=4\nThe answer is 4",
        "It costs $5 and $6.",
        "2 * 3 * 4",
        r"\boxed{5",
        "    indented",
        "<b>x</b>",
    ],
)
def test_text_without_markdown_is_not_rendered(text):
    assert rendered(text) is None


def test_html_links_and_images_are_text():
    nodes = rendered(
        "**x** <script>alert(1)</script> [a](javascript:alert(1)) ![b](http://c/d.png) <http://e>\n\n<div>\n"
    )
    assert {tag for tag, _ in elements(nodes)} <= {"p", "strong", "span"}
    assert "<script>alert(1)</script>" in text_of(nodes)
    assert not [attributes for _, attributes in elements(nodes) if attributes]


@pytest.mark.parametrize(
    "latex", [r"\href{javascript:alert(1)}{x}", r"\style{position:fixed}{x}", r"\class{t}{x}", r"\color{white}{x}"]
)
def test_formulas_have_allowed_attributes_only(latex):
    attributes = {name for _, attributes in elements(rendered(f"${latex}$")) for name in attributes}
    assert attributes <= set(ALLOWED["attributes"])
    assert not attributes & {"href", "style", "class", "mathcolor", "id"}


@pytest.mark.parametrize("frame", ["{}", "**a** {}", "${}$", r"\boxed{{{}}}", "`{}` *b*", "| a |\n|---|\n| {} |"])
def test_hostile_text_becomes_allowed_elements(frame):
    tags = {*ALLOWED["html"], *ALLOWED["math"]}
    for text in HOSTILE:
        nodes = rendered(frame.format(text[:20_000])) or []
        for tag, attributes in elements(nodes):
            assert tag in tags
            assert attributes.keys() <= set(ALLOWED["attributes"])
        assert not set(text_of(nodes)) & set("\0\x1b\u202e\u2066\u200b\ufeff")


@pytest.mark.parametrize(
    "piece",
    ["$", r"\(", r"\[", "[", "![", "*a", "> ", "- ", "`", r"\boxed{", "$$\n", "$a ", r"\(a ", "{", "a\n", "1. "],
)
def test_no_text_takes_long(piece):
    started = time.perf_counter()
    rendered(piece * (20_000 // len(piece)))
    assert (
        time.perf_counter() - started < 10
    )  # a bound against quadratic time at the limit of 50,000, not a measurement


def test_a_long_formula_stays_latex():
    latex = "x" * (LONGEST_FORMULA + 1)
    assert rendered(f"${latex}$") is None
    assert rendered(f"$$\n{latex}\n$$") == [["code", f"\n{latex}\n"]]
    assert rendered(f"${latex[1:]}$")[0][1][0] == "math"
