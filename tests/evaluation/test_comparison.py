import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from statsmodels.stats.multitest import multipletests

from ktae_trl.arguments import NotImportedError, pip_install
from ktae_trl.evaluation import summary
from ktae_trl.evaluation.comparison import (
    MEAN,
    Run,
    compare,
    differing_settings,
    labels,
    length_sentence,
    load_run,
    sentence,
)
from ktae_trl.evaluation.plot import plot
from ktae_trl.evaluation.run import main
from ktae_trl.evaluation.samples import SETTINGS, Store, graded, read_samples, safe_name
from ktae_trl.evaluation.summary import results, summarise
from tests.evaluation.running import DAMAGES, QUICK, complaint, damage, samples


def row(problem, sample, completion, tokens=10, **more):
    return {
        "benchmark": "b",
        "id": problem,
        "sample": sample,
        "problem": f"problem {problem}",
        "prompt": f"prompt {problem}",
        "completion": completion,
        "tokens": tokens,
        "truncated": None if tokens is None else tokens >= 100,
    } | more


def sampled(right, problems=40, samples=1, tokens=10, seed=0):
    """Rows of a model that is right with the chance given."""
    draw = np.random.default_rng(seed)
    rows = [
        row(str(p), s, rf"\boxed{{{int(draw.random() > right)}}}", tokens)
        for p in range(problems)
        for s in range(samples)
    ]
    return graded(rows, [("0",)] * len(rows))


def run(name, right, benchmarks=("easy", "hard"), **options):
    return Run(name, {}, {b: results(b, sampled(right, seed=i, **options)) for i, b in enumerate(benchmarks)})


def test_figures_by_hand():
    completions = {"1": ["0", "0", "7", "7"], "2": ["0", "0", "0", "0"], "3": [None, None, "5", "0"]}
    rows = [
        row(p, s, rf"\boxed{{{answer}}}" if answer else "...", tokens=10 * s + (100 if p == "3" else 0))
        for p, answers in completions.items()
        for s, answer in enumerate(answers)
    ]
    figures = summarise([results("b", graded(rows, [("0",)] * 12))], [1, 2, 4])["benchmarks"]["b"]
    assert figures["problems"] == 3
    assert figures["accuracy"].value == pytest.approx((2 / 4 + 1 + 1 / 4) / 3)
    assert figures["pass"]["1"].value == pytest.approx(figures["accuracy"].value)
    assert figures["pass"]["2"].value == pytest.approx(((1 - 1 / 6) + 1 + (1 - 3 / 6)) / 3)
    assert figures["pass"]["4"].value == 1
    assert figures["maj"]["4"].value == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert figures["maj"]["2"].value == pytest.approx((1 / 2 + 1 + 1 / 4) / 3)
    assert figures["tokens"]["mean"] == pytest.approx(15 + 100 / 3)
    assert figures["tokens"]["p50"] == pytest.approx(np.median([0, 10, 20, 30] * 2 + [100, 110, 120, 130]))
    assert figures["truncated"] == pytest.approx(4 / 12)
    assert figures["boxed"] == pytest.approx(10 / 12)


def test_unscorable_problems_are_left_out_even_when_met_word_for_word():
    rows = [row("1", 0, r"\boxed{0}"), row("2", 0, r"\boxed{???}"), row("3", 0, r"\boxed{1}")]
    found = results("b", graded(rows, [("0",), ("???",), ("0",)]))
    assert found.ids == ["1", "3"]
    assert found.unscorable == ["2"]
    assert found.right.tolist() == [[True], [False]]


def test_a_clear_difference_and_none():
    comparisons = compare([run("a", 0.2), run("b", 0.9), run("c", 0.2)])
    assert [(c.b, c.benchmark) for c in comparisons] == [(m, b) for m in "bc" for b in ("easy", "hard", MEAN)]
    by = {(c.b, c.benchmark): c for c in comparisons}
    family = [c for c in comparisons if c.benchmark != MEAN]
    expected = multipletests([c.accuracy.p for c in family], method="holm")[1]
    assert [c.corrected_p for c in family] == pytest.approx(expected)
    assert expected[0] > family[0].accuracy.p
    assert sentence(by["b", MEAN]).startswith("mean of benchmarks: b is better: +")
    assert by["c", MEAN].accuracy == (0, 0, 0, 1)
    assert sentence(by["c", "hard"]) == "hard: no evidence of a difference: identical on every problem"


def test_the_worse_model_is_not_called_better():
    (comparison,) = compare([run("a", 0.9, ["easy"]), run("b", 0.2, ["easy"])])
    assert sentence(comparison).startswith("easy: a is better: -")


