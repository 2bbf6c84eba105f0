"""The model card, and uploads by the real `huggingface_hub` to a small Hub on loopback."""

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import sys
import types
from pathlib import Path
from subprocess import CompletedProcess

import huggingface_hub
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, constants
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import close_session
from huggingface_hub.utils._runtime import is_xet_available
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState
from trl import ModelConfig

import ktae_trl
from ktae_trl import tiny
from ktae_trl.files import model_files
from ktae_trl.files.fingerprint import fingerprint
from ktae_trl.hub import card as model_card
from ktae_trl.hub import upload as our_hub
from ktae_trl.hub.results import is_hub_id, of_evaluation
from ktae_trl.hub.upload import HubError
from tests import hostile, processes
from tests.distributed import launching
from tests.files.test_fingerprint import change_middle_layer
from tests.hub_server import TOKEN, serving
from tests.trainers import make_trainer

ROOT = Path(__file__).parents[2]
SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 8}


@pytest.fixture
def server(monkeypatch):
    """A Hub, and this process's client set to it. The client reads its settings at import, so they are patched."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own trials
        our_hub.api.cache_clear()
        close_session()
        yield hub
    close_session()
    our_hub.api.cache_clear()


@pytest.fixture
def report(monkeypatch):
    """A maker of pages that is quick; returns what it was called with."""
    calls = []

    def write_report(source, output):
        calls.append((Path(source), Path(output)))
        Path(output).write_text("<p>page</p>")
        return Path(output)

    module = types.ModuleType("ktae_trl.report")
    module.write_report = write_report
    monkeypatch.setitem(sys.modules, "ktae_trl.report", module)
    monkeypatch.setattr(ktae_trl, "report", module, raising=False)
    return calls


def record(folder: Path) -> None:
    """Put something where records are; only their names count here."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    (folder / "rollouts" / "step_000001.parquet").write_bytes(b"PAR1 somebody's data")
    (folder / "rollouts" / "metrics.jsonl").write_text("{}\n")


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sums"
    trainer = make_trainer(folder, **SETTINGS, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_whole_model()
    figures = {"after_greedy": 0.5, "after_sampled": 0.25, "after_samples": 4, "before_greedy": 0.125}
    (folder / model_files.HELD_OUT).write_text(json.dumps({**figures, "before_sampled": 0.1, "problems": 32}))
    trainer.create_model_card()
    record(folder)
    assert list(folder.glob("checkpoint-1/*"))
    return folder


@pytest.fixture
def run(one_run, tmp_path):
    """The folder that a short run left, with a checkpoint, records and measured results."""
    return Path(shutil.copytree(one_run, tmp_path / "runs" / "sums"))


def measured(folder: Path, model: Path, **change) -> Path:
    """Write a summary as eval.py does."""
    settings = {"temperature": 0.6, "top_p": 0.95, "samples": 8, "max_new_tokens": 3000, "seed": 0}
    estimate = [0.75, 0.625, 0.875]
    figures = {
        "problems": 30,
        "accuracy": estimate,
        "pass": {"1": estimate, "8": [0.9, 0.8, 1]},
        "maj": {"1": estimate},
    }
    summary = {
        "benchmarks": {"aime24": figures, "own | `sums`\n": {**figures, "accuracy": [0.1, float("nan"), float("nan")]}},
        "datasets": {
            "aime24": {"dataset": "HuggingFaceH4/aime_2024", "config": None, "split": "train"},
            "own | `sums`\n": {"dataset": "/data/own sums.jsonl", "config": None, "split": "test"},
        },
        "model": str(model),
        "settings": {**settings, "fingerprint": fingerprint(str(model))},
    }
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary | change))
    return folder


def files_for_the_hub(folder: Path) -> dict[str, bytes]:
    """What must arrive: said independently of the patterns."""
    private = ("rollouts", "checkpoint-1", "completions", "runs")
    kept = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in private
    }
    stay = ("training_args.bin", "held_out_before.json", ".lock")
    return {name: data for name, data in kept.items() if name not in stay}


