"""KTAE as a credit method: settings, model card and metrics (arXiv 2505.16826). The formulas are in `values`.

Departures from the authors' code (xiaolizh1/KTAE), in addition to those in `values`:

- Credit is computed once per generation, not at each call of the loss.
- One reward function decides which rollouts are correct, not the weighted sum of all.
- The loss is TRL's (`loss_type`).
- `ktae_combine: multiply`, `ktae_combine: importance`, `ktae_leave_one_out` and `ktae_memory` are additions.
"""

import dataclasses
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktae_trl.arguments import UserError, nearest
from ktae_trl.credit.combine import combine
from ktae_trl.credit.ktae import memory
from ktae_trl.credit.ktae.values import (
    check_weights,
    importance_weights,
    key_token_strengths,
    key_token_values,
)
from ktae_trl.credit.method import Card, Credit, Groups, Method, Settings

IMPORTANCE = "importance"
COMBINE = ("multiply", "add", IMPORTANCE)
SATURATED = 0.9  # |K| above this counts in `ktae/saturated`
# No arguments of `key_token_values`.
_AFTER_COUNTING = ("ktae_combine", "ktae_scale", "ktae_importance_beta", "ktae_memory")
_COLUMNS_OF_WEIGHTS = {
    "mixed": ("ktae/informative_groups", "{:.0%}", "share of groups with both correct and wrong rollouts"),
    "eff. w": ("ktae/effective_share", "{:.1%}", "effective share of the tokens of mixed groups: 1 / mean w^2"),
}
_PANELS_OF_WEIGHTS = {"Shares": ["ktae/effective_share", "ktae/informative_groups"]}
_DOES_OF_WEIGHTS = (
    "Each token gets the advantage of its rollout, weighted by how strongly the token is associated with the correct "
    "or the wrong rollouts of its prompt (Fisher's exact test, information gain)."
)
_DOES_OF_MEMORY = (
    "Each token gets the advantage of its rollout, raised or lowered by how strongly the token was associated with the "
    "correct or the wrong rollouts of earlier prompts (an odds ratio over groups, in place of the paper's value)."
)
_SILENCED = 1e-3  # |A'| up to this share of |A| counts in `ktae/zero_factor`


