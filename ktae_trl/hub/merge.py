"""Merges a LoRA adapter, or the shards of a checkpoint, into one model folder for `from_pretrained` and vLLM.

ktae merge SOURCE -o FOLDER [--base MODEL] [--dtype bfloat16]

SOURCE is the folder of an adapter, a checkpoint of DeepSpeed ZeRO or FSDP, or the folder of a run, in which case its
newest checkpoint is used. Merging runs on the CPU in single precision.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from ktae_trl.arguments import NotFoundError, UserError, loading, need, user_errors
from ktae_trl.files.checkpoints import last_checkpoint

DTYPES = ("float32", "bfloat16", "float16")
FSDP_SHARDS = "pytorch_model_fsdp_0"
logger = logging.getLogger(__name__)


def kind_of(folder: Path) -> str | None:
    """Return what a folder contains: "adapter", "zero", "fsdp", "model" (nothing to merge), or None."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"  # even next to shards, which do not contain the base model
    if (folder / "latest").is_file() and list(folder.glob("global_step*")):
        return "zero"  # even next to full weights: the shards are in single precision
    if (folder / FSDP_SHARDS / ".metadata").is_file():
        return "fsdp"
    if list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin")):
        return "model"
    return None


def merge(source: str | Path, output: str | Path, *, base: str | None = None, dtype: str | None = None) -> Path:
    """Write the merged model (weights, config, generation config, tokenizer, chat template) to `output`.

    Args:
        source: folder of an adapter, a checkpoint or a run.
        output: folder to create.
        base: Hub id or folder of the base model. Default: the base model that the adapter names. For shards, the config
            and tokenizer in the checkpoint or in the run's folder.
        dtype: precision of the weights, one of `DTYPES`. Default: the dtype in the config of the base model or
            checkpoint.

    Raises:
        UserError: there is nothing to merge, a part is missing, or `output` is not empty.
        NotFoundError: `source` does not exist.
        NotImportedError: the shards are DeepSpeed's, and DeepSpeed is not installed.
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise NotFoundError(f"There is no folder {source}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists and is not empty. Choose another folder")
    source, kind = _find(source)
    logger.info("%s: %s", source, kind)
    if kind == "adapter":
        model, named = _merged_adapter(source, base)
        tokenizer_from = [source, named]
    else:
        settings = _settings_of(source, base)
        model = _filled(settings, _zero_weights(source) if kind == "zero" else _fsdp_weights(source), source)
        tokenizer_from = [source, settings]
    precision = getattr(torch, dtype) if dtype else model.config.dtype
    if precision is not None:
        model = model.to(precision)
    tokenizer = _tokenizer(tokenizer_from)
    place = output.resolve()  # keeps a link to an empty folder, perhaps on another disk
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as partial:
        whole = Path(partial) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if place.exists():
            place.rmdir()
        whole.rename(place)
    return output


def _find(source: Path) -> tuple[Path, str]:
    """Return the folder to merge and its kind: `source` itself, or its newest checkpoint."""
    kind, checkpoint = kind_of(source), last_checkpoint(str(source))
    if kind is None and checkpoint:
        source = Path(checkpoint)
        kind = kind_of(source)
    if kind == "model":
        of = f" To merge one of its checkpoints, pass the checkpoint, such as {checkpoint}" if checkpoint else ""
        raise UserError(f"{source} is already a complete model, which from_pretrained and vLLM can load.{of}")
    if kind is None:
        found = ", ".join(sorted(path.name for path in source.iterdir())[:20]) or "nothing"
        raise UserError(
            f"{source} contains nothing to merge. Expected: adapter_config.json (an adapter), `latest` and "
            f"global_step*/ (a checkpoint of DeepSpeed ZeRO), {FSDP_SHARDS}/ (a checkpoint of FSDP), or a run's folder "
            f"with checkpoints. Found: {found}"
        )
    return source, kind


def _merged_adapter(source: Path, base: str | None) -> tuple[PreTrainedModel, str]:
    with loading(f"The adapter in {source}"):
        named = base or PeftConfig.from_pretrained(source).base_model_name_or_path
    with loading(f"The adapter's base model {named}", by="--base"):
        config = AutoConfig.from_pretrained(named)
        model = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
    try:
        # Merge in float32 and round once at the end. In bfloat16, small changes of a weight would be lost.
        adapted = _adapted(model, source)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The adapter in {source} does not fit {named}: {error}. Pass its base model with --base"
        ) from None
    whole = adapted.merge_and_unload()
    whole.config.dtype = config.dtype
    return whole, named


def _adapted(model: PreTrainedModel, source: Path) -> PeftModel:
    """Return the model with its adapter, after checking that every weight of the adapter is used."""
    weights = load_peft_weights(str(source), device="cpu")
    tokens = [len(weight) for name, weight in weights.items() if name.endswith("embed_tokens.weight")]
    if tokens and tokens[0] != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens[0], mean_resizing=False)  # the adapter includes embeddings
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        # With tied weights, merging an adapter into one of the two would also change the other.
        ends = [f".{name}.lora_" for name, module in model.named_modules() if module in (embeddings, head)]
        if any(end in name for name in weights for end in ends):
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            model.config.tie_word_embeddings = False
    adapted = PeftModel.from_pretrained(model, source)
    if missing := set(weights) - set(get_peft_model_state_dict(adapted)):
        raise UserError(f"{len(missing)} of the adapter's weights do not belong to this model, such as {min(missing)}")
    return adapted


def _settings_of(source: Path, base: str | None) -> str:
    """Return the model whose config belongs to the shards in `source`."""
    places = (
        [base] if base else [str(folder) for folder in (source, source.parent) if (folder / "config.json").exists()]
    )
    if not places:
        raise UserError(
            f"{source} contains only the shards of the weights, and neither it nor {source.parent} has the model's "
            "config.json. Pass the model that the run started from with --base"
        )
    return places[0]


def _zero_weights(source: Path) -> dict[str, torch.Tensor]:
    need("deepspeed", "deepspeed")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with loading(f"The checkpoint {source}"):
        return get_fp32_state_dict_from_zero_checkpoint(str(source))


def _fsdp_weights(source: Path) -> dict[str, torch.Tensor]:
    with loading(f"The checkpoint {source}"), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        dcp_to_torch_save(source / FSDP_SHARDS, file)
        return torch.load(file, weights_only=True)["model"]


def _filled(settings: str, weights: dict[str, torch.Tensor], source: Path) -> PreTrainedModel:
    """Return the model with the config of `settings` and these weights."""
    if any("lora_" in name for name in weights):
        raise UserError(
            f"{source} contains a sharded adapter without its adapter_config.json. Merge the run's folder, which has "
            "the complete adapter once training has ended. Or resume training with fsdp_state_dict_type: "
            "FULL_STATE_DICT, as in configs/accelerate/fsdp2.yaml"
        )
    with loading(f"The config of {settings}", by="--base"):
        config = AutoConfig.from_pretrained(settings)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    _, unknown = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or unknown:
        raise UserError(
            f"The weights in {source} do not match {settings}: missing {empty[:3] or 'none'}, unexpected "
            f"{list(unknown)[:3] or 'none'}. Pass the model that the run started from with --base"
        )
    model.config.dtype = config.dtype
    if (Path(settings) / "generation_config.json").exists() or not Path(settings).is_dir():
        with loading(f"The generation config of {settings}", by="--base"):
            model.generation_config = GenerationConfig.from_pretrained(settings)
    return model


def _tokenizer(places: list):
    for place in places:
        if not Path(place).is_dir() or list(Path(place).glob("tokenizer*")):
            with loading(f"The tokenizer of {place}"):
                return AutoTokenizer.from_pretrained(place)
    raise UserError(f"There is no tokenizer in {' or '.join(map(str, places))}. Pass a model that has one with --base")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ktae merge",
        description="Merge a LoRA adapter, or a checkpoint of DeepSpeed ZeRO or FSDP, into one model folder.",
    )
    parser.add_argument("source", type=Path, help="folder of an adapter, a checkpoint or a run")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--base", help="base model; default: the one that the source names")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights; default: the one in the config")
    options = parser.parse_args(words)
    with user_errors("ktae merge"):
        merge(options.source, options.output, base=options.base, dtype=options.dtype)
    print(f"Wrote {options.output}\nTo serve it: vllm serve {options.output}")
