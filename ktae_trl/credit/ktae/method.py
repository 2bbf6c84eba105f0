"""KTAE as a credit method: settings, model card and metrics (arXiv 2505.16826). The formulas are in `values`.

Departures from the authors' code (xiaolizh1/KTAE), in addition to those in `values`:

- Credit is computed once per generation, not at each call of the loss.
- One reward function decides which rollouts are correct, not the weighted sum of all.
- The loss is TRL's (`loss_type`).
- `ktae_combine: multiply` and `ktae_leave_one_out` are additions.
"""

import dataclasses
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktae_trl.arguments import UserError, nearest
from ktae_trl.credit.combine import combine
from ktae_trl.credit.ktae.values import KeyTokenTable, check_weights, key_token_table
from ktae_trl.credit.method import Card, Credit, Groups, Method, Settings

COMBINE = ("multiply", "add")
SATURATED = 0.9  # |K| above this counts in `ktae/saturated`
_SILENCED = 1e-3  # |A'| up to this share of |A| counts in `ktae/zero_factor`


class KTAE(Method):
    """Key-token values: how strongly a token is associated with the correct or the wrong rollouts of its group."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: ktae`.

        Parameters:
            ktae_combine (`str`, *optional*, defaults to `"multiply"`):
                How the key-token value K and the rollout advantage A are combined: `"multiply"` is `A + |A| K`, which
                keeps the sign of A; `"add"` is `A + K`, as in the authors' code.
            ktae_fisher_weight (`float`, *optional*, defaults to `1.0`):
                Weight h1 of the Fisher association in the strength of a token.
            ktae_ig_weight (`float`, *optional*, defaults to `1.0`):
                Weight h2 of the information gain in the strength of a token.
            ktae_tf_weight (`float`, *optional*, defaults to `1.0`):
                Weight h3 of the term frequencies in the direction of a token.
            ktae_leave_one_out (`bool`, *optional*, defaults to `False`):
                Compute the values of each rollout from the other rollouts of its group only, so that it does not vote
                for itself.
        """

        ktae_combine: str = field(
            default="multiply",
            metadata={"help": "'multiply' (A + |A| K, keeps the sign of A) or 'add' (A + K, the authors' code)."},
        )
        ktae_fisher_weight: float = field(default=1.0, metadata={"help": "Weight h1 of the Fisher association."})
        ktae_ig_weight: float = field(default=1.0, metadata={"help": "Weight h2 of the information gain."})
        ktae_tf_weight: float = field(default=1.0, metadata={"help": "Weight h3 of the term frequencies."})
        ktae_leave_one_out: bool = field(
            default=False,
            metadata={"help": "Compute the values of each rollout from the other rollouts of its group only."},
        )

        def check(self) -> None:
            if self.ktae_combine not in COMBINE:
                raise UserError(
                    f"ktae_combine={self.ktae_combine!r} is unknown{nearest(self.ktae_combine, COMBINE)}. "
                    f"Choose from: {', '.join(COMBINE)}"
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

    def __init__(self, settings: Any, tools: Any):
        super().__init__(settings, tools)
        self.how = settings.ktae_combine

    def credit(self, groups: Groups) -> Credit:
        """Compute the key-token values of this process's rollouts."""
        table = key_token_table(
            groups.ids_PGT,
            groups.mask_PGT,
            groups.correct_PG,
            scored=groups.scored_PG,
            ignore_ids=groups.special_ids,
            **self.options(self.settings_of(self.settings)),
        )
        values_BT = groups.own_rows(table.values)
        return Credit(values_BT, sums(groups, table, values_BT, self.settings.ktae_combine))

    @classmethod
    def options(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments of `key_token_table` from config fields, with defaults for missing ones.

        Fields of other methods are ignored.
        """
        known = {f.name: settings.get(f.name, f.default) for f in dataclasses.fields(cls.Settings)}
        return {name.removeprefix("ktae_"): value for name, value in known.items() if name != "ktae_combine"}

    @classmethod
    def settings_from(cls, options: dict[str, Any], combine: str) -> dict[str, Any]:
        """Return checked config fields from keyword arguments of `key_token_table`."""
        settings = cls.Settings(ktae_combine=combine, **{f"ktae_{name}": value for name, value in options.items()})
        settings.check()
        return dataclasses.asdict(settings)


def sums(groups: Groups, table: KeyTokenTable, values_BT: Tensor, how: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of this process's rollouts as (numerator, denominator). See `docs/reference/metrics.md`."""
    mask, correct, scored = map(
        groups.own_rows, (groups.mask_PGT, groups.correct_PG[..., None], groups.scored_PG[..., None])
    )
    advantages = combine(groups.advantages_B, values_BT, how).abs()
    before = groups.advantages_B.abs()[:, None].expand_as(advantages)
    informative = groups.own_rows(
        ((table.n_right > 0) & (table.n_wrong > 0))[:, None, None].expand_as(groups.correct_PG[..., None])
    )
    valued = mask & informative  # K is 0 everywhere else

    def mean(x: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
        over = over.expand_as(x)
        return (x * over).sum(), over.sum()

    return {
        "ktae/value_right": mean(values_BT, valued & scored & correct),
        "ktae/value_wrong": mean(values_BT, valued & scored & ~correct),
        "ktae/abs_value": mean(values_BT.abs(), valued),
        "ktae/saturated": mean((values_BT.abs() > SATURATED).float(), valued),
        "ktae/zero_factor": mean((advantages <= _SILENCED * before).float(), mask & (before > 0)),
        "ktae/advantage_ratio": ((advantages * mask).sum(), (before * mask).sum()),
        "ktae/informative_groups": mean(informative[:, 0].float(), torch.ones_like(mask[:, 0])),
    }
