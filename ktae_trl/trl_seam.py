"""What is used of TRL's and transformers' private names, and the check at start that the installed TRL has it."""

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers.trainer
import trl
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from transformers import Trainer
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import RepeatSampler, add_fused_lm_head, create_model_from_path

from ktae_trl.arguments import UserError, loading

TESTED_TRL = ">=1.16,<1.17"

# Method -> its parameters, and names that its code must still mention: attributes it sets or reads, keys of the batch.
_RELIED_ON: dict[str, tuple[list[str], set[str]]] = {
    "__init__": (
        ["model", "reward_funcs", "args"],
        {
            "_buffered_inputs",
            "_logs",
            "_metrics",
            "_step",
            "_tokenizer",
            "chat_template",
            "chat_template_kwargs",
            "environment_factories",
            "eos_token_ids",
            "generation_config",
            "max_new_tokens",
            "num_completions_to_print",
            "num_generations",
            "num_generations_eval",
            "num_iterations",
            "reward_func_names",
            "reward_funcs",
            "reward_processing_classes",
            "rollout_func",
            "shuffle_dataset",
            "tools",
            "vllm_generation",
        },
    ),
    "_get_train_sampler": (["dataset"], {"RepeatSampler"}),
    "_prepare_inputs": (["generation_batch"], {"_step", "_buffered_inputs", "_generate_and_score_completions"}),
    # Dynamic sampling lets the parent run on chosen rollouts by way of `rollout_func`.
    "_generate": (
        ["prompts"],
        {"_metrics", "completion_ids", "env_mask", "logprobs", "num_input_tokens_seen", "prompt_ids", "rollout_func"},
    ),
    # Credit methods ask for the log-probabilities and entropies of tokens.
    "_get_per_token_logps_and_entropies": (
        ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"],
        {"fused_lm_head", "entropy", "log_probs"},
    ),
    # A sampler generates segments, each from a prompt of its own, with a limit set where these two read it.
    "_tokenize_prompts": (["prompts"], set()),
    "_generate_single_turn": (
        ["prompt_ids", "images", "multimodal_fields", "num_generations"],
        {"generation_config", "generate", "vllm_generation"},
    ),
    "_log_completion_extra": (["column", "values"], {"_pending_extra_logs"}),
    # The held-out measurement asks the correctness reward alone, and logs nothing.
    "_log_metric": (["name", "value"], {"_pending_metrics"}),
    "_calculate_rewards": (
        ["inputs", "prompts", "completions", "completion_ids_list"],
        {"gather", "reward_funcs", "reward_processing_classes", "reward_func_names"},
    ),
    "_generate_and_score_completions": (
        ["inputs"],
        {
            "_calculate_rewards",
            "_generate",
            "_pending_extra_logs",
            "advantages",
            "completion_ids",
            "completion_mask",
            "tool_mask",
        },
    ),
    # `dim` and `unsqueeze`: advantages of shape (B,) are widened, those of shape (B, T) taken as they are.
    "_compute_loss": (["model", "inputs"], {"advantages", "tool_mask", "dim", "unsqueeze"}),
    # Cards and uploads. What is uploaded in training goes by `hf_api`, which we put our patterns into.
    "create_model_card": (["model_name", "dataset_name", "tags"], {"_tag_names", "_name", "_paper"}),
    "_push_from_checkpoint": (["checkpoint_folder"], {"hf_api", "upload_folder"}),
    "_finish_current_push": ([], {"push_in_progress"}),
    "init_hf_repo": (["token"], {"hub_model_id", "push_in_progress"}),
    "save_model": (["_internal_call"], set()),
    # The sample of `log_completions` is shown after it.
    "log": (["logs", "start_time"], {"log_completions"}),
    # These are transformers' own.
    "_save_rng_state": (["output_dir"], set()),
    "_get_output_dir": (["trial"], set()),
    "_get_grad_norm": (["model", "grad_norm"], set()),
    "_init_training_state": (
        ["max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"],
        {"load_from_json", "global_step"},
    ),
}


# The tools of credit methods: see `ktae_trl.rollouts.tools`.


def tokenizer_of(trainer) -> Any:
    """Return the tokenizer, also where the trainer has a processor."""
    return trainer._tokenizer


