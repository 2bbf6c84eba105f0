"""The page in headless Chromium and Firefox, opened from disk: what a person sees, with the mouse and the keyboard."""

import json
import math
import shutil
import statistics
import time

import numpy as np
import pytest
from scipy.stats import entropy, fisher_exact, rankdata

from benchmarks.report_page import write_records
from ktae_trl.credit import find_method
from ktae_trl.report import explain, records, write_report
from ktae_trl.report.contents import collect, pack
from ktae_trl.report.curves import curves
from ktae_trl.report.page import write
from ktae_trl.report.records import Record, method_of
from ktae_trl.report.tokens import colour
from tests import firefox
from tests.reporting import HOSTILE, random_group, rows_of_group, write_run

pytestmark = pytest.mark.slow
MINUS = "\u2212"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PARTS = "leaves every correct rollout here: a place where they part, not a proof of an error"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium or google-chrome on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page and waits until its first group is there. At the end: no error, no dialog, no request but itself."""
    faults, opened = [], []

    def open_page(path, fragment="", **context):
        page = browser.new_page(**{"viewport": {"width": 1500, "height": 950}, **context})
        opened.append(page)
        own = path.resolve().as_uri()
        page.on("console", lambda message: faults.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.on("request", lambda r: faults.append(r.url) if r.url.partition("#")[0] not in (own, "data:,") else None)
        page.goto(own + fragment)
        page.wait_for_selector("#group[data-complete], #group > .warn", state="attached")
        return page

    yield open_page
    for page in opened:
        page.wait_for_timeout(100)
        page.close()
    assert faults == []


def complete(page, step: int, group: int) -> None:
    page.wait_for_selector(f'#group[data-group="step-{step}-group-{group}"][data-complete]', state="attached")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three groups at step 10 and one at step 20: mixed, all right, hard, mixed."""
    folder = tmp_path_factory.mktemp("run")
    easy = rows_of_group([["x", " y\n"], ["x"]], [True, True], prompt="An easy one")
    hard = rows_of_group([["x", "z"], *[["z", " zebra"]] * 5], [True, *[False] * 5], prompt="A hard one")
    mixed = [random_group(seed, prompt=f"Problem <b>{seed}</b>", special=(3,)) for seed in (1, 2)]
    write_run(folder, {10: [mixed[0], easy, hard], 20: [mixed[1]]}, special_ids=(3,))
    metrics = [{"step": s, "reward": s / 9, "entropy": 1 / s, "ktae/value_right": 0.1} for s in range(1, 30)]
    path = folder / records.FOLDER / records.METRICS
    path.write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    return folder


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    return write_report(run, tmp_path_factory.mktemp("page") / "report.html")


def facts(page) -> dict[str, str]:
    tip = page.locator("#tip")
    assert tip.is_visible()
    values = tip.locator("dd").evaluate_all("all => all.map(dd => [dd.dataset.fact, dd.textContent])")
    return {name: plain(text) for name, text in values}


def plain(text: str) -> str:
    return text.replace(MINUS, "-").replace(",", "")


def choose(page, control: str, option: str) -> None:
    page.locator(f"#{control}").select_option(option)
    page.wait_for_selector("#group[data-complete]", state="attached")


def slide(page, control: str, value: float) -> None:
    page.locator(f"#fade-{control}").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); }", value
    )


def shades(page, selector: str) -> list[str]:
    """The classes of tokens that set their colour."""
    return [name.split()[1] for name in page.locator(selector).evaluate_all("all => all.map(t => t.className)")]


def level(x: float) -> str:
    return f"v{20 + math.floor(max(-1, min(1, x)) * 20 + 0.5)}"  # rounds as JavaScript does


def cells(page, table: str) -> list[list[str]]:
    rows = page.locator(f"{table} tbody tr").evaluate_all("all => all.map(r => [...r.cells].map(c => c.textContent))")
    return [[name, *map(plain, numbers)] for name, *numbers in rows]


def information_gain(a: int, b: int, c: int, d: int) -> float:
    """H(Y) - H(Y | presence) in bits, by SciPy."""
    n = a + b + c + d
    parts = [(pair, sum(pair) / n) for pair in ((a, b), (c, d)) if sum(pair)]
    return entropy([a + c, b + d], base=2) - sum(share * entropy(pair, base=2) for pair, share in parts)


def direction(token: int, right: list[dict], wrong: list[dict]) -> float:
    """D by the formulas of docs/methods/ktae.md."""
    sides = [[ids for row in side for ids in row["token_ids"]] for side in (right, wrong)]
    mean = sum(map(len, sides)) / 2
    shares = [sum(token in row["token_ids"] for row in side) / len(side) for side in (right, wrong)]
    T, F = (
        3 * f / (f + 2 * (0.5 + 0.5 * len(side) / mean))
        for side, f in ((side, side.count(token) / len(side)) for side in sides)
    )
    ends = [math.asin(math.sqrt(share)) for share in shares]
    return ends[0] - ends[1] + T / (F + 1e-5) - F / (T + 1e-5)


