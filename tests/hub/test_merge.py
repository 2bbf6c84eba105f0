"""Merged models say what the model in parts said."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ktae_trl import tiny
from ktae_trl.hub import merge as merging
from ktae_trl.hub.merge import merge
from tests.processes import run
from tests.trainers import make_trainer

ROOT = Path(__file__).parents[2]


def logits(model) -> torch.Tensor:
    ids = torch.randint(3, 90, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def base() -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32))


def assert_a_whole_model(folder: Path) -> None:
    """As vLLM wants it: config, safetensors, tokenizer with the chat template, generation config; no rest of PEFT."""
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not [name for name in names if "adapter" in name]
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tiny.MODEL)
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    assert (
        GenerationConfig.from_pretrained(folder).eos_token_id
        == GenerationConfig.from_pretrained(tiny.MODEL).eos_token_id
    )


@pytest.fixture
def adapter(tmp_path):
    """An adapter that changes much, as `save_model` leaves it: with the tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    modules = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter(adapter, tmp_path):
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(adapter)
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32))
    assert (expected - base()).abs().max() > 0.1
    merge(adapter, tmp_path / "out" / "merged", dtype="float32")
    assert_a_whole_model(tmp_path / "out" / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "use_dora": True},
    ],
    ids=str,
)
def test_what_an_adapter_does_to_tied_embeddings(tmp_path, settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert (expected - base()).abs().max() > 0.1
    merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-5)


def test_an_adapter_with_more_tokens_than_its_base(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    model.resize_token_embeddings(model.get_input_embeddings().num_embeddings + 3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"hidden_size": 64, "num_attention_heads": 2}], ids=str)
def test_another_base_is_refused(adapter, tmp_path, change):
    config = json.loads((Path(tiny.MODEL) / "config.json").read_text()) | change
    config.pop("layer_types", None)  # one for each layer
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"The adapter in .*adapter does not fit .*other: "):
        merge(adapter, tmp_path / "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()


def test_dtype(adapter, tmp_path):
    exact = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload()
    merge(adapter, tmp_path / "merged", dtype="bfloat16")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    for name, weight in weights.items():  # rounded once
        assert torch.equal(weight, exact.state_dict()[name].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    # Without one it is the base model's.
    merge(adapter, tmp_path / "same")
    config = json.loads((Path(tiny.MODEL) / "config.json").read_text())
    assert str(AutoModelForCausalLM.from_pretrained(tmp_path / "same").dtype) == f"torch.{config['dtype']}"


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path / "run",
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.1,
    )
    trainer.train()
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    assert_a_whole_model(tmp_path / "merged")
    expected = logits(trainer.model)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    assert (expected - base()).abs().max() > 1e-3


def test_the_base_model_can_be_said(adapter, tmp_path):
    shutil.copytree(tiny.MODEL, tmp_path / "moved")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(ValueError, match=r"The adapter\'s base model /gone/base \(--base\) could not be loaded: "):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    words = ["--base", str(tmp_path / "moved"), "--dtype", "float32"]
    merging.main([str(adapter), "-o", str(tmp_path / "merged"), *words])
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(expected), atol=1e-4, rtol=0)


def test_what_cannot_be_merged(adapter, tmp_path):
    def complaint(*words) -> str:
        with pytest.raises(SystemExit) as end:
            merging.main([str(word) for word in words])
        return str(end.value.code)

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    said = complaint(adapter, "-o", tmp_path / "full")
    assert said == f"ktae merge: {tmp_path / 'full'} already exists and is not empty. Choose another folder"
    said = complaint(tmp_path / "full", "-o", tmp_path / "x")
    assert "contains nothing to merge. Expected: adapter_config.json" in said
    assert said.endswith("Found: mine.txt")
    assert "is already a complete model" in complaint(tiny.MODEL, "-o", tmp_path / "x")
    assert "There is no folder" in complaint(tmp_path / "none", "-o", tmp_path / "x")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    said = complaint(tmp_path / "damaged", "-o", tmp_path / "x")
    assert said.startswith(f"ktae merge: The adapter in {tmp_path / 'damaged'} could not be loaded: ")
    (tmp_path / "shards" / "pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "shards" / "pytorch_model_fsdp_0" / ".metadata").touch()
    assert "Pass the model that the run started from with --base" in complaint(
        tmp_path / "shards", "-o", tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()


TRAINING = {
    "replay": True,
    "prompts": 12,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "reward": "by_tokens",
}


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mode", ["zero2", "zero3_sharded", "fsdp2_sharded"])
def test_a_checkpoint_in_shards(crews, tmp_path, mode, lora):
    adapter = {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "learning_rate": 0.05} if lora else {}
    trained, _ = crews.train(tmp_path / "run", {**TRAINING, **adapter}, mode)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    if mode == "fsdp2_sharded":
        assert not (checkpoint / "config.json").exists()
        with pytest.raises(ValueError, match="Pass the model that the run started from"):
            merge(tmp_path / "run", tmp_path / "merged")
        if lora:
            with pytest.raises(ValueError, match=r"contains a sharded adapter without its adapter_config\.json"):
                merge(checkpoint, tmp_path / "merged", base=str(tiny.MODEL))
            return
    command = [sys.executable, "-m", "ktae_trl", "merge", str(tmp_path / "run"), "-o", str(tmp_path / "merged")]
    command += ["--base", str(tiny.MODEL)] if mode == "fsdp2_sharded" else []
    done = run([*command, "--dtype", "float32"], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_a_whole_model(tmp_path / "merged")

    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    if lora:
        model = get_peft_model(model, LoraConfig(**adapter["lora"]))
    model.load_state_dict(trained["weights"], strict=False)
    expected = logits(model)
    assert (expected - base()).abs().max() > 1e-2
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-4, rtol=0
    )
