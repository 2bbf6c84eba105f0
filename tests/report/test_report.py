"""The report: what it says of a group is what was recorded, and no text of a model becomes markup."""

import base64
import gzip
import hashlib
import json
import math
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ktae_trl import tiny
from ktae_trl.arguments import UserError, pip_install
from ktae_trl.credit import find_method
from ktae_trl.credit.ktae.values import key_token_values
from ktae_trl.report import KeyTokens, explain, records, write_report
from ktae_trl.report.contents import collect
from ktae_trl.report.curves import curves
from ktae_trl.report.group_view import describe, parting
from ktae_trl.report.page import render
from ktae_trl.report.records import Method, Record, method_of
from ktae_trl.report.rows import group_advantages
from ktae_trl.report.run import main
from ktae_trl.report.tokens import amount, colour, label, token_strings, visible
from tests.reference import ktae_loop
from tests.reporting import HOSTILE, Page, random_group, rows_of_group, write_run

KTAE = method_of(find_method("ktae"), "multiply", {})


def of_token(group: dict, text: str) -> dict:
    """What a described group says of a token."""
    i = group["tokens"]["text"].index(text)
    return {name: column[i] for name, column in group["tokens"].items()}


# Statistics and what is shown of a group


def test_statistics_of_a_group_counted_by_hand():
    rows = rows_of_group([["x", "y", "x"], ["x"], ["y", "z"], ["z"]], [True, True, False, False])
    group = describe(KTAE, rows)
    assert (group["right"], group["wrong"], group["unscored"]) == (2, 2, 0)
    x, y, z = (of_token(group, text) for text in "xyz")
    assert (x["a"], x["b"], y["a"], y["b"], z["a"], z["b"]) == (2, 0, 1, 1, 0, 2)
    assert x["p"] == pytest.approx(1 / 3)  # one of the 6 ways to give 2 of 4 rollouts the token, and its mirror
    assert (x["IG"], y["IG"]) == (pytest.approx(1), 0)
    assert x["F"] == pytest.approx(math.exp(-2 / 3))
    assert (y["p"], y["F"], y["K"]) == (1, 0, 0)
    assert x["K"] > 0.99 > 0 > -0.99 > z["K"]
    assert x["D"] > 0 > z["D"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fisher_weight": 2.0, "ig_weight": 0.5, "tf_weight": 0.0},
        {"leave_one_out": True},
    ],
)
def test_statistics_agree_with_scipy_and_the_reference(settings):
    rows = random_group(seed=3, special=(2,), **settings)
    rows[4]["correct"] = None
    rows[5]["trained"] = [False] * len(rows[5]["trained"])
    rows[6]["trained"][:10] = [False] * 10
    method = KTAE._replace(special_ids=(2,), settings={f"ktae_{name}": value for name, value in settings.items()})
    group = describe(method, rows)

    own = [[t for t, m in zip(r["token_ids"], r["trained"], strict=True) if m] for r in rows]
    right = [tokens for r, tokens in zip(rows, own, strict=True) if r["correct"] is True and tokens]
    wrong = [tokens for r, tokens in zip(rows, own, strict=True) if r["correct"] is False and tokens]
    assert (group["right"], group["wrong"]) == (len(right), len(wrong))
    weights = {"fisher_weight": 1.0, "ig_weight": 1.0, "tf_weight": 1.0} | settings
    weights.pop("leave_one_out", None)
    checked = 0
    for i, token in enumerate(group["tokens"]["id"]):
        numbers = {name: group["tokens"][name][i] for name in ("a", "b", "p", "F", "IG", "D", "K")}
        if token == 2 or not any(token in tokens for tokens in (*right, *wrong)):
            assert set(numbers.values()) == {None}
            continue
        a, b = sum(token in r for r in right), sum(token in r for r in wrong)
        c, d = len(right) - a, len(wrong) - b
        assert (numbers["a"], numbers["b"]) == (a, b)
        assert numbers["p"] == pytest.approx(fisher_exact([[a, b], [c, d]]).pvalue, abs=1e-6)
        gain = ktae_loop.strength(a, b, c, d, 0.0, 1.0)
        assert numbers["IG"] == pytest.approx(gain, abs=1e-6)
        assert numbers["K"] == pytest.approx(ktae_loop.value(token, right, wrong, **weights), abs=1e-5)
        checked += 1
    assert checked > 20


def test_a_described_group_is_the_record():
    rows = random_group(seed=1)
    rows[1]["trained"][3] = False
    rows[1]["credit"][3] = 0.0
    group = describe(KTAE, rows)
    for row, rollout in zip(rows, group["rollouts"], strict=True):
        cells = rollout["cells"]
        back = {name: [cells[name][cell] for cell in rollout["at"]] for name in cells}
        assert [group["tokens"]["id"][i] for i in back["token"]] == row["token_ids"]
        assert [group["tokens"]["text"][i] for i in back["token"]] == row["tokens"]
        assert back["value"] == pytest.approx(row["credit"], rel=1e-6)
        assert back["advantage"] == pytest.approx(row["advantages"], rel=1e-6)
        assert [bool(trained) for trained in back["trained"]] == row["trained"]
        assert (rollout["rollout"], rollout["correct"]) == (row["rollout"], row["correct"])
    assert "differs" in " ".join(group["notes"])  # position 3 was changed: K of the others with it


