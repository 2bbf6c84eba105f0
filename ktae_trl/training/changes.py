"""Settings that have changed since a checkpoint was saved, and how each change affects a resumed training."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any, NamedTuple

from datasets import Dataset
from trl import GRPOConfig

from ktae_trl.config import KTAEGRPOConfig
from ktae_trl.credit import METHODS, find_method

# The settings that determine a checkpoint's buffered rollouts and how long training uses them.
LAYOUT = (
    "num_processes",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "credit",
)
_FOR_SAMPLING = (
    "dynamic_sampling",
    "dynamic_sampling_max_batches",
    "dynamic_sampling_reuse",
    "dynamic_sampling_skip_solved",
)
_FOR_NO_ROLLOUT = (
    *(name for method in METHODS.values() for name in method.no_effect),
    "credit_in_evaluation",
    "record_steps",
    "record_groups",
    "allow_inexact_resume",
    "reward_timeout",
    "console",
    *_FOR_SAMPLING,
)
_OF_METHODS = tuple(
    name
    for name in (field.name for field in fields(KTAEGRPOConfig))
    if name not in (*LAYOUT, *_FOR_NO_ROLLOUT, *(field.name for field in fields(GRPOConfig)))
)
OWN = "settings of the credit method"  # those that are no fields of `KTAEGRPOConfig`
ROWS, HASH = "number of training prompts", "hash of training prompts"


class Kind(NamedTuple):
    """Settings for which a change has the same consequence: an error, or a warning that states the effect."""

    names: tuple[str, ...]
    effect: str  # for the warning
    refused: str = ""  # "always", "inside a generation cycle", "unless ignore_data_skip"


# All settings that are compared. The others do not affect training (saving, logging), or a mismatch raises an error
# elsewhere (the model).
KINDS = (
    Kind(
        (ROWS, HASH, "seed", "shuffle_dataset"),
        "training starts at the first prompt of the epoch",
        refused="unless ignore_data_skip",
    ),
    Kind(("optim",), "", refused="always"),
    Kind(
        ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        "no effect, because the optimizer keeps the checkpoint's value. To change it, start a new run from the "
        "checkpoint's model",
    ),
    Kind(
        ("max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        "in effect; the learning rate follows the new schedule from now on",
    ),
    Kind(
        LAYOUT,
        "in effect; training starts with a new generation, so it will not match the original run exactly",
        refused="inside a generation cycle",
    ),
    Kind(
        (
            *_OF_METHODS,
            OWN,
            *("reward_funcs", "reward_weights", "scale_rewards", "multi_objective_aggregation", "overlong_buffer"),
            *("max_completion_length", "mask_truncated_completions", "temperature", "chat_template_kwargs"),
            *("beta", "use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
            *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
        ),
        "in effect",
        refused="inside a generation cycle",
    ),
    Kind(
        ("dynamic_sampling",),
        "in effect; the checkpoint does not record which prompts come next in this mode, so some may be repeated or "
        "skipped",
    ),
    Kind(
        (
            *("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "dynamic_sampling_max_batches"),
            *("dynamic_sampling_reuse", "dynamic_sampling_skip_solved"),
            *("vllm_mode", "vllm_structured_outputs_regex", "max_tool_calling_iterations"),
        ),
        "in effect from the next generation",
    ),
    Kind(
        (
            *("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "top_entropy_quantile"),
            *("sapo_temperature_neg", "sapo_temperature_pos", "off_policy_mask_threshold", "use_bias_correction_kl"),
            *("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "max_grad_norm"),
            *("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta"),
            *("entropy_target", "router_aux_loss_coef", "disable_dropout", "cast_lm_head_to_fp32"),
            *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        ),
        "in effect",
    ),
)
SETTINGS = tuple(name for kind in KINDS for name in kind.names)

_SAMPLE = 64  # prompts that a fingerprint reads
_SAMPLE_OF_A_STREAM = 8


def fingerprint(data) -> dict[str, Any]:
    """Return a fingerprint of the training prompts: their number (None for a stream) and a hash.

    The hash covers a sample of the prompts that includes the first and the last one. It changes if the dataset grows,
    shrinks or is sorted, but may miss an edit of a single prompt. For a stream it covers the first few prompts.
    """
    if isinstance(data, Dataset):
        n = len(data)
        rows = sorted({round(i * (n - 1) / (_SAMPLE - 1)) for i in range(_SAMPLE)}) if n else []
        prompts = data[rows]["prompt"] if rows else []
    else:
        n, prompts = None, [row["prompt"] for row in islice(data, _SAMPLE_OF_A_STREAM)]
    text = json.dumps(prompts, sort_keys=True, default=lambda value: type(value).__name__)
    return {ROWS: n, HASH: hashlib.sha256(text.encode()).hexdigest()[:12]}


def own_settings(args: KTAEGRPOConfig) -> dict[str, Any]:
    """Return, as one entry `OWN`, what the values depend on that is no field of `KTAEGRPOConfig`.

    These are the settings of a user-defined credit method, and a method's `content`.
    """
    method = find_method(args.credit)
    known = {field.name for field in fields(KTAEGRPOConfig)}
    settings = method.settings_of(args).items()
    own = {name: value for name, value in settings if name not in known and name not in method.no_effect}
    own |= method.content(args)
    return {OWN: own} if own else {}


class Changes:
    """The settings that differ between a checkpoint and this run.

    Args:
        was: settings of the checkpoint. Settings that it lacks, such as most in a checkpoint of version 0.1, are not
            compared.
        now: settings of this run.
    """

    def __init__(self, was: dict[str, Any], now: dict[str, Any]):
        self.was, self.now = was, now
        self._changed = {name for name in SETTINGS if name in was and name in now and was[name] != now[name]}

    def among(self, names: Sequence[str]) -> str:
        """Return a description of the changes among these settings, empty if there are none."""
        return ", ".join(
            f"{name} changed from {self.was[name]!r} to {self.now[name]!r}" for name in names if name in self._changed
        )

    def refused(self, when: str) -> str:
        """Return a description of the changes that are an error in case `when` (see `Kind.refused`)."""
        return self.among([name for kind in KINDS if kind.refused == when for name in kind.names])

    def notes(self) -> Iterator[str]:
        """Yield a line for each change with its effect, for the case that none is an error."""
        for kind in KINDS:
            for name in kind.names:
                if change := self.among([name]):
                    yield f"{change}: {kind.effect}"
