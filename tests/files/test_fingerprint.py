"""Which model is in a folder: every byte of its weights counts, and nothing that only says when it was saved."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktae_trl import tiny
from ktae_trl.files import fingerprint as marks
from ktae_trl.files.fingerprint import adapter_base, digests, fingerprint, is_of, is_old

LONG_AGO = 1_600_000_000_000_000_000


@pytest.fixture
def model(tmp_path):
    return in_single_precision(Path(shutil.copytree(tiny.MODEL, tmp_path / "model")))


def in_single_precision(folder: Path) -> Path:
    """Make the file of weights larger than twice the MiB that was read of it once."""
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_middle_layer(folder: Path) -> None:
    """Change one weight in the middle of the file; its first and last MiB, its size and its times stay."""
    file = folder / "model.safetensors"
    before, data, weights = file.stat(), file.read_bytes(), load_file(file)
    weights["model.layers.2.mlp.up_proj.weight"][7, 7] += 1
    save_file(weights, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    now = file.read_bytes()
    assert (now[: 1 << 20], now[-1 << 20 :]) == (data[: 1 << 20], data[-1 << 20 :])


def save_again(source: Path, folder: Path, *, used: bool = False, **options) -> Path:
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if used:  # which leaves its marks in tokenizer.json
        tokenizer(["1", "1+1"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_byte_of_the_weights_counts(model):
    file, mark = model / "model.safetensors", fingerprint(model)
    data = file.read_bytes()
    for place in (0, len(data) // 3, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert fingerprint(model) != mark, place
    file.write_bytes(data)
    assert fingerprint(model) == mark
    assert len(mark) == 32
    assert not is_old(mark)


def test_a_middle_layer_counts(model):
    mark = fingerprint(model)
    change_middle_layer(model)
    assert fingerprint(model) != mark


def test_saving_again_changes_nothing(model, tmp_path):
    one, two = save_again(model, tmp_path / "one"), save_again(model, tmp_path / "two", used=True)
    mark = fingerprint(one)
    assert fingerprint(two) == fingerprint(save_again(two, tmp_path / "three")) == mark
    for name in ("training_args.bin", "optimizer.bin", "optimizer.pt", "trainer_state.json", "README.md", "events.out"):
        (one / name).write_text("of a training")
    (one / "rollouts").mkdir()
    (one / "rollouts" / "step_000001.parquet").write_text("records")
    config = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"transformers_version": "99"}))
    os.utime(one / "model.safetensors")
    assert fingerprint(one) == mark
    assert fingerprint(f"{one}/") == fingerprint(os.path.relpath(one)) == mark


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"rms_norm_eps": 1e-3}),
        ("generation_config.json", {"eos_token_id": [2, 9]}),
        ("tokenizer_config.json", {"eos_token": "9"}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    ],
)
def test_settings_that_change_samples_count(model, name, change):
    mark = fingerprint(model)
    settings = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(settings | change))
    assert fingerprint(model) != mark


def test_settings_that_change_no_sample_do_not_count(model):
    mark = fingerprint(model)
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.3, "top_k": 20}))
    assert fingerprint(model) == mark


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "added_tokens.json", "tokenizer.model"])
def test_files_of_the_tokenizer_count(model, name):
    mark = fingerprint(model)
    (model / name).write_text('{"a": 1}')
    assert fingerprint(model) != mark


def test_each_of_several_files_counts(model, tmp_path):
    sharded = save_again(model, tmp_path / "sharded", max_shard_size="1MB")
    mark, shards = fingerprint(sharded), sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        data = bytearray(shard.read_bytes())
        data[-1000] ^= 1
        shard.write_bytes(data)
        assert fingerprint(sharded) != mark
        data[-1000] ^= 1
        shard.write_bytes(data)
    assert fingerprint(sharded) == mark


def test_weights_of_torch(model):
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    mark = fingerprint(model)
    weights["model.layers.2.mlp.up_proj.weight"][7, 7] += 1
    torch.save(weights, model / "pytorch_model.bin")
    assert fingerprint(model) != mark


def adapter_of(base: Path, folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    settings = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(folder)
    return folder


def test_an_adapter_counts_with_its_base(model, tmp_path):
    one, again = adapter_of(model, tmp_path / "one"), adapter_of(model, tmp_path / "again")
    settings = json.loads((again / "adapter_config.json").read_text())
    settings["target_modules"].reverse()  # PEFT writes a set
    (again / "adapter_config.json").write_text(json.dumps(settings))
    mark = fingerprint(one)
    assert adapter_base(one) == str(model)
    assert fingerprint(again) == mark
    assert fingerprint(adapter_of(model, tmp_path / "other", seed=1)) != mark
    settings["lora_alpha"] += 1
    (again / "adapter_config.json").write_text(json.dumps(settings))
    assert fingerprint(again) != mark
    change_middle_layer(model)
    assert fingerprint(one) != mark
    assert not is_of(mark, one)


def test_an_adapter_whose_base_is_elsewhere(model, tmp_path, caplog):
    adapter, other = adapter_of(model, tmp_path / "one"), adapter_of(model, tmp_path / "other", seed=1)
    mark = fingerprint(adapter)
    assert is_of(mark, adapter)
    assert not caplog.records
    shutil.rmtree(model)
    assert is_of(mark, adapter)
    assert "Could not check the base model of" in caplog.text
    assert not is_of(mark, other)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The cache of the Hub's client, with one model; the network is off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--ann--sums"
    (repository / "refs").mkdir(parents=True)

    def upload(commit: str) -> Path:
        (repository / "refs" / "main").write_text(commit)
        return in_single_precision(Path(shutil.copytree(tiny.MODEL, repository / "snapshots" / commit)))

    return upload


def test_a_model_of_the_hub_is_what_its_files_are(hub_cache):
    folder = hub_cache("a" * 40)
    mark = fingerprint("ann/sums")
    assert mark == fingerprint(folder)
    (hub_cache("b" * 40) / "README.md").write_text("Another card")
    assert fingerprint("ann/sums") == mark
    change_middle_layer(hub_cache("c" * 40))
    assert fingerprint("ann/sums") != mark
    assert fingerprint("ann/sums", "a" * 40) == mark
    with pytest.raises(FileNotFoundError, match="ann/other is neither a folder nor on the Hub: "):
        fingerprint("ann/other")


def test_a_model_without_weights(model):
    (model / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model contains no weights \(\*\.safetensors or \*\.bin\)"):
        fingerprint(model)


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and a count of the files that are read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read, plain = [], marks._digest
    monkeypatch.setattr(marks, "_digest", lambda file: read.append(file.name) or plain(file))
    return read


def age(folder: Path, monkeypatch) -> None:
    """Let the folder's files be older than what the resolution of times leaves open."""
    plain = marks._stamp
    monkeypatch.setattr(marks, "_stamp", lambda file: [n - 10**10 if n > 10**15 else n for n in plain(file)])