def test_arrays_have_four_digits_of_their_range():
    rows = rows_of_group([["x", "y", "z", "x", "y"]], [True], credit=[[0.0] * 5])
    rows[0]["arrays"] = {
        "log_probability": [-1e-7, -12.345678, -0.000123, None, math.nan],
        "ratio": [1.00012345, 0.99914999, 1.0021, 1.0, 1.0],
        "small": [1e-6, 5.4321e-6, 0.0, 0.0, 0.0],
        "same": [2.5] * 5,
    }
    rows[0]["compared"] = [[0.25, 0.5, math.inf, 1, 2]]
    (rollout,) = describe(KTAE, rows)["rollouts"]
    assert rollout["arrays"] == {
        "log_probability": [0.0, -12.346, 0.0, None, "nan"],
        "ratio": [1.000123, 0.99915, 1.0021, 1.0, 1.0],
        "small": [1e-6, 5.432e-6, 0.0, 0.0, 0.0],
        "same": [2.5] * 5,
    }
    assert rollout["compared"] == [[0.25, 0.5, "inf", 1.0, 2.0]]


def test_a_record_of_other_values_is_told():
    rows = random_group(seed=2)
    assert describe(KTAE, rows)["notes"] == []
    rows[0]["credit"][0] += 2e-4
    (note,) = describe(KTAE, rows)["notes"]
    assert "differs from the recorded K by up to 0.0002" in note
    rows[0]["credit"][0] = float("nan")
    assert "up to inf" in describe(KTAE, rows)["notes"][0]


@pytest.mark.parametrize(
    ("correct", "told"),
    [([True], "single rollout"), ([True, True], "correct"), ([False, False], "wrong"), ([None, None], "graded")],
)
def test_groups_without_contrast_say_so(correct, told):
    group = describe(KTAE, rows_of_group([["x", "y"]] * len(correct), correct))
    assert told in group["notes"][0]
    assert group["tokens"]["p"] == [None, None]
    assert {value for r in group["rollouts"] for value in r["cells"]["value"]} == {0}


@pytest.mark.parametrize(
    ("credit", "how", "symbol"), [("oar_g", "scale", "w"), ("tree", "replace", "v"), ("none", None, None)]
)
def test_other_methods_have_their_values_and_the_statistics(tmp_path, credit, how, symbol):
    values = None if how is None else [[0.25, 1.75], [1.0, 1.0]]
    rows = rows_of_group([["x", "y"], ["y", "z"]], [True, False], how=how, credit=values)
    write_run(tmp_path, {1: [rows]}, credit=credit, how=how)
    page = Page(write_report(tmp_path, tmp_path / "page.html").read_text())
    (method,) = page.data("index")["methods"]
    assert (method["value"] or {"symbol": None})["symbol"] == symbol
    group = page.data("block-0")
    assert group["notes"] == []
    assert of_token(group, "x")["a"] == 1
    assert group["rollouts"][0]["cells"]["value"] == ([None, None] if values is None else values[0])
    assert group["rollouts"][0]["cells"]["advantage"] == rows[0]["advantages"]


# The page


def test_the_page_of_a_run(tmp_path):
    groups = [random_group(seed) for seed in range(3)]
    write_run(tmp_path / "run", {10: groups, 20: groups[:1]}, generated_groups=8)
    train = [{"step": s, "reward": s / 10, "ktae/value_right": 0.25, "entropy": float("nan")} for s in (1, 2)]
    held_out = [{"step": s, "eval_reward": s / 8} for s in (2, 4)]
    lines = [json.dumps(entry) + "\n" for entry in (*train, *held_out)]
    (tmp_path / "run" / "rollouts" / "metrics.jsonl").write_text("".join(lines))
    sources = [tmp_path / "run", tmp_path / "run" / "rollouts"]
    pages = [write_report(source, tmp_path / "new" / "page.html").read_text() for source in sources]
    assert pages[0] == pages[1]
    page = Page(pages[0])
    assert "run · key tokens" in page.text
    index = page.data("index")
    assert [(g["step"], g["group"]) for g in index["groups"]] == [(10, 0), (10, 1), (10, 2), (20, 0)]
    assert page.data("block-3")["step"] == 20
    assert [panel["title"] for panel in index["panels"]] == ["Reward", "Mean value K"]
    train, held_out = index["panels"][0]["traces"]
    assert (train["x"], train["y"], train["evaluated"]) == ([1, 2], [0.1, 0.2], False)
    assert (held_out["x"], held_out["y"], held_out["evaluated"]) == ([2, 4], [0.25, 0.5], True)
    assert "The run recorded 4 of the 16 groups generated in these steps" in page.text
    assert len(page.code) == 1

    one = Page(write_report(sources[1] / "step_000020.parquet", tmp_path / "one.html").read_text())
    assert [g["step"] for g in one.data("index")["groups"]] == [20]
    assert one.data("index")["panels"] == index["panels"]  # those of the run