def test_a_tooltip_has_the_numbers_of_the_parquet_row(visit, report, run):
    page = visit(report, "#step-10-group-0")
    rows = [row for row in records.read(records.files(run)[0]).rows if row["group"] == 0]
    right, wrong = ([r for r in rows if r["correct"] is side] for side in (True, False))
    checked = 0
    for row in rows[:3]:
        article = page.locator("article.rollout", has_text=f"Rollout {row['rollout']}")
        spans = article.locator(".t")
        assert spans.all_text_contents() == row["tokens"]
        assert f"A {row['advantage']:+.4f}" in article.inner_text().replace(MINUS, "-")
        for place in (0, 3, len(row["tokens"]) - 1):
            spans.nth(place).hover()
            shown, token = facts(page), row["token_ids"][place]
            assert float(shown["K"]) == pytest.approx(row["credit"][place], abs=6e-5)
            assert float(shown["A'"]) == pytest.approx(row["advantages"][place], abs=6e-5)
            assert float(shown["A"]) == pytest.approx(row["advantage"], abs=6e-5)
            if token == 3:
                assert "p" not in shown
                continue
            a, b = (sum(token in r["token_ids"] for r in side) for side in (right, wrong))
            assert (shown["a"], shown["b"]) == (f"{a} of {len(right)} correct", f"{b} of {len(wrong)} wrong")
            assert (shown["c"], shown["d"]) == (str(len(right) - a), str(len(wrong) - b))
            p = fisher_exact([[a, b], [len(right) - a, len(wrong) - b]]).pvalue
            assert float(shown["p"]) == pytest.approx(p, abs=6e-5)
            assert float(shown["F"]) == pytest.approx(0 if p > 1 - 1e-9 else math.exp(-2 * p), abs=6e-5)
            bits = information_gain(a, b, len(right) - a, len(wrong) - b)
            assert float(shown["IG"]) == pytest.approx(bits, abs=6e-5)
            D = direction(token, right, wrong)
            if abs(D) >= 10:
                assert shown["D"].startswith("≫ 0 (" if D > 0 else "≪ 0 (")
            exact = shown["D"].partition("(")[2].rstrip(")") or shown["D"]
            assert float(exact) == pytest.approx(D, rel=1e-3, abs=6e-5)
            checked += 1
    assert checked >= 5


def test_leave_one_out_is_told(visit, tmp_path):
    rows = random_group(seed=4, leave_one_out=True)
    write_run(tmp_path, {1: [rows]}, settings={"ktae_leave_one_out": True})
    page = visit(write_report(tmp_path, tmp_path / "page.html"))
    page.locator("article.rollout", has_text="Rollout 0").locator(".t").first.hover()
    assert float(facts(page)["K"]) == pytest.approx(rows[0]["credit"][0], abs=6e-5)
    assert "K is computed without this rollout" in page.locator("#tip").inner_text()
    assert "K of the whole group" in page.locator(".table").inner_text()


def test_colours_are_those_of_the_values(visit, report, run):
    row = records.read(records.files(run)[0]).rows[0]
    for scheme, dark in (("light", False), ("dark", True)):
        page = visit(report, "#step-10-group-0", color_scheme=scheme)
        spans = page.locator("article.rollout", has_text="Rollout 0").locator(".t")
        shown = spans.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
        assert shown == [f"rgb{colour(round(k * 20) / 20, dark)}" for k in row["credit"]]
        ground = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(ground)
        assert (sum(map(int, before[4:-1].split(","))) < 200) == dark
        page.get_by_role("button", name="Theme").click()
        assert page.evaluate(ground) != before


def test_the_page_opens_at_the_most_telling_group(visit, report, run):
    """The largest mean |K| of the groups with a quarter on each side, with tokens in the first screen."""
    strength, sides = {}, {}
    for path in records.files(run):
        for row in records.read(path).rows:
            strength.setdefault((row["step"], row["group"]), []).extend(map(abs, row["credit"]))
            sides.setdefault((row["step"], row["group"]), []).append(row["correct"])
    balanced = [key for key, sides_of in sides.items() if 0.25 <= statistics.fmean(sides_of) <= 0.75]
    assert 0 < len(balanced) < len(sides)
    step, group = max(balanced, key=lambda key: statistics.fmean(strength[key]))
    for size in ({"width": 1500, "height": 950}, {"width": 1280, "height": 720}, {"width": 390, "height": 844}):
        page = visit(report, viewport=size)
        assert page.locator("#group").get_attribute("data-group") == f"step-{step}-group-{group}"
        box = page.locator(".t").first.bounding_box()
        assert 0 < box["y"] < size["height"] - 150
        assert page.evaluate("scrollY") == 0
        assert f"mean |K| {statistics.fmean(strength[step, group]):.4f}" in page.locator(".head").inner_text()


def test_curves_unfold(visit, report):
    """The strip has a small curve per panel. Unfolded, large ones replace it, with whole steps and numbers on hover."""
    page = visit(report)
    assert page.locator(".spark").count() == 3
    assert not page.locator("#curves").is_visible()
    assert page.locator("#curves svg").count() == 0
    page.locator("#curves-open").click()
    assert not page.locator(".spark").first.is_visible()
    assert page.locator("figcaption b").all_text_contents() == ["Reward", "Entropy", "Mean value K"]
    figure = page.locator("figure").first
    assert figure.locator("text.axis").text_content() == "optimizer step"
    steps = figure.locator("text.step").all_text_contents()
    assert steps == ["10", "20"]
    points = np.array([pair.split(",") for pair in figure.locator("polyline").get_attribute("points").split()], float)
    assert len(points) == 29
    # Reward is step / 9: a straight line, upwards.
    x, y = points.T
    assert np.allclose(np.diff(x), np.diff(x)[0], atol=0.11)
    assert np.allclose(y, np.linspace(y[0], y[-1], 29), atol=0.11)
    assert y[0] > y[-1]
    values = figure.locator("text.value")
    at = {
        float(text): float(values.nth(i).get_attribute("y")) - 3.5 for i, text in enumerate(values.all_text_contents())
    }
    for value, height in at.items():
        assert y[0] + (value * 9 - 1) / 28 * (y[-1] - y[0]) == pytest.approx(height, abs=0.2)
    box = figure.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * x[17] / 320, box["y"] + 40)
    assert plain(figure.locator(".told").inner_text()) == "step 18: 2"
    assert "0.1111 at step 1, 3.222 at step 29" in figure.locator("svg").get_attribute("aria-label")
    page.locator("#curves-open").click()
    assert not page.locator("#curves").is_visible()


