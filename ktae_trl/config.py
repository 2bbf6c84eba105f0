"""`KTAEGRPOConfig`: TRL's `GRPOConfig` plus the fields for token-level credit."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any

from trl import GRPOConfig

from ktae_trl.arguments import UserError, parse
from ktae_trl.credit import METHODS, find_method
from ktae_trl.grading import ANSWER_FORMATS, BUDGET, check_budget, check_format
from ktae_trl.rollouts.verdicts import read_threshold


def _settings_of_methods() -> list[type]:
    found = dict.fromkeys(method.Settings for method in METHODS.values())
    return [one for one in found if not any(other is not one and issubclass(other, one) for other in found)]


@dataclass
class KTAEGRPOConfig(*_settings_of_methods(), GRPOConfig):
    r"""
    Configuration of `KTAEGRPOTrainer`: every field of TRL's `GRPOConfig`, the fields of the credit methods, and those
    below.

    With `credit` other than `"none"`, each token has its own advantage A'. TRL's options then mean:

    - `loss_type` `grpo`, `dapo`, `bnpo`, `dr_grpo`, `luspo`, `cispo`: the loss of a token uses its A'. With
      `ktae_combine="add"`, A' can have different signs within a rollout.
    - `epsilon`, `epsilon_high` and `delta`: the sign of the token's A' decides which side of the ratio is clipped and
      whether `delta` applies. The metrics `clip_ratio/...` follow it.
    - `loss_type` `sapo` and `vespo`: the sign of the token's A' selects temperature, k and lambda.
    - `off_policy_mask_threshold`: tokens with A' >= 0 are always kept. Tokens with A' < 0 are kept only if their
      rollout is close to the policy. TRL keeps or drops whole rollouts.
    - `importance_sampling_level="sequence"`: the ratio is one per rollout, but the sign of each token's
      A' decides how it is clipped.
    - `scale_rewards` and `reward_weights` change the rollout advantage, before credit is applied.

    Parameters:
        credit (`str`, *optional*, defaults to `"ktae"`):
            Credit method: a name in `ktae_trl.credit.METHODS`, the dotted path of your own method, such as
            `my_package.my_credit`, or `"none"` for TRL's GRPO. The fields of a method are those of its `Settings`.
        credit_in_evaluation (`bool`, *optional*, defaults to `False`):
            Compute token credit in evaluation too. It adds the method's metrics for the held-out problems and gives an
            evaluation loss with token advantages. It does not affect training.
        answer_format (`str`, *optional*, defaults to `"boxed"`):
            Where the final answer of a completion is: `"boxed"` (the last `\boxed{...}`), `"tag"`
            (`<answer>...</answer>`), `"hash"` (a last line `#### ...`), `"last_number"`, or `"auto"` (the first of
            these that is found). Text inside `<think>...</think>` is ignored. `math_accuracy`, `boxed_format`, the
            held-out measurement and OAR use this format. It is passed to your own reward function if that has a
            parameter of this name.
        grading_budget (`float`, *optional*, defaults to `60.0`):
            Seconds that `math_accuracy` may take for 1,000 rollouts, with at least 10 seconds per call; `None` for no
            limit. Grading an answer takes milliseconds, so only very costly answers, such as towers of powers, exceed
            the budget. Rollouts that are not graded within it count as wrong (metric `grading/budget`). See
            `ktae_trl.grading.grade_many` for the formula.
        correctness_reward (`str`, *optional*):
            Name of the reward function that decides which rollouts are correct. Defaults to the first one. A rollout
            for which it returns `None` is left out of the statistics.
        correctness_threshold (`float | str`, *optional*, defaults to `0.0`):
            A rollout is correct if its correctness reward is above this number. `"auto"`, for rewards with more than
            two values, compares it to the mean of the rollout's group. A group whose rewards are all equal then has
            neither correct nor wrong rollouts.
        reward_timeout (`float`, *optional*):
            Maximum seconds for one call of a reward function with the whole batch of a process. A longer call ends the
            run with an error that names the function and the completion. There is no limit by default. A call of more
            than one minute is logged, and again after two minutes, four minutes and so on.
        dynamic_sampling (`bool`, *optional*, defaults to `False`):
            Replace prompts whose rollouts are all correct or all wrong with the next prompts of the training set, until
            every group of the generation batch has both (DAPO). The number of optimizer steps does not change, but more
            prompts are used.
        dynamic_sampling_max_batches (`int`, *optional*, defaults to `10`):
            At most this many times the groups of a batch are generated to fill it. If there are still too few groups
            with both correct and wrong rollouts, other groups fill the batch.
        dynamic_sampling_reuse (`bool`, *optional*, defaults to `False`):
            Keep surplus groups with both correct and wrong rollouts for the next batch. The policy that sampled them is
            then one optimizer step old, which the importance ratio takes into account. There must be at most one
            optimizer step per generation.
        dynamic_sampling_skip_solved (`int`, *optional*, defaults to `0`):
            Dynamic sampling skips a prompt whose rollouts were all correct the last two times in the next N passes over
            the training set, and then draws it again. `0` skips no prompt.
        allow_inexact_resume (`bool`, *optional*, defaults to `False`):
            Also resume from a checkpoint without the optimizer and learning-rate schedule, the random states, or the
            rollouts still to be trained on, such as a checkpoint of another trainer. Missing parts start from scratch.
        record_steps (`int`, *optional*, defaults to `0`):
            Record rollouts every N optimizer steps (0: never), with the value and advantage of every token, in
            `output_dir/rollouts`. `ktae report` and pandas read them. A run has at most 100 records; a run that would
            have more is recorded less often.
        record_groups (`int`, *optional*, defaults to `16`):
            Maximum number of groups in a record. Groups in which about half of the rollouts are correct come first.
        console (`bool`, *optional*, defaults to `True`):
            Print the metrics as a table with one line per log, and explain its columns. `False` prints the dictionaries
            of transformers instead. The progress bar is shown only in terminals; `disable_tqdm` turns it off there too.
    """

    credit: str = field(
        default="ktae",
        metadata={
            "help": f"Credit method: {', '.join(METHODS)}, none (TRL's GRPO), or the dotted path of your own method."
        },
    )
    credit_in_evaluation: bool = field(
        default=False,
        metadata={"help": "Compute token credit in evaluation too, for its metrics. Does not affect training."},
    )
    answer_format: str = field(
        default="boxed",
        metadata={"help": f"Where the final answer of a completion is: {', '.join(map(repr, ANSWER_FORMATS))}."},
    )
    grading_budget: float | None = field(
        default=BUDGET, metadata={"help": "Maximum seconds to grade 1,000 rollouts; null for no limit."}
    )
    correctness_reward: str | None = field(
        default=None,
        metadata={"help": "Reward function that decides which rollouts are correct. Defaults to the first one."},
    )
    # None in the type makes the parser keep strings. It would parse `float | str` as float.
    correctness_threshold: float | str | None = field(
        default=0.0,
        metadata={
            "help": "A rollout is correct if its correctness reward is above this number ('auto': the mean of its "
            "group)."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Maximum seconds for a call of a reward function. A longer call ends the run."},
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace prompts whose rollouts are all correct or all wrong (DAPO)."},
    )
    dynamic_sampling_max_batches: int = field(
        default=10, metadata={"help": "Maximum number of groups generated to fill a batch, in batches."}
    )
    dynamic_sampling_reuse: bool = field(
        default=False, metadata={"help": "Keep surplus groups for the next batch, one optimizer step later."}
    )
    dynamic_sampling_skip_solved: int = field(
        default=0,
        metadata={
            "help": "Skip a prompt in the next N passes if its rollouts were all correct the last two times (0: never)."
        },
    )
    allow_inexact_resume: bool = field(
        default=False,
        metadata={"help": "Also resume from a checkpoint that lacks training state, such as the optimizer."},
    )
    record_steps: int = field(default=0, metadata={"help": "Record rollouts every N optimizer steps (0: never)."})
    record_groups: int = field(default=16, metadata={"help": "Maximum number of groups in a record."})
    console: bool = field(
        default=True, metadata={"help": "Print the metrics as a table (false: as dictionaries, like transformers)."}
    )

    def __new__(cls, *args, credit: str | None = None, **kwargs):
        # A user's own method adds its fields to the class.
        return super().__new__(with_settings_of(cls, credit or cls.credit))

    def __post_init__(self):
        self._check_generation_batch()
        # Before `super()`, which sets it from the number of processes if it is None.
        self.fixed_generation_batch = self.generation_batch_size is not None
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16/gpu" not in str(error):
                raise
            raise UserError(
                "bf16 is on (the default), but torch finds no GPU that supports it. Set use_cpu=true to train on the "
                "CPU, or bf16=false for a GPU without bf16"
            ) from error
        method = find_method(self.credit)
        for settings in dict.fromkeys(each.Settings for each in (*METHODS.values(), method)):
            settings.check(self)
        if self.dynamic_sampling_max_batches < 1:
            raise UserError(f"dynamic_sampling_max_batches must be at least 1, not {self.dynamic_sampling_max_batches}")
        for name in ("dynamic_sampling_reuse", "dynamic_sampling_skip_solved"):
            if getattr(self, name) and not self.dynamic_sampling:
                raise UserError(
                    f"{name} is {getattr(self, name)}, but has an effect only with dynamic sampling. Set "
                    "dynamic_sampling: true"
                )
        if self.dynamic_sampling_reuse:
            self._check_reuse(method)
        for name, least in (("dynamic_sampling_skip_solved", 0), ("record_steps", 0), ("record_groups", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise UserError(
                f"reward_timeout must be a positive number of seconds, or None for no limit, not {self.reward_timeout}"
            )
        check_format(self.answer_format)
        check_budget("grading_budget", self.grading_budget)
        self.correctness_threshold = read_threshold(self.correctness_threshold)
        method.check_run(self)

    def _check_reuse(self, method) -> None:
        passes = self.steps_per_generation * self.num_iterations
        if self.gradient_accumulation_steps % passes:
            raise UserError(
                "dynamic_sampling_reuse needs at most one optimizer step per generation, because kept groups would be "
                f"older than one step. But a generation has {passes} forward passes (steps_per_generation "
                f"{self.steps_per_generation} x num_iterations {self.num_iterations}) and an optimizer step "
                f"{self.gradient_accumulation_steps} (gradient_accumulation_steps). Set dynamic_sampling_reuse: false, "
                f"or gradient_accumulation_steps to a multiple of {passes}"
            )
        if method.samples_itself():
            raise UserError(
                f"dynamic_sampling_reuse does not support credit: {self.credit}, which samples its own rollouts. Set "
                "dynamic_sampling_reuse: false"
            )

    def _check_generation_batch(self) -> None:
        # Before TRL's check, whose message has only the product. The launcher sets WORLD_SIZE.
        processes = int(os.environ.get("WORLD_SIZE", 1))
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        rollouts = self.generation_batch_size or self.per_device_train_batch_size * processes * steps
        if self.num_generations > 0 and rollouts % self.num_generations:
            arithmetic = f"{rollouts} rollouts. Set generation_batch_size to a multiple of {self.num_generations}"
            if self.generation_batch_size is None:
                name = "steps_per_generation" if self.steps_per_generation else "gradient_accumulation_steps"
                enough = steps * self.num_generations // math.gcd(rollouts, self.num_generations)
                arithmetic = (
                    f"{self.per_device_train_batch_size} (per_device_train_batch_size) x {processes} (processes) x "
                    f"{steps} ({name}) = {rollouts} rollouts. Set {name}={enough}"
                )
            raise UserError(
                f"A generation must consist of complete groups of {self.num_generations} rollouts (num_generations), "
                f"but has {arithmetic}"
            )


def with_settings_of(config: type[KTAEGRPOConfig], credit: str) -> type[KTAEGRPOConfig]:
    """Return the config class with the fields of a credit method. The package's own methods need no extension.

    Raises:
        UserError: the method is unknown, or one of its fields has the name of an existing field.
    """
    settings = find_method(credit).Settings
    return config if issubclass(config, settings) else _extended(config, settings, credit)


@functools.cache
def _extended(config: type[KTAEGRPOConfig], settings: type, credit: str) -> type[KTAEGRPOConfig]:
    bases = [base for base in config.__mro__ if is_dataclass(base) and issubclass(settings, base)]
    shared = {own.name for base in bases for own in fields(base)}
    taken = {own.name for own in fields(config)} - shared
    if both := [own.name for own in fields(settings) if own.name in taken]:
        raise UserError(
            f"credit={credit!r} has settings whose names already exist in the config: {', '.join(both)}. Rename them"
        )

    def reduce(self):  # pickle cannot find a class that is created at run time
        return _restored, (config, self.credit, vars(self))

    return make_dataclass(config.__name__, [], bases=(settings, config), namespace={"__reduce__": reduce})


def _restored(config: type[KTAEGRPOConfig], credit: str, values: dict[str, Any]) -> KTAEGRPOConfig:
    args = config.__new__(config, credit=credit)
    vars(args).update(values)
    return args


@dataclass
class _Chosen:
    credit: str = KTAEGRPOConfig.credit


def config_class(words: Sequence[str], program: str) -> type[KTAEGRPOConfig]:
    """Return the config class with the fields of the credit method that a command line, or its config file, names."""
    (chosen,) = parse((_Chosen,), program, words, others=True)
    return with_settings_of(KTAEGRPOConfig, chosen.credit)
