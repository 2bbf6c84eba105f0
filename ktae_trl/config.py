"""`KTAEGRPOConfig`: TRL's `GRPOConfig` and the few fields that token-level credit adds."""

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
    Configuration of `KTAEGRPOTrainer`: every field of TRL's `GRPOConfig`, and those below.

    What TRL's options mean once the advantages A' differ per token (`credit` other than `none`):

    - `loss_type` `grpo`, `dapo`, `bnpo`, `dr_grpo`, `luspo`, `cispo`: the loss of a token takes that token's A'. With
      `ktae_combine="add"` tokens of one rollout can pull in both directions.
    - `epsilon` / `epsilon_high` and `delta`: which side of the ratio is clipped, and whether `delta` bounds it, goes by
      the sign of the token's A'; so do the metrics `clip_ratio/...`.
    - `loss_type` `sapo` and `vespo`: temperature, k and lambda are picked by the sign of the advantage, so per token.
    - `off_policy_mask_threshold`: tokens with A' >= 0 are always kept, those with A' < 0 only if their rollout is near
      the policy. TRL drops or keeps whole rollouts.
    - `importance_sampling_level="sequence"`: the ratio is still one per rollout, but it is clipped against each
      token's A'.
    - `scale_rewards` and `reward_weights` shape the rollout advantage as ever; credit comes after them.

    Parameters:
        credit (`str`, *optional*, defaults to `"ktae"`):
            How tokens get credit: a name in `ktae_trl.credit.METHODS`, the dotted path of a method of your own, such as
            `my_package.my_credit`, or `"none"` for TRL's GRPO, unchanged. The fields of each method are those of its
            `Settings`.
        credit_in_evaluation (`bool`, *optional*, defaults to `False`):
            Value tokens in evaluation too. Nothing trains on it: it gives the method's metrics for the held-out
            problems, and an evaluation loss with token advantages.
        answer_format (`str`, *optional*, defaults to `"boxed"`):
            Where a completion has its final answer: `"boxed"` (the last `\boxed{...}`), `"tag"`
            (`<answer>...</answer>`), `"hash"` (a last line `#### ...`), `"last_number"`, or `"auto"` (the first of
            these that is there). Read so by `math_accuracy`, `boxed_format`, the held-out measurement and OAR; a reward
            function of yours with a parameter of this name gets it. What a model thinks (`<think>...</think>`) is no
            answer.
        grading_budget (`float`, *optional*, defaults to `60.0`):
            Seconds that `math_accuracy` may take for 1,000 rollouts, at least 10 a call; `None` for no limit. Answers
            take milliseconds, so only rollouts whose answers never end, such as towers of powers, use it up. What is
            left then counts as wrong (metric `grading/budget`). The formula: `ktae_trl.grading.grade_many`.
        correctness_reward (`str`, *optional*):
            Name of the reward function that says which rollouts are right. Defaults to the first one. A rollout for
            which it returns `None` is left out of the statistics.
        correctness_threshold (`float | str`, *optional*, defaults to `0.0`):
            A rollout is right if that reward is above this. `"auto"`: if it is above the mean of its group, for rewards
            that have more than two values; a group whose rewards are all equal has no right and no wrong rollouts.
        reward_timeout (`float`, *optional*):
            Seconds that a call of a reward function, with the whole batch of a process, may take. A call that takes
            longer ends the run with an error that names the function and the completion. By default a call may take any
            time; after a minute, and again after two, four and so on, a line says what is waited for.
        dynamic_sampling (`bool`, *optional*, defaults to `False`):
            Replace prompts whose rollouts are all right or all wrong by the next ones of the training set, until the
            generation batch is full of groups with both (DAPO). The optimizer steps stay as many as ever; they use
            more prompts.
        dynamic_sampling_max_batches (`int`, *optional*, defaults to `10`):
            Generate at most so many batches to fill one. What is still missing then is filled with other groups.
        allow_inexact_resume (`bool`, *optional*, defaults to `False`):
            Resume also from a checkpoint that lacks its optimizer and learning-rate schedule, its random numbers, or
            the rollouts still to be trained on, as one of another trainer does: what is missing starts anew.
        record_steps (`int`, *optional*, defaults to `0`):
            Record rollouts, with the value and the advantage of every token, once in so many optimizer steps, in
            `output_dir/rollouts`, for `ktae report` and for pandas. 0 records none. A run of more than 100 records is
            recorded less often.
        record_groups (`int`, *optional*, defaults to `16`):
            Groups in a record at most; those whose right and wrong rollouts are nearest to half and half come first.
        console (`bool`, *optional*, defaults to `True`):
            Print the metrics as a table, a line per log, and explain its columns. `False` prints the dictionaries of
            transformers instead. The progress bar is shown in terminals only; `disable_tqdm` turns it off there too.
    """

    credit: str = field(
        default="ktae",
        metadata={
            "help": f"How tokens get credit: {', '.join(METHODS)}, none (TRL's GRPO), or a dotted path of your own."
        },
    )
    credit_in_evaluation: bool = field(
        default=False,
        metadata={"help": "Value tokens in evaluation too, for the method's metrics there; nothing trains on it."},
    )
    answer_format: str = field(
        default="boxed",
        metadata={"help": f"Where a completion has its final answer: {', '.join(map(repr, ANSWER_FORMATS))}."},
    )
    grading_budget: float | None = field(
        default=BUDGET, metadata={"help": "Seconds that grading 1,000 rollouts may take; null for no limit."}
    )
    correctness_reward: str | None = field(
        default=None,
        metadata={"help": "Reward function that says which rollouts are right. Defaults to the first one."},
    )
    # With None in it the parser takes words; `float | str` it would read as float.
    correctness_threshold: float | str | None = field(
        default=0.0,
        metadata={
            "help": "A rollout is right if its correctness reward is above this number, or 'auto': above the mean of "
            "its group."
        },
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds that a call of a reward function may take; a longer one ends the run."},
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace prompts whose rollouts are all right or all wrong by further ones (DAPO)."},
    )
    dynamic_sampling_max_batches: int = field(
        default=10, metadata={"help": "Generate at most so many batches to fill one."}
    )
    allow_inexact_resume: bool = field(
        default=False,
        metadata={"help": "Resume also from a checkpoint that lacks parts other than the model; they start anew."},
    )
    record_steps: int = field(
        default=0, metadata={"help": "Record rollouts once in so many optimizer steps; 0 records none."}
    )
    record_groups: int = field(default=16, metadata={"help": "Groups in a record at most."})
    console: bool = field(
        default=True,
        metadata={"help": "Print the metrics as a table; false: as the dictionaries of transformers."},
    )

    def __new__(cls, *args, credit: str | None = None, **kwargs):
        # A user's method brings its own fields.
        return super().__new__(with_settings_of(cls, credit or cls.credit))

    def __post_init__(self):
        self._check_generation_batch()
        # TRL sets the one that is not given, for the processes that were started.
        self.fixed_generation_batch = self.generation_batch_size is not None
        super().__post_init__()
        method = find_method(self.credit)
        for settings in dict.fromkeys(each.Settings for each in (*METHODS.values(), method)):
            settings.check(self)
        if self.dynamic_sampling_max_batches < 1:
            raise UserError(f"dynamic_sampling_max_batches must be at least 1, not {self.dynamic_sampling_max_batches}")
        for name, least in (("record_steps", 0), ("record_groups", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.reward_timeout is not None and not 0 < self.reward_timeout < math.inf:
            raise UserError(
                f"reward_timeout must be a number of seconds above 0, or None for no limit, not {self.reward_timeout}"
            )
        check_format(self.answer_format)
        check_budget("grading_budget", self.grading_budget)
        self.correctness_threshold = read_threshold(self.correctness_threshold)
        method.check_run(self)

    def _check_generation_batch(self) -> None:
        # Before TRL's own check, whose message has the product only. The launcher sets the number of processes.
        processes = int(os.environ.get("WORLD_SIZE", 1))
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        rollouts = self.generation_batch_size or self.per_device_train_batch_size * processes * steps
        if self.num_generations > 0 and rollouts % self.num_generations:
            arithmetic = f"{rollouts} rollouts (generation_batch_size)"
            if self.generation_batch_size is None:
                name = "steps_per_generation" if self.steps_per_generation else "gradient_accumulation_steps"
                enough = steps * self.num_generations // math.gcd(rollouts, self.num_generations)
                arithmetic = (
                    f"{self.per_device_train_batch_size} (per_device_train_batch_size) x {processes} (processes) x "
                    f"{steps} ({name}) = {rollouts} rollouts; with {name}={enough} they would"
                )
            raise UserError(
                f"A generation must hold whole groups of {self.num_generations} rollouts (num_generations), but has "
                f"{arithmetic}"
            )


def with_settings_of(config: type[KTAEGRPOConfig], credit: str) -> type[KTAEGRPOConfig]:
    """Return the config class with the fields of a credit method, which those of the package have from the start.

    Raises:
        ValueError: no such method, or one of its fields has the name of a field that is there already.
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
            f"credit={credit!r} has settings with names that the config has already: {', '.join(both)}. Rename them"
        )

    def reduce(self):  # for pickle, which does not find a class that is made here
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
    """Return the config class for a command line, with the fields of the credit method that it names, if only in the
    file after `--config`."""
    (chosen,) = parse((_Chosen,), program, words, others=True)
    return with_settings_of(KTAEGRPOConfig, chosen.credit)
