"""`KTAEGRPOConfig`: TRL's `GRPOConfig` and the few fields that token-level credit adds."""

import math
import os
from dataclasses import dataclass, field

from trl import GRPOConfig

from ktae_trl.arguments import UserError, nearest
from ktae_trl.credit import METHODS, oar
from ktae_trl.credit.ktae.values import check_weights
from ktae_trl.grading import ANSWER_FORMATS, BUDGET, check_budget, check_format
from ktae_trl.rollouts.samplers import SAMPLERS
from ktae_trl.rollouts.verdicts import read_threshold


@dataclass
class KTAEGRPOConfig(GRPOConfig):
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
            How tokens get credit: by `"ktae"` (statistics over right and wrong rollouts), `"oar_g"` or `"oar_p"`
            (influence on the answer, by gradients or by perturbation), `"tree"` (rollouts sampled as trees, segments
            compared with their siblings), or `"none"` for TRL's GRPO, unchanged.
        ktae_combine (`str`, *optional*, defaults to `"multiply"`):
            How the key-token value K meets the rollout advantage A: `"multiply"` gives `A + |A| K`, which never turns
            the sign of A; `"add"` gives `A + K`, as published.
        ktae_fisher_weight (`float`, *optional*, defaults to `1.0`):
            Weight h1 of the Fisher association in the strength of a token.
        ktae_ig_weight (`float`, *optional*, defaults to `1.0`):
            Weight h2 of the information gain in the strength of a token.
        ktae_tf_weight (`float`, *optional*, defaults to `1.0`):
            Weight h3 of the term frequencies in the direction of a token.
        ktae_leave_one_out (`bool`, *optional*, defaults to `False`):
            Value each rollout's tokens by the other rollouts of its group only, so that it does not vote for itself.
        oar_answer (`str`, *optional*, defaults to `"answer_mean"`):
            What of the model's answer a token may influence: `"answer_mean"`, the mean logits where the answer's tokens
            are predicted; `"answer_joint"`, the log-probability of these tokens together; `"last"`, the distribution
            after the completion's last token.
        oar_quantile (`float`, *optional*, defaults to `0.25`):
            Tokens below this quantile of influence in their rollout lose weight, the others gain.
        oar_beta (`float`, *optional*, defaults to `1.0`):
            How much the most influential token gains, before weights are scaled to mean 1.
        oar_noise_std (`float`, *optional*, defaults to `0.001`):
            Standard deviation of the noise on the embeddings (`oar_g`). In bf16 the effect of so little is lost in
            rounding: take 0.01.
        oar_span (`int`, *optional*, defaults to `1`):
            Perturb so many tokens in a row together; they share their weight (`oar_p`). 4 costs about a quarter of 1.
        oar_token_budget (`int`, *optional*, defaults to `16384`):
            Tokens, with those of prompts, that a forward pass of OAR holds at most. Lower it if memory runs out:
            `oar_g` keeps all activations where there are no checkpoints, or reentrant ones (PEFT under ZeRO-3).
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
        tree_branching (`int`, *optional*, defaults to `2`):
            With `credit="tree"`: segments sampled from each node.
        tree_depth (`int`, *optional*, defaults to `3`):
            Segments from the prompt to a leaf. `num_generations` must be `tree_branching ** tree_depth`.
        tree_segment_tokens (`int`, *optional*):
            Tokens of a segment at most. Defaults to `max_completion_length // tree_depth`.
        tree_min_spread (`float`, *optional*, defaults to `0.1`):
            Siblings whose values are all nearer than this are not trained apart: their advantages are 0.
        tree_normalizer (`str`, *optional*, defaults to `"bernoulli"`):
            What a segment's value, less the mean mu of its siblings, is divided by: `"bernoulli"` sqrt(mu (1 - mu)),
            `"std"` the siblings' standard deviation, as in GRPO, or `"none"`.
        allow_inexact_resume (`bool`, *optional*, defaults to `False`):
            Resume also from a checkpoint that lacks its optimizer and learning-rate schedule, its random numbers, or
            the rollouts still to be trained on, as one of another trainer does: what is missing starts anew.
        record_steps (`int`, *optional*, defaults to `0`):
            Record rollouts, with the value and the advantage of every token, once in so many optimizer steps, in
            `output_dir/rollouts`, for `ktae report` and for pandas. 0 records none. A run of more than 100 records is
            recorded less often.
        record_groups (`int`, *optional*, defaults to `16`):
            Groups in a record at most; those whose right and wrong rollouts are nearest to half and half come first.
    """

    credit: str = field(
        default="ktae",
        metadata={"help": "How tokens get credit: 'ktae', 'oar_g', 'oar_p', 'tree', or 'none' for TRL's GRPO."},
    )
    ktae_combine: str = field(
        default="multiply",
        metadata={"help": "'multiply' (A + |A| K, keeps the sign of A) or 'add' (A + K, as published)."},
    )
    ktae_fisher_weight: float = field(default=1.0, metadata={"help": "Weight h1 of the Fisher association."})
    ktae_ig_weight: float = field(default=1.0, metadata={"help": "Weight h2 of the information gain."})
    ktae_tf_weight: float = field(default=1.0, metadata={"help": "Weight h3 of the term frequencies."})
    ktae_leave_one_out: bool = field(
        default=False,
        metadata={"help": "Value each rollout's tokens by the other rollouts of its group only."},
    )
    oar_answer: str = field(
        default="answer_mean", metadata={"help": "What tokens may influence: 'answer_mean', 'answer_joint' or 'last'."}
    )
    oar_quantile: float = field(
        default=0.25, metadata={"help": "Tokens below this quantile of influence lose weight, the others gain."}
    )
    oar_beta: float = field(default=1.0, metadata={"help": "How much the most influential token gains."})
    oar_noise_std: float = field(default=1e-3, metadata={"help": "Noise on the embeddings (oar_g)."})
    oar_span: int = field(default=1, metadata={"help": "Perturb so many tokens in a row together (oar_p)."})
    oar_token_budget: int = field(default=16384, metadata={"help": "Tokens in a forward pass of OAR at most."})
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
    tree_branching: int = field(default=2, metadata={"help": "Tree sampling: segments sampled from each node."})
    tree_depth: int = field(
        default=3,
        metadata={"help": "Segments from the prompt to a leaf; num_generations is tree_branching ** tree_depth."},
    )
    tree_segment_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens of a segment at most. Defaults to max_completion_length // tree_depth."},
    )
    tree_min_spread: float = field(
        default=0.1, metadata={"help": "Siblings whose values are all nearer than this have no advantages."}
    )
    tree_normalizer: str = field(
        default="bernoulli",
        metadata={"help": "'bernoulli' (sqrt(mu (1 - mu))), 'std' (as in GRPO) or 'none'."},
    )
    allow_inexact_resume: bool = field(
        default=False,
        metadata={"help": "Resume also from a checkpoint that lacks parts other than the model; they start anew."},
    )
    record_steps: int = field(
        default=0, metadata={"help": "Record rollouts once in so many optimizer steps; 0 records none."}
    )
    record_groups: int = field(default=16, metadata={"help": "Groups in a record at most."})

    def __post_init__(self):
        self._check_generation_batch()
        # TRL sets the one that is not given, for the processes that were started.
        self.fixed_generation_batch = self.generation_batch_size is not None
        super().__post_init__()
        for name, choices in (("credit", ["none", *METHODS]), ("ktae_combine", ["multiply", "add"])):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"{name}={value!r} is unknown{nearest(value, choices)}. Choose from: {', '.join(choices)}"
                )
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
        check_weights(self.ktae_fisher_weight, self.ktae_ig_weight, self.ktae_tf_weight)
        oar.check_settings(
            self.oar_answer,
            self.oar_quantile,
            self.oar_beta,
            self.oar_noise_std,
            self.oar_span,
            self.oar_token_budget,
        )
        if self.credit in SAMPLERS:
            SAMPLERS[self.credit].check(self)

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
