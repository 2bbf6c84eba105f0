"""The files that make a model: all that the libraries write is known, and nothing else is sent."""

import ast
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPProcessor,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperTokenizer,
)

from ktae_trl import tiny
from ktae_trl.files import model_files
from tests import hostile

TINY_LLAMA = LlamaConfig(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=64,
)


def written(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": 0, "a": 1, "b": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<s>")), bos_token="<s>")


def tiny_model(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny.MODEL).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(folder)


def shards(folder: Path) -> None:
    model = LlamaForCausalLM(TINY_LLAMA)
    model.generation_config = GenerationConfig(temperature=0.5, do_sample=True)
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1


def several_templates(folder: Path) -> None:
    made = tokenizer()
    made.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    made.save_pretrained(folder)
    assert len(list(folder.glob("additional_chat_templates/*"))) == 2


def vocabulary_and_merges(folder: Path) -> None:
    source = folder.with_name("source")
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    (source / "normalizer.json").write_text("{}")
    WhisperTokenizer(*(str(source / name) for name in ("vocab.json", "merges.txt", "normalizer.json"))).save_pretrained(
        folder
    )


def sentencepiece(folder: Path) -> None:
    pieces = pytest.importorskip("sentencepiece")
    source = folder.with_name("source")
    source.mkdir()
    (source / "text").write_text("one two three\nfour five six\n" * 20)
    pieces.SentencePieceTrainer.train(
        input=str(source / "text"), model_prefix=str(source / "spiece"), vocab_size=30, minloglevel=2
    )
    from transformers.models.bert_generation import BertGenerationTokenizer

    BertGenerationTokenizer(str(source / "spiece.model")).save_pretrained(folder)


def adapter(folder: Path) -> None:
    get_peft_model(LlamaForCausalLM(TINY_LLAMA), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def images_too(folder: Path) -> None:
    BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)).save_pretrained(
        folder
    )
    CLIPImageProcessor().save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer()).save_pretrained(folder)


