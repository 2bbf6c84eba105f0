"""`eval.py` as a user runs it, with the offline model on its own task."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from ktae_trl.arguments import parse
from ktae_trl.evaluation import generate as sampling
from ktae_trl.evaluation import measure
from ktae_trl.evaluation.run import main
from ktae_trl.evaluation.settings import EvalArguments
from ktae_trl.grading import ANSWER_FORMATS, INSTRUCTIONS, grade
from ktae_trl.hub.results import of_evaluation
from tests.evaluation.running import DAMAGES, QUICK, ROOT, complaint, damage, samples
from tests.processes import started


def test_the_whole_path(evaluated):
    rows = samples(evaluated)
    problems = [json.loads(line) for line in tiny.HELD_OUT.read_text().splitlines()[:24]]
    assert [(row["id"], row["sample"]) for row in rows] == [(str(p), s) for p in range(24) for s in range(4)]
    for row in rows:
        problem = problems[int(row["id"])]
        assert row["problem"] == problem["problem"]
        assert problem["problem"] in row["prompt"]
        assert row["verdict"] == grade(row["completion"], problem["answer"])
        assert row["truncated"] == (r"\boxed" not in row["completion"] and row["tokens"] == 80)
        assert 0 < row["tokens"] <= 80
    assert len({row["completion"] for row in rows}) > 24  # samples of a problem differ
    summary = json.loads((evaluated / "summary.json").read_text())
    figures = summary["benchmarks"]["sums"]
    assert figures["accuracy"][0] == pytest.approx(sum(row["verdict"] for row in rows) / 96)
    assert list(figures["pass"]) == ["1", "2", "4"]
    assert summary["settings"]["temperature"] == 1.0
    assert summary["new_samples"] == 96


def test_the_summary_goes_into_a_model_card(evaluated):
    accuracy, *others = of_evaluation(evaluated, Path("ktae_trl/tiny/model"))
    rows = samples(evaluated)
    assert accuracy.metric_value == pytest.approx(sum(row["verdict"] for row in rows) / 96, abs=1e-5)
    assert accuracy.metric_name == "accuracy, mean of 4 samples at temperature 1, top_p 1"
    assert (accuracy.dataset_type, accuracy.dataset_name, accuracy.dataset_split) == ("tiny", "sums", "test")
    low, high = accuracy.metric_args["interval_95"]
    assert low < accuracy.metric_value < high
    assert [r.metric_name for r in others] == [f"{kind}@{k} of 4 samples" for kind in ("pass", "maj") for k in (2, 4)]


def test_a_second_run_samples_nothing(evaluated, tmp_path, capsys):
    folder = Path(shutil.copytree(evaluated, tmp_path / "tiny"))  # other tests read the summary
    main([*QUICK, "--output_dir", str(folder), "--k", "4"])
    assert (folder / "sums.jsonl").read_bytes() == (evaluated / "sums.jsonl").read_bytes()
    assert "All 96 samples are already in" in capsys.readouterr().out.replace("\n", " ")
    assert complaint([*QUICK, "--output_dir", str(folder), "--seed", "3"]).startswith(
        f"eval.py: {folder} contains samples generated with other settings: seed was 0 and is now 3."
    )


def test_a_file_gets_lines_and_no_bar(tmp_path, capsys, monkeypatch):
    """Where a bar cannot be redrawn: one line a minute, for which 0 stands here, and one at the end."""
    for seconds, expected in ((0.0, ["3 of 4", "4 of 4"]), (60.0, ["4 of 4"])):
        monkeypatch.setattr(measure, "_LOG_SECONDS", seconds)
        folder = str(tmp_path / f"{seconds}")
        main([*QUICK, "--output_dir", folder, "--limit", "2", "--samples", "2", "--batch_size", "3"])
        said = capsys.readouterr()
        lines = [line for line in said.out.splitlines() if "samples after" in line]
        assert lines == [f"{done} samples after 0 min" for done in expected]
        assert "━" not in said.out + said.err


def test_another_answer_format_grades_the_same_samples_again(evaluated, tmp_path, capsys):
    folder = tmp_path / "tags"
    shutil.copytree(evaluated, folder)
    words = [*QUICK, "--output_dir", str(folder)]
    asked = json.loads((folder / "settings.json").read_text())["system_prompt"]
    main([*words, "--answer_format", "tag", "--system_prompt", asked])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "All 96 samples are already in" in said
    assert "Hardly any completion has an answer in the answer_format: sums." in said
    assert {row["reason"] for row in samples(folder)} == {"no answer"}
    assert json.loads((folder / "summary.json").read_text())["benchmarks"]["sums"]["boxed"] == 0
    main([*words, "--answer_format", "auto", "--system_prompt", asked])
    assert "Hardly any" not in capsys.readouterr().out
    for row in samples(folder):
        assert row["verdict"] == grade(row["completion"], row["answers"], "auto")


@pytest.mark.parametrize("answer_format", ANSWER_FORMATS)
def test_the_system_prompt_asks_for_the_answer_format(answer_format):
    words = {"model_name_or_path": "x", "answer_format": answer_format}
    assert EvalArguments(**words).system_prompt == INSTRUCTIONS[answer_format]
    assert EvalArguments(**words, system_prompt="Think.").system_prompt == "Think."
    assert EvalArguments(**words, system_prompt=None).system_prompt == ""


def test_the_seed_and_nothing_else_decides(evaluated, tmp_path):
    main([*QUICK, "--output_dir", str(tmp_path / "again")])
    assert samples(tmp_path / "again") == samples(evaluated)
    main([*QUICK, "--output_dir", str(tmp_path / "other"), "--seed", "1"])
    assert samples(tmp_path / "other") != samples(evaluated)


def test_the_batch_makes_no_difference(evaluated, tmp_path, capsys):
    main([*QUICK, "--output_dir", str(tmp_path), "--batch_size", "7"])
    assert samples(tmp_path) == samples(evaluated)
    main([*QUICK, "--output_dir", str(tmp_path), "--batch_size", "96"])
    assert "All 96 samples are already in" in capsys.readouterr().out.replace("\n", " ")


def test_samples_are_drawn_as_by_hand(tmp_path, tokenizer):
    """One sample at a time, without a cache, from cumulated probabilities."""
    words = ["--limit", "2", "--samples", "2", "--temperature", "0.7", "--top_p", "0.9", "--max_new_tokens", "12"]
    main([*QUICK, *words, "--output_dir", str(tmp_path)])
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    for row in samples(tmp_path):
        ids = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        numbers, drawn = Random(json.dumps([0, "sums", row["id"], row["sample"]])), []
        while len(drawn) < 12 and tokenizer.eos_token_id not in drawn:
            with torch.no_grad():
                logits = model(torch.tensor([ids + drawn])).logits[0, -1].double()
            p = torch.softmax(logits / 0.7, 0)
            order = p.argsort(descending=True)
            outside = order[(p[order].cumsum(0) - p[order]) >= 0.9]  # not needed to reach 90%
            p[outside] = 0
            cumulated = (p / p.sum()).cumsum(0)
            drawn.append(int((cumulated <= numbers.random()).sum()))
        assert row["completion"] == tokenizer.decode(drawn, skip_special_tokens=True)
        assert row["tokens"] == len(drawn)


def test_samples_follow_the_model():
    """Many draws of one distribution have its frequencies."""
    scores = torch.tensor([[0.0, 1.0, -1.0, 2.0, -torch.inf]])
    draw = sampling._Draw(torch.rand(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    tokens = draw(None, scores.expand(4000, -1)).argmax(1)
    shares = torch.bincount(tokens, minlength=5) / 4000
    assert torch.allclose(shares, scores[0].softmax(0), atol=0.02)
    assert shares[4] == 0
    with pytest.raises(ValueError, match="probabilities are NaN"):
        sampling._Draw(torch.zeros(1, 1))(None, scores * torch.nan)


def test_the_same_problem_twice_gets_other_samples(tmp_path):
    problem = {"problem": "State the final answer to the following arithmetic problem: 9 + 3 + 4 =", "answers": ["16"]}
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"id": i} | problem) + "\n" for i in range(2)))
    words = ["--benchmark_folder", str(tmp_path), "--samples", "16", "--batch_size", "16"]
    main([*QUICK, *words, "--output_dir", str(tmp_path / "out")])
    rows = samples(tmp_path / "out")
    assert [row["completion"] for row in rows[:16]] != [row["completion"] for row in rows[16:]]


def test_more_and_fewer_samples_use_those_there_are(evaluated, tmp_path, capsys, caplog):
    """What is asked for is in the file and in the figures, what is not is kept, and nothing is drawn twice."""
    words = ["--config", "configs/eval/quickstart.yaml", "--output_dir", str(tmp_path)]
    main([*words, "--limit", "10", "--samples", "2"])
    whole = samples(evaluated)
    assert samples(tmp_path) == [row for row in whole if int(row["id"]) < 10 and row["sample"] < 2]
    main([*words, "--limit", "24", "--samples", "4"])
    said = capsys.readouterr().out.replace("\n", " ")
    assert "20 of 96 samples are already in" in said
    assert samples(tmp_path) == whole
    main([*words, "--limit", "5", "--samples", "1", "--k", "1"])
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert (figures["new_samples"], figures["benchmarks"]["sums"]["problems"]) == (0, 5)
    assert (figures["settings"]["samples"], figures["settings"]["limit"]) == (1, 5)
    assert samples(tmp_path) == [row for row in whole if int(row["id"]) < 5 and row["sample"] < 1]
    main([*words, "--limit", "24", "--samples", "4"])
    assert json.loads((tmp_path / "summary.json").read_text())["new_samples"] == 0
    assert samples(tmp_path) == whole
    assert not list((tmp_path / "more").iterdir())


def test_samples_of_another_model_are_refused(model, tmp_path):
    """In the same folder, with weights that differ in the middle only: a merged LoRA, or layers trained alone."""
    weights = {name: weight.float() for name, weight in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    before = (model / "model.safetensors").read_bytes()
    words = [*QUICK, "--limit", "2", "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    main(words)
    weights["model.layers.1.mlp.up_proj.weight"] *= -1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    after = (model / "model.safetensors").read_bytes()
    assert (before[: 1 << 20], before[-1 << 20 :]) == (after[: 1 << 20], after[-1 << 20 :])
    said = complaint(words)
    assert (
        f"{tmp_path / 'out'} contains samples of another model, or the model's files have changed: fingerprint was "
        in said
    )
    assert "Choose another output_dir, or move that folder away" in said


def test_the_same_model_by_another_path(model, tmp_path, capsys, monkeypatch):
    shutil.copytree(model, tmp_path / "saved_again")
    (tmp_path / "saved_again" / "training_args.bin").write_bytes(b"of another run")
    words = [*QUICK, "--limit", "2", "--output_dir", str(tmp_path / "out"), "--model_name_or_path"]
    main([*words, str(model)])
    for path in (f"{model}/", os.path.relpath(model), str(tmp_path / "saved_again")):
        capsys.readouterr()
        main([*words, path])
        assert "All 8 samples are already in" in capsys.readouterr().out.replace("\n", " ")


def test_greedy_samples_depend_on_no_seed(tmp_path, capsys):
    words = [*QUICK, "--temperature", "0", "--samples", "1", "--limit", "2", "--output_dir", str(tmp_path)]
    main(words)
    capsys.readouterr()
    main([*words, "--seed", "5", "--top_p", "0.5"])
    assert "All 2 samples are already in" in capsys.readouterr().out.replace("\n", " ")


def test_each_config_has_a_folder_of_its_own(model, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load((ROOT / "configs" / "eval" / "quickstart.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    for name, change in (("sampled", {}), ("greedy", {"temperature": 0.0, "samples": 1})):
        settings = config | {"limit": 2, "model_name_or_path": "model/"} | change
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        main(["--config", f"{name}.yaml"])
    folder = Path("runs/eval/model")
    assert sorted(path.parent.name for path in folder.glob("*/summary.json")) == ["greedy", "sampled"]
    capsys.readouterr()
    main(["--config", "sampled.yaml", "--model_name_or_path", str(model)])  # the same folder, absolute
    assert "All 16 samples are already in runs/eval/model/sampled" in capsys.readouterr().out
    assert "Its subfolders with results: runs/eval/model/greedy, runs/eval/model/sampled" in complaint(
        ["compare", str(folder), str(folder / "greedy")]
    )
    said = complaint(["--config", "sampled.yaml", "--seed", "1"])
    assert "runs/eval/model/sampled contains samples generated with other settings: seed was 0 and is now 1." in said


def test_results_of_version_0_1(evaluated, model, tmp_path, monkeypatch, caplog):
    """Whose they are is not known. They are neither used nor harmed, and the message says what to do."""
    old = tmp_path / "runs" / "eval" / "model"
    shutil.copytree(evaluated, old)
    settings = json.loads((old / "settings.json").read_text())
    (old / "settings.json").write_text(json.dumps(settings | {"fingerprint": "0123456789abcdef"}))
    said = complaint([*QUICK, "--output_dir", str(old)])
    assert "contains samples of version 0.1, which did not check all of the model's weights" in said
    assert "Choose another output_dir, or move that folder away" in said
    config = yaml.safe_load((ROOT / "configs" / "eval" / "quickstart.yaml").read_text())
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(config | {"limit": 2, "samples": 1}))
    monkeypatch.chdir(tmp_path)
    before = (old / "sums.jsonl").read_bytes()
    main(["--config", "quick.yaml", "--model_name_or_path", "model"])
    assert "runs/eval/model contains results of version 0.1" in caplog.text
    assert len(samples(old / "quick")) == 2
    assert (old / "sums.jsonl").read_bytes() == before


def test_outputs_of_others_are_no_samples(tmp_path):
    shutil.copy(ROOT / "ktae_trl" / "tiny" / "data" / "held_out.jsonl", tmp_path / "sums.jsonl")
    said = complaint([*QUICK, "--output_dir", str(tmp_path)])
    assert "sums.jsonl already exists, but the folder has no settings.json" in said
    assert "delete" not in said


def test_lost_samples_are_generated_again(evaluated, tmp_path):
    """As after a crash: some samples are there, ungraded and in another order, the last line is cut off."""
    main([*QUICK, "--output_dir", str(tmp_path)])
    whole = (tmp_path / "sums.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "sums.jsonl").write_bytes(b"".join(lines[70:] + lines[5:30]) + lines[40][:50])
    main([*QUICK, "--output_dir", str(tmp_path)])
    assert (tmp_path / "sums.jsonl").read_bytes() == whole


def test_greedy_needs_no_seed_and_equals_generate(tmp_path, tokenizer):
    greedy = ["--temperature", "0", "--samples", "1", "--limit", "6"]
    main([*QUICK, *greedy, "--output_dir", str(tmp_path)])
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    for row in samples(tmp_path):
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)
        output = model.generate(**ids, max_new_tokens=80, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert row["completion"] == tokenizer.decode(output, skip_special_tokens=True)
        assert row["tokens"] == len(output)


def test_an_adapter_is_evaluated_on_its_base(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    adapter = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapter.save_pretrained(tmp_path / "adapter")  # without a tokenizer
    greedy = ["--temperature", "0", "--samples", "1", "--limit", "6"]
    main([*QUICK, *greedy, "--model_name_or_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "a")])
    main([*QUICK, *greedy, "--output_dir", str(tmp_path / "b")])
    assert [row["completion"] for row in samples(tmp_path / "a")] != [
        row["completion"] for row in samples(tmp_path / "b")
    ]
    assert samples(tmp_path / "a")[0]["prompt"] == samples(tmp_path / "b")[0]["prompt"]


def test_damaged_models_are_named(model, tmp_path):
    words = [*QUICK, "--limit", "1", "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
    config = (model / "config.json").read_text()
    (model / "model.safetensors").write_bytes(b"no weights")
    assert f"The model {model} (model_name_or_path) could not be loaded: " in complaint(words)
    (model / "tokenizer.json").write_text("{")
    assert f"The tokenizer of {model} (model_name_or_path) could not be loaded: " in complaint(words)
    (model / "config.json").write_text(config.replace("{", "", 1))
    assert f"{model} (model_name_or_path) could not be loaded: " in complaint(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "5"], "k must be between 1 and samples (4), not 5"),
        (["--temperature", "0"], "temperature 0 always gives the same completion, but samples is 4"),
        (["--samples", "0"], "samples must be at least 1, not 0"),
        (["--backend", "tgi"], "backend must be one of vllm, transformers, not 'tgi'"),
        (["--prompt", "qwn"], "prompt must be one of chat, qwen, r1, none, not 'qwn' (did you mean 'qwen'?)"),
        (["--dtype", "flot32"], "dtype must be one of auto, float32, bfloat16, float16, not 'flot32'"),
        (["--limit", "0"], "limit must be at least 1, not 0"),
        (["--temperature", "nan"], "temperature must be at least 0 and finite, not nan"),
        (["--vllm_options", "{bad"], "vllm_options is not valid JSON"),
        (["--vllm_options", "[1]"], "vllm_options must be a JSON object, not [1]"),
        (["--chat_template_kwargs", "{enable_thinking"], "chat_template_kwargs is not valid JSON"),
        (["--chat_template_kwargs", "[1]"], "chat_template_kwargs must be a JSON object, not [1]"),
        (["--prompt", "none", "--chat_template_kwargs", '{"a": 1}'], "need the model's own chat template"),
        (["--model_name_or_path", "ktae_trl/no_such_model"], "The model 'ktae_trl/no_such_model' (model_name"),
        (["--only", "sum"], "Unknown benchmark 'sum' in only (did you mean 'sums'?)"),
        (["--model_name_or_path", "./no/model"], "There is no model ./no/model"),
        (["--model_name_or_path", "configs"], "configs (model_name_or_path) contains neither config.json nor"),
        (["--benchmark_folder", "configs"], "There is no data file configs/sums.jsonl"),
        (["--sample", "4"], "Unknown setting: 'sample' (did you mean 'samples'?)"),
        (["--top_p", "1.5"], "top_p must be above 0 and at most 1, not 1.5"),
    ],
)
def test_bad_settings(tmp_path, words, message):
    assert message in complaint([*QUICK, "--output_dir", str(tmp_path), *words])


def test_how_a_model_is_asked_is_a_setting_of_the_samples(tmp_path):
    template = (Path(tiny.MODEL) / "chat_template.jinja").read_text()
    model = shutil.copytree(tiny.MODEL, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template + "{{ '<think></think>' if enable_thinking is false }}")
    words = [*QUICK, "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out"), "--limit", "1"]
    words += ["--chat_template_kwargs", '{"enable_thinking": false}', "--max_new_tokens", "1"]
    main([*words, "--system_prompt", "null"])
    prompt = samples(tmp_path / "out")[0]["prompt"]
    assert prompt.startswith("<|im_start|>user\nState")
    assert prompt.endswith("assistant\n<think></think>")
    settings = json.loads((tmp_path / "out" / "summary.json").read_text())["settings"]
    assert settings["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs was" in complaint([*words, "--chat_template_kwargs", "null"])
    main([*words, "--system_prompt_in_user", "true", "--output_dir", str(tmp_path / "in_user")])
    assert samples(tmp_path / "in_user")[0]["prompt"].startswith("<|im_start|>user\nPlease reason")


def test_what_is_not_there(tmp_path):
    assert "There is no file nothing.yaml" in complaint(["--config", "nothing.yaml", "--model_name_or_path", "x"])
    config = {"model_name_or_path": str(tiny.MODEL), "benchmarks": [{"name": "a", "dataset": "someone/nothing"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    said = complaint(["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path / "out")])
    assert said.startswith("eval.py: The dataset 'someone/nothing' (benchmark a) is neither in ")


def test_unknown_command():
    assert "unknown command 'comparee' (did you mean 'compare'?)" in complaint(["comparee", "a", "b"])


def test_only_one_process_writes_to_a_folder(tmp_path):
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from ktae_trl.files.lock import locked\nwith locked({str(tmp_path)!r}, 'eval.py'):\n  input()",
        ],
        stdin=subprocess.PIPE,
        cwd=ROOT,
    )
    with other:
        while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text().endswith("}"):
            time.sleep(0.01)
        said = complaint([*QUICK, "--output_dir", str(tmp_path)])
        other.communicate(b"\n")
    assert f"{tmp_path} is in use: eval.py (process {other.pid} on " in said
    assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_settings_are_those_of_the_summary(evaluated, tmp_path, caplog, capsys, kind):
    folder = Path(shutil.copytree(evaluated, tmp_path / "tiny"))
    damage(folder / "settings.json", kind)
    main([*QUICK, "--output_dir", str(folder)])
    assert "All 96 samples are already in" in capsys.readouterr().out
    assert "Using the settings in summary.json" in caplog.text
    for name in ("settings.json", "sums.jsonl"):
        assert (folder / name).read_bytes() == (evaluated / name).read_bytes()
    damage(folder / "settings.json", kind)
    said = complaint([*QUICK, "--temperature", "0.5", "--output_dir", str(folder)])  # they are compared
    assert "contains samples generated with other settings: temperature was 1.0 and is now 0.5" in said


@pytest.mark.parametrize("kind", DAMAGES)
def test_advice_on_damaged_settings_loses_nothing(evaluated, tmp_path, capsys, kind):
    folder = Path(shutil.copytree(evaluated, tmp_path / "tiny"))
    damage(folder / "settings.json", kind)
    damage(folder / "summary.json", "half")
    before = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    said = complaint([*QUICK, "--output_dir", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*")} == before
    assert "delete" not in said.lower()
    if kind == "missing":  # it could be anybody's
        assert f"To grade the file: ktae grade {folder / 'sums.jsonl'}" in said
        main(["grade", str(folder / "sums.jsonl"), "--output_dir", str(tmp_path / "graded")])
        return
    assert "settings.json is damaged (" in said
    assert "run it with another output_dir, stop it when sampling has begun, and copy settings.json from there" in said
    shutil.copy(evaluated / "settings.json", folder)  # as such a run writes it before its first sample
    capsys.readouterr()
    main([*QUICK, "--output_dir", str(folder)])
    assert "All 96 samples are already in" in capsys.readouterr().out
    assert (folder / "sums.jsonl").read_bytes() == before["sums.jsonl"]
    assert json.loads((folder / "summary.json").read_text())["benchmarks"]


def test_results_are_not_written_through_links(evaluated, tmp_path):
    other = tmp_path / "other"
    other.write_text("another's")
    (tmp_path / "graded").mkdir()
    (tmp_path / "compare").mkdir()
    folder = Path(shutil.copytree(evaluated, tmp_path / "tiny"))
    (folder / "summary.json").unlink()
    links = [folder / "summary.json", tmp_path / "compare" / "comparison.json", tmp_path / "graded" / "summary.json"]
    for link in links:
        link.symlink_to(other)
    main([*QUICK, "--output_dir", str(folder)])
    main(["compare", str(folder), str(evaluated), "--output_dir", str(tmp_path / "compare")])
    main(["grade", str(folder / "sums.jsonl"), "--output_dir", str(tmp_path / "graded")])
    assert other.read_text() == "another's"
    for link in links:
        assert not link.is_symlink()
        assert json.loads(link.read_text())
    (tmp_path / "graded" / "sums.jsonl").unlink()
    (tmp_path / "graded" / "sums.jsonl").symlink_to(other)
    main(["grade", str(folder / "sums.jsonl"), "--output_dir", str(tmp_path / "graded")])
    assert other.read_text() == "another's"
    assert len(samples(tmp_path / "graded")) == 96


def test_settings_are_there_before_the_first_sample(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "sample_with_transformers", killed)
    with pytest.raises(SystemExit, match="stopped"):
        main([*QUICK, "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "settings.json").read_text())["samples"] == 4


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "missing"])
def test_a_damaged_summary_is_written_anew(evaluated, tmp_path, kind):
    folder = Path(shutil.copytree(evaluated, tmp_path / "tiny"))
    damage(folder / "summary.json", kind)
    with pytest.raises(ValueError, match=r"run ktae eval again|does not say which model"):
        of_evaluation(folder, folder)
    main([*QUICK, "--output_dir", str(folder)])
    was = json.loads((evaluated / "summary.json").read_text())
    assert json.loads((folder / "summary.json").read_text())["benchmarks"] == was["benchmarks"]


def test_a_last_line_that_is_whole_is_kept(evaluated, tmp_path, capsys):
    """An editor may leave out the end of the last line."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "tiny"))
    whole = (folder / "sums.jsonl").read_bytes()
    (folder / "sums.jsonl").write_bytes(whole.rstrip(b"\n"))
    main([*QUICK, "--output_dir", str(folder)])
    assert "All 96 samples are already in" in capsys.readouterr().out
    assert (folder / "sums.jsonl").read_bytes() == whole


