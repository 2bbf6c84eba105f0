"""GTPO: rewards of tokens by entropy (arXiv 2508.04349, ICML 2026).

A token of a correct rollout is rewarded more the higher the policy's entropy is there, compared with the other correct
rollouts at the same position. A token of a wrong rollout is blamed more the lower the entropy is.

The abstract was read, not the whole paper. The formulas are those of notes on the paper (equations 3, 5 and 6), which
agree with two independent implementations (teilomillet/textpolicy, and one with another signal in place of entropy).
Inferred, or other than there:

- By default, rewards are normalised over all tokens of a group. Equation 6, as the two implementations read it,
  normalises the correct and the wrong rollouts separately (`gtpo_normalize: sides`). Then the mean of each side is 0,
  so that no difference between correct and wrong rollouts is left.
- A group with rollouts of one side only gets no advantages. The formulas would give it some, which say nothing about
  correctness. The paper trains on DAPO's groups, which have both sides.
- 0.001 nats are added to each entropy. The implementations add 1e-8 to the entropies that are inverted, so that tokens
  with almost no entropy are compared by rounding errors.

Shape suffixes: P prompts, G rollouts in a group, B rollouts of this process, T completion tokens.
"""

import textwrap
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktae_trl.arguments import UserError
from ktae_trl.credit.method import Card, Credit, Groups, Method, Settings, both_sides

NORMALIZE = ("group", "sides")
FLOOR = 1e-3  # nats, added to each entropy
_SPREAD = 1e-4  # a smaller standard deviation is rounding


def entropy_shares(entropies_PGT: Tensor, alive_PGT: Tensor, correct_PG: Tensor) -> Tensor:
    """Compute the share of each token in the reward or blame of its position.

        s_it = x_it / (sum of x_kt over the rollouts k of i's side that are alive at t) n_t
        x    = H + 0.001 in correct rollouts, 1 / (H + 0.001) in wrong ones

    n_t is the number of these rollouts, so the mean of s over them is 1. Source: arXiv 2508.04349, equations 3 and 5.

    Args:
        entropies_PGT: entropy of the policy at each token, in nats. Rounding may make it negative; it then counts as 0.
        alive_PGT: bool, which rollouts have a token at a position.
        correct_PG: bool, the side of each rollout.

    Returns:
        (P, G, T) float32: 1 where only one rollout of the side is alive, or all have the same entropy; 0 for others.
    """
    raised_PGT = entropies_PGT.float().clamp(min=0) + FLOOR
    x_PGT = torch.where(correct_PG[..., None], raised_PGT, 1 / raised_PGT)
    shares_PGT = torch.zeros_like(x_PGT)
    for side_PG in (correct_PG, ~correct_PG):
        side_PGT = alive_PGT & side_PG[..., None]
        mean_P1T = (x_PGT * side_PGT).sum(1, keepdim=True) / side_PGT.sum(1, keepdim=True).clamp(min=1)
        shares_PGT = torch.where(side_PGT, x_PGT / mean_P1T, shares_PGT)
    return shares_PGT


def standardized(x_PGT: Tensor, over_PGT: Tensor) -> Tensor:
    """Return (x - mean) / std over the chosen tokens of each group, and 0 for others.

    The standard deviation is that of the population. It is 0, up to rounding, where x is the same for all tokens chosen
    in a group; these get 0.
    """
    count_P11 = over_PGT.sum((1, 2), keepdim=True).clamp(min=1)
    centred_PGT = (x_PGT - (x_PGT * over_PGT).sum((1, 2), keepdim=True) / count_P11) * over_PGT
    std_P11 = (centred_PGT.square().sum((1, 2), keepdim=True) / count_P11).sqrt()
    return torch.where(std_P11 > _SPREAD, centred_PGT / std_P11, 0.0)


def token_advantages(
    entropies_PGT: Tensor,
    mask_PGT: Tensor,
    correct_PG: Tensor,
    scored_PG: Tensor,
    entropy_weight: float = 0.1,
    normalize: str = "group",
) -> Tensor:
    """Compute GTPO's advantages.

        r~_it = y_i (1 + c s_it)                         y = 1 in correct rollouts, -1 in wrong ones
        A'_it = (r~_it - mean r~) / std r~               over the tokens of the group (group) or of i's side (sides)

    s are the `entropy_shares`. The paper's r~ is alpha_1 times this, with c = alpha_2 / alpha_1; the factor cancels.
    With `sides`, so do c and the 1: A' = y (s - mean s) / std s. Source: arXiv 2508.04349, equations 3, 5 and 6.

    Args:
        entropies_PGT: entropy of the policy at each token, in nats.
        mask_PGT: bool, tokens that are trained on. Others are neither valued nor counted.
        correct_PG: bool, the answer is correct.
        scored_PG: bool, the answer could be graded. Other rollouts are neither valued nor counted.
        entropy_weight: c.
        normalize: "group" or "sides".

    Returns:
        (P, G, T) float32. 0 in groups in which one side has no token, and, with `sides`, on a side whose tokens all
        have the same share, as those of a single rollout do.
    """
    alive_PGT = mask_PGT & scored_PG[..., None]
    alive_PGT = alive_PGT & both_sides(alive_PGT, correct_PG)[:, None, None]
    shares_PGT = entropy_shares(entropies_PGT, alive_PGT, correct_PG)
    y_PG1 = torch.where(correct_PG, 1.0, -1.0)[..., None]
    if normalize == "group":
        return standardized(y_PG1 * (1 + entropy_weight * shares_PGT), alive_PGT)
    sides = (alive_PGT & side_PG[..., None] for side_PG in (correct_PG, ~correct_PG))
    return sum(y_PG1 * standardized(shares_PGT, side_PGT) for side_PGT in sides)