def test_lengths_are_compared_too():
    (comparison,) = compare([run("a", 0.5, ["easy"], tokens=50), run("b", 0.5, ["easy"], tokens=40)])
    assert comparison.tokens[:3] == (-10, -10, -10)
    assert length_sentence(comparison) == "b is shorter: -10 tokens, 95% interval -10 to -10, p < 0.001"


def test_runs_that_do_not_match():
    with pytest.raises(ValueError, match="two or more"):
        compare([run("a", 0.5)])
    with pytest.raises(ValueError, match="Two folders have the same name, 'a'"):
        compare([run("a", 0.5), run("a", 0.5)])
    with pytest.raises(ValueError, match="a and b were measured on different benchmarks: easy, hard and easy"):
        compare([run("a", 0.5), run("b", 0.5, ["easy"])])
    with pytest.raises(
        ValueError, match=r"a and b have different problems in easy\. Only one of them has: 40, 41, 42, 43, 44 \.\.\."
    ):
        compare([run("a", 0.5), run("b", 0.5, problems=50)])
    other = run("b", 0.5)
    other.benchmarks["hard"].problems[3] = "something else"
    with pytest.raises(ValueError, match="The text of problem '3' of hard differs between a and b"):
        compare([run("a", 0.5), other])


def test_answers_that_differ_are_no_difference_between_models():
    a, b = (
        Run(n, {}, {"x": results("x", graded([row("1", 0, r"\boxed{0}")], [(gold,)]))})
        for n, gold in (("a", "0"), ("b", "1"))
    )
    with pytest.raises(ValueError, match="The accepted answers of problem '1' of x differ between a and b"):
        compare([a, b])


def test_the_order_of_problems_does_not_matter():
    rows = sampled(0.5)
    a, b = (Run(n, {}, {"x": results("x", r)}) for n, r in (("a", rows), ("b", rows[::-1])))
    (comparison,) = compare([a, b])
    assert comparison.accuracy == (0, 0, 0, 1)


def test_lengths_without_a_difference_are_seldom_called_different():
    """Four benchmarks, two models: the claims are corrected together."""
    wrong = 0
    for seed in range(25):
        draw = np.random.default_rng(seed)
        runs = []
        for name in "abc":
            base = run(name, 0.5, "1234", problems=8)
            for found in base.benchmarks.values():
                found.tokens[:] = draw.normal(100, 10, found.tokens.shape)
            runs.append(base)
        wrong += any("no evidence" not in length_sentence(c) for c in compare(runs))
    assert wrong <= 5  # 2 families at 5%


def test_settings_that_differ_are_told():
    runs = [
        Run("a", {"temperature": 0, "seed": 1, "model_name_or_path": "x"}, {}),
        Run("b", {"temperature": 1, "seed": 1}, {}),
    ]
    assert differing_settings(runs) == ["temperature differs: 0 in a, 1 in b"]


def test_a_plot_needs_matplotlib(tmp_path, monkeypatch):
    runs = [run("a", 0.2, ["easy"]), run("b", 0.9, ["easy"])]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotImportedError, match=r"matplotlib is not installed: pip install 'ktae-trl\[eval\]"):
        plot(runs, tmp_path)


def test_plot(tmp_path):
    files = plot([run("a", 0.2), run("b", 0.9, tokens=30)], tmp_path / "plots")
    assert [file.name for file in files] == ["accuracy_and_length.png", "accuracy_and_length.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in files[1].read_text()
    assert plot([run("a", 0.2, tokens=None), run("b", 0.9, tokens=None)], tmp_path) == []  # nothing to draw it against


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/eval/A/math", "runs/eval/B/math"], ["A", "B"]),
        (["runs/eval/A/math", "runs/eval/A/quick"], ["math", "quick"]),
        (["A/math", "B/math", "A/quick"], ["A/math", "B/math", "A/quick"]),
        (["one", "two/"], ["one", "two"]),
        (["one/x", "two/x", "two/x"], ["one", "two", "two"]),
    ],
)
def test_labels(folders, names):
    assert labels(folders) == names


def test_what_another_version_graded_is_graded_again(tmp_path, caplog):
    store = Store(tmp_path / "model", {"fingerprint": "f" * 32})
    store.add("b", [row("1", 0, r"\boxed{0}")])
    store.finish("b", {"1": ("0",)}, 1)
    load_run(str(tmp_path / "model"))
    assert "grading it again" not in caplog.text
    (judged,) = read_samples(store.path("b"))
    judged |= {"verdict": False, "graded_by": "an earlier one"}
    store.path("b").write_text(json.dumps(judged) + "\n")
    assert load_run(str(tmp_path / "model")).benchmarks["b"].right.tolist() == [[True]]
    assert "b.jsonl was graded by another version of the grader: grading it again for this comparison" in caplog.text


