"""OTB: the optimal token baseline (arXiv 2602.07078, ICML 2026).

Each token position has its own baseline: the mean of the returns, weighted by how much gradient the rollouts have
accumulated up to there. It is the baseline with the smallest variance of the gradient, as far as squared gradient norms
are those of the logits. No token is preferred for what it is: OTB is a control for methods that prefer some.

The abstract was read, not the whole paper. The formulas are those of verl's documentation and code
(`optimal_token_baseline` in core_algos.py). Departures:

- The return of a rollout is TRL's advantage A. A baseline moves with the returns, so it makes no difference that A is
  already centred; TRL's division by the standard deviation (`scale_rewards`) stays.
- Where only one rollout is left, its baseline is the mean return of its group, so A' = A. verl has 0 there (its return
  is 0 or 1), or with `handle_zero_tail=False` the rollout's own return, so that A' = 0.
- There is no correction for rollouts of another policy (verl: the weights times the squared importance ratio).

Shape suffixes: P prompts, G rollouts in a group, B rollouts of this process, T completion tokens.
"""

import textwrap

import torch
from torch import Tensor

from ktae_trl.credit.method import Card, Credit, Groups, Method

_TINY = 1e-6  # added to each weight, so that rollouts without any gradient have a mean


def energies(probs: Tensor, squares: Tensor, mask: Tensor) -> Tensor:
    """Compute the accumulated squared gradient norm of each rollout up to each token.

        W_it = sum over j <= t of (1 - 2 pi_ij + sum over v of pi_ij(v)^2)

    A term is the squared norm of the gradient of log pi(token) with respect to the logits. Source: verl, docs/algo/otb.

    Args:
        probs: (..., T) probability pi of each token.
        squares: (..., T) sum of squared probabilities over the vocabulary.
        mask: (..., T) bool, tokens that are trained on. Others add nothing.

    Returns:
        (..., T) float32, not decreasing in t.
    """
    terms = (1 - 2 * probs.float() + squares.float()).clamp(min=0)  # < 0 by rounding
    return (terms * mask).cumsum(-1)


def token_advantages(returns_PG: Tensor, energies_PGT: Tensor, alive_PGT: Tensor) -> Tensor:
    """Compute the advantage of each token relative to the optimal baseline of its position.

        A'_it = G_i - B_t
        B_t   = (sum of G_k W_kt) / (sum of W_kt)        over the rollouts k that are alive at t

    B_t minimises the sum of W_kt (G_k - B)^2. Adding a number to all returns of a group changes nothing.

    Args:
        returns_PG: return G of each rollout.
        energies_PGT: W.
        alive_PGT: bool, which rollouts have a token at a position. None of a rollout without any reward.

    Returns:
        (P, G, T) float32, 0 where a rollout is not alive. Where it alone is, B_t is the mean return of the group. Where
        all W are 0, B_t is the mean return of those alive.
    """
    returns_PG1 = returns_PG.float()[..., None]
    weights_PGT = (energies_PGT + _TINY) * alive_PGT
    baselines_P1T = (returns_PG1 * weights_PGT).sum(1, keepdim=True) / weights_PGT.sum(1, keepdim=True).clamp(min=_TINY)
    alone_P1T = alive_PGT.sum(1, keepdim=True) == 1
    baselines_P1T = torch.where(alone_P1T, returns_PG1.mean(1, keepdim=True), baselines_P1T)
    return (returns_PG1 - baselines_P1T) * alive_PGT


class OTB(Method):
    """Each token position has the baseline with the smallest variance of the gradient."""

    how = "replace"
    name = "otb"
    family = "otb"
    title = "OTB (optimal token baseline)"
    card = Card(
        "OTB",
        "The advantage of a token is the return of its rollout minus a baseline for the token's position: the mean "
        "return of the rollouts that reach it, weighted by their accumulated gradient norms.",
        ("otb",),
        {
            "title": "The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL",
            "id": "2602.07078",
            "citation": textwrap.dedent("""\
                @inproceedings{li2026otb,
                    title     = {{The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL}},
                    author    = {Yingru Li and Jiawei Xu and Ziniu Li and Jiacai Liu and Wei Liu and Yuxuan Tong
                                 and Longtao Zheng and Zhenghai Xue and Yaxiang Zhang and Tianle Cai and Ge Zhang
                                 and Qian Liu and Baoxiang Wang},
                    booktitle = {Proceedings of the 43rd International Conference on Machine Learning},
                    year      = 2026,
                    eprint    = {arXiv:2602.07078},
                }"""),
        },
    )
    value = "token advantage v"
    columns = {
        "var": ("otb/variance_ratio", "{:.2f}", "gradient variance (its proxy) over that of GRPO's baseline"),
        "A'/A": ("otb/advantage_ratio", "{:.2f}", "mean |token advantage A'| over mean |rollout advantage A|"),
    }
    panels = {"Ratios": ["otb/variance_ratio", "otb/advantage_ratio"], "Share of tokens": ["otb/alone"]}
    needs_both_sides = False  # the returns may come from any reward

    def credit(self, groups: Groups) -> Credit:
        """Compute the token advantages from the probabilities of one forward pass and the rollout advantages."""
        probs_BT, squares_BT = self.tools.token_squares(groups)
        energies_BT = energies(probs_BT, squares_BT, groups.mask_BT)
        energies_PGT = self.tools.of_groups(groups, energies_BT)
        returns_PG = self.tools.of_groups(groups, groups.advantages_B)
        # A rollout without any reward has A = 0 in TRL, so that it is not trained on.
        alive_PGT = groups.mask_PGT & (groups.scored_PG | (returns_PG != 0))[..., None]
        values_PGT = token_advantages(returns_PG, energies_PGT, alive_PGT)
        values_BT, mask_BT = groups.own_rows(values_PGT), groups.mask_BT
        alone_PGT = alive_PGT & (alive_PGT.sum(1, keepdim=True) == 1)
        before_BT = groups.advantages_B[:, None] * mask_BT
        sums = {
            "otb/variance_ratio": (
                (energies_BT * values_BT.square()).sum(),
                (energies_BT * before_BT.square()).sum(),
            ),
            "otb/advantage_ratio": (values_BT.abs().sum(), before_BT.abs().sum()),
            "otb/alone": (groups.own_rows(alone_PGT).sum(), mask_BT.sum()),
        }
        return Credit(values_BT, sums)