class GTPO(Method):
    """Tokens are rewarded by entropy in correct rollouts, and blamed by its inverse in wrong ones."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: gtpo`.

        Parameters:
            gtpo_normalize (`str`, *optional*, defaults to `"group"`):
                Tokens over which rewards are normalised: `"group"`, all of a group; `"sides"`, those of the correct and
                of the wrong rollouts separately, which is how we understand the paper. With `"sides"`, no difference
                between correct and wrong rollouts is left.
            gtpo_entropy_weight (`float`, *optional*, defaults to `0.1`):
                Weight of entropy relative to correctness, alpha_2 / alpha_1. It has no effect with
                `gtpo_normalize: sides`.
        """

        gtpo_normalize: str = field(
            default="group",
            metadata={"help": "Rewards are normalised over: 'group', or 'sides' (correct and wrong separately)."},
        )
        gtpo_entropy_weight: float = field(
            default=0.1, metadata={"help": "Weight of entropy relative to correctness. No effect with 'sides'."}
        )

        def check(self) -> None:
            if self.gtpo_normalize not in NORMALIZE:
                raise UserError(f"gtpo_normalize must be one of {', '.join(NORMALIZE)}, not {self.gtpo_normalize!r}")
            if not 0 <= self.gtpo_entropy_weight < float("inf"):
                raise UserError(f"gtpo_entropy_weight must be at least 0, not {self.gtpo_entropy_weight}")

    how = "replace"
    name = "gtpo"
    family = "gtpo"
    title = "GTPO (entropy-weighted)"
    card = Card(
        "GTPO",
        "Tokens of correct rollouts are rewarded by the policy's entropy, those of wrong rollouts are blamed by its "
        "inverse, each compared with the rollouts of the same side at the same position.",
        ("gtpo",),
        {
            "title": "GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy",
            "id": "2508.04349",
            "citation": textwrap.dedent("""\
                @inproceedings{tan2026gtpo,
                    title     = {{GTPO and GRPO-S: Token and Sequence-Level Reward Shaping with Policy Entropy}},
                    author    = {Hongze Tan and Zihan Wang and Jianfei Pan and Jinghao Lin and Hao Wang and Yifan Wu
                                 and Tao Chen and Zhihang Zheng and Zhihao Tang and Haihua Yang},
                    booktitle = {Proceedings of the 43rd International Conference on Machine Learning},
                    year      = 2026,
                    eprint    = {arXiv:2508.04349},
                }"""),
        },
    )
    value = "token advantage v"
    columns = {
        "turned": ("gtpo/turned_tokens", "{:.0%}", "share of tokens whose A' has the sign of the other side"),
        "A≠0": ("gtpo/trained_share", "{:.0%}", "share of tokens whose advantage is not 0"),
        "A'/A": ("gtpo/advantage_ratio", "{:.2f}", "mean |token advantage A'| over mean |rollout advantage A|"),
    }
    panels = {"Shares": ["gtpo/turned_tokens", "gtpo/trained_share"], "Mean |A'| / mean |A|": ["gtpo/advantage_ratio"]}

    def credit(self, groups: Groups) -> Credit:
        """Compute the token advantages from the entropies of one forward pass and from which answers are correct.

        They replace the rollout advantages, so `scale_rewards`, `reward_weights` and other reward functions have no
        effect.
        """
        _, entropies_BT = self.tools.token_stats(groups)
        entropies_PGT = self.tools.of_groups(groups, entropies_BT)
        settings = self.settings
        values_PGT = token_advantages(
            entropies_PGT,
            groups.mask_PGT,
            groups.correct_PG,
            groups.scored_PG,
            settings.gtpo_entropy_weight,
            settings.gtpo_normalize,
        )
        return Credit(groups.own_rows(values_PGT), _sums(groups, groups.own_rows(values_PGT)))


def _sums(groups: Groups, values_BT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of this process's rollouts as (numerator, denominator). See `docs/reference/metrics.md`."""
    alive_PGT = groups.mask_PGT & groups.scored_PG[..., None]
    valued_BT = groups.own_rows(alive_PGT & groups.mixed_P[:, None, None])
    correct_B1 = groups.own_rows(groups.correct_PG[..., None])
    turned_BT = torch.where(correct_B1, values_BT < 0, values_BT > 0) & valued_BT
    before_BT = groups.advantages_B.abs()[:, None] * valued_BT
    return {
        "gtpo/turned_tokens": (turned_BT.sum(), valued_BT.sum()),
        "gtpo/trained_share": ((values_BT != 0).sum(), groups.mask_BT.sum()),
        "gtpo/advantage_ratio": (values_BT.abs().sum(), before_BT.sum()),
    }