class KTAE(Method):
    """Key-token values: how strongly a token is associated with the correct or the wrong rollouts of its group."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: ktae`.

        Parameters:
            ktae_combine (`str`, *optional*, defaults to `"multiply"`):
                How the rollout advantage A is changed: `"multiply"` is `A + |A| K`, which keeps the sign of A; `"add"`
                is `A + K`, as in the authors' code. `"importance"` is `A w`, with weights w that follow the strength of
                a token but not its direction, and have mean 1 over the rollout.
            ktae_scale (`float`, *optional*, defaults to `1.0`):
                Factor c between 0 and 1 of K: `A + c |A| K` and `A + c K`. No effect with `"importance"`.
            ktae_importance_beta (`float`, *optional*, defaults to `1.0`):
                Size beta of the weights of `"importance"`, which are proportional to `1 + beta S`. 0 is GRPO.
            ktae_fisher_weight (`float`, *optional*, defaults to `1.0`):
                Weight h1 of the Fisher association in the strength of a token.
            ktae_ig_weight (`float`, *optional*, defaults to `1.0`):
                Weight h2 of the information gain in the strength of a token.
            ktae_tf_weight (`float`, *optional*, defaults to `1.0`):
                Weight h3 of the term frequencies in the direction of a token. No effect with `"importance"`.
            ktae_leave_one_out (`bool`, *optional*, defaults to `False`):
                Compute the values of each rollout from the other rollouts of its group only, so that it does not vote
                for itself.
            ktae_memory (`float`, *optional*, defaults to `0.0`):
                Above 0 and below 1: the values come from the groups of earlier generations instead of the rollout's own
                group. Each generation counts `ktae_memory` times as much as the one after it. The weights and
                `ktae_leave_one_out` then have no effect. Not with `"importance"`.
        """

        ktae_combine: str = field(
            default="multiply",
            metadata={
                "help": "'multiply' (A + |A| K, keeps the sign of A), 'add' (A + K, the authors' code) or 'importance' "
                "(A w, w of mean 1)."
            },
        )
        ktae_scale: float = field(default=1.0, metadata={"help": "Factor of K, 0 to 1 (not with 'importance')."})
        ktae_importance_beta: float = field(
            default=1.0, metadata={"help": "Size of the weights of 'importance': w is proportional to 1 + beta S."}
        )
        ktae_fisher_weight: float = field(default=1.0, metadata={"help": "Weight h1 of the Fisher association."})
        ktae_ig_weight: float = field(default=1.0, metadata={"help": "Weight h2 of the information gain."})
        ktae_tf_weight: float = field(default=1.0, metadata={"help": "Weight h3 of the term frequencies."})
        ktae_leave_one_out: bool = field(
            default=False,
            metadata={"help": "Compute the values of each rollout from the other rollouts of its group only."},
        )
        ktae_memory: float = field(
            default=0.0,
            metadata={
                "help": "Above 0 and below 1: values from the groups of earlier generations, each of which counts "
                "ktae_memory times as much as the one after it."
            },
        )

        def check(self) -> None:
            if self.ktae_combine not in COMBINE:
                raise UserError(
                    f"ktae_combine={self.ktae_combine!r} is unknown{nearest(self.ktae_combine, COMBINE)}. "
                    f"Choose from: {', '.join(COMBINE)}"
                )
            if not 0 <= self.ktae_scale <= 1:
                raise UserError(f"ktae_scale must be between 0 and 1, not {self.ktae_scale}")
            if not 0 <= self.ktae_importance_beta < float("inf"):
                raise UserError(f"ktae_importance_beta must be a finite number >= 0, not {self.ktae_importance_beta}")
            if not 0 <= self.ktae_memory < 1:
                raise UserError(f"ktae_memory must be at least 0 and below 1, not {self.ktae_memory}")
            if self.ktae_memory and self.ktae_combine == IMPORTANCE:
                raise UserError(
                    "ktae_memory gives signed values, but ktae_combine: importance needs strengths. Set "
                    "ktae_combine to multiply or add, or ktae_memory to 0"
                )
            try:
                check_weights(self.ktae_fisher_weight, self.ktae_ig_weight, self.ktae_tf_weight)
            except ValueError as error:
                raise UserError(str(error)) from None

    name = "ktae"
    family = "ktae"
    title = "KTAE (key tokens)"
    card = Card(
        "KTAE",
        "Each token gets the advantage of its rollout, raised or lowered by how strongly the token is associated "
        "with the correct or the wrong rollouts of its prompt (Fisher's exact test, information gain, term "
        "frequencies).",
        ("ktae",),
        {
            "title": "KTAE: A Model-Free Algorithm to Key-Tokens Advantage Estimation in Mathematical Reasoning",
            "id": "2505.16826",
            "citation": textwrap.dedent("""\
                @inproceedings{sun2025ktae,
                    title     = {{KTAE: A Model-Free Algorithm to Key-Tokens Advantage Estimation
                                 in Mathematical Reasoning}},
                    author    = {Wei Sun and Wen Yang and Pu Jian and Qianlong Du and Fuwei Cui and Shuo Ren
                                 and Jiajun Zhang},
                    booktitle = {Advances in Neural Information Processing Systems},
                    year      = 2025,
                    eprint    = {arXiv:2505.16826},
                }"""),
        },
    )
    value = "key-token value K"
    columns = {
        "mixed": ("ktae/informative_groups", "{:.0%}", "share of groups with both correct and wrong rollouts"),
        "K correct": ("ktae/value_right", "{:+.3f}", "mean key-token value K in the correct rollouts of mixed groups"),
        "K wrong": ("ktae/value_wrong", "{:+.3f}", "mean key-token value K in the wrong rollouts of mixed groups"),
        "|K|>.9": ("ktae/saturated", "{:.0%}", "share of the tokens of mixed groups with |K| above 0.9"),
        "A'/A": ("ktae/advantage_ratio", "{:.2f}", "mean |token advantage A'| over mean |rollout advantage A|"),
    }
    panels = {
        "Mean value K": ["ktae/value_right", "ktae/value_wrong"],
        "Shares": ["ktae/saturated", "ktae/informative_groups"],
    }

    variants = {
        "ktae": {"ktae_combine": "multiply", "ktae_leave_one_out": False, "ktae_memory": 0.0},
        "ktae_loo": {"ktae_combine": "multiply", "ktae_leave_one_out": True, "ktae_memory": 0.0},
        "ktae_add": {"ktae_combine": "add", "ktae_leave_one_out": False, "ktae_memory": 0.0},
        "importance": {"ktae_combine": IMPORTANCE, "ktae_leave_one_out": False, "ktae_memory": 0.0},
        "importance_loo": {"ktae_combine": IMPORTANCE, "ktae_leave_one_out": True, "ktae_memory": 0.0},
    }

    def __init__(self, settings: Any, tools: Any):
        super().__init__(settings, tools)
        self.how = settings.ktae_combine
        if self.how == IMPORTANCE:
            self.how, self.title, self.value = "scale", "KTAE (importance)", "weight w"
            self.columns, self.panels = _COLUMNS_OF_WEIGHTS, _PANELS_OF_WEIGHTS
            self.card = self.card._replace(does=_DOES_OF_WEIGHTS)
        elif settings.ktae_scale != 1:
            self.value = f"scaled key-token value {settings.ktae_scale:g}K"
        self.remembers = settings.ktae_memory > 0
        if self.remembers:
            self.title, self.card = "KTAE (with memory)", self.card._replace(does=_DOES_OF_MEMORY)
            factor = "" if settings.ktae_scale == 1 else f"{settings.ktae_scale:g}"
            self.value = f"{'scaled ' * bool(factor)}remembered value {factor}M"  # not the group's own K
            self._evidence_2V = torch.zeros(2, tools.vocabulary, device=tools.device)

    def credit(self, groups: Groups) -> Credit:
        """Compute the key-token values of this process's rollouts, or with `ktae_combine: importance` the weights."""
        counts = {"scored": groups.scored_PG, "ignore_ids": groups.special_ids}
        options = self.options(self.settings_of(self.settings))
        inputs = groups.ids_PGT, groups.mask_PGT, groups.correct_PG
        if self.settings.ktae_combine == IMPORTANCE:
            del options["tf_weight"]
            strength_BT = groups.own_rows(key_token_strengths(*inputs, **counts, **options))
            weights_BT = importance_weights(strength_BT, groups.mask_BT, self.settings.ktae_importance_beta)
            return Credit(weights_BT, sums_of_weights(groups, weights_BT))
        if self.remembers:
            values_BT = memory.values(self._evidence_2V, groups.ids_BT) * _valued(groups)
        else:
            values_BT = groups.own_rows(key_token_values(*inputs, **counts, **options))
        scale = self.settings.ktae_scale
        return Credit(scale * values_BT, sums(groups, values_BT, self.settings.ktae_combine, scale))

    def learn(self, groups: Groups) -> None:
        """With `ktae_memory`, add the evidence of the groups of all processes."""
        if not self.remembers:
            return
        own_PG = torch.zeros(groups.correct_PG.shape, device=groups.ids_PGT.device)
        own_PG.view(-1)[groups.own] = 1
        new_2V = memory.evidence(
            groups.ids_PGT,
            groups.mask_PGT,
            groups.correct_PG,
            self.tools.vocabulary,
            scored=groups.scored_PG,
            ignore_ids=groups.special_ids,
            weight_P=own_PG.mean(1),  # a group that is spread over processes counts once
        )
        self._evidence_2V = memory.later(self._evidence_2V, self.tools.total(new_2V), self.settings.ktae_memory)

    def state(self) -> dict[str, Tensor]:
        """Return the evidence of earlier generations, with `ktae_memory`."""
        return {"evidence": self._evidence_2V} if self.remembers else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up the evidence of a checkpoint, with `ktae_memory`."""
        if self.remembers:
            self._evidence_2V = state["evidence"]

    @classmethod
    def options(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of `key_token_values` from config fields, with defaults for missing ones.

        Fields of other methods are ignored.
        """
        known = {f.name: settings.get(f.name, f.default) for f in dataclasses.fields(cls.Settings)}
        return {name.removeprefix("ktae_"): value for name, value in known.items() if name not in _AFTER_COUNTING}

    @classmethod
    def scale_of(cls, settings: dict[str, Any]) -> float:
        """Return the factor of K in the values of a run with these config fields, 1 if it has no such field."""
        return settings.get("ktae_scale", 1.0)

    @classmethod
    def of_own_group(cls, settings: dict[str, Any]) -> bool:
        """Return whether a run with these config fields takes the values of a rollout from its own group."""
        return not settings.get("ktae_memory")

    @classmethod
    def settings_from(cls, options: dict[str, Any], combine: str) -> dict[str, Any]:
        """Return checked config fields from keyword arguments of `key_token_values`."""
        settings = cls.Settings(ktae_combine=combine, **{f"ktae_{name}": value for name, value in options.items()})
        settings.check()
        return dataclasses.asdict(settings)


