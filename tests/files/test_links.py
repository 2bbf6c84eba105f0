"""What a link in a run's folder points to is never written, whoever writes there: we or the libraries."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from ktae_trl.evaluation.comparison import Run
from ktae_trl.evaluation.plot import plot
from ktae_trl.evaluation.samples import Store
from ktae_trl.evaluation.summary import Results
from ktae_trl.files.fingerprint import fingerprint
from ktae_trl.hub import card as model_card
from ktae_trl.hub import merge
from ktae_trl.report import records, write_report
from ktae_trl.training.held_out import Accuracy, HeldOutAccuracy
from tests.report.test_records import METHOD, row
from tests.trainers import difference, make_trainer

ROOT = Path(__file__).parents[2]
SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
# What a training writes into its folder beside the model's own files.
WRITTEN = [
    "README.md", "training_args.bin", "held_out_results.json", "all_results.json", "key_tokens.html",
    "trainer_state.json", "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json",
    "model-00001-of-00002.safetensors", "adapter_config.json", "adapter_model.safetensors",
]  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def outside(tmp_path):
    """A folder of something else, which must be as it was when the test ends."""
    folder = tmp_path / "outside"
    shutil.copytree(tiny.MODEL, folder)
    for name in WRITTEN:
        (folder / name).write_text(f"another's {name}")
    (folder / "lines.jsonl").write_text("{}\n")
    (folder / "rollouts").mkdir()
    for step in (1, 2):
        records.write(folder / "rollouts" / records.file_name(step), records.Record(METHOD, [row(step=step)]))
        records.append_metrics(folder / "rollouts", {"step": step, "reward": 0.5})
    before = content(folder)
    yield folder
    assert content(folder) == before


def link(path: Path, target: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


def link_all(folder: Path, target: Path) -> None:
    """As `cp -a` of a snapshot in the Hub's cache leaves them."""
    for path in target.iterdir():
        if path.is_file():
            link(folder / path.name, path)
    link(folder / "dangling.json", target / "missing.json")


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules=["q_proj"])], ids=["model", "adapter"])
def test_a_training_in_a_copied_snapshot_leaves_the_cache_alone(tmp_path, outside, adapter):
    folder = tmp_path / "run"
    link_all(folder, outside)
    if adapter is None:  # from_pretrained would look for it
        (folder / "adapter_config.json").unlink()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        link(folder / "ref" / name, outside / name)
    trainer = make_trainer(folder, **SETTINGS, peft_config=adapter, record_steps=1)
    trainer.train()
    trainer.save_metrics("held_out", {"after_greedy": 0.5, "after_sampled": 0.5, "after_samples": 1}, combined=True)
    trainer.save_state()
    trainer.save_all(push=False)
    model_card.update(folder)
    if adapter is None:
        saved = {name: p.detach() for name, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
        trained = {name: p.detach().to(saved[name].dtype) for name, p in trainer.model.named_parameters()}
        assert difference(saved, trained) == 0
    own = "adapter_model.safetensors" if adapter else "model.safetensors"
    for name in (own, "README.md", "training_args.bin", "key_tokens.html", "tokenizer.json", "held_out_results.json"):
        assert not (folder / name).is_symlink(), name
    # What was not written is there as it was.
    assert (folder / "lines.jsonl").is_symlink()
    assert (folder / "dangling.json").is_symlink()
    assert (folder / "model-00001-of-00002.safetensors").is_symlink() or adapter is None  # transformers clears these


def test_links_come_back_when_saving_fails(tmp_path, outside, monkeypatch):
    folder = tmp_path / "run"
    link_all(folder, outside)
    trainer = make_trainer(folder, **SETTINGS)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save_model(str(folder))
    assert all((folder / name).resolve() == outside / name for name in (*WRITTEN, "model.safetensors", "config.json"))


def test_templates_of_a_tokenizer(tmp_path, outside):
    folder = tmp_path / "run"
    link(folder / "additional_chat_templates" / "tool.jinja", outside / "lines.jsonl")
    trainer = make_trainer(folder, **SETTINGS)
    trainer.processing_class.chat_template = {"default": trainer.processing_class.chat_template, "tool": "{{ tools }}"}
    trainer.save_model(str(folder))
    assert (folder / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"
    shutil.rmtree(folder)
    link(folder / "additional_chat_templates", outside / "rollouts")
    trainer.save_model(str(folder))
    assert (folder / "additional_chat_templates" / "tool.jinja").read_text() == "{{ tools }}"


def test_an_output_dir_that_is_a_link_is_used(tmp_path):
    """People keep their runs on another disk."""
    (tmp_path / "disk").mkdir()
    folder = link(tmp_path / "run", tmp_path / "disk")
    trainer = make_trainer(folder, **SETTINGS, record_steps=1)
    trainer.train()
    trainer.save_all(push=False)
    assert folder.is_symlink()
    assert {"model.safetensors", "README.md", "rollouts", "checkpoint-1"} <= {
        p.name for p in (tmp_path / "disk").iterdir()
    }


@pytest.mark.parametrize("name", ["rollouts", "completions"])
def test_a_folder_of_another_run_is_refused_before_training(tmp_path, outside, name):
    (outside / "completions").mkdir(exist_ok=True)
    link(tmp_path / "run" / name, outside / name)
    with pytest.raises(ValueError, match=f"{name} is a symbolic link to .*outside/{name}, .*Remove the link, or"):
        make_trainer(tmp_path / "run", **SETTINGS, record_steps=1, log_completions=True)
    (outside / "completions").rmdir()


def test_records(tmp_path, outside, caplog):
    folder = tmp_path / "rollouts"
    for step in (1, 2):
        link(folder / records.file_name(step), outside / "rollouts" / records.file_name(step))
    link(folder / records.METRICS, outside / "rollouts" / records.METRICS)
    records.write(folder / records.file_name(1), records.Record(METHOD, [row(prompt="new")]))
    assert records.read(folder / records.file_name(1)).rows[0]["prompt"] == "new"
    with pytest.raises(OSError, match=r"metrics\.jsonl is a symbolic link to"):
        records.append_metrics(folder, {"step": 3})
    assert records.forget(folder, 2) == 0  # as a training begins: the lines are kept, in a file of its own
    records.append_metrics(folder, {"step": 3})
    assert [entry["step"] for entry in records.read_metrics(folder)] == [1, 2, 3]
    assert records.forget(folder, 1) == 1
    assert [path.name for path in records.files(folder)] == [records.file_name(1)]


def test_drafts_are_not_written_through(tmp_path, outside):
    """The names of drafts are known, so there can be links under them, too."""
    for name in (
        ".step_000001.parquet.part",
        ".part-step_000001.parquet",
        ".metrics.jsonl.part",
        ".part-metrics.jsonl",
    ):
        link(tmp_path / "rollouts" / name, outside / "lines.jsonl")
    records.write(tmp_path / "rollouts" / records.file_name(1), records.Record(METHOD, [row()]))
    records.append_metrics(tmp_path / "rollouts", {"step": 5})
    records.forget(tmp_path / "rollouts", 1)
    for name in (".page.html.part", ".part-page.html", "page.html"):
        link(tmp_path / name, outside / "lines.jsonl")
    write_report(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").is_symlink()
    shutil.copy(outside / "README.md", tmp_path / "README.md")
    for name in ("_README.md.part", ".part-README.md"):
        link(tmp_path / name, outside / "lines.jsonl")
    model_card.update(tmp_path)


def test_merge(tmp_path, outside, monkeypatch):
    trainer = make_trainer(tmp_path / "lora", **SETTINGS, peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.save_model(str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="already exists and is not empty"):
        merge.merge(tmp_path / "lora", link(tmp_path / "full", outside))
    (tmp_path / "disk").mkdir()
    merge.merge(tmp_path / "lora", link(tmp_path / "empty", tmp_path / "disk"))
    merge.merge(tmp_path / "lora", link(tmp_path / "dangling", tmp_path / "elsewhere"))
    for name in ("disk", "elsewhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert (tmp_path / "empty").is_symlink()
    assert (tmp_path / "dangling").is_symlink()


def test_the_cache_of_digests(tmp_path, outside, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = link(tmp_path / "cache" / "ktae_trl" / "digests-1.json", outside / "lines.jsonl")
    link(cache.with_name(f"{cache.name}.{os.getpid()}.part"), outside / "lines.jsonl")
    link(cache.with_name(f".part-{cache.name}"), outside / "lines.jsonl")
    fingerprint(str(tiny.MODEL))
    assert not cache.is_symlink()
    assert len(json.loads(cache.read_text())) > 3


def test_the_offline_problems(tmp_path, outside):
    for name in ("train", "held_out"):
        link(tmp_path / "data" / f"{name}.jsonl", outside / "lines.jsonl")
    command = [sys.executable, "-m", "ktae_trl.tiny", "data", "--output", str(tmp_path / "data")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (tmp_path / "data" / "train.jsonl").read_bytes() == tiny.TRAIN.read_bytes()


SAMPLE = {"benchmark": "sums", "id": "1", "problem": "1 + 1", "prompt": "1 + 1", "completion": r"\boxed{2}"}


def sample(number: int) -> dict:
    return SAMPLE | {"sample": number, "tokens": 3, "truncated": False}


def test_samples(tmp_path, outside):
    folder = tmp_path / "eval"
    (tmp_path / "own.jsonl").write_text(json.dumps(sample(0)) + "\n" + '{"half')
    (tmp_path / "settings").write_text(json.dumps({"seed": 1}))
    before = (tmp_path / "own.jsonl").read_bytes(), (tmp_path / "settings").read_bytes()
    link(folder / "sums.jsonl", tmp_path / "own.jsonl")
    link(folder / "settings.json", tmp_path / "settings")
    for name in ("settings.json.part", ".part-settings.json", "sums.jsonl.part", ".part-sums.jsonl"):
        link(folder / name, outside / "lines.jsonl")
    store = Store(folder, {"seed": 1, "samples": 2}, {"samples"})
    assert [one["sample"] for one in store.read("sums")] == [0]
    store.add("sums", [sample(1)])
    store.finish("sums", {"1": ["2"]}, 2)
    store.close()
    assert len((folder / "sums.jsonl").read_text().splitlines()) == 2
    assert ((tmp_path / "own.jsonl").read_bytes(), (tmp_path / "settings").read_bytes()) == before


def test_a_whole_file_of_samples_behind_a_link_is_copied(tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps(sample(0)) + "\n")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "settings.json").write_text("{}")
    link(tmp_path / "eval" / "sums.jsonl", tmp_path / "own.jsonl")
    store = Store(tmp_path / "eval", {})
    store.read("sums")
    store.add("sums", [sample(1)])
    store.close()
    assert len((tmp_path / "own.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "eval" / "sums.jsonl").read_text().splitlines()) == 2


def test_samples_that_were_not_asked_for_are_not_put_elsewhere(tmp_path, outside):
    (tmp_path / "eval").mkdir()
    link(tmp_path / "eval" / "more", outside / "rollouts")
    with pytest.raises(ValueError, match=r"more is a symbolic link to .*outside/rollouts"):
        Store(tmp_path / "eval", {})


def test_plots(tmp_path, outside):
    for name in ("accuracy_and_length.png", "accuracy_and_length.svg"):
        link(tmp_path / "compare" / name, outside / "lines.jsonl")
    two = np.ones((2, 1))
    texts = [[""], [""]]
    part = Results("sums.jsonl", ["1", "2"], ["", ""], texts, two > 0, texts, two, two > 1, Counter(), [])
    files = plot([Run("a", {}, {"sums": part})], tmp_path / "compare")
    assert [path.is_symlink() for path in files] == [False, False]
    assert files[0].read_bytes().startswith(b"\x89PNG")


def test_the_figures_before_training(tmp_path, outside, monkeypatch):
    """As the callback of a training writes them."""
    monkeypatch.setattr(HeldOutAccuracy, "measure", lambda self: Accuracy(0.5, 0.5, 1))
    monkeypatch.setattr(HeldOutAccuracy, "problems", lambda self: "mark")
    file = link(tmp_path / "run" / "held_out_before.json", outside / "lines.jsonl")
    accelerator = types.SimpleNamespace(is_main_process=False)
    args = types.SimpleNamespace(output_dir=tmp_path / "run", correctness_threshold=0.0)
    trainer = types.SimpleNamespace(accelerator=accelerator, args=args, correctness_reward="math_accuracy")
    state = types.SimpleNamespace(global_step=0, is_world_process_zero=True)
    HeldOutAccuracy(trainer, samples=1).on_train_begin(args, state, None)
    assert not file.is_symlink()
    assert json.loads(file.read_text())["problems"] == "mark"


def test_the_first_line_of_a_run_says_what_is_lost(tmp_path, outside, caplog):
    """A link in the place of the metrics is replaced when training begins, so that no line is lost."""
    link(tmp_path / "run" / "rollouts" / records.METRICS, outside / "rollouts" / records.METRICS)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path / "run", **SETTINGS, record_steps=1).train()
    assert "Could not write a record" not in caplog.text
    assert [entry["step"] for entry in records.read_metrics(tmp_path / "run")] == [1]