def test_results_of_version_0_1_are_named():
    runs = [Run("a", {"fingerprint": "f" * 32}, {}), Run("b", {"fingerprint": "0123456789abcdef"}, {})]
    (note,) = differing_settings(runs)
    assert note.startswith("b was measured by version 0.1, which did not check all of the model's weights")


def test_safe_name():
    assert safe_name("Qwen/Qwen2.5-Math-1.5B") == "Qwen_Qwen2.5-Math-1.5B"
    assert safe_name("../runs/x/") == "runs_x"


# Files


def test_a_store_takes_up_where_it_stopped(tmp_path, caplog):
    store = Store(tmp_path, {"seed": 1})
    store.add("b", [row("2", 0, r"\boxed{0}"), row("1", 0, r"\boxed{1}")])
    store.close()
    with open(store.path("b"), "a") as file:
        file.write('{"id": "1", "sam')  # killed while writing
    store = Store(tmp_path, {"seed": 1})
    assert [r["id"] for r in store.read("b")] == ["2", "1"]
    assert "the last line is incomplete" in caplog.text
    store.add("b", [row("1", 1, "\\boxed{0} \udcff\u2028\r\n")])
    rows = store.finish("b", {"1": ("0",), "2": ("0",)}, 2)
    assert [(r["id"], r["sample"], r["verdict"]) for r in rows] == [("1", 0, False), ("1", 1, True), ("2", 0, True)]
    assert read_samples(store.path("b")) == rows
    assert not list(tmp_path.glob("*.part"))


def test_a_crash_between_two_files_loses_nothing(tmp_path):
    """What is not asked for is put aside before the file gets its new form: for a moment it is in both."""
    store = Store(tmp_path, {})
    rows = [row("1", 0, "x"), row("1", 1, "y"), row("2", 0, "z")]
    store.add("b", rows)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert sorted(store.read("b"), key=lambda r: (r["id"], r["sample"])) == rows
    assert [r["completion"] for r in store.finish("b", {"1": ("0",)}, 1)] == ["x"]
    assert [r["completion"] for r in store.finish("b", {"2": ("0",), "1": ("0",)}, 2)] == ["z", "x", "y"]
    assert not list((tmp_path / "more").iterdir())


def test_other_settings_need_another_folder(tmp_path):
    store = Store(tmp_path, {"seed": 1, "temperature": 0.5})
    store.add("b", [row("1", 0, "x")])
    store.close()
    with pytest.raises(
        ValueError, match=r"other settings: temperature was 0.5 and is now 1.0. Choose another output_dir"
    ):
        Store(tmp_path, {"seed": 1, "temperature": 1.0})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"line 2: not JSON: .*Move this line to another file and run ktae eval with the same settings"),
        ("17", r"line 2: an object was expected, not 17\. Move this line to another file"),
        ('{"id": "1"}', "line 2 is not a sample: it lacks sample, problem, prompt, completion, tokens, truncated"),
        (json.dumps(row(["1"], 0, "x")), "line 2 is not a sample: it lacks id"),
        (json.dumps(row("1", 0, "again")), "line 2 repeats problem '1', sample 0"),
    ],
)
def test_corrupt_lines_are_named(tmp_path, line, message):
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps(row("1", 0, "x")) + "\n" + line + "\n" + json.dumps(row("2", 0, "x")) + "\n")
    with pytest.raises(ValueError, match=message):
        read_samples(path)