def test_only_keeps_the_other_benchmarks_in_the_summary(tmp_path, caplog):
    config = yaml.safe_load((ROOT / "configs" / "eval" / "quickstart.yaml").read_text())
    config["benchmarks"].append(config["benchmarks"][0] | {"name": "again"})
    (tmp_path / "two.yaml").write_text(
        yaml.safe_dump(config | {"limit": 4, "samples": 1, "output_dir": str(tmp_path / "o")})
    )
    main(["--config", str(tmp_path / "two.yaml")])
    main(["--config", str(tmp_path / "two.yaml"), "--only", "again"])
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert list(summary["benchmarks"]) == ["sums", "again"]
    # What was measured in another way is not mixed in.
    main(["--config", str(tmp_path / "two.yaml"), "--only", "again", "--samples", "2"])
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert list(summary["benchmarks"]) == ["again"]
    assert "sums is not in the summary, because 4 of the requested samples are missing in" in caplog.text


def test_settings_of_the_model_do_not_leak_into_sampling(evaluated, tmp_path):
    """Instruct models ship sampling settings; what is measured is what the config of the evaluation says."""
    shutil.copytree(tiny.MODEL, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    settings |= {
        "num_beams": 3,
        "min_p": 0.5,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 20,
        "top_k": 2,
        "do_sample": True,
    }
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    main([*QUICK, "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")])
    assert samples(tmp_path / "out") == samples(evaluated)