def listed(page) -> list[str]:
    return page.locator("#list a").evaluate_all("all => all.map(a => a.getAttribute('href').slice(1))")


def test_search_filters_and_order(visit, report):
    page = visit(report, "#step-10-group-0")
    everything = ["step-10-group-0", "step-10-group-1", "step-10-group-2", "step-20-group-0"]
    assert listed(page) == everything
    page.get_by_label("Answers").select_option("right")
    assert listed(page) == ["step-10-group-1"]
    page.get_by_label("Answers").select_option("mixed")
    page.get_by_label("Step").select_option("10")
    assert listed(page) == ["step-10-group-0", "step-10-group-2"]
    assert page.locator("#count").inner_text() == "2 of 4 groups"
    page.get_by_label("Answers").select_option("")
    page.get_by_label("Step").select_option("")
    page.get_by_label("Order").select_option("easy")
    assert listed(page)[0] == "step-10-group-1"
    page.get_by_label("Order").select_option("hard")
    assert listed(page)[0] == "step-10-group-2"
    page.get_by_label("Order").select_option("telling")
    assert listed(page)[-1] == "step-10-group-1"
    page.get_by_label("Order").select_option("run")

    search = page.get_by_role("searchbox")
    expected = {"HARD": everything[2:3], "nowhere": [], "<b>2": everything[3:], "zebra": []}
    for text, found in expected.items():
        search.fill(text)
        page.wait_for_function("n => document.querySelectorAll('#list a').length === n", arg=len(found))
        assert listed(page) == found
    page.get_by_label("also search completions").check()
    page.wait_for_function("() => document.querySelectorAll('#list a').length === 1")
    assert listed(page) == everything[2:3]
    search.fill("")
    page.wait_for_function("() => document.querySelectorAll('#list a').length === 4")


def test_the_table_sorts_and_marks(visit, report):
    page = visit(report, "#step-10-group-2")
    complete(page, 10, 2)
    heads = page.locator(".keys th")
    assert heads.nth(6).get_attribute("aria-sort") == "other"  # |K|
    names = [row[0] for row in cells(page, ".keys")]
    assert sorted(names) == ["x", "␣zebra"]
    sizes = [abs(float(row[6])) for row in cells(page, ".keys")]
    assert sizes == sorted(sizes, reverse=True)
    page.get_by_role("button", name="Show 1 with K = 0").click()  # z is in all rollouts
    assert sorted(row[0] for row in cells(page, ".keys")) == ["x", "z", "␣zebra"]
    for number, key in ((0, ["␣zebra", "x", "z"].index), (1, lambda x: int(x[0])), (3, float), (6, float)):
        heads.nth(number).get_by_role("button").click()
        once = [row[number] for row in cells(page, ".keys")]
        first = heads.nth(number).get_attribute("aria-sort")
        heads.nth(number).get_by_role("button").click()
        twice = [row[number] for row in cells(page, ".keys")]
        assert (first, heads.nth(number).get_attribute("aria-sort")) == (
            ("ascending", "descending") if number in (0, 3) else ("descending", "ascending")
        )
        ascending, descending = (once, twice) if number in (0, 3) else (twice, once)
        assert [key(x) for x in ascending] == sorted(map(key, ascending))
        assert [key(x) for x in descending] == sorted(map(key, descending), reverse=True)
    row = page.locator(".keys tr[data-token]", has_text="␣zebra")
    assert row.locator("td").all_text_contents()[1:3] == ["0 of 1", "5 of 5"]
    assert row.locator("td").nth(5).inner_text() == "≪ 0"
    assert float(plain(row.locator("td").nth(5).get_attribute("title")).removeprefix("D = ")) < -1000
    row.get_by_role("button").click()
    assert page.locator(".hit").all_text_contents() == [" zebra"] * 5
    assert page.locator('tr[aria-selected="true"]').count() == 1
    page.locator(".column.right .t").first.click()
    assert page.locator(".hit").all_text_contents() == ["x"]
    page.locator(".column.right .t").first.click()
    assert page.locator(".hit").count() == 0