def test_a_page_of_a_long_run_holds_a_share_of_each_step(tmp_path):
    def group(right: int, wrong: int) -> list[dict]:
        return rows_of_group([["x"]] * (right + wrong), [True] * right + [False] * wrong)

    write_run(tmp_path, {1: [group(4, 0), group(3, 1), group(2, 2)], 2: [group(1, 3)]}, generated_groups=3)

    def shown(max_groups: int) -> tuple[list[tuple[int, int]], str]:
        page = Page(write_report(tmp_path, tmp_path / "page.html", max_groups).read_text())
        return [(group["right"], group["wrong"]) for group in page.data("index")["groups"]], page.text

    for most, groups in ((4, [(3, 1), (2, 2), (1, 3)]), (1, [(2, 2), (1, 3)])):
        found, text = shown(most)
        assert found == groups
        assert f"shows {len(groups)} of 4 recorded groups" in text
        assert "recorded 4 of the 6 groups" in text
    found, text = shown(6)
    assert len(found) == 4
    assert "recorded groups" not in text
    with pytest.raises(ValueError, match="max_groups must be at least 1"):
        write_report(tmp_path, tmp_path / "page.html", 0)


def test_curves_without_metrics_come_from_the_records(tmp_path):
    all_right = rows_of_group([["x", "y"], ["x"]], [True, True])
    mixed = rows_of_group([["x", "y"], ["z"]], [True, False])
    shown = collect([Record(KTAE, [{**row, "step": s, "group": i} for i, g in enumerate(groups) for row in g])
                     for s, groups in ((1, [mixed, all_right]), (2, [mixed, mixed]))])  # fmt: skip
    first, second = shown.by_step
    assert (first["step"], second["step"]) == (1, 2)
    assert (first["rewards/math_accuracy/mean"], second["rewards/math_accuracy/mean"]) == (0.75, 0.5)
    assert (first["ktae/informative_groups"], second["ktae/informative_groups"]) == (0.5, 1.0)
    assert (first["completions/mean_length"], second["completions/mean_length"]) == (1.5, 1.5)
    values = [row["credit"] for row in mixed]
    assert second["ktae/value_right"] == pytest.approx(statistics.fmean(values[0]), abs=1e-6)
    assert first["ktae/value_right"] == second["ktae/value_right"]  # the group that is all right has no values
    assert second["ktae/saturated"] == 1.0
    titles = [panel["title"] for panel in curves(shown.by_step, [KTAE])]
    assert titles == ["Rewards by function", "Completion length (tokens)", "Mean value K", "Shares"]
    write_run(tmp_path, {1: [mixed], 2: [mixed]})
    assert "means over the groups on this page" in Page(write_report(tmp_path, tmp_path / "p.html").read_text()).text


def test_curves_need_two_points_that_are_numbers():
    assert curves([{"step": 1, "reward": 1.0}]) == []
    assert curves([{"step": 1, "reward": 1.0}, {"step": 2, "reward": float("nan")}]) == []
    (panel,) = curves(
        [{"step": s, "oar/mean_change": float(s)} for s in (1, 2)], [method_of(find_method("oar_g"), "scale", {})]
    )
    assert panel["title"] == "Mean |w - 1|"


def test_no_curve_is_drawn_twice():
    """The only reward function's mean is the reward itself; two functions are drawn."""
    one = [{"step": s, "reward": s / 4, "rewards/accuracy/mean": s / 4} for s in (1, 2)]
    assert [panel["title"] for panel in curves(one)] == ["Reward"]
    two = [{**entry, "rewards/format/mean": 1.0} for entry in one]
    panels = curves(two)
    assert [panel["title"] for panel in panels] == ["Reward", "Rewards by function"]
    assert [trace["name"] for trace in panels[1]["traces"]] == ["accuracy", "format"]
    assert panels[0]["traces"][0] == {"x": (1, 2), "y": (0.25, 0.5), "name": "reward", "evaluated": False}


def test_the_tokens_that_are_key_most_often():
    """By hand: x is key in both mixed groups, at |K| of at least 0.5 and in two rollouts; z in one rollout only."""
    groups = [
        rows_of_group([["x"], ["x"], ["y"], ["y", "z"]], [True, True, False, False]),
        rows_of_group([["x"], ["x"], ["y"], ["y"]], [False, False, True, True]),
        rows_of_group([["x"], ["x"]], [True, True]),
    ]
    rows = [{**row, "group": i} for i, group in enumerate(groups) for row in group]
    shown = collect([Record(KTAE, rows)])
    page = Page(render("run", shown))
    assert page.data("index")["run"]
    found = page.data("run-data")
    assert found["tokens"]["text"] == ["x", "y"]
    signs = {(found["tokens"]["text"][token], group): K > 0 for token, group, K in found["found"]}
    assert signs == {("x", 0): True, ("y", 0): False, ("x", 1): False, ("y", 1): True}
    none = method_of(find_method("none"), None, {})
    other = Page(render("run", collect([Record(none, [{**row, "credit": None} for row in rows])])))
    assert not other.data("index")["run"]  # the method has no K
    assert "run-data" not in {attributes.get("id") for attributes, _ in other.scripts}


