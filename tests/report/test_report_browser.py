"""The report in headless Chromium, opened from disk: what a person sees, with the mouse and with the keyboard."""

import json
import math
import shutil
import time

import pytest
from scipy.stats import entropy, fisher_exact

from benchmarks.report_page import write_records
from ktae_trl.report import explain, records, write_report
from tests.reporting import HOSTILE, random_group, rows_of_group, write_run

pytestmark = pytest.mark.slow
MINUS = "\u2212"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


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
    return {name: text.replace(MINUS, "-").replace(",", "") for name, text in values}


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
    page = visit(report)
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
            assert float(shown["D"].replace(",", "")) == pytest.approx(D, rel=1e-3, abs=6e-5)
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
    from ktae_trl.report.tokens import colour

    row = records.read(records.files(run)[0]).rows[0]
    for scheme, dark in (("light", False), ("dark", True)):
        page = visit(report, color_scheme=scheme)
        spans = page.locator("article.rollout", has_text="Rollout 0").locator(".t")
        shown = spans.evaluate_all("all => all.map(t => getComputedStyle(t).backgroundColor)")
        assert shown == [f"rgb{colour(round(k * 20) / 20, dark)}" for k in row["credit"]]
        ground = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(ground)
        assert (sum(map(int, before[4:-1].split(","))) < 200) == dark
        page.get_by_role("button", name="Theme").click()
        assert page.evaluate(ground) != before
        line = "getComputedStyle(document.querySelector('#plot-0 .scatterlayer path.js-line')).stroke"
        assert page.evaluate(line) != ""


def test_curves_are_drawn(visit, report):
    page = visit(report)
    page.wait_for_selector("#plot-2 .scatterlayer path.js-line", state="attached")
    titles = page.locator("figcaption b").all_text_contents()
    assert titles == ["Reward", "Entropy", "Mean value K"]


def listed(page) -> list[str]:
    return page.locator("#list a").evaluate_all("all => all.map(a => a.getAttribute('href').slice(1))")


def test_search_filters_and_order(visit, report):
    page = visit(report)
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
    heads = page.locator(".table th")

    def column(number: int) -> list[str]:
        return [text.replace(MINUS, "-") for text in page.locator(f".table td:nth-child({number})").all_text_contents()]

    assert heads.nth(4).get_attribute("aria-sort") == "descending"  # information gain
    assert column(1)[0] == "x"
    assert sorted(column(1)) == sorted(["x", "z", "␣zebra"])
    for number, key in ((1, ["␣zebra", "x", "z"].index), (2, lambda x: int(x[0])), (4, float), (7, float)):
        heads.nth(number - 1).get_by_role("button").click()
        once = column(number)
        heads.nth(number - 1).get_by_role("button").click()
        twice = column(number)
        directions = {heads.nth(number - 1).get_attribute("aria-sort")}
        assert directions == {"descending"} if number in (1, 4) else {"ascending"}
        ascending, descending = (once, twice) if number in (1, 4) else (twice, once)
        assert [key(x) for x in ascending] == sorted(map(key, ascending))
        assert [key(x) for x in descending] == sorted(map(key, descending), reverse=True)
    row = page.locator(".table tr[data-token]", has_text="␣zebra")
    assert row.locator("td").all_text_contents()[1:3] == ["0 of 1", "5 of 5"]
    row.get_by_role("button").click()
    assert page.locator(".hit").all_text_contents() == [" zebra"] * 5
    assert page.locator('tr[aria-selected="true"]').count() == 1
    page.locator(".column.right .t").first.click()
    assert page.locator(".hit").all_text_contents() == ["x"]
    page.locator(".column.right .t").first.click()
    assert page.locator(".hit").count() == 0


def test_the_keyboard(visit, report):
    page = visit(report)
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
    write_run(tmp_path, {1: [rows]}, credit=credit, how=how)
    page = visit(write_report(tmp_path, tmp_path / "page.html"))
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
    write_run(tmp_path / HOSTILE[1], {1: [rows], 2: [rows]})
    page = visit(write_report(tmp_path / HOSTILE[1], tmp_path / "page.html"))
    for place in range(len(HOSTILE)):
        page.locator(".t").nth(place).hover()
        page.locator(".t").nth(place).click()
    page.get_by_role("searchbox").fill("<script>")
    page.wait_for_timeout(300)
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