def snapshot(folder: Path) -> dict[str, str]:
    """What must not be lost. The card may gain words."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (model_files.CARD, model_files.PAGE)
    }


def retry_command(message: str) -> list[str]:
    return shlex.split(re.search(r"Try again: ktae push (.*)$", message)[1])


# The card


def test_the_card_says_what_the_run_was(tmp_path):
    trainer = make_trainer(
        tmp_path / "sums", ktae_tf_weight=2.0, hub_token="hf_secret_of_somebody_1234", hub_model_id="ann/sums"
    )
    trainer.recipe = {"dataset_name": "nlile/hendrycks-MATH-benchmark", "system_prompt": "Use ```python\nfences```."}
    trainer.create_model_card()
    text = (tmp_path / "sums" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.tags == sorted(card.data.tags)
    assert {"ktae", "trl", "grpo"} <= set(card.data.tags)
    assert card.data.datasets == "nlile/hendrycks-MATH-benchmark"
    assert card.data.library_name == "transformers"
    assert "associated with the correct or the wrong rollouts" in text
    assert "version of a local model (model) on the [nlile/hendrycks-MATH-benchmark]" in text
    settings = yaml.safe_load(re.search(r"^(`{4})yaml\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)[2])
    assert settings["ktae_tf_weight"] == 2.0
    assert settings["reward_funcs"] == ["math_accuracy"]
    assert settings["system_prompt"] == "Use ```python\nfences```."
    assert settings["learning_rate"] == 1e-3
    assert settings["credit"] == "ktae"
    assert (settings["ktae_ig_weight"], settings["num_generations"], settings["num_processes"]) == (1.0, 8, 1)
    assert not {"output_dir", "hub_token", "weight_decay", "accelerator_config"} & settings.keys()
    assert f"- ktae-trl: {ktae_trl.__version__}\n- TRL: " in text
    assert not [name for name in settings if name.startswith("hub_")]
    assert "hf_secret" not in text
    assert "secret" not in text
    assert text.count("## Training procedure") == text.count("### Framework versions") == 1
    assert "sun2025ktae" in text
    assert "vonwerra2020trl" in text


def test_settings_hide_secrets_and_homes():
    hidden = {"token": "abc", "api_key": "abc", "trust_remote_code": True, "url": "http://ann:pw@host/x", "t": None}
    args = ktae_trl.KTAEGRPOConfig(output_dir="x", use_cpu=True, bf16=False, model_init_kwargs=hidden)
    assert model_card.settings_of(args)["model_init_kwargs"] == {
        "token": "<secret>",
        "api_key": "<secret>",
        "trust_remote_code": True,
        "url": "http://<secret>@host/x",
    }
    model = ModelConfig(model_name_or_path="/home/ann/models/base")
    assert model_card.settings_of(model) == {"model_name_or_path": ".../base"}


def test_a_base_model_on_the_hub_is_linked_for_an_adapter_too(tmp_path):
    for name, adapter in (("full", None), ("lora", LoraConfig(r=2, target_modules=["q_proj"]))):
        trainer = make_trainer(tmp_path / name, peft_config=adapter)
        trainer.model.config._name_or_path = "Qwen/Qwen2.5-Math-1.5B"
        trainer.create_model_card()
        text = (tmp_path / name / "README.md").read_text()
        data = ModelCard(text).data
        assert data.base_model == "Qwen/Qwen2.5-Math-1.5B"
        assert "[Qwen/Qwen2.5-Math-1.5B](https://huggingface.co/Qwen/Qwen2.5-Math-1.5B)" in text
        assert (data.library_name, data.get("base_model_relation")) == (
            ("peft", "adapter") if adapter else ("transformers", None)
        )


@pytest.mark.parametrize(
    "name",
    [
        'a"b',
        "x\n---\nlicense: mit",
        "## Training procedure",
        "<script>alert(1)</script>",
        "`a` | [b](c)",
        "!!python/object: {a: 1}",
    ],
)
def test_names_do_not_break_the_card(tmp_path, name):
    trainer = make_trainer(tmp_path / "run")
    trainer.recipe = {"dataset_name": f"data/{name}", "filter": {name: name}}
    trainer.model.config._name_or_path = ""
    trainer.create_model_card(model_name=name)
    text = (tmp_path / "run" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.model_name == " ".join(name.split())
    assert set(card.data.to_dict()) == {"library_name", "model_name", "tags"}
    body = card.text
    (heading,) = re.findall("^# Model.*", body, re.MULTILINE)
    block = re.search("```yaml\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(block[1])["filter"] == {name: name}
    outside = body.replace(block[0], "")
    assert "<script" not in outside
    assert len(re.findall("^## Training procedure", outside, re.MULTILINE)) == 1
    assert (
        heading.replace("\\", "").replace("&lt;", "<").replace("&gt;", ">")
        == f"# Model Card for {card.data.model_name}"
    )


def test_what_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "own").mkdir(parents=True)
    assert is_hub_id("gsm8k")
    assert is_hub_id("nlile/hendrycks-MATH-benchmark")
    for name in (None, "", "tiny", "data/own", "data/own.jsonl", "/data/own", "a/b/c", "../own", "a b"):
        assert not is_hub_id(name), name


def test_results_become_metadata_and_a_table(run, tmp_path):
    found = of_evaluation(measured(tmp_path / "eval", run), run)
    model_card.update(run, results=found)
    model_card.update(run, results=found)  # a second time changes nothing
    text = (run / "README.md").read_text()
    name, results = model_index_to_eval_results(metadata_load(run / "README.md")["model-index"])
    assert name == "sums"
    values = {(r.metric_args["benchmark"], r.metric_name): r.metric_value for r in results}
    how = "mean of 8 samples at temperature 0.6, top_p 0.95"
    assert values == {
        ("aime24", f"accuracy, {how}"): 0.75,
        ("aime24", "pass@8 of 8 samples"): 0.9,
        ("own | `sums`\n", f"accuracy, {how}"): 0.1,
        ("own | `sums`\n", "pass@8 of 8 samples"): 0.9,
        ("held-out problems", "accuracy, greedy, measured in training"): 0.5,
        ("held-out problems", "accuracy, mean of 4 samples at temperature 1, measured in training"): 0.25,
    }
    aime = next(r for r in results if r.dataset_name == "aime24")
    assert (aime.dataset_type, aime.dataset_split) == ("HuggingFaceH4/aime_2024", "train")
    assert aime.metric_args["interval_95"] == [0.625, 0.875]
    for result in results:  # what the Hub takes
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result.dataset_type)
    assert text.count("## Results") == 1
    assert f"| aime24 | accuracy, {how} | 75.0% | 62.5% to 87.5% | 30 |  |" in text
    assert "| own \\| \\`sums\\` |" in text
    assert "measured in training | 50.0% |  | 32 | 12.5% |" in text
    # Measured again, the figures are replaced; greedy ones are others.
    again = [EvalResult(**{**vars(r), "metric_value": 0.8}) for r in found if r.dataset_name == "aime24"]
    model_card.update(run, results=again)
    text = (run / "README.md").read_text()
    assert f"| aime24 | accuracy, {how} | 80.0% |" in text
    assert "75.0%" not in text
    assert text.count("| aime24 |") == 2


def test_results_of_a_card_of_version_0_1_are_replaced(run, tmp_path):
    text = (run / "README.md").read_text()
    old = "<!-- Results: python -m ktae_trl.hub FOLDER writes them -->"
    text, count = re.subn("<!-- Results: .*? -->", old, text)
    (run / "README.md").write_text(text)
    model_card.update(run, results=of_evaluation(measured(tmp_path / "eval", run), run))
    assert count == (run / "README.md").read_text().count("## Results") == 1


def test_results_of_an_earlier_run_are_not_those_of_one_that_still_trains(tmp_path):
    trainer = make_trainer(tmp_path)
    (tmp_path / model_files.HELD_OUT).write_text(
        json.dumps({"after_greedy": 0.5, "after_sampled": 0.5, "after_samples": 1})
    )
    trainer.is_in_train = True  # as when a checkpoint is saved
    trainer.create_model_card()
    assert "50.0%" not in (tmp_path / "README.md").read_text()
    trainer.is_in_train = False
    trainer.create_model_card()
    assert "50.0%" in (tmp_path / "README.md").read_text()


def test_greedy_results_say_so(run, tmp_path):
    settings = {"temperature": 0.0, "top_p": 1.0, "samples": 1, "max_new_tokens": 30, "seed": 0}
    folder = measured(tmp_path / "eval", run, settings={**settings, "fingerprint": fingerprint(str(run))})
    assert of_evaluation(folder, run)[0].metric_name == "accuracy, greedy"


def test_results_of_another_model_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="weights differ from those in"):
        of_evaluation(measured(tmp_path / "a", tiny.MODEL), run)
    mine, other = measured(tmp_path / "d", run), measured(tmp_path / "b", run, file="graded.jsonl")
    assert of_evaluation(mine, run)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({"benchmarks": summary["benchmarks"], "file": "graded.jsonl"}))
    with pytest.raises(ValueError, match="does not say which model was evaluated"):
        of_evaluation(other, run)
    with pytest.raises(FileNotFoundError, match=r"contains no summary\.json"):
        of_evaluation(tmp_path, run)
    for old in (None, "0123456789abcdef"):  # None: of a Hub id, under which there may be another model by now
        before = measured(tmp_path / "c", run, settings={**summary["settings"], "fingerprint": old})
        with pytest.raises(ValueError, match=r"was written by version 0.1 of eval.py, .* Evaluate again: ktae eval"):
            of_evaluation(before, run)
    change_middle_layer(run)
    with pytest.raises(ValueError, match="weights differ from those in"):
        of_evaluation(mine, run)


def test_results_of_the_same_weights_saved_again_are_accepted(run, tmp_path):
    # A checkpoint of these very weights is this model.
    assert of_evaluation(measured(tmp_path / "d", run / "checkpoint-1"), run)
    (run / "training_args.bin").write_bytes(b"of another run")
    AutoModelForCausalLM.from_pretrained(run).save_pretrained(run)
    AutoTokenizer.from_pretrained(run).save_pretrained(run)
    assert of_evaluation(tmp_path / "d", run)


# Uploads


@pytest.mark.parametrize("private", [None, True, False])
def test_push_to_hub(server, report, tmp_path, private):
    folder = tmp_path / "sums"
    trainer = make_trainer(folder, **SETTINGS, save_strategy="steps", save_steps=1, hub_private_repo=private)
    trainer.train()
    record(folder)
    info = trainer.push_to_hub(dataset_name="ann/problems")
    assert isinstance(info, huggingface_hub.CommitInfo)
    (repo,) = server.repos.values()
    assert server.repos.keys() == {"ann/sums"}
    assert repo["private"] is bool(private)
    assert repo["commits"][-1]["message"] == "End of training"
    assert repo["files"] == files_for_the_hub(folder)
    assert {"model.safetensors", "tokenizer.json", "config.json", "README.md", "key_tokens.html"} <= repo[
        "files"
    ].keys()
    weights = (folder / "model.safetensors").read_bytes()
    assert server.objects[hashlib.sha256(weights).hexdigest()] == weights
    assert report == [(folder, folder / ".part-key_tokens.html")]
    text = repo["files"]["README.md"].decode()
    card = ModelCard(text)
    assert card.data.datasets == "ann/problems"
    assert 'model="ann/sums"' in text
    assert "[key_tokens.html](key_tokens.html)" in text


def test_push_an_adapter_in_the_background(server, tmp_path):
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(tmp_path / "lora", peft_config=adapter, hub_model_id="team/adapter", credit="tree")
    future = trainer.push_to_hub(blocking=False, commit_message="adapter", tags="mine")
    assert future.result(timeout=60).repo_url.repo_id == "team/adapter"
    files = server.repos["team/adapter"]["files"]
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert "key_tokens.html" not in files
    data = ModelCard(files["README.md"].decode()).data
    assert data.get("base_model") is None  # it came from a folder, which the Hub would refuse
    assert data.library_name == "peft"
    assert {"treerpo", "trl", "grpo", "mine"} <= set(data.tags)


def test_a_push_in_the_background_fails(server, tmp_path, caplog):
    server.fault("refuse", "/preupload/", 403)
    future = make_trainer(tmp_path / "sums").push_to_hub(blocking=False)
    assert isinstance(future.exception(timeout=60), HubError)
    assert (
        "A background upload to the Hub failed: The upload to sums failed: the token has no write access" in caplog.text
    )
    assert (tmp_path / "sums" / "model.safetensors").exists()


@pytest.mark.parametrize("credit", ["none", "oar_g"])
def test_cards_of_other_methods_on_the_hub(server, tmp_path, credit):
    make_trainer(tmp_path / "other", credit=credit).push_to_hub()
    data = ModelCard(server.repos["ann/other"]["files"]["README.md"].decode()).data
    assert "ktae" not in data.tags
    assert ("oar" in data.tags) == (credit == "oar_g")


def test_uploads_during_training(server, report, tmp_path):
    """`push_to_hub: true` and `hub_strategy: every_save`, as transformers has it, but without the rollouts."""
    folder = tmp_path / "sums"
    settings = {
        **SETTINGS,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "hub_always_push": True,
        "record_steps": 1,
        "report_to": "tensorboard",
    }
    trainer = make_trainer(folder, **settings, push_to_hub=True, hub_private_repo=True, hub_token=TOKEN)
    assert server.repos["ann/sums"]["private"]
    trainer.train()
    (repo,) = server.repos.values()
    messages = [commit["message"] for commit in repo["commits"]]
    assert messages  # one that has nothing new to send makes no commit
    assert set(messages) <= {"Training in progress, step 1", "Training in progress, step 2"}
    assert list(folder.glob("runs/*/events*"))
    assert not [name for name in repo["files"] if re.search("rollouts|checkpoint|events|training_args", name)]
    assert not [name for name, data in repo["files"].items() if TOKEN.encode() in data]
    assert repo["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    trainer.push_to_hub()
    assert repo["files"].keys() >= {"key_tokens.html", "README.md"}


def test_a_card_has_no_results_of_an_earlier_run(tmp_path):
    (tmp_path / model_files.HELD_OUT).write_text('{"after_greedy": 0.99, "after_sampled": 0.98, "after_samples": 4}')
    trainer = make_trainer(tmp_path)
    trainer.save_all(push=False)
    assert "99.0%" in (tmp_path / "README.md").read_text()
    trainer.train()
    trainer.save_all(push=False)
    assert "99.0%" not in (tmp_path / "README.md").read_text()


def test_failed_uploads_during_training_are_a_warning(server, tmp_path, caplog):
    settings = {**SETTINGS, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "sums", **settings, push_to_hub=True)
    server.fault("refuse", "POST /api/models", 403)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 2
    assert "A background upload to the Hub failed: the token has no write access (403: the test says no)" in (
        caplog.text
    )


def test_a_page_that_cannot_be_made_is_a_warning(server, report, run, monkeypatch, caplog):
    def broken(source, output):
        Path(output).write_text("half")
        raise ValueError("a broken record")

    monkeypatch.setattr(sys.modules["ktae_trl.report"], "write_report", broken)
    our_hub.publish(run)
    assert f"Could not write the key-token page of {run}: ValueError: a broken record" in caplog.text
    assert "model.safetensors" in server.repos["ann/sums"]["files"]
    assert not [name for name in server.repos["ann/sums"]["files"] if "key_tokens" in name]
    assert "key_tokens" not in (run / "README.md").read_text()
    assert not list(run.glob("*key_tokens*"))


FAULTS = {
    "refused": (("refuse", "POST /api/repos", 401), "was rejected (401). Log in with `hf auth login`"),
    "no write access": (("refuse", "/preupload/", 403), "the token has no write access (403: the test says no)"),
    "weights refused": (("refuse", "PUT /lfs", 403), "the token has no write access (403"),
    "dropped at the weights": (("drop", "PUT /lfs"), "the connection failed ("),
    "dropped at the commit": (("drop", "/commit/"), "the connection failed ("),
    "full": (("refuse", "/objects/batch", 507), "507"),
    "slow": (("slow", "/commit/", 3.0), "no response within 0.5 seconds"),
    "slow at first": (("slow", "POST /api/repos", 3.0), "no response within 0.5 seconds"),
}


@pytest.mark.slow_after(4)
@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_upload_loses_nothing_and_says_how_to_try_again(server, report, run, monkeypatch, capsys, name):
    fault, reason = FAULTS[name]
    monkeypatch.setattr(our_hub, "TIMEOUT", 0.5)
    server.fault(*fault)
    before = snapshot(run)
    args = ["--repo_id", "ann/my sums".replace(" ", "-"), "--private", "true"]
    with pytest.raises(SystemExit) as end:
        our_hub.main([str(run), *args])
    message = str(end.value.code)
    assert "\n" not in message
    assert message.startswith("ktae push: The upload to ann/my-sums failed: ")
    assert reason in message
    assert f"Nothing is lost: the model is in {run}." in message
    assert retry_command(message) == [str(run), *args]
    assert snapshot(run) == before
    assert (run / "key_tokens.html").exists()
    ModelCard((run / "README.md").read_text())

    server.faults.clear()
    monkeypatch.setattr(our_hub, "TIMEOUT", 30)
    close_session()  # which had the other limit
    our_hub.main(retry_command(message))
    assert f"Uploaded {run}: {server.url}/ann/my-sums" in capsys.readouterr().out
    assert server.repos["ann/my-sums"]["private"]
    assert server.repos["ann/my-sums"]["files"] == files_for_the_hub(run)
    assert snapshot(run) == before
    assert len(report) == 1


def test_a_bug_keeps_its_traceback(server, report, run, monkeypatch):
    monkeypatch.setattr(model_card, "update", lambda folder: None)  # which takes no `repo_id`
    with pytest.raises(TypeError):
        our_hub.send(run, "sums")


def test_the_client_waits_as_long_as_its_owner_wants(server, report, run):
    assert huggingface_hub.get_session().timeout.read is None
    our_hub.publish(run)
    assert huggingface_hub.get_session().timeout.read == our_hub.TIMEOUT
    huggingface_hub.get_session().timeout = 7.0
    our_hub.publish(run)
    assert huggingface_hub.get_session().timeout.read == 7.0


def test_trying_again_sends_only_what_is_missing(server, report, run):
    server.fault("drop", "/commit/")
    with pytest.raises(HubError):
        our_hub.publish(run)
    server.faults.clear()
    sent = server.asked("PUT /lfs")
    assert sent == 1
    our_hub.publish(run)
    assert server.asked("PUT /lfs") == sent
    our_hub.publish(run, "ann/sums")
    assert len(server.repos["ann/sums"]["commits"]) == 1  # nothing had changed


def test_the_client_s_other_way_of_uploading(server, report, run, monkeypatch):
    """With Xet, which is the default, the client sends a folder in several commits. (This Hub stores all as files.)"""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    assert is_xet_available()
    server.large = ()
    server.fault("drop", "/commit/")
    with pytest.raises(HubError, match="the connection failed"):
        our_hub.publish(run)
    server.faults.clear()
    our_hub.publish(run)
    assert server.repos["ann/sums"]["files"] == files_for_the_hub(run)
    assert not server.asked("lfs")


def test_metadata_that_somebody_broke_are_not_overwritten(server, run):
    card = run / "README.md"
    for broken in ("---\ntags: [a\n---\n# Mine\n", "---\nmodel-index: 3\n---\n# Mine\n"):
        card.write_text(broken)
        with pytest.raises(SystemExit, match=r"The metadata at the top of .* is not valid"):
            our_hub.main([str(run)])
        assert card.read_text() == broken
    card.unlink()
    our_hub.main([str(run)])
    assert "README.md" not in server.repos["ann/sums"]["files"]


def test_results_go_up_with_the_command(server, report, run, tmp_path):
    our_hub.main([str(run), "--results", str(measured(tmp_path / "eval", run))])
    data = server.repos["ann/sums"]["files"]["README.md"].decode()
    assert len(ModelCard(data).data.eval_results) == 6
    assert not server.repos["ann/sums"]["private"]


def test_trainer_pushes_after_a_failure(server, report, tmp_path):
    """The first network call fails: all is on disk by then."""
    trainer = make_trainer(tmp_path / "sums", hub_token="hf_" + "w" * 34, hub_revision="v1", hub_private_repo=True)
    with pytest.raises(HubError, match="the token is missing or was rejected") as error:
        trainer.push_to_hub()
    folder = tmp_path / "sums"
    words = [str(folder), "--repo_id", "sums", "--private", "true", "--revision", "v1"]
    assert retry_command(str(error.value)) == words
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert ModelCard((folder / "README.md").read_text()).data.model_name == "sums"
    assert "hf_wwww" not in str(error.value)
    our_hub.main(words)
    assert server.repos["ann/sums"]["files"] == files_for_the_hub(folder)


def test_a_repository_that_cannot_be_made_ends_it_before_anything_is_loaded(server, tmp_path):
    server.token = "another"
    with pytest.raises(
        HubError, match="Could not create the repository sums on the Hub: the token is missing or was rejected"
    ):
        make_trainer(tmp_path / "sums", push_to_hub=True)


def test_a_public_repository_is_not_taken_for_a_private_one(server, run):
    server.repos["ann/sums"] = {"private": False, "files": {}, "commits": []}
    with pytest.raises(
        HubError, match="already exists on the Hub and is public, but a private repository was requested"
    ):
        our_hub.publish(run, private=True)
    assert not server.repos["ann/sums"]["commits"]


def test_what_is_no_model_is_refused(server, tmp_path, capsys):
    with pytest.raises(SystemExit, match="contains no model: it has neither"):
        our_hub.main([str(tmp_path)])
    with pytest.raises(SystemExit):
        our_hub.main([str(tmp_path), "--private", "maybe"])
    assert not server.requests


# What must not leave the folder


def leaked(repo: dict) -> list[str]:
    """Return which files of a repository hold what lay in the folder or behind its links."""
    return sorted(name for name, data in repo["files"].items() if hostile.SECRET.encode() in data)


def test_hostile_files_stay_here_with_the_command(server, report, run, caplog):
    expected = set(files_for_the_hub(run)) | {"key_tokens.html"}
    assert hostile.add(run, run.parent / "outside") > 70
    our_hub.main([str(run)])
    repo = server.repos["ann/sums"]
    assert leaked(repo) == []
    assert set(repo["files"]) == expected - {"generation_config.json"}  # which is a link in here
    (said,) = [message for message in caplog.messages if "were not uploaded: " in message]
    assert len(said) < 2000
    names = ("seed2/ (6 files)", "training_args.bin", "generation_config.json (a symbolic link)", "wandb/ (2 files)")
    for name in names:
        assert name in said


def test_hostile_files_stay_here_after_training(server, report, tmp_path):
    folder = tmp_path / "sums"
    hostile.add(folder, tmp_path / "outside", links={})
    trainer = make_trainer(folder, **SETTINGS, save_strategy="steps", save_steps=1)
    trainer.train()
    for name, target in hostile.LINKS.items():  # what the last save did not replace
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(tmp_path / "outside" / target)
    trainer.push_to_hub()
    assert leaked(server.repos["ann/sums"]) == []
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= server.repos["ann/sums"]["files"].keys()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_hostile_files_stay_here_during_training(server, report, tmp_path, monkeypatch, strategy):
    folder = tmp_path / "sums"
    hostile.add(folder, tmp_path / "outside")
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "hub_always_push": True}
    trainer = make_trainer(folder, **settings, push_to_hub=True, hub_strategy=strategy, hub_token=TOKEN)
    checkpoint = folder / "checkpoint-1"

    def add_to_checkpoint(*_):
        for name in (".env", "train.jsonl", "wandb/config.yaml", "optimizer.pt.bak", "seed2/training_args.bin"):
            (checkpoint / name).parent.mkdir(exist_ok=True)
            (checkpoint / name).write_text(hostile.SECRET)
        (checkpoint / "manifest.json").write_text("{}")
        (checkpoint / "scaler.pt").symlink_to(tmp_path / "outside" / "id_rsa")
        (checkpoint / "global_step1").symlink_to(tmp_path / "outside" / "private_folder")

    save = TrainerState.save_to_json  # into a checkpoint that is not sent yet
    monkeypatch.setattr(TrainerState, "save_to_json", lambda *arguments: (save(*arguments), add_to_checkpoint()))
    before = snapshot(tmp_path / "outside")
    trainer.train()
    (repo,) = server.repos.values()
    assert leaked(repo) == []
    assert snapshot(tmp_path / "outside") == before
    assert not [name for name, data in repo["files"].items() if TOKEN.encode() in data]
    assert {"model.safetensors", "tokenizer.json"} <= repo["files"].keys()
    name = {"every_save": None, "checkpoint": "last-checkpoint", "all_checkpoints": "checkpoint-1"}[strategy]
    sent = {tuple(path.split("/", 1)) for path in repo["files"] if "/" in path}
    assert {where for where, _ in sent} == ({name} if name else set())
    if name:
        own = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
        own |= {"chat_template.jinja", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
        assert {path for _, path in sent} == own | {"rollouts_0.pt", "manifest.json"}


def test_files_are_added_by_name(server, report, run):
    (run / "notes.txt").write_text("of interest")
    (run / "logs").mkdir()
    (run / "logs" / "[1] loss.csv").write_text("1,2")
    our_hub.main([str(run), "--include", "notes.txt", "logs/[1] loss.csv"])
    files = server.repos["ann/sums"]["files"]
    assert files["notes.txt"] == b"of interest"
    assert files["logs/[1] loss.csv"] == b"1,2"
    assert not [name for name in files if name.startswith(("rollouts", "checkpoint"))]


def test_a_failed_upload_with_added_files_says_so(server, report, run):
    (run / "my notes.txt").write_text("of interest")
    server.fault("drop", "/commit/")
    with pytest.raises(SystemExit) as end:
        our_hub.main([str(run), "--include", "my notes.txt"])
    words = retry_command(str(end.value.code))
    assert words[-2:] == ["--include", "my notes.txt"]
    server.faults.clear()
    our_hub.main(words)
    assert "my notes.txt" in server.repos["ann/sums"]["files"]


REFUSED = {
    "training_args.bin": "contains all training arguments, including hub_token",
    "seed2/training_args.bin": "contains all training arguments, including hub_token",
    ".env": "is a hidden file",
    ".git/config": "is a hidden file",
    "generation_config.json": "is a symbolic link",
    "linked/config.json": "is a symbolic link",
    "../outside/id_rsa": "is not inside",
    "notes.txt": "seems to contain a Hugging Face token",
    "seed2": "is a folder",
    "nothing.txt": "There is no file nothing.txt",
}


def test_weights_that_cannot_be_sent_are_said(server, run):
    (run / "model.safetensors").rename(run.parent / "weights")
    with pytest.raises(SystemExit, match=r"contains no weights .* ktae merge"):
        our_hub.main([str(run)])
    (run / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(SystemExit, match=r"pytorch_model\.bin is a pickle, .* add --include pytorch_model\.bin"):
        our_hub.main([str(run)])
    (run / "model.safetensors").symlink_to(run.parent / "weights")
    with pytest.raises(SystemExit, match=r"The weights in .* are a symbolic link .*Copy the file there"):
        our_hub.main([str(run)])
    assert not server.requests


def test_a_card_or_records_behind_a_link_are_not_read(server, run):
    outside = run.parent / "outside"
    outside.mkdir()
    (run / "README.md").rename(outside / "README.md")
    (run / "README.md").symlink_to(outside / "README.md")
    (run / "rollouts").rename(outside / "rollouts")
    (run / "rollouts").symlink_to(outside / "rollouts")
    before = (outside / "README.md").read_bytes()
    our_hub.main([str(run)])
    assert not {"README.md", "key_tokens.html"} & server.repos["ann/sums"]["files"].keys()
    assert (outside / "README.md").read_bytes() == before
    assert (run / "README.md").is_symlink()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_asked_for_by_name_and_refused(server, report, run, name):
    hostile.add(run, run.parent / "outside")
    with pytest.raises(SystemExit, match=REFUSED[name]):
        our_hub.main([str(run), "--include", name])
    assert not server.requests


def test_a_token_in_a_file_of_the_model_ends_the_upload(server, report, run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"token": hostile.SECRET}))
    with pytest.raises(SystemExit, match=r"config\.json seems to contain a Hugging Face token"):
        our_hub.main([str(run)])
    assert not server.repos or not server.repos["ann/sums"]["files"]


def test_no_token_is_on_disk_but_in_training_args(tmp_path):
    """Nor is one that a model is loaded with, except in TensorBoard's logs, which have all arguments in clear."""
    folder = tmp_path / "sums"
    settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "record_steps": 1, "report_to": "tensorboard"}
    trainer = make_trainer(folder, **settings, hub_token=TOKEN, log_completions=True)
    trainer.args.model_init_kwargs = {"token": hostile.SECRET}  # as for a model by name
    trainer.train()
    trainer.save_all(push=False)

    def holding(token: str) -> set[str]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.name.partition(".tfevents")[0] for path in files if token.encode() in path.read_bytes()}

    assert holding(TOKEN) == {"training_args.bin"}
    assert holding(hostile.SECRET) == {"training_args.bin", "events.out"}
    (events,) = folder.rglob("events*")
    assert not {"training_args.bin", events.name} & set(model_files.of_model(folder).sent)
    with pytest.raises(model_files.RefusedFileError, match="seems to contain a Hugging Face token"):
        model_files.of_model(folder, [events.relative_to(folder).as_posix()])