def own_code(folder: Path) -> None:
    source = folder.with_name("own_model_code")
    source.mkdir()
    (source / "__init__.py").write_text("")
    (source / "layers_own.py").write_text("SIZE = 16\n")
    (source / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nfrom .layers_own import SIZE\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (source / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    sys.path.insert(0, str(source.parent))
    try:
        from own_model_code.configuration_own import OwnConfig
        from own_model_code.modeling_own import OwnModel
    finally:
        sys.path.pop(0)
    OwnConfig.register_for_auto_class()
    OwnModel.register_for_auto_class("AutoModelForCausalLM")
    OwnModel(OwnConfig(**TINY_LLAMA.to_diff_dict())).save_pretrained(folder)
    assert {"modeling_own.py", "configuration_own.py", "layers_own.py"} <= written(folder)


KINDS = [tiny_model, shards, several_templates, vocabulary_and_merges, sentencepiece, adapter, images_too, own_code]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_all_that_is_saved_is_sent_and_nothing_else(tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    kind(folder)
    saved = written(folder)
    assert saved
    outside = {name: target for name, target in hostile.LINKS.items() if name not in saved}
    hostile.add(folder, tmp_path / "outside", links=outside)
    chosen = model_files.of_model(folder)
    assert set(chosen.sent) == saved
    everything = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    assert set(chosen.left_out) == everything - saved | set(hostile.FOLDER_LINKS)


def test_vocabularies_of_all_tokenizers_of_transformers_are_known():
    """Read from the installed sources: a new tokenizer with another file shows up here."""
    names = set()
    for file in Path(transformers.__file__).parent.rglob("*token*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(target, ast.Name) and target.id.endswith("VOCAB_FILES_NAMES"):
                names |= {value.value for value in getattr(node.value, "values", []) if isinstance(value, ast.Constant)}
    assert {"vocab.json", "merges.txt", "spiece.model"} <= names
    assert len(names) > 15
    assert [name for name in sorted(names) if not model_files._is_model(name)] == []


@pytest.mark.skipif(Version(version("peft")) < Version("0.17"), reason="other names")
def test_a_second_adapter_and_pickles_are_left_out(tmp_path):
    """TRL's reference of an adapter that is trained again: the model that was trained is `default`."""
    config = LoraConfig(target_modules=["q_proj"])
    model = get_peft_model(LlamaForCausalLM(TINY_LLAMA), config)
    model.add_adapter("ref", config)
    model.save_pretrained(tmp_path)
    assert "ref/adapter_model.safetensors" in written(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    torch.save({}, tmp_path / "training_args.bin")
    chosen = model_files.of_model(tmp_path)
    assert set(chosen.sent) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert model_files.in_words(chosen.left_out) == (
        "pytorch_model.bin (a pickle), ref/ (2 files), training_args.bin (contains hub_token)"
    )
    assert "pytorch_model.bin" in model_files.of_model(tmp_path, ["pytorch_model.bin"]).sent


def test_code_of_the_model_is_sent_and_no_other(tmp_path):
    auto_map = {"AutoModel": "modeling_x.Model", "AutoConfig": "owner/other--configuration_x.Config"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    tokenizer_map = {"AutoTokenizer": ["tokenization_x.Slow", None], "AutoProcessor": "../outside.Processor"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": tokenizer_map}))
    (tmp_path / "modeling_x.py").write_text(
        "from .layers import A\nimport os\nfrom .modeling_x import B\n  import .deep\n"
    )
    for name in ("layers", "deep", "tokenization_x", "configuration_x", "my_rewards", "train", "os"):
        (tmp_path / f"{name}.py").write_text("")
    code = {name for name in model_files.of_model(tmp_path).sent if name.endswith(".py")}
    assert code == {"modeling_x.py", "layers.py", "deep.py", "tokenization_x.py"}


@pytest.mark.parametrize("text", ["[]", '{"auto_map": 3}', '{"auto_map": {"a": 3, "b": [null, {}]}}', "{", ""])
def test_a_config_of_any_kind_is_no_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert model_files.of_model(tmp_path).sent == ["config.json"]


def test_pictures_of_the_card(tmp_path):
    (tmp_path / "README.md").write_text(
        "![curve](curve.png) <img src='./plots/length.svg' width=3> ![](../up.png) ![](.hidden/x.png) [a](notes.txt)\n"
        '![titled](titled.jpg "A title") ![elsewhere](https://example.org/far.png) ![](linked.png) ![](missing.gif)'
    )
    for name in (
        "curve.png",
        "plots/length.svg",
        "plots/other.png",
        "titled.jpg",
        ".hidden/x.png",
        "notes.txt",
        "far.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("picture")
    (tmp_path / "linked.png").symlink_to(tmp_path / "notes.txt")
    assert set(model_files.of_model(tmp_path).sent) == {"README.md", "curve.png", "plots/length.svg", "titled.jpg"}


def test_what_is_no_regular_file_is_left_out(tmp_path):
    os.mkfifo(tmp_path / "config.json")  # to read it would wait for ever
    (tmp_path / "README.md").mkdir()
    (tmp_path / "README.md" / "config.json").write_text("{}")
    chosen = model_files.of_model(tmp_path)
    assert chosen.sent == []
    assert chosen.left_out == {"config.json": "not a regular file", "README.md/config.json": ""}


def test_a_folder_that_is_a_link_is_read(tmp_path):
    """People keep their runs on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "config.json").write_text("{}")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert model_files.of_model(tmp_path / "run").sent == ["config.json"]


CHECKPOINT = [
    "config.json", "model-00001-of-00002.safetensors", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt",
    "rng_state.pth", "rng_state_3.pth", "rollouts_0.pt", "rollouts_12.pt", "trainer_state.json", "manifest.json",
    "latest", "zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt", "pytorch_model_fsdp.bin",
    "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "pytorch_model_fsdp_0/.metadata",
    "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__1_0.distcp", "ref/adapter_model.safetensors",
]  # fmt: skip


def test_a_checkpoint_s_own_files(tmp_path):
    for name in [*CHECKPOINT, "training_args.bin", "optimizer.pt.bak", "train.jsonl", ".env", "global_step10/.env"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    assert set(model_files.of_checkpoint(tmp_path).sent) == set(CHECKPOINT)


def test_a_list_for_a_person(tmp_path):
    for name in [f"note{i}.txt" for i in range(2000)] + [f"wandb/{i}" for i in range(3000)] + ["\x1b[31mred\n"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    said = model_files.in_words(model_files.of_model(tmp_path).left_out)
    assert said.startswith("wandb/ (3000 files), '\\x1b[31mred\\n', note0.txt, ")
    assert said.endswith(", and 1962 more")
    assert len(said) < 1000