def test_markdown_is_rendered_up_to_a_limit(monkeypatch):
    """The group with the larger mean |K| first, and the page says how many are left out."""
    weak = rows_of_group([["$x$"], ["$x$", "y"]], [True, False])
    strong = rows_of_group([["$x$"], ["$z$"]], [True, False])
    rows = [{**row, "group": i} for i, group in enumerate((weak, strong)) for row in group]
    for characters, groups in ((100, [0, 1]), (9, [1]), (1, [])):
        shown = collect([Record(KTAE, rows)], characters=characters)
        page = Page(render("run", shown))
        assert page.data("index")["rendered"] == groups
        assert (f"rendered in {len(groups)} of 2 groups" in page.text) == (len(groups) < 2)
    assert page.data("index")["groups"][1]["score"] > page.data("index")["groups"][0]["score"]
    nodes = Page(render("run", collect([Record(KTAE, rows)]))).data("rendered-1")
    assert [node[0][1][0] for node in nodes] == ["math", "math"]
    plain = rows_of_group([["x"], ["y"]], [True, False])
    assert collect([Record(KTAE, plain)]).rendered == {}
    monkeypatch.setattr("ktae_trl.report.contents.LONGEST_RENDERED", 2)
    assert collect([Record(KTAE, rows)]).rendered == {}


def test_warnings_about_k_are_for_methods_with_k():
    rows = rows_of_group([["x"], ["y"]], [True, True])
    assert "K is 0" in describe(KTAE, rows)["notes"][0]
    for name, how in (("oar_g", "scale"), ("tree", "replace"), ("none", None)):
        method = method_of(find_method(name), how, {})
        assert describe(method, rows)["notes"] == []
        assert describe(method, rows[:1])["notes"] == []


def test_a_page_of_nothing_but_hostile_text(tmp_path):
    tokens = [HOSTILE, HOSTILE[::-1], HOSTILE[:3]]
    rows = rows_of_group(tokens, [True, False, False], prompt="".join(HOSTILE))
    for row in rows:
        row["rewards"] = {HOSTILE[0]: float("inf"), "nan": float("nan")}
    name = "<img src=x onerror=alert(1)>&{{ 7 }}"
    write_run(tmp_path / name, {1: [rows], 2: [rows]})
    html = write_report(tmp_path / name, tmp_path / "page.html").read_text()
    assert len(html) < 12e6
    page = Page(html)
    assert {a.get("id") for a, _ in page.scripts if "type" in a} == {"index", "block-0", "block-1"}
    assert len(page.code) == 1
    assert not {"img", "svg", "iframe", "object", "embed", "a", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
    assert name in page.text  # as text
    assert not set(re.findall(r"[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\u200b-\u200f\ufeff]", page.text))
    group = page.data("block-0")
    assert len(max(group["tokens"]["text"], key=len)) < 250
    assert of_token(group, HOSTILE[0])["id"] == 0  # whole
    assert "abc⟨RLO⟩dcba⟨LRI⟩x⟨PDI⟩⟨RLM⟩" in group["tokens"]["text"]
    assert group["rollouts"][0]["rewards"] == {HOSTILE[0]: "inf", "nan": "nan"}


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(tmp_path):
    write_run(tmp_path, {1: [random_group(0)], 2: [random_group(1)]})
    page = Page(write_report(tmp_path, tmp_path / "page.html").read_text())
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-")
    allowed = set(re.findall(r"'sha256-([^']+)'", page.policy))
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.code}
    assert allowed == hashes
    assert len(hashes) == 1
    assert "unsafe" not in page.policy.partition("style-src")[0]
    addresses = [a[name] for _, a in page.elements for name in ("src", "href", "action") if name in a]
    assert addresses == ["data:,"]
    (style,) = re.findall(r"<style>(.*?)</style>", (tmp_path / "page.html").read_text(), re.S)
    assert "url(" not in style
    assert "@import" not in style


def test_a_page_without_latex2mathml_lacks_the_rendered_text_only(tmp_path, monkeypatch, caplog):
    import importlib.util

    find = importlib.util.find_spec
    hide = lambda name, package=None: None if name == "latex2mathml" else find(name, package)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    rows = rows_of_group([["$x$"], ["y"]], [True, False])
    write_run(tmp_path, {1: [rows], 2: [rows]})
    page = Page(write_report(tmp_path, tmp_path / "page.html").read_text())
    assert len(page.data("index")["groups"]) == 2
    assert page.data("index")["rendered"] == []
    for said in (page.text, caplog.text):
        assert said.count(f"latex2mathml is not installed: {pip_install('report')}") == 1


def test_numbers_that_json_does_not_know(tmp_path):
    rows = rows_of_group([["x", "y"], ["y", "z"]], [True, False], credit=[[math.nan, math.inf], [-math.inf, 0.5]])
    write_run(tmp_path, {1: [rows]})
    group = Page(write_report(tmp_path, tmp_path / "page.html").read_text()).data("block-0")
    assert group["rollouts"][0]["cells"]["value"] == ["nan", "inf"]
    assert group["rollouts"][1]["cells"]["value"] == ["-inf", 0.5]


def test_a_template_is_folded_up_to_its_special_tokens():
    prompts = [
        f"<|system|>Be brief.<|user|>{text}<|end|>\n<|assistant|>" for text in ("Is 7 odd?", "Is 8 odd?", "Why?")
    ]
    rows = [row for i, p in enumerate(prompts) for row in rows_of_group([["x"]], [True], prompt=p, group=i)]
    groups = collect([Record(KTAE, rows)]).groups
    assert [g["prompt"][slice(*g["own"])] for g in groups] == ["Is 7 odd?", "Is 8 odd?", "Why?"]
    (alone,) = collect([Record(KTAE, rows[:1])]).groups
    assert alone["own"] == (0, len(alone["prompt"]))  # nothing to compare with