# train.py, as a user starts it


def client(server, token: str = TOKEN) -> dict[str, str]:
    """The environment of a process that knows this server as the Hub."""
    switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **switches, "HF_ENDPOINT": server.url, "HF_TOKEN": token, "OMP_NUM_THREADS": "1"}


def train(server, output: Path, *words: str, token: str = TOKEN, lines: str = "") -> CompletedProcess:
    recipe = output.parent / "recipe.yaml"
    recipe.write_text((ROOT / "configs/quickstart.yaml").read_text() + lines)
    small = {"max_steps": 1, "per_device_train_batch_size": 16, "eval_strategy": "no", "eval_size": 4}
    small |= {"held_out_samples": 1, "report_to": "none", "output_dir": output, "save_strategy": "no"}
    return processes.run(
        [sys.executable, "train.py", "--config", str(recipe), *map(str, words)]
        + [str(word) for key, value in small.items() for word in (f"--{key}", value)],
        cwd=ROOT,
        env=client(server, token),
    )


@pytest.mark.slow
def test_train_py_pushes(server, tmp_path):
    done = train(server, tmp_path / "sums", lines="\npush_to_hub: true\nhub_private_repo: true\n")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Uploaded to {server.url}/ann/sums" in done.stdout
    repo = server.repos["ann/sums"]
    assert repo["private"]
    assert repo["files"] == files_for_the_hub(tmp_path / "sums")
    assert [commit["message"] for commit in repo["commits"]] == ["End of training"]
    text = repo["files"]["README.md"].decode()
    data = ModelCard(text).data
    assert [r.metric_name for r in data.eval_results] == [
        "accuracy by math_accuracy, greedy, measured in training",
        "accuracy by math_accuracy, mean of 1 samples at temperature 1, measured in training",
    ]
    assert all("before_training" in r.metric_args for r in data.eval_results)
    assert "on local data (tiny)" in text
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "model.safetensors").write_bytes(repo["files"]["model.safetensors"])
    assert load_file(tmp_path / "copy" / "model.safetensors")


