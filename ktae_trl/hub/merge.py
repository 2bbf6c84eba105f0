"""One model folder, for `from_pretrained` and vLLM, from a LoRA adapter or from the shards of a checkpoint.

ktae merge SOURCE -o FOLDER [--base MODEL] [--dtype bfloat16]

SOURCE is an adapter's folder, a checkpoint of DeepSpeed ZeRO or FSDP, or a run's folder, whose newest checkpoint is
then taken. All is done on the CPU, in single precision.
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
    """Return what a folder holds, by its files: adapter, zero, fsdp, model (whole already), or None."""
    if (folder / "adapter_config.json").is_file():
        return "adapter"  # also beside the shards of a checkpoint: the base model is not in those
    if (folder / "latest").is_file() and list(folder.glob("global_step*")):
        return "zero"  # beside whole weights too: the shards are the optimizer's, in single precision
    if (folder / FSDP_SHARDS / ".metadata").is_file():
        return "fsdp"
    if list(folder.glob("model*.safetensors")) or list(folder.glob("pytorch_model*.bin")):
        return "model"
    return None


def merge(source: str | Path, output: str | Path, *, base: str | None = None, dtype: str | None = None) -> Path:
    """Write the merged model (weights, config, generation config, tokenizer, chat template) to `output`.

    Args:
        base: Hub id or folder of the base model. Default: the one that the adapter names; for shards the config and
            tokenizer beside them or in the run's folder.
        dtype: of the weights, one of `DTYPES`. Default: as the base model's or the checkpoint's config says.

    Raises:
        ValueError: there is nothing to merge, a part of it is missing, or `output` is not empty.
        FileNotFoundError: no such folder.
        ImportError: the shards are DeepSpeed's, and it is not installed.
    """
    source, output = Path(source), Path(output)
    if not source.is_dir():
        raise NotFoundError(f"There is no folder {source}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already and not empty: choose another folder")
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
    place = output.resolve()  # a link to an empty folder, perhaps on another disk, stays one
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
        of = f" Of its checkpoints, name the one to merge, such as {checkpoint}" if checkpoint else ""
        raise UserError(f"{source} is a whole model already: from_pretrained and vLLM load it as it is.{of}")
    if kind is None:
        found = ", ".join(sorted(path.name for path in source.iterdir())[:20]) or "nothing"
        raise UserError(
            f"{source} is nothing to merge. Expected: adapter_config.json (an adapter), `latest` and global_step*/ (a "
            f"checkpoint of DeepSpeed ZeRO), {FSDP_SHARDS}/ (one of FSDP), or a run's folder with checkpoints. Found: "
            f"{found}"
        )
    return source, kind


def _merged_adapter(source: Path, base: str | None) -> tuple[PreTrainedModel, str]:
    with loading(f"The adapter in {source}"):
        named = base or PeftConfig.from_pretrained(source).base_model_name_or_path
    with loading(f"The base model of the adapter, {named},", by="--base"):
        config = AutoConfig.from_pretrained(named)
        model = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
    try:
        # Rounded once, at the end: a small change of a bfloat16 weight would be lost in each of the two.
        adapted = _adapted(model, source)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The adapter in {source} does not fit {named}: {error}. Name its base model by --base"
        ) from None
    whole = adapted.merge_and_unload()
    whole.config.dtype = config.dtype
    return whole, named


def _adapted(model: PreTrainedModel, source: Path) -> PeftModel:
    """Return the model with its adapter, every weight of which must have its place."""
    weights = load_peft_weights(str(source), device="cpu")
    tokens = [len(weight) for name, weight in weights.items() if name.endswith("embed_tokens.weight")]
    if tokens and tokens[0] != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens[0], mean_resizing=False)  # the adapter brings them
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        # Merged into one of two that are tied, an adapter would change the other as well.
        ends = [f".{name}.lora_" for name, module in model.named_modules() if module in (embeddings, head)]
        if any(end in name for name in weights for end in ends):
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            model.config.tie_word_embeddings = False
    adapted = PeftModel.from_pretrained(model, source)
    if missing := set(weights) - set(get_peft_model_state_dict(adapted)):
        raise UserError(f"it has no place for {len(missing)} of the adapter's weights, such as {min(missing)}")
    return adapted


def _settings_of(source: Path, base: str | None) -> str:
    """Return the name of the model that has the config for the shards in `source`."""
    places = (
        [base] if base else [str(folder) for folder in (source, source.parent) if (folder / "config.json").exists()]
    )
    if not places:
        raise UserError(
            f"{source} holds the shards of the weights only, and neither it nor {source.parent} has the model's "
            "config.json: name the model that the run began with, by --base"
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
    """Return the model of this config with these weights."""
    if any("lora_" in name for name in weights):
        raise UserError(
            f"{source} holds an adapter in shards, without its adapter_config.json. The run's folder has the whole "
            "adapter once training has ended; or resume with fsdp_state_dict_type: FULL_STATE_DICT, as "
            "configs/accelerate/fsdp2.yaml has it"
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
            f"The weights in {source} are not those of {settings}: it lacks {empty[:3] or 'none'}, and does not know "
            f"{list(unknown)[:3] or 'none'}. Is --base the model that the run began with?"
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
    raise UserError(f"There is no tokenizer in {' or '.join(map(str, places))}: say where it is with --base")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="ktae merge",
        description="Merge a LoRA adapter, or a checkpoint of DeepSpeed ZeRO or FSDP, into one model folder.",
    )
    parser.add_argument("source", type=Path, help="an adapter's folder, a checkpoint, or a run's folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--base", help="base model, where the source does not say it")
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights; default: as the config says")
    options = parser.parse_args(words)
    with user_errors("ktae merge"):
        merge(options.source, options.output, base=options.base, dtype=options.dtype)
    print(f"Written: {options.output}\nServe it: vllm serve {options.output}")
