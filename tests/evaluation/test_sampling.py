"""Where a completion ends, and what is read off a model's folder. Whole runs: test_measure.py and test_vllm.py."""

import json
import shutil

import pytest

from ktae_trl import tiny
from ktae_trl.evaluation.generate import Completion, Sampling, _completion, _lora_rank, stop_token_ids
from ktae_trl.files.fingerprint import adapter_base


def ended(tokenizer, text, *, stop=(), padding=0, limit=None):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:limit] + [tokenizer.pad_token_id] * padding
    return _completion(ids, tokenizer, Sampling(0.0, 1.0, 0, stop, (tokenizer.eos_token_id,)))


def test_a_completion_ends_at_the_first_end_token(tokenizer):
    end = tokenizer.eos_token
    assert ended(tokenizer, f"2+3=5{end}{end}", padding=3) == Completion("2+3=5", 6, False)
    assert ended(tokenizer, "2+3=5") == Completion("2+3=5", 5, True)
    assert ended(tokenizer, end) == Completion("", 1, False)


def test_a_stop_string_ends_it_too(tokenizer):
    """Also in the middle of what was generated, with padding that looks like an end token after it."""
    assert ended(tokenizer, "2+3=5", stop=("=5",)) == Completion("2+3=5", 5, False)
    assert ended(tokenizer, "2+3=5. So", stop=("=5", "+3")) == Completion("2+3", 3, False)
    assert ended(tokenizer, "2+3=5" + tokenizer.eos_token * 2, stop=("=5",)) == Completion("2+3=5", 5, False)
    assert ended(tokenizer, "2+3=5", stop=("=6",)) == Completion("2+3=5", 5, True)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(tiny.MODEL, tmp_path / "model")


def adapter(folder, base, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(base)} | config)
    )
    return str(folder)


def test_end_tokens(model, tmp_path, tokenizer):
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [2, 9]}))
    expected = tuple(sorted({tokenizer.eos_token_id, 2, 9}))
    assert stop_token_ids(str(model), tokenizer, ()) == expected
    assert stop_token_ids(adapter(tmp_path / "adapter", model), tokenizer, ()) == expected
    assert set(stop_token_ids(str(model), tokenizer, ("7",))) == {*expected, tokenizer.convert_tokens_to_ids("7")}
    with pytest.raises(
        ValueError, match=r"has no token <\|turn\|>, which this prompt template needs. Set prompt: chat"
    ):
        stop_token_ids(str(model), tokenizer, ("<|turn|>",))


def test_adapters(model, tmp_path):
    assert adapter_base(str(model)) is None
    assert adapter_base(adapter(tmp_path / "a", model)) == str(model)
    assert _lora_rank(adapter(tmp_path / "b", model, r=24)) == 32
    assert _lora_rank(adapter(tmp_path / "c", model, r=8, rank_pattern={"q_proj": 65})) == 128
    with pytest.raises(ValueError, match=r"LoRA ranks up to 512, not 600\. Set backend: transformers"):
        _lora_rank(adapter(tmp_path / "d", model, r=600))
    with pytest.raises(ValueError, match="supports only LoRA adapters, not IA3"):
        _lora_rank(adapter(tmp_path / "e", model, peft_type="IA3"))