def token_stats(
    trainer, model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, *, completion_length: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the log-probability and the entropy of the last tokens of each row, (B, completion_length) each.

    Args:
        rows: that a forward pass holds at most.
    """
    logps_BT, entropies_BT, _ = trainer._get_per_token_logps_and_entropies(
        model, ids_BL, mask_BL, completion_length, batch_size=rows, compute_entropy=True
    )
    return logps_BT, entropies_BT


def continuations(trainer, prefixes: list[list[int]], limit: int) -> tuple[list[list[int]], list[list[float]] | None]:
    """Sample a continuation of each prefix, of at most `limit` tokens; log-probabilities with vLLM only."""
    holder, name = trainer.generation_config, "max_new_tokens"
    if trainer.use_vllm:
        holder, name = trainer.vllm_generation, "max_completion_length"
    with changed(holder, **{name: limit}):
        return trainer._generate_single_turn(prefixes, None, {}, num_generations=1)


def prompt_ids_of(trainer, prompts: list) -> list[list[int]]:
    """Return prompts as the token ids that the trainer generates from."""
    return trainer._tokenize_prompts(prompts)[0]


def rewards(trainer, index: int, rows: list[dict[str, Any]], completion_ids: list[list[int]]) -> Tensor:
    """Return what one reward function gives to the completions of all processes, (N,); logs nothing.

    All processes must call it, with as many completions each.
    """
    prompts = [row["prompt"] for row in rows]
    completions = _as_reward_functions_read(trainer, prompts, completion_ids)
    lists = ("reward_funcs", "reward_processing_classes", "reward_func_names")
    only = {name: getattr(trainer, name)[index : index + 1] for name in lists}
    with changed(trainer, **only, _pending_extra_logs=defaultdict(list), _pending_metrics=defaultdict(list)):
        return GRPOTrainer._calculate_rewards(trainer, rows, prompts, completions, completion_ids)[:, 0]


def _as_reward_functions_read(trainer, prompts: list, completion_ids: list[list[int]]) -> list:
    """Return completions as reward functions get them in training, which TRL makes while it generates."""
    rollouts = {"prompt_ids": prompt_ids_of(trainer, prompts), "completion_ids": completion_ids, "logprobs": None}
    nowhere = {
        "rollout_func": lambda prompts, trainer: rollouts,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "tools": [],
        "use_vllm": False,  # it would load the weights into vLLM
    }
    tokens = trainer.state.num_input_tokens_seen
    try:
        with changed(trainer, **nowhere):
            return GRPOTrainer._generate(trainer, prompts)[3]
    finally:
        trainer.state.num_input_tokens_seen = tokens


def frozen_model(trainer, name: str) -> nn.Module:
    """Load a second model as TRL loads its reference model, prepared for the device, ZeRO-3 and FSDP2."""
    policy, args = trainer.model, trainer.args
    how = {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        how["device_map"] = None
    with loading(f"the frozen model {name!r}"):
        model = create_model_from_path(name, trust_remote_code=args.trust_remote_code, **how)
    tokens = len(trainer._tokenizer)
    if model.config.get_text_config().vocab_size < tokens:
        raise UserError(
            f"The frozen model {name!r} has {model.config.get_text_config().vocab_size} token ids, but the policy's "
            f"tokenizer has {tokens}: choose a model with the same tokens"
        )
    model.requires_grad_(False)
    add_fused_lm_head(model, temperature=trainer.temperature, outputs=("log_probs", "entropy"))
    if trainer.is_deepspeed_enabled:
        model = prepare_deepspeed(model, trainer.accelerator)
    elif trainer.is_fsdp_enabled:
        model = prepare_fsdp(model, trainer.accelerator)
    else:
        model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    return model.eval()


def log_metrics(trainer, metrics: dict[str, float]) -> None:
    """Add to the means that the trainer logs next, those of training or of evaluation."""
    means = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, value in metrics.items():
        means[name].append(value)


@contextmanager
def changed(owner: object, **values: Any) -> Iterator[None]:
    """In here, attributes of an object have other values."""
    kept = {name: getattr(owner, name) for name in values}
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(kept)


def check_trl(trainer_class: type, version: str = trl.__version__) -> None:
    """Check that `trainer_class` (TRL's `GRPOTrainer`) keeps the contract that the subclass relies on.

    Raises:
        ImportError: something relied on is gone; the message names it and the tested versions.

    Warns:
        UserWarning: the contract is intact, but this version of TRL was not tested.
    """
    missing = [problem for name, wanted in _RELIED_ON.items() for problem in _problems(trainer_class, name, *wanted)]
    missing += _problems(VLLMGeneration, "generate", ["prompts", "num_generations"], {"max_completion_length"})
    # Between the last file of a checkpoint and the removal of older ones it is sealed.
    missing += _problems(Trainer, "_save_checkpoint", ["model", "trial"], {"rotate_checkpoints", "_save_rng_state"})
    # Before each step of the optimizer the norm of the gradient is asked for.
    missing += _problems(Trainer, "_run_epoch", [], {"_get_grad_norm", "zero_grad"})
    # Resuming draws one permutation per past epoch: right as long as the sampler does, and is not told its epoch.
    missing += _problems(RepeatSampler, "__iter__", [], {"randperm", "generator", "num_samples"})
    if hasattr(RepeatSampler, "set_epoch"):
        missing.append("RepeatSampler.set_epoch is new")
    if missing:
        raise ImportError(
            f"TRL {version} lacks what ktae_trl relies on: {'; '.join(missing)}. "
            f"Tested with TRL {TESTED_TRL}: pip install 'trl{TESTED_TRL}'"
        )
    if not SpecifierSet(TESTED_TRL).contains(version, prereleases=True):
        warnings.warn(
            f"TRL {version} was not tested with ktae_trl (tested: {TESTED_TRL}). Everything relied on is there, so "
            "training goes on.",
            stacklevel=2,
        )


def _problems(owner: type, method: str, parameters: list[str], names: set[str]) -> list[str]:
    function: Callable | None = getattr(owner, method, None)
    if function is None:
        return [f"{owner.__name__}.{method} is gone"]
    function = inspect.unwrap(function)
    found = set(inspect.signature(function).parameters)
    code = function.__code__
    # The keys of a dict literal are one constant, a tuple.
    constants = [c for group in code.co_consts for c in (group if isinstance(group, tuple) else (group,))]
    mentioned = {*code.co_names, *(c for c in constants if isinstance(c, str))}
    return [f"{owner.__name__}.{method} has no parameter {name!r}" for name in parameters if name not in found] + [
        f"{owner.__name__}.{method} no longer uses {name!r}" for name in sorted(names - mentioned)
    ]


def model_name(model) -> str:
    """Return the folder or the name on the Hub that a model was loaded from."""
    return model.config._name_or_path


# The Hub.


def wait_for_upload(trainer) -> None:
    """Wait until an upload of a checkpoint in the background has ended."""
    trainer._finish_current_push()


@contextmanager
def uploading_by(api: Callable[[], object]) -> Iterator[None]:
    """In here, transformers uploads checkpoints by the client that `api` returns: it takes no patterns of files."""
    theirs, transformers.trainer.hf_api = transformers.trainer.hf_api, api
    try:
        yield
    finally:
        transformers.trainer.hf_api = theirs