def sums(groups: Groups, values_BT: Tensor, how: str, scale: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of this process's rollouts as (numerator, denominator). See `docs/reference/metrics.md`.

    Args:
        values_BT: K of each token.
        how: "multiply" or "add".
        scale: factor of K in the token advantages.
    """
    mask, correct, scored = map(
        groups.own_rows, (groups.mask_PGT, groups.correct_PG[..., None], groups.scored_PG[..., None])
    )
    advantages = combine(groups.advantages_B, scale * values_BT, how).abs()
    before = groups.advantages_B.abs()[:, None].expand_as(advantages)
    informative = _informative(groups)
    valued = mask & informative  # K is 0 everywhere else
    return {
        "ktae/value_right": _mean(values_BT, valued & scored & correct),
        "ktae/value_wrong": _mean(values_BT, valued & scored & ~correct),
        "ktae/abs_value": _mean(values_BT.abs(), valued),
        "ktae/saturated": _mean((values_BT.abs() > SATURATED).float(), valued),
        "ktae/zero_factor": _mean((advantages <= _SILENCED * before).float(), mask & (before > 0)),
        "ktae/advantage_ratio": ((advantages * mask).sum(), (before * mask).sum()),
        "ktae/informative_groups": _mean(informative[:, 0].float(), torch.ones_like(mask[:, 0])),
    }


def sums_of_weights(groups: Groups, weights_BT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of weights of mean 1, such as those of `importance_weights`, as (numerator, denominator)."""
    informative_B1 = _informative(groups)
    valued_BT = groups.mask_BT & informative_B1  # w is 1 everywhere else
    # (sum w)^2 / (n sum w^2) with sum w = n
    return {
        "ktae/effective_share": (valued_BT.sum(), (weights_BT.square() * valued_BT).sum()),
        "ktae/informative_groups": _mean(informative_B1[:, 0].float(), torch.ones_like(informative_B1[:, 0])),
    }


def _valued(groups: Groups) -> Tensor:
    """Return which tokens of this process's rollouts have a value, (B, T) bool."""
    special = torch.isin(groups.ids_BT, groups.ids_BT.new_tensor(groups.special_ids))
    return groups.mask_BT & groups.own_rows(groups.scored_PG[..., None]) & _informative(groups) & ~special


def _informative(groups: Groups) -> Tensor:
    """Return which rollouts of this process are in groups with votes on both sides, (B, 1) bool."""
    return groups.own_rows(groups.mixed_P[:, None, None].expand_as(groups.correct_PG[..., None]))


def _mean(x: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
    over = over.expand_as(x)
    return (x * over).sum(), over.sum()