def test_the_keyboard(visit, report):
    page = visit(report, "#step-10-group-0")
    first = page.locator(".column.right .t").first.text_content()
    page.keyboard.press("ArrowRight")  # without a click
    assert page.evaluate("document.activeElement.textContent") == first
    assert page.locator("#tip").is_visible()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.textContent") == first
    page.keyboard.press("j")
    page.keyboard.press("j")
    complete(page, 10, 2)
    assert page.locator('#list a[aria-current="true"]').get_attribute("href") == "#step-10-group-2"
    assert page.url.endswith("#step-10-group-2")
    page.keyboard.press("k")
    complete(page, 10, 1)
    assert "All counted rollouts are correct" in page.locator("#group .warn").inner_text()
    page.keyboard.press("j")
    complete(page, 10, 2)

    page.locator(".column.wrong .text").first.focus()
    for key, text in (("ArrowRight", "z"), ("ArrowRight", " zebra"), ("ArrowRight", " zebra"), ("ArrowLeft", "z")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.textContent") == text
        assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
        assert facts(page)["a"] == {"z": "1 of 1 correct", " zebra": "0 of 1 correct"}[text]
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert page.locator(".hit").count() == 5
    page.keyboard.press("n")
    active = "[...document.querySelectorAll('.hit')].indexOf(document.activeElement)"
    assert page.evaluate(active) == 1
    page.keyboard.press("N")
    page.keyboard.press("N")
    assert page.evaluate(active) == 4
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    assert page.locator(".hit").count() == 5
    page.keyboard.press("Escape")
    assert page.locator(".hit").count() == 0

    page.keyboard.press("/")
    page.keyboard.type("jk?n")  # text, not commands
    assert page.get_by_role("searchbox").input_value() == "jk?n"
    page.wait_for_function("() => document.querySelectorAll('#list a').length === 0")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement === document.body")
    assert page.get_by_role("searchbox").input_value() == "jk?n"
    page.get_by_role("searchbox").fill("")
    page.wait_for_function("() => document.querySelectorAll('#list a').length === 4")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()

    page.locator("#list a").nth(2).focus()
    page.keyboard.press("ArrowDown")
    complete(page, 20, 0)
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#step-20-group-0"


def test_a_link_names_its_group(visit, report):
    page = visit(report, "#step-20-group-0")
    assert page.locator("#group h2").inner_text() == "Step 20 · group 0"
    page = visit(report, "#step-7-group-7")
    assert "does not have the group" in page.locator("#group").inner_text()
    page.locator("#list a").nth(1).click()
    complete(page, 10, 1)
    assert page.locator(".prompt").inner_text() == "An easy one"
    assert page.locator(".t").all_inner_texts() == ["x", " y↵\n", "x"]


@pytest.mark.parametrize(
    ("credit", "how", "name", "value"),
    [
        ("oar_g", "scale", "weight w", "w"),
        ("tree", "replace", "segment advantage v", "v"),
        ("none", None, "key-token", None),
    ],
)
def test_other_methods(visit, tmp_path, credit, how, name, value):
    values = [[0.25, 1.5], [1.0, 3.0]] if how else None
    trained = [[True, True], [False, True]]
    rows = rows_of_group([["x", "y"], ["y", "z"]], [True, False], how=how, credit=values, trained=trained)
    all_right = rows_of_group([["x"], ["y"]], [True, True], how=how, credit=[[1.0], [1.0]] if how else None)
    write_run(tmp_path, {1: [rows, all_right]}, credit=credit, how=how)
    page = visit(write_report(tmp_path, tmp_path / "page.html"), "#step-1-group-1")
    assert page.locator(".keys, .warn, #fade-size").count() == 0  # nothing of K: the method has none
    assert "K" not in page.locator(".head").inner_text()
    page.keyboard.press("k")
    complete(page, 1, 0)
    assert page.locator(".keys, .warn, #fade-size, #run-open:not([hidden])").count() == 0
    tables = page.locator(".table > summary").all_inner_texts()
    assert tables == ([f"Tokens by {name}"] if how else [])
    modes = page.locator("#mode option").all_text_contents()
    assert modes[0].startswith(name)
    assert any("not used in training" in mode for mode in modes)
    page.locator(".t").nth(1).hover()
    shown = facts(page)
    assert shown["A'"] == f"{rows[0]['advantages'][1]:+.4f}"
    assert shown["a"] == "1 of 1 correct"
    if value:
        assert float(shown[value]) == 1.5
        levels = [int(name.split()[1][1:]) for name in page.locator(".t").evaluate_all("a => a.map(t => t.className)")]
        assert levels == ([5, 30, 20, 40] if how == "scale" else [22, 30, 27, 40])
    page.locator(".t").nth(2).hover()
    assert "Not trained on" in page.locator("#tip").inner_text()
    page.locator("#mode").select_option(index=len(modes) - 1)
    first = page.locator(".t").first.get_attribute("class")
    assert (int(first.split()[1][1:]) > 20) == (rows[0]["advantages"][0] > 0)


def test_hostile_text_does_nothing(visit, tmp_path, tokenizer):
    tokens = [HOSTILE, HOSTILE[::-1], HOSTILE[:4]]
    rows = rows_of_group(tokens, [True, False, False], prompt="\n".join(HOSTILE))
    rows[0]["rewards"] = {HOSTILE[0]: float("nan")}
    names = [*HOSTILE[:9], "constructor", "toString"]
    for row in rows:
        row["arrays"] = {name: [0.5] * len(row["tokens"]) for name in names}
    write_run(tmp_path / HOSTILE[1], {1: [rows], 2: [rows]})
    page = visit(write_report(tmp_path / HOSTILE[1], tmp_path / "page.html"))
    for place in range(len(HOSTILE)):
        page.locator(".t").nth(place).hover()
        page.locator(".t").nth(place).click()
    page.get_by_role("searchbox").fill("<script>")
    page.wait_for_timeout(300)
    options = page.locator("#mode option").all_text_contents()
    assert {"constructor", "toString", HOSTILE[0]} <= set(options)
    for option in options:
        choose(page, "mode", option)
    assert page.evaluate("window.__hacked") is None
    assert page.evaluate("document.querySelectorAll('img, svg[onload], .text script, #list script').length") == 0
    assert page.locator(".t").first.text_content() == HOSTILE[0]
    # Nothing is wider than the window, and text keeps its direction: the token after the override is right of it.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert "⟨RLO⟩" in page.locator(".column.right .text").inner_text()


def test_a_megabyte_of_one_character(visit, tmp_path, tokenizer):
    rows = [{"prompt": "a" * 1_000_000, "completion": "a" * n, "correct": n > 9} for n in (1_000_000, 3)]
    page = visit(explain(rows, tokenizer).save(tmp_path / "page.html"))
    assert page.locator(".t").count() == 2003
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    more = page.get_by_role("button", name="Show 10,000 more of 1,000,000 tokens")
    more.click()
    assert page.locator(".t").count() == 12_003
    page.locator(".prompt button").click()
    assert len(page.locator(".prompt").text_content()) < 41_000


def test_many_groups_and_tokens(visit, tmp_path):
    write_records(tmp_path, groups=110, G=2, T=10)
    write_records(tmp_path, groups=40, G=16, T=1000)
    page = visit(write_report(tmp_path, tmp_path / "page.html"))
    assert len(listed(page)) == 100
    first = page.locator("#list a").first
    first.click()
    complete(page, 1, 0)
    assert page.locator(".t").count() == 16_000
    page.get_by_role("button", name="Show 10 more").click()
    assert len(listed(page)) == 110
    started = time.perf_counter()
    page.keyboard.press("j")
    complete(page, 1, 1)
    assert time.perf_counter() - started < 10  # a bound against freezing, not a measurement
    page.keyboard.press("/")
    page.keyboard.type("Problem 109:")
    page.wait_for_function("() => document.querySelectorAll('#list a').length === 1")


RAW = [
    "First, **add** them: $\\frac{1}{2} + \\frac{1}{3}$ is \\boxed{\\frac{5}{6}}.",
    "Use a tool.\n5/6\nThe sum is <b>5/6</b>.",
    "First, **guess**: \\boxed{2}.",
    "I guess 2.",
]
LOG_PROBABILITIES = ("log-probability (base)", "log-probability (step 100)")


def many_kinds(step: int, group: int, prompt: str, seed: int) -> list[dict]:
    """A group with arrays, values of two more methods, and a tool's turn."""
    rng = np.random.default_rng(seed)
    tokens = [[f"{word} " for word in text.split(" ")] for text in RAW]
    trained = [[True] * len(row) for row in tokens]
    trained[1][2] = False
    rows = rows_of_group(tokens, [True, True, False, False], step=step, group=group, prompt=prompt, trained=trained)
    rows[1]["segments"] = [
        {"role": "assistant", "begin": 0},
        {"role": "tool", "begin": 2},
        {"role": "assistant", "begin": 3},
    ]
    for row in rows:
        n = len(row["tokens"])
        row["completion"] = RAW[row["rollout"]]
        row["arrays"] = {  # three decimals are displayed
            "entropy": rng.random(n).round(3).tolist(),
            "ratio": np.exp(rng.normal(0, 0.2, n)).round(3).tolist(),
            "clipped": (rng.random(n) < 0.3).astype(float).tolist(),
            "surprise": rng.normal(0, 2, n).round(3).tolist(),
            **{name: (-rng.random(n) * (i + 1)).round(3).tolist() for i, name in enumerate(LOG_PROBABILITIES)},
        }
        row["compared"] = [rng.uniform(-1, 1, n).round(3).tolist(), rng.uniform(0, 2, n).round(3).tolist()]
    return rows


TEMPLATE = "<|user|>\n{}<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def kinds():
    """Records of three steps with two prompts, the second only at the last one, and everything a page can show."""
    ktae = method_of(find_method("ktae"), "multiply", {})
    compared = (ktae._replace(title="Leave one out"), method_of(find_method("oar_g"), "scale", {}))
    prompts = [TEMPLATE.format(text) for text in ("What is 1/2 + 1/3?", "And 1/3 + 1/2?")]
    return [
        Record(ktae, many_kinds(1, 0, prompts[0], 1), compared),
        Record(ktae, many_kinds(5, 0, prompts[0], 2), compared),
        Record(ktae, [*many_kinds(9, 0, prompts[0], 3), *many_kinds(9, 1, prompts[1], 4)], compared),
    ]


@pytest.fixture(scope="module")
def rich(kinds, tmp_path_factory):
    shown = collect(kinds)
    metrics = [{"step": s, "reward": s / 10} for s in (1, 5, 9)]
    return write(tmp_path_factory.mktemp("rich") / "page.html", "rich", shown, curves(metrics, shown.recorded))


def test_the_template_of_the_prompt_is_folded(visit, rich):
    page = visit(rich, "#step-9-group-1")
    assert page.locator(".prompt").inner_text() == "…And 1/3 + 1/2?…"
    assert [text.strip() for text in page.locator(".preview").all_inner_texts()] == ["What is 1/2 + 1/3?"] * 3 + [
        "And 1/3 + 1/2?"
    ]
    for _ in range(2):
        page.locator(".prompt .template").first.click()
    assert page.locator(".prompt").inner_text().replace("↵", "") == TEMPLATE.format("And 1/3 + 1/2?")


def test_tokens_are_coloured_by_any_number(visit, rich, kinds):
    """The shade of every token, computed again from the row's array."""
    page = visit(rich, "#step-1-group-0")
    rows = kinds[0].rows
    for name, option in (
        ("ratio", "importance ratio"),
        ("entropy", "entropy"),
        ("clipped", "clipped"),
        ("surprise", "surprise"),
    ):
        choose(page, "mode", option)
        numbers = np.array([x for row in rows for x in row["arrays"][name]])
        size = np.sort(np.abs(np.log(numbers) if name == "ratio" else numbers))
        end = 1 if name == "clipped" else size[int((len(size) - 1) * 0.99)]
        shade = np.clip((np.log(numbers) if name == "ratio" else numbers) / end, -1, 1)
        signed = name in ("ratio", "surprise")
        expected = [level(x) if signed else f"s{math.floor(x * 20 + 0.5)}" for x in shade]
        assert shades(page, ".t") == expected, name
        assert len(set(expected)) > 1
    one, other = LOG_PROBABILITIES
    choose(page, "mode", other)
    choose(page, "minus", one)
    pairs = [zip(row["arrays"][other], row["arrays"][one], strict=True) for row in rows]
    numbers = np.array([x - y for pair in pairs for x, y in pair])
    size = np.sort(np.abs(numbers))
    assert shades(page, ".t") == [level(x / size[int((len(size) - 1) * 0.99)]) for x in numbers]
    # The table: means over the occurrences of a token that are trained on, the largest difference first.
    found: dict[str, list[float]] = {}
    for row in rows:
        for token, trained, x, y in zip(
            row["tokens"], row["trained"], row["arrays"][other], row["arrays"][one], strict=True
        ):
            if trained:
                found.setdefault(token.replace("\n", "↵").replace(" ", "␣"), []).append(x - y)
    expected = {token: (len(x), statistics.fmean(x), statistics.fmean(map(abs, x))) for token, x in found.items()}
    table = {row[0]: tuple(map(float, row[1:])) for row in cells(page, ".means")}
    assert table.keys() == expected.keys()
    for token, numbers in table.items():
        assert numbers == pytest.approx(expected[token], abs=2e-3)
    sizes = [float(row[3]) for row in cells(page, ".means")]
    assert sizes == sorted(sizes, reverse=True)
    # Both side by side.
    choose(page, "view", "side")
    assert page.locator("article").first.locator(".text").count() == 2
    page.locator(".t").first.hover()
    shown = facts(page)
    assert float(shown[other]) == pytest.approx(rows[0]["arrays"][other][0], rel=1e-3)
    assert float(shown["entropy"]) == pytest.approx(rows[0]["arrays"]["entropy"][0], rel=1e-3)
    difference = rows[0]["arrays"][other][0] - rows[0]["arrays"][one][0]
    assert float(shown[f"{other} {MINUS} {one}"]) == pytest.approx(difference, abs=2e-3)


def test_a_choice_stays_with_the_next_group(visit, rich, kinds):
    page = visit(rich, "#step-1-group-0")
    choose(page, "mode", "clipped")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    complete(page, 5, 0)
    assert shades(page, ".t") == [f"s{int(x) * 20}" for row in kinds[1].rows for x in row["arrays"]["clipped"]]


def test_thresholds_fade_tokens(visit, report, run):
    page = visit(report, "#step-10-group-0")
    rows = [row for row in records.read(records.files(run)[0]).rows if row["group"] == 0]
    right, wrong = ([r for r in rows if r["correct"] is side] for side in (True, False))

    def counts(token):
        return [sum(token in r["token_ids"] for r in side) for side in (right, wrong)]

    def p_value(a, b):
        return fisher_exact([[a, b], [len(right) - a, len(wrong) - b]]).pvalue

    weak = {
        ("p", 0.3): lambda token, K: p_value(*counts(token)) > 0.3,
        ("support", 3): lambda token, K: sum(counts(token)) < 3,
        ("size", 0.5): lambda token, K: abs(K) < 0.5,
    }
    start = {"p": 1, "support": 1, "size": 0}
    ordered = [*right, *wrong]
    for (control, value), fades in weak.items():
        slide(page, control, value)
        expected = [
            token == 3 or bool(fades(token, K))
            for row in ordered
            for token, K in zip(row["token_ids"], row["credit"], strict=True)
        ]
        shown = [shade == "faded" for shade in shades(page, ".t")]
        assert shown == expected, control
        assert 0 < sum(shown) < len(shown)
        ids = {token for row in rows for token in row["token_ids"]} - {3}
        K = {token: k for row in rows for token, k in zip(row["token_ids"], row["credit"], strict=True)}
        assert len(cells(page, ".keys")) == sum(K[token] != 0 and not fades(token, K[token]) for token in ids)
        slide(page, control, start[control])
    assert "faded" not in shades(page, ".t")


def test_methods_side_by_side(visit, rich, kinds):
    page = visit(rich, "#step-5-group-0")
    choose(page, "view", "side")
    rows = kinds[1].rows
    articles = page.locator("article")
    assert articles.count() == 4
    texts = articles.nth(2).locator(".text")
    assert texts.count() == 3
    row = rows[2]
    shown = [shades_of(texts.nth(i)) for i in range(3)]
    assert shown[0] == [level(k) for k in row["credit"]]
    assert shown[1] == [level(k) for k in row["compared"][0]]
    assert shown[2] == [level(w - 1) for w in row["compared"][1]]

    # Where they disagree: ranks of what each does to the advantage, over all tokens that are trained on.
    places, pulls = [], []
    for row in rows:
        sign = np.sign(row["advantage"])
        for i, token in enumerate(row["tokens"]):
            if row["trained"][i]:
                places.append(token.replace("\n", "↵").replace(" ", "␣"))
                k, other, w = row["credit"][i], *(values[i] for values in row["compared"])
                pulls.append([float(f"{k:.7g}"), other, sign * (w - 1)])
    ranks = (rankdata(np.array(pulls), axis=0) - 1) / (len(pulls) - 1)
    expected = {}
    for token in set(places):
        own = ranks[[place == token for place in places]]
        expected[token] = [len(own), 100 * (own.max(1) - own.min(1)).mean(), *(100 * own.mean(0))]
    table = cells(page, ".apart")
    assert {row[0] for row in table} == expected.keys()
    for token, *numbers in table:
        assert list(map(float, numbers)) == pytest.approx(expected[token], abs=0.51)
    apart = [float(row[2]) for row in table]
    assert apart == sorted(apart, reverse=True)
    heads = page.locator(".apart th button").all_text_contents()
    assert heads == ["token", "times", "apart", "KTAE", "Leave one out", "OAR-G"]
    page.locator(".apart .name").first.click()
    assert page.locator(".hit").count() == 3 * int(table[0][1])


def shades_of(text) -> list[str]:
    return [name.split()[1] for name in text.locator(".t").evaluate_all("all => all.map(t => t.className)")]


def test_the_same_prompt_at_other_steps(visit, rich, kinds):
    page = visit(rich, "#step-5-group-0")
    assert page.locator(".same").inner_text() == "same prompt at step 1, 9"
    choose(page, "view", "steps")
    heads = page.locator(".column h3").all_inner_texts()
    assert heads == [f"step {step} · group 0 · 2 correct, 2 wrong" for step in (1, 5, 9)]
    assert page.locator(".column").nth(2).locator(".t").all_text_contents() == [
        token.replace("\n", "↵\n") for row in kinds[2].rows[:4] for token in row["tokens"]
    ]
    page.locator(".column").first.locator(".t").first.click()  # marked in all columns
    assert page.locator(".column").nth(2).locator(".hit").count() > 0
    page.locator(".column h3 a").nth(2).click()
    complete(page, 9, 0)
    page.goto(page.url.partition("#")[0] + "#step-9-group-1")
    complete(page, 9, 1)
    assert page.locator(".same").count() == 0
    assert page.locator(".column h3").all_inner_texts() == ["Correct (2)", "Wrong (2)"]


def test_at_most_six_steps_stand_side_by_side(visit, tmp_path):
    write_run(tmp_path, {step: [random_group(step, G=2, T=4, prompt="Again")] for step in range(1, 13)})
    page = visit(write_report(tmp_path, tmp_path / "page.html"), "#step-8-group-0")
    choose(page, "view", "steps")
    steps = [int(text.split()[1]) for text in page.locator(".column h3").all_inner_texts()]
    assert len(steps) == 6
    assert {1, 8, 12} <= set(steps)
    assert steps == sorted(steps)


def test_the_key_tokens_of_the_run(visit, report, run):
    """Counted again from the records: |K| of at least 0.5, in at least two rollouts."""
    page = visit(report)
    page.locator("#run-open").click()
    expected: dict[str, dict] = {}
    for path in records.files(run):
        for group in range(3):
            rows = [row for row in records.read(path).rows if row["group"] == group]
            own = {}
            for row in rows:
                for token, text, K in zip(row["token_ids"], row["tokens"], row["credit"], strict=True):
                    own.setdefault((token, text), [K, set()])[1].add(row["rollout"])
            for (token, text), (K, rollouts) in own.items():
                if abs(K) >= 0.5 and len(rollouts) >= 2 and token != 3:
                    expected.setdefault((token, text), {}).setdefault(rows[0]["step"], []).append((abs(K), K, group))
    wanted = sorted(
        (text.replace(" ", "␣"), len(found), sum(K > 0 for _, K, _ in found), sum(K < 0 for _, K, _ in found))
        for text, found in (
            (text, [x for some in steps.values() for x in some]) for (_, text), steps in expected.items()
        )
    )
    shown = [(row[0], *map(int, row[1:4])) for row in cells(page, "#run")]
    assert sorted(shown) == wanted
    assert [row[1] for row in shown] == sorted((row[1] for row in shown), reverse=True)
    # A click on a cell goes to the group in which the token is strongest, and marks it.
    line = page.locator("#run tbody tr").first
    text = line.locator(".name").inner_text().replace("␣", " ")
    (steps,) = [steps for (_, own), steps in expected.items() if own == text]
    step = max(steps)
    line.locator(".heat button").last.click()
    complete(page, step, max(steps[step], key=lambda x: (round(x[0], 3), -x[2]))[2])
    assert set(page.locator(".hit").all_text_contents()) == {text}
    assert line.locator(".heat button").last.inner_text() == str(len(steps[step]))


def test_a_cell_of_the_run_goes_from_example_to_example(visit, tmp_path):
    """The group in which x has the largest |K| first, and then the other."""
    weak = rows_of_group([["x"]] * 4 + [["x"], *[["y"]] * 3], [True] * 4 + [False] * 4)
    strong = rows_of_group([["x"], ["x"], ["y"], ["y"]], [True, True, False, False])
    assert 0.5 < weak[0]["credit"][0] < strong[0]["credit"][0]
    write_run(tmp_path, {1: [weak, strong]})
    page = visit(write_report(tmp_path, tmp_path / "page.html"), "#step-1-group-0")
    page.locator("#run-open").click()
    cell = page.locator("#run tbody tr", has_text="x").locator(".heat button")
    assert cell.inner_text() == "2"
    for group in (1, 0, 1):
        cell.click()
        complete(page, 1, group)
        assert set(page.locator(".hit").all_text_contents()) == {"x"}


def test_roles_and_where_rollouts_part(visit, rich):
    page = visit(rich, "#step-1-group-0")
    assert page.locator(".role").all_inner_texts() == ["assistant", "tool", "assistant"]
    text = page.locator("article", has_text="Rollout 1").locator(".text")
    order = text.evaluate("box => [...box.children].map(e => e.classList.contains('role') ? e.textContent : e.place)")
    assert order == ["assistant", 0, 1, "tool", 2, "assistant", *range(3, 6)]
    untrained = text.locator(".u")
    assert untrained.count() == 1
    assert float(untrained.evaluate("t => getComputedStyle(t).opacity")) < 0.7
    # Rollout 2 begins like rollout 0 ("First,"), rollout 3 like none.
    assert page.locator(".t.parts").all_text_contents() == ["**guess**: ", "I "]
    for flag in page.locator(".text .flag").all():
        assert "parts" in flag.evaluate("flag => flag.nextSibling.className").split()
    buttons = page.locator("article header button")
    assert buttons.all_inner_texts() == ["parts at token 2", "parts at token 1"]
    assert PARTS in buttons.first.get_attribute("title")
    assert PARTS in page.locator(".controls").inner_text()
    buttons.first.click()
    assert page.evaluate("document.activeElement.textContent") == "**guess**: "
    assert PARTS in page.locator("#tip").inner_text()


def test_markdown_and_formulas_beside_the_tokens(visit, rich):
    page = visit(rich, "#step-1-group-0")
    assert page.locator(".rendered").count() == 0
    page.locator("#rendered").check()
    page.wait_for_selector(".rendered math")
    first = page.locator("article", has_text="Rollout 0").locator(".rendered")
    assert first.locator("strong").inner_text() == "add"
    assert first.locator("mfrac").count() == 3
    assert first.locator('[notation="box"] mfrac').count() == 1
    assert first.locator("math").first.evaluate("m => m.namespaceURI").endswith("Math/MathML")
    fraction = first.locator("mfrac").first.bounding_box()
    assert fraction["height"] > fraction["width"]  # is drawn as one
    assert page.locator("article", has_text="Rollout 3").locator(".rendered").count() == 0  # nothing to render
    page.locator("#rendered").uncheck()
    page.wait_for_function("() => !document.querySelector('.rendered')")


def test_no_other_elements_are_rendered(visit, kinds, tmp_path):
    """Even if the packed nodes had others: a script, an image with a handler, a style."""
    shown = collect(kinds)
    bad = [
        ["script", "window.__hacked = 1"],
        ["img", {"src": "x", "onerror": "window.__hacked = 1"}],
        [
            "p",
            {"style": "position:fixed", "onclick": "window.__hacked = 1", "class": "t"},
            "kept",
            ["a", {"href": "http://x"}, "text"],
        ],
        [
            "math",
            [
                "mtext",
                {"href": "javascript:window.__hacked = 1"},
                ["iframe", {"srcdoc": "<script>window.__hacked = 1</script>"}],
            ],
        ],
    ]
    shown.rendered[0] = pack([bad] * 4)
    page = visit(write(tmp_path / "page.html", "bad", shown), "#step-1-group-0")
    page.locator("#rendered").check()
    page.wait_for_selector(".rendered math", state="attached")
    box = page.locator(".rendered").first
    found = box.evaluate("box => [...box.querySelectorAll('*')].map(e => [e.localName, e.getAttributeNames()])")
    assert found == [["p", []], ["math", []], ["mtext", []]]
    assert "kepttext" in box.inner_text()
    assert page.evaluate("window.__hacked") is None


def test_a_narrow_screen_stacks_the_columns(visit, report):
    boxes = {}
    for width in (1500, 390):
        page = visit(report, viewport={"width": width, "height": 800})
        boxes[width] = [page.locator(f".column.{side}").bounding_box() for side in ("right", "wrong")]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    right, wrong = boxes[1500]
    assert right["y"] == wrong["y"]
    assert right["x"] < wrong["x"]
    right, wrong = boxes[390]
    assert right["x"] == wrong["x"]
    assert right["y"] + right["height"] <= wrong["y"]
    # The list of groups opens on demand.
    assert not page.locator("#list").is_visible()
    page.locator("#groups-open").click()
    page.locator("#list a").nth(1).click()
    complete(page, 10, 1)
    assert not page.locator("#list").is_visible()


def test_k_is_not_cut_on_a_narrow_screen(visit, tmp_path):
    words = ["multiplication", " denominators", "x"]
    rows = rows_of_group([words] * 12 + [["x", "y"]] * 12, [True] * 12 + [False] * 12)
    write_run(tmp_path, {1: [rows]})
    page = visit(write_report(tmp_path, tmp_path / "page.html"), viewport={"width": 375, "height": 800})
    page.locator(".keys summary").click()
    box = page.locator(".keys").bounding_box()
    for selector in (".keys th:last-child", ".keys td:last-child .value"):
        own = page.locator(selector).first.bounding_box()
        assert own["x"] + own["width"] <= box["x"] + box["width"]
    assert page.locator("#tables").evaluate("box => box.scrollWidth <= box.clientWidth")


def test_firefox_shows_the_same(rich, kinds, tmp_path):
    pytest.importorskip("websockets", reason="websockets is not installed")
    if not any(map(shutil.which, firefox.NAMES)):
        pytest.skip("there is no Firefox on this machine")
    row = kinds[0].rows[0]
    ground = {}
    for dark in (False, True):
        with firefox.Firefox(tmp_path / f"profile-{dark}", dark) as window:
            window.open(f"{rich.as_uri()}#step-1-group-0")
            window.wait("document.querySelector('#group[data-complete]')")
            shown = window.evaluate("[...document.querySelectorAll('article')][0].querySelector('.text').innerText")
            assert shown == "".join(row["tokens"])
            first = "[...document.querySelectorAll('article')][0].querySelectorAll('.t')"
            colours = window.evaluate(f"[...{first}].map(t => getComputedStyle(t).backgroundColor)")
            assert colours == [f"rgb{colour(round(k * 20) / 20, dark)}" for k in row["credit"]]
            window.press("\ue014")  # right arrow
            assert window.evaluate("document.activeElement.textContent") == row["tokens"][0]
            K = window.evaluate("document.querySelector('#tip [data-fact=KTAE]').textContent")
            assert float(plain(K)) == pytest.approx(row["credit"][0], abs=6e-5)
            window.evaluate("document.querySelector('#rendered').click()")
            window.wait("document.querySelector('.rendered mfrac') && document.querySelector('#group[data-complete]')")
            size = window.evaluate("document.querySelector('.rendered mfrac').getBoundingClientRect().toJSON()")
            assert size["height"] > size["width"]
            for name in ("curves", "run", "about"):
                window.evaluate(f"document.querySelector('#{name}-open').click()")
                window.wait(f"document.querySelector('#{name}').children.length")
            ground[dark] = window.evaluate("getComputedStyle(document.body).backgroundColor")
            window.screenshot(tmp_path / "wide.png")
            window.open(f"{rich.as_uri()}?#step-9-group-1", 390, 844)
            window.wait("document.querySelector('#group[data-complete]')")
            assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert window.evaluate("document.querySelector('.t').getBoundingClientRect().top") < 844
            assert window.errors == []
    assert ground[False] != ground[True]