def test_a_second_time_nothing_is_read(model, cache, monkeypatch):
    age(model, monkeypatch)
    mark = fingerprint(model)
    assert "model.safetensors" in cache
    cache.clear()
    assert fingerprint(model) == mark
    assert cache == []
    change_middle_layer(model)  # same path, size and mtime
    assert fingerprint(model) != mark
    assert cache == ["model.safetensors"]


def test_what_was_just_written_is_read_again(model, cache):
    """Another write within the resolution of the file's times would not be seen."""
    (model / "model.safetensors").touch()
    fingerprint(model)
    cache.clear()
    fingerprint(model)
    assert "model.safetensors" in cache


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2]}', "\x00\xff"])
def test_a_damaged_cache_is_no_error(model, cache, tmp_path, monkeypatch, damage):
    age(model, monkeypatch)
    mark = fingerprint(model)
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text(damage)
    assert fingerprint(model) == mark
    cache.clear()
    assert fingerprint(model) == mark
    assert cache == []


def test_a_home_that_cannot_be_written(model, cache, tmp_path, monkeypatch):
    age(model, monkeypatch)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fingerprint(model) == fingerprint(model)
    assert cache.count("model.safetensors") == 2


def test_the_cache_forgets_files_that_are_gone(model, cache, tmp_path, monkeypatch):
    age(model, monkeypatch)
    fingerprint(model)
    shutil.rmtree(model)
    fingerprint(shutil.copytree(tiny.MODEL, tmp_path / "other"))
    (file,) = (tmp_path / "cache").rglob("*.json")
    assert {Path(path).parent.name for path in json.loads(file.read_text())} == {"other"}
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_file_that_changes_while_it_is_read(model, cache, monkeypatch):
    plain = marks._digest

    def slow(file):
        os.utime(file, ns=(LONG_AGO, LONG_AGO))
        return plain(file)

    monkeypatch.setattr(marks, "_digest", slow)
    with pytest.raises(ValueError, match=r"changed while it was being read. Wait until it is complete, then try again"):
        digests([model / "model.safetensors"])