def test_the_list_leaves_out_what_all_prompts_share():
    prompts = ["<user> Solve it: 12 + 3 = <end> now", "<user> Solve it: 12 - 4 = <end> now"]
    rows = [row for i, p in enumerate(prompts) for row in rows_of_group([["x"]], [True], prompt=p, group=i)]
    groups = collect([Record(KTAE, rows)]).groups
    assert [g["preview"] for g in groups] == ["+ 3", "- 4"]
    (group,) = collect([Record(KTAE, rows[:1])]).groups
    assert group["preview"] == prompts[0]


def test_a_page_without_groups_or_records(tmp_path):
    assert Page(render("empty", collect([]))).data("index")["groups"] == []
    with pytest.raises(FileNotFoundError, match="contains no records"):
        write_report(tmp_path, tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere", tmp_path / "page.html")
    (tmp_path / "step_000001.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"step_000001\.parquet is not a Parquet file"):
        write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# Tokens


def test_what_has_no_ink_is_written_out():
    assert visible("plain text") == "plain text"
    assert visible("a\nb\tc\r") == "a↵\nb⇥\tc⟨CR⟩"
    assert visible("\0\x1b\x1f\x7f\x85\x86") == "⟨NUL⟩⟨ESC⟩⟨US⟩⟨DEL⟩⟨NEL⟩⟨U+0086⟩"
    assert visible("\u202ex\u2069\u200b\u200d\xa0\u3000\ufe0f\ue000\u3164") == (
        "⟨RLO⟩x⟨PDI⟩⟨ZWSP⟩⟨ZWJ⟩⟨NBSP⟩⟨U+3000⟩⟨U+FE0F⟩⟨U+E000⟩⟨U+3164⟩"
    )
    assert visible("\ud800 \u2028") == "⟨U+D800⟩ ⟨U+2028⟩"
    assert visible("\u0301e") == "◌\u0301e"
    assert visible("déjà 猫 שלום 😀") == "déjà 猫 שלום 😀"
    assert label(" a\n b") == "␣a↵␣b"


def test_nothing_visible_turns_or_hides():
    for code in [*range(0x3000), *range(0xD7F0, 0x10000), *range(0xE0000, 0xE0200)]:
        shown = visible(chr(code))
        assert not re.search(
            r"[\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]", shown
        )


def linear(rgb: tuple[int, int, int]) -> np.ndarray:
    return np.array([c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb])


def luminance(rgb: tuple[int, int, int]) -> float:
    return linear(rgb) @ (0.2126, 0.7152, 0.0722)


# What is left of linear RGB without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
SIGHT = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_told_apart_and_read(dark):
    text = luminance((255,) * 3 if dark else (0,) * 3)
    shades = [colour(i / 20, dark) for i in range(-20, 21)]
    amounts = [amount(i / 20, dark) for i in range(21)]
    assert len(set(shades)) == 41
    assert len(set(amounts)) == 21
    assert amounts[0] == shades[20]
    for shade in (*shades, *amounts):
        high, low = sorted((luminance(shade), text), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert all(r < g < b for r, g, b in shades[25:])  # blue
    assert all(r > g > b for r, g, b in shades[:16])  # orange
    for name, cones in SIGHT.items():
        against, ground, for_it = (np.array(cones) @ linear(shades[i]) for i in (0, 20, 40))
        much = np.array(cones) @ linear(amounts[-1])
        for one, other in ((against, for_it), (against, ground), (for_it, ground), (much, ground)):
            assert np.linalg.norm(one - other) > 0.15, name
    assert colour(7, dark) == shades[-1]
    assert colour(float("nan"), dark) == colour(0, dark)


def test_strings_of_the_offline_tokenizer(tokenizer):
    text = "The answer is \\boxed{21}.\n 猫"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    strings = token_strings([*ids, *ids, tokenizer.eos_token_id, 10**6], tokenizer)
    assert set(strings) == {*ids, tokenizer.eos_token_id, 10**6}
    assert strings[tokenizer.eos_token_id] == "<|im_end|>"
    assert strings[10**6] == "⟨id 1000000⟩"
    shown = [strings[i] for i in ids]
    assert shown[:3] == ["The", " answer", " is"]
    assert "".join(shown[:-3]).startswith("The answer is \\boxed{21}.\n")
    assert shown[-3:] == tokenizer.convert_ids_to_tokens(ids[-3:])  # the bytes of a character


def train_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of the SentencePiece kind, with bytes for what it does not know, or byte-level."""
    texts = ["the cat sat on the mat, the cat ran"] * 3
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special, alphabet = ["</s>"], pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        special, alphabet = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))], []
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize(
    ("kind", "parts"), [("byte-level", ["ç", "Į", "«"]), ("metaspace", ["<0xE7>", "<0x8C>", "<0xAB>"])]
)
def test_strings_keep_leading_spaces_and_parts_of_characters(kind, parts):
    tokenizer = train_tokenizer(kind)
    ids = tokenizer("the cat sat猫", add_special_tokens=False)["input_ids"]
    strings = token_strings(ids, tokenizer)
    shown = [strings[i] for i in ids]
    assert shown[-3:] == parts
    assert "".join(shown[:-3]).lstrip() == "the cat sat"
    assert " cat" in shown


# Rollouts of any origin


def rollouts(n: int = 4) -> list[dict]:
    return [
        {"prompt": "2 + 2?", "completion": f"It is {'4' if i % 2 else '5'}.", "correct": bool(i % 2)} for i in range(n)
    ]


def test_explained_rows_have_the_values_of_training(tokenizer):
    rows = [
        {"prompt": "p", "completion": "The answer is 4.", "correct": True},
        {"prompt": "q", "completion": "7", "correct": True},
        {"prompt": "p", "completion": "That is about 5", "correct": False},
        {"prompt": "p", "completion": "is 4", "correct": None},
        {"prompt": "p", "completion": "", "correct": False},
        {"prompt": "p", "completion": "The 4 is it", "correct": 1},
    ]
    found = explain(rows, tokenizer, combine="add", tf_weight=0.5, leave_one_out=True).record
    assert [(row["group"], row["rollout"]) for row in found.rows] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    group = found.rows[:5]
    ids = [tokenizer(rows[i]["completion"], add_special_tokens=False)["input_ids"] for i in (0, 2, 3, 4, 5)]
    assert [row["token_ids"] for row in group] == ids
    longest = max(map(len, ids))
    padded = torch.tensor([[[*row, *[0] * (longest - len(row))] for row in ids]])
    mask = torch.tensor([[[1] * len(row) + [0] * (longest - len(row)) for row in ids]])
    verdicts = [True, False, None, False, True]
    reference = ktae_loop.key_token_values(
        padded, mask, [[v is True for v in verdicts]], scored=[[v is not None for v in verdicts]],
        tf_weight=0.5, leave_one_out=True, ignore_ids=found.method.special_ids,
    )[0]  # fmt: skip
    rewards = [float(v) for v in verdicts if v is not None]
    for i, row in enumerate(group):
        assert row["credit"] == pytest.approx(reference[i, : len(ids[i])].tolist(), abs=1e-5)
        A = 0 if verdicts[i] is None else (verdicts[i] - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-4)
        assert row["advantage"] == pytest.approx(A, abs=1e-5)
        assert row["advantages"] == pytest.approx([A + k for k in row["credit"]], abs=1e-5)
        assert "".join(row["tokens"]) == row["completion"]
    assert any(abs(k) > 0.1 for row in group for k in row["credit"])
    assert set(found.rows[5]["credit"]) == {0.0}


def test_advantages_are_those_of_trl(tmp_path):
    from tests.trainers import hook, make_trainer

    rewards = [1.0, 0.0, None, 1.0, 0.0, 0.0, 1.0, 0.0] * 2
    trainer = make_trainer(tmp_path, reward_funcs=lambda completions, **_: rewards, credit="none")
    batch = hook(trainer, "batch")([trainer.train_dataset[i // 8] for i in range(16)])
    verdicts = [None if reward is None else bool(reward) for reward in rewards[:8]]
    assert batch["advantages"].tolist() == pytest.approx(group_advantages(verdicts) * 2, abs=1e-6)
    assert group_advantages([True]) == [0]
    assert group_advantages([True, None]) == [0, 0]
    assert group_advantages([True, True]) == [0, 0]


def test_answers_are_graded_and_what_cannot_be_is_left_out(tokenizer):
    rows = [
        {"prompt": "p", "completion": r"\boxed{0.5}", "answers": [r"\frac12"]},
        {"prompt": "p", "completion": r"\boxed{2}", "answers": "1/2"},
        {"prompt": "p", "completion": r"\boxed{2}", "answers": [""]},
    ]
    found = explain(rows, tokenizer)
    assert [row["correct"] for row in found.record.rows] == [True, False, None]
    assert found.summary() == (
        "prompts: 1 (1 with correct and wrong rollouts); rollouts: 3 (1 not graded and excluded from the statistics)"
    )


def test_chats_are_prompts_and_completions(tokenizer):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": "4"}], "correct": True},
        {"prompt": list(prompt), "completion": "5", "correct": False},
    ]
    found = explain(rows, tokenizer).record.rows
    assert [row["prompt"] for row in found] == ["system: Be brief.\n\nuser: 2 + 2?"] * 2
    assert [(row["group"], row["completion"]) for row in found] == [(0, "4"), (0, "5")]


def test_bad_rows_and_settings_are_named(tokenizer):
    with pytest.raises(ValueError, match="row 1: completion is missing"):
        explain([rollouts()[0], {"prompt": "p", "correct": True}], tokenizer)
    with pytest.raises(ValueError, match="No rollouts"):
        explain([], tokenizer)
    with pytest.raises(ValueError, match="combine must be one of"):
        explain(rollouts(), tokenizer, combine="scale")
    with pytest.raises(ValueError, match="tf_weight"):
        explain(rollouts(), tokenizer, tf_weight=-1)


def test_hostile_rows_are_explained(tokenizer, tmp_path):
    texts = [*HOSTILE, "lone \ud800 surrogate", "😀".encode("utf-16", "surrogatepass").decode("utf-16")]
    rows = [
        {"prompt": HOSTILE[0] + "\udfff" * (len(text) < 1000), "completion": text, "correct": i % 2 == 0}
        for i, text in enumerate([*texts, "short"])
    ]
    found = explain(rows, tokenizer)
    page = Page(found.save(tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(page.code) == 1
    group = page.data("block-0")
    assert len(group["rollouts"]) == len(texts)
    assert {"ï", "¿", "½"} <= set(group["tokens"]["text"])  # U+FFFD, in the bytes of this tokenizer
    assert "\ufffd" in page.data("index")["groups"][0]["prompt"]
    records.write(tmp_path / "step_000001.parquet", found.record)  # a file takes no lone surrogates
    assert len(page.data("block-1")["rollouts"][0]["at"]) == 1_000_000
    html = found._repr_html_()
    assert len(html) < 1e6
    parsed = Page(html)
    assert parsed.scripts == []
    assert {tag for tag, _ in parsed.elements} <= {"div", "p", "b", "span", "i", "table", "tr", "th", "td", "code"}
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert "<script>window.__hacked" not in html
    assert not set(re.findall(r"[\0-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\u200b-\u200f\ufeff\ud800-\udfff]", html))


def test_a_notebook_shows_coloured_tokens_and_the_table(tokenizer):
    found = explain([*rollouts(), {"prompt": "alone", "completion": "x", "correct": True}], tokenizer)
    assert isinstance(found, KeyTokens)
    html = found._repr_html_()
    parsed = Page(html)
    assert "It is 4." in parsed.text
    four = next(row for row in found.record.rows if row["correct"])
    place = four["tokens"].index("4")
    spans = [attributes for tag, attributes in parsed.elements if tag == "span" and "title" in attributes]
    (title, style), *_ = [(a["title"], a["style"]) for a in spans if a["title"].startswith("4 ")]
    assert "a 2  b 0  c 0  d 2" in title
    assert f"A' {four['advantages'][place]:+.4f}" in title
    assert f"rgb{colour(four['credit'][place])}" in style
    assert "2 of 2" in parsed.text
    assert "single rollout" in parsed.text
    assert (
        "↵↵"
        not in explain([{**row, "completion": row["completion"] + "\n"} for row in rollouts()], tokenizer)._repr_html_()
    )


@pytest.mark.parametrize(
    ("how", "values", "shades", "told"),
    [
        ("scale", [[0.5, 1.0], [3.0, math.nan]], [-0.5, 0, 1, 0], "weight 0"),
        ("replace", [[2.0, -1.0], [0.0, -4.0]], [0.5, -0.25, 0, -1], "advantage below 0"),
        (None, None, [0] * 4, "wrong -1"),
    ],
)
def test_a_notebook_shows_other_methods_too(how, values, shades, told):
    rows = rows_of_group([["x", "y"], ["y", "z"]], [True, False], how=how, credit=values)
    html = Page(KeyTokens(Record(Method("other", how), rows))._repr_html_())
    styles = [a["style"] for tag, a in html.elements if tag == "span" and "title" in a]
    assert [f"rgb{colour(shade)}" in style for shade, style in zip(shades, styles, strict=True)] == [True] * 4
    assert told in html.text


# The command line


def test_the_command_line(tmp_path, capsys):
    write_run(tmp_path / "run", {1: [random_group(0)]})
    main([str(tmp_path / "run"), "-o", str(tmp_path / "run.html"), "--max_groups", "3"])
    assert re.fullmatch(rf"Saved {tmp_path}/run\.html \([\d.]+ MB\)\n", capsys.readouterr().out)

    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n\n" for row in rollouts()))
    options = ["--combine", "add", "--fisher_weight", "2", "--ig_weight", "3", "--tf_weight", "0", "--leave_one_out"]
    main(
        [
            "explain",
            str(tmp_path / "rows.jsonl.gz"),
            "--tokenizer",
            str(tiny.MODEL),
            "-o",
            str(tmp_path / "e.html"),
            *options,
        ]
    )
    assert "prompts: 1 (1 with correct and wrong rollouts); rollouts: 4" in capsys.readouterr().err
    page = Page((tmp_path / "e.html").read_text())
    (method,) = page.data("index")["methods"]
    assert method["settings"] == {
        "token advantage": "A' = A + K",
        "ktae_combine": "add",
        "ktae_scale": "1.0",
        "ktae_importance_beta": "1.0",
        "ktae_fisher_weight": "2.0",
        "ktae_ig_weight": "3.0",
        "ktae_tf_weight": "0.0",
        "ktae_leave_one_out": "True",
        "ktae_memory": "0.0",
    }
    assert method["leave_one_out"]
    group = page.data("block-0")
    assert (group["right"], group["wrong"], group["notes"]) == (2, 2, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/none"], "{}/none does not exist"),
        (["{}"], "{} contains no records"),
        (["{}", "--max_groups", "0"], "max_groups must be at least 1, not 0"),
        (["{}/bad.parquet"], "{}/bad.parquet is not a Parquet file"),
        (["explain", "{}/none.jsonl", "--tokenizer", str(tiny.MODEL)], "There is no file {}/none.jsonl"),
        (["explain", "{}/empty.jsonl", "--tokenizer", str(tiny.MODEL)], "{}/empty.jsonl contains no rollouts"),
        (["explain", "{}/bad.parquet", "--tokenizer", str(tiny.MODEL)], "{}/bad.parquet is not a Parquet file"),
        (["explain", "{}/binary.jsonl.gz", "--tokenizer", str(tiny.MODEL)], "binary.jsonl.gz is a damaged gzip file"),
        (["explain", "{}/good.jsonl", "--tokenizer", "{}/none"], "'{}/none' (--tokenizer) could not be loaded"),
        (["explain", "{}/good.jsonl", "--tokenizer", str(tiny.MODEL), "-o", "{}"], "{}"),
    ],
)  # fmt: skip
def test_errors_are_one_line(tmp_path, words, message):
    (tmp_path / "bad.parquet").write_text("nothing")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl.gz").write_bytes(b"\x00\x01")
    (tmp_path / "good.jsonl").write_text(json.dumps(rollouts()[0]))
    with pytest.raises(SystemExit) as stopped:
        main([word.format(tmp_path) for word in words])
    assert stopped.value.code.startswith(("ktae report: ", "ktae explain: "))
    assert message.format(tmp_path) in stopped.value.code
    assert "\n" not in stopped.value.code


def test_the_package_is_cheap_to_import():
    code = "import sys, ktae_trl.report; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "jinja2", "markdown_it", "transformers", "pyarrow"} & set(loaded)


def test_records_of_training_are_what_is_compared(tmp_path):
    """What `random_group` writes is what the package computes: the tests above share no values with the code."""
    rows = random_group(seed=5)
    longest = max(len(row["token_ids"]) for row in rows)
    ids = torch.tensor([[[*row["token_ids"], *[0] * (longest - len(row["token_ids"]))] for row in rows]])
    mask = torch.tensor([[[1] * len(r["token_ids"]) + [0] * (longest - len(r["token_ids"])) for r in rows]])
    values = key_token_values(ids, mask, torch.tensor([[row["correct"] for row in rows]]))
    for i, row in enumerate(rows):
        assert row["credit"] == pytest.approx(values[0, i, : len(row["credit"])].tolist(), abs=1e-5)
    write_run(tmp_path, {1: [rows]})
    assert records.read(records.files(tmp_path)[0]).rows[0]["token_ids"] == rows[0]["token_ids"]


def test_a_tree_counts_what_several_rows_share(tmp_path):
    """One row trains a shared segment, but all rollouts below it have its tokens."""
    trained = [[True, True], [False, True], [True, True], [False, True]]
    rows = rows_of_group([["s", "x"], ["s", "y"], ["t", "x"], ["t", "z"]], [True, True, False, False])
    for row, mask in zip(rows, trained, strict=True):
        row |= {"trained": mask, "credit": [0.5 * kept for kept in mask]}
    tree = method_of(find_method("tree"), "replace", {})
    group = describe(tree, rows)
    counts = {text: (a, b) for text, a, b in zip(*(group["tokens"][name] for name in ("text", "a", "b")), strict=True)}
    assert counts == {"s": (2, 0), "t": (0, 2), "x": (1, 1), "y": (1, 0), "z": (0, 1)}
    assert describe(KTAE, rows)["tokens"]["a"][0] == 1  # elsewhere, such as a tool's output, it does not count
    for row in rows:
        row["trained"] = [False, False]
    assert not [note for note in describe(tree, rows)["notes"] if "do not count" in note]


def test_messages_quote_no_escape_sequences(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"\x1b[31mred": 1}))
    with pytest.raises(SystemExit, match=r"Its keys: ⟨ESC⟩\[31mred"):
        main(["explain", str(path), "--tokenizer", "x"])


def test_a_folder_is_no_place_for_a_page(tmp_path):
    write_run(tmp_path, {1: [rows_of_group([["x"], ["y"]], [True, False])]})
    with pytest.raises(UserError, match=r"is a folder\. Give a file"):
        write_report(tmp_path, tmp_path)
    assert not list(tmp_path.parent.glob("*.part"))


def test_a_preview_is_cut_by_characters(tmp_path):
    groups = [
        [{**row, "group": i, "prompt": f"{'😀' * 9} {i} end"} for row in rows_of_group([["x"], ["y"]], [True, False])]
        for i in range(3)
    ]
    shown = collect([Record(KTAE, [row for group in groups for row in group])])
    assert [group["preview"] for group in shown.groups] == ["0", "1", "2"]


def test_where_a_wrong_rollout_leaves_the_correct_ones():
    """By hand: the first position at which no correct rollout begins with the same tokens."""
    verdicts = {(1, 2, 3): True, (1, 4, 5): True, (1, 2, 9): False, (7,): False, (1, 4): False, (1, 4, 5, 6): False}
    rows = [{"token_ids": list(ids), "correct": correct} for ids, correct in verdicts.items()]
    rows.append({"token_ids": [8], "correct": None})
    assert parting(rows) == [None, None, 2, 0, None, 3, None]
    assert parting(rows[2:]) == [None] * 5  # no correct rollout to compare with
    assert parting([{"token_ids": [], "correct": False}, {"token_ids": [1], "correct": True}]) == [None, None]
