"""Settings that were changed since a checkpoint was saved: what becomes of each when training resumes from it."""

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

# What the buffered rollouts of a checkpoint are made of, and for how long they are used.
LAYOUT = (
    "num_processes",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "credit",
)
_FOR_SAMPLING = ("dynamic_sampling", "dynamic_sampling_max_batches")
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
OWN = "settings of the credit method"  # those of a user's own
ROWS, HASH = "number of training prompts", "hash of training prompts"


class Kind(NamedTuple):
    """Settings that share what becomes of a change: an error, or what a warning says is in effect."""

    names: tuple[str, ...]
    effect: str
    refused: str = ""  # "always", "inside a generation cycle", "unless ignore_data_skip"


# The table of all settings that are compared. A setting that is not here shapes no training (saving, logging), or says
# itself that it does not fit (the model).
KINDS = (
    Kind(
        (ROWS, HASH, "seed", "shuffle_dataset"),
        "the prompts are drawn from the first one of the epoch",
        refused="unless ignore_data_skip",
    ),
    Kind(("optim",), "", refused="always"),
    Kind(
        ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        "no effect: the optimizer keeps the checkpoint's. To change it, start a new run from the checkpoint's model",
    ),
    Kind(
        ("max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        "in effect: the learning rate follows the new schedule from here on",
    ),
    Kind(
        LAYOUT,
        "in effect; training starts with a new generation and will not repeat the original run exactly",
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
        "in effect; the checkpoint does not say which prompts are next in this mode, so some may come again or be left "
        "out",
    ),
    Kind(
        (
            *("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "dynamic_sampling_max_batches"),
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

_SAMPLE = 64  # prompts that a fingerprint looks at
_SAMPLE_OF_A_STREAM = 8


def fingerprint(data) -> dict[str, Any]:
    """Return what tells these training prompts from others: their number (None for a stream) and a hash.

    Reads some prompts, the first and the last one among them: a dataset that has grown, shrunk or been sorted is
    another one, one with a corrected word in the middle may not be. Of a stream it reads the first few.
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
    """Return the settings of a user's credit method that shape training, under one name."""
    method = find_method(args.credit)
    known = {field.name for field in fields(KTAEGRPOConfig)}
    settings = method.settings_of(args).items()
    own = {name: value for name, value in settings if name not in known and name not in method.no_effect}
    return {OWN: own} if own else {}


class Changes:
    """The settings that differ between a checkpoint and this run, by what becomes of them.

    Args:
        was: the checkpoint's. Those that it does not have, as one of version 0.1, are not compared.
        now: this run's.
    """

    def __init__(self, was: dict[str, Any], now: dict[str, Any]):
        self.was, self.now = was, now
        self._changed = {name for name in SETTINGS if name in was and name in now and was[name] != now[name]}

    def among(self, names: Sequence[str]) -> str:
        """Return the changes of these settings in words, empty if there are none."""
        return ", ".join(
            f"{name} was {self.was[name]!r} and is {self.now[name]!r}" for name in names if name in self._changed
        )

    def refused(self, when: str) -> str:
        """Return the changes in words that are an error in this case, one of those of `Kind.refused`."""
        return self.among([name for kind in KINDS if kind.refused == when for name in kind.names])

    def notes(self) -> Iterator[str]:
        """Yield what to say of each change where none is an error."""
        for kind in KINDS:
            for name in kind.names:
                if change := self.among([name]):
                    yield f"{change}: {kind.effect}"