@pytest.mark.slow
def test_train_py_ends_at_once_without_a_token(server, tmp_path):
    done = train(server, tmp_path / "sums", "--push_to_hub", "true", token="hf_nobody")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = "train.py: Could not create the repository sums on the Hub: the token is missing or was rejected (401)."
    assert done.stderr.strip().splitlines()[-1].startswith(line)
    assert "Loading weights" not in done.stderr
    assert not (tmp_path / "sums").exists()


@pytest.mark.slow
def test_train_py_says_how_to_go_on_when_the_upload_fails(server, tmp_path):
    server.fault("drop", "/commit/")
    done = train(server, tmp_path / "sums", "--push_to_hub", "true", "--hub_private_repo", "true")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Saved model, tokenizer and card in" in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: The upload to ann/sums failed: the connection failed (")
    before = snapshot(tmp_path / "sums")
    server.faults.clear()
    command = [sys.executable, "-m", "ktae_trl", "push", *retry_command(last)]
    again = processes.run(command, cwd=ROOT, env=client(server))
    assert again.returncode == 0, again.stderr
    assert server.repos["ann/sums"]["private"]
    assert server.repos["ann/sums"]["files"] == files_for_the_hub(tmp_path / "sums")
    assert snapshot(tmp_path / "sums") == before


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["at the start", "at the end"])
def test_two_processes_end_when_the_upload_fails(server, tmp_path, fails):
    server.fault(*(("refuse", "POST /api/repos", 401) if fails == "at the start" else ("drop", "/commit/")))
    words = ["--config", "configs/quickstart.yaml", "--output_dir", str(tmp_path / "sums"), "--push_to_hub", "true"]
    small = {"max_steps": 1, "per_device_train_batch_size": 16, "eval_strategy": "no", "held_out_samples": 0}
    words += [str(word) for key, value in (small | {"save_strategy": "no"}).items() for word in (f"--{key}", value)]
    done = processes.run(
        [*launching.accelerate(tmp_path / "launch", "ddp"), "tests/distributed/train_on_cpu.py", *words],
        cwd=ROOT,
        env={**client(server), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        timeout=200,  # a process that waits for one that is gone would wait for half an hour
    )
    assert done.returncode != 0
    (line,) = re.findall(r"^train\.py: .*(?:Hub|upload).*$", done.stderr, re.MULTILINE)
    if fails == "at the start":
        assert "the token is missing or was rejected (401)" in line
        assert not (tmp_path / "sums").exists()
        return
    assert "\nran as 2 MULTI_CPU DistributedDataParallel\n" in done.stdout
    assert line.startswith("train.py: The upload to ann/sums failed: the connection failed (")
    server.faults.clear()
    our_hub.main(retry_command(line))
    assert server.repos["ann/sums"]["files"] == files_for_the_hub(tmp_path / "sums")