def test_the_context_bounds_completions(tmp_path, caplog):
    main([*QUICK, "--max_new_tokens", "100000", "--limit", "4", "--output_dir", str(tmp_path)])
    assert "16 of 16 completions are limited to fewer than max_new_tokens (100000) tokens" in caplog.text
    problem = {"id": 1, "problem": "1 + " * 1000 + "1 =", "answers": ["1001"]}
    (tmp_path / "sums.jsonl").write_text(json.dumps(problem) + "\n")
    said = complaint([*QUICK, "--benchmark_folder", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert "The prompt of sums, problem '1', has" in said


def test_unparsable_answers_are_listed(tmp_path, caplog):
    (tmp_path / "sums.jsonl").write_text(
        "".join(
            json.dumps({"id": i, "problem": "1 + 1 =", "answers": [a]}) + "\n"
            for i, a in (("p", "2"), ("q", r"\frac{"))
        )
    )
    main([*QUICK, "--benchmark_folder", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert (
        r"sums: the gold answers of 1 of 2 problems cannot be parsed. These problems are excluded: q: \frac{"
        in caplog.text
    )
    figures = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["sums"]
    assert (figures["problems"], figures["unscorable"]) == (1, ["q"])


@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses(config):
    text = config.read_text()
    assert text.startswith(f"# python eval.py --config configs/eval/{config.name}")
    (args,) = parse((EvalArguments,), "eval.py", ["--config", str(config), "--model_name_or_path", "m"])
    assert args.benchmarks == yaml.safe_load(text)["benchmarks"]
    assert args.samples == yaml.safe_load(text)["samples"]


def start(folder, *words, **options):
    command = [sys.executable, "eval.py", *QUICK, "--batch_size", "4", "--output_dir", str(folder), *words]
    return started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def output_of(folder) -> str:
    with start(folder) as process:
        return process.communicate()[0]


def wait_for_samples(process, folder, count):
    """Wait until some samples are on disk and more are to come."""
    path = folder / "sums.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_killed_in_the_middle(tmp_path, blow):
    """A run that was killed and started again leaves the same file as one that was not."""
    assert "96 of 96 samples after" in output_of(tmp_path / "whole")
    with start(tmp_path / "killed") as process:
        wait_for_samples(process, tmp_path / "killed", 8)
        process.send_signal(blow)
        said = process.communicate()[0]
    there = (tmp_path / "killed" / "sums.jsonl").read_bytes().count(b"\n")
    assert 8 <= there < 96
    assert ("Stopping after the current batch" in said) == (blow == signal.SIGINT)
    assert ("The samples generated so far are saved" in said) == (blow != signal.SIGKILL)
    assert "96 of 96 samples after" in output_of(tmp_path / "killed")
    assert (tmp_path / "killed" / "sums.jsonl").read_bytes() == (tmp_path / "whole" / "sums.jsonl").read_bytes()


@pytest.mark.slow
def test_a_background_job_of_nohup_is_not_stopped_by_ctrl_c_or_a_closed_terminal(tmp_path):
    with start(tmp_path, ignored=(signal.SIGINT, signal.SIGHUP)) as process:
        wait_for_samples(process, tmp_path, 8)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGHUP)
        assert "96 of 96 samples after" in process.communicate()[0]