def test_unfinished_results_are_not_compared(tmp_path):
    Store(tmp_path, {}).add("b", [row("1", 0, "x")])
    with pytest.raises(ValueError, match="is incomplete: some samples are not graded"):
        load_run(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere contains no results of ktae eval"):
        load_run("nowhere")


def test_problems_need_the_same_number_of_samples():
    rows = graded([row("1", 0, "x"), row("1", 1, "x"), row("2", 0, "x")], [("0",)] * 3)
    with pytest.raises(ValueError, match="problem '2' has 1 samples, but problem '1' has 2"):
        results("b", rows)
    with pytest.raises(ValueError, match="none of the gold answers of its 1 problems can be parsed"):
        results("b", graded([row("1", 0, "x")], [("???",)]))


def test_settings_are_read_back(tmp_path):
    store = Store(tmp_path / "model", {"seed": 1})
    store.add("b", [row("1", 0, r"\boxed{0}")])
    store.finish("b", {"1": ("0",)}, 1)
    assert (tmp_path / "model" / SETTINGS).exists()
    loaded = load_run(str(tmp_path / "model"))
    assert loaded.name == "model"
    assert loaded.settings == {"seed": 1}
    assert loaded.benchmarks["b"].right.tolist() == [[True]]


def test_a_budget_that_was_used_up_is_told_and_graded_again(tmp_path, monkeypatch, capsys):
    """Its verdicts are no measurement: the summary says how many, and a comparison grades them again."""
    monkeypatch.setattr("ktae_trl.grading._LEAST_BUDGET", 0.01)
    monkeypatch.setattr("ktae_trl.grading._verdicts", {})
    rows = [row("1", s, rf"\boxed{{{s + 2}+x}}") for s in range(40)]
    judged = graded(rows, [("x+2",)] * 40, budget=0.01)
    left = [r for r in judged if r["reason"] == "budget"]
    assert left
    assert {r["graded_by"] for r in left} == {None}
    figures = summarise([results("b", judged)], [1])
    assert figures["benchmarks"]["b"]["over_budget"] == len(left)
    summary.show(figures, "model", Console(width=400))
    assert f"because grading_budget was used up: {len(left)} of b." in capsys.readouterr().out
    assert not [r for r in graded(rows, [("x+2",)] * 40) if r["reason"] == "budget"]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in judged))
    assert load_run(str(tmp_path)).benchmarks["b"].reasons["budget"] == 0


# The command


def test_compare(evaluated, tmp_path, capsys):
    main([*QUICK, "--output_dir", str(tmp_path / "other"), "--seed", "1"])
    capsys.readouterr()
    main(["compare", str(evaluated), str(tmp_path / "other"), "--output_dir", str(tmp_path / "compared")])
    said = capsys.readouterr().out
    assert "other against tiny" in said
    assert "sums: no evidence of a difference: " in said
    assert "no evidence of a difference in length: " in said
    assert "seed differs: 0 in tiny, 1 in other" in said
    (entry,) = json.loads((tmp_path / "compared" / "comparison.json").read_text())["comparisons"]
    a, b = (sum(row["verdict"] for row in samples(folder)) / 96 for folder in (evaluated, tmp_path / "other"))
    assert entry["accuracy"]["value"] == pytest.approx(b - a)
    assert (tmp_path / "compared" / "accuracy_and_length.png").exists()
    assert (tmp_path / "compared" / "accuracy_and_length.svg").exists()


def test_compare_without_matplotlib(evaluated, tmp_path, capsys, monkeypatch):
    """The sentences and comparison.json are there; one line says what the plot needs."""
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name))
    main(["compare", str(evaluated), str(shutil.copytree(evaluated, tmp_path / "b")), "--output_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "sums: no evidence of a difference: identical on every problem" in said
    assert f"Note: no plot: matplotlib is not installed: {pip_install('eval')}" in said.splitlines()
    assert json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    assert not list(tmp_path.glob("*.png"))


def test_folders_without_results(evaluated, tmp_path):
    assert "nowhere contains no results of ktae eval" in complaint(["compare", str(evaluated), "nowhere"])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sums.jsonl").write_text("{}\n")
    assert "sums.jsonl, line 1 is not a sample" in complaint(["compare", str(evaluated), str(broken)])


def test_comparing_and_grading_do_not_load_torch():
    command = (
        "import sys; from ktae_trl.evaluation import run; print({'torch', 'transformers', 'trl'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", command], text=True) == "set()\n"


def test_a_bug_keeps_its_traceback(evaluated, tmp_path, monkeypatch):
    """Only a mistake of the user ends in one line."""
    monkeypatch.setattr("ktae_trl.evaluation.comparison.compare", lambda *_: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["compare", str(evaluated), str(evaluated), "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "missing"])
@pytest.mark.parametrize("name", ["settings.json", "summary.json"])
def test_what_was_sampled_can_be_compared_whatever_else_is_damaged(evaluated, tmp_path, capsys, name, kind):
    one, other = (Path(shutil.copytree(evaluated, tmp_path / side)) for side in ("one", "other"))
    damage(one / name, kind)
    if name == "settings.json":
        (one / "summary.json").unlink()
    main(["compare", str(one), str(other), "--output_dir", str(tmp_path / "compare")])
    out = capsys.readouterr().out
    assert "identical on every problem" in out
    assert ("the sampling settings are unknown for: one" in out) == (name == "settings.json")
