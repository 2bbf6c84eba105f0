"""The worked examples of `docs/methods/your_own.md`, as they stand there."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ktae_trl.arguments import UserError
from ktae_trl.credit.method import Credit, Groups, Method, Settings, Tools


class EntropyWeight(Method):
    """Weigh a token by the entropy of the model there, to mean 1 over the rollout."""

    @dataclass
    class Settings(Settings):
        entropy_floor: float = field(default=0.1, metadata={"help": "Added to each entropy, in nats."})

        def check(self) -> None:
            if self.entropy_floor < 0:
                raise UserError(f"entropy_floor must be at least 0, not {self.entropy_floor}")

    how = "scale"
    family = "entropy"
    columns = {"w max": ("entropy/largest_weight", "{:.1f}")}
    panels = {"Largest weight": ["entropy/largest_weight"]}

    def credit(self, groups: Groups) -> Credit:
        _, entropies_BT = self.tools.token_stats(groups)
        raw_BT = (entropies_BT + self.settings.entropy_floor) * groups.mask_BT
        mean_B1 = raw_BT.sum(1, keepdim=True) / groups.mask_BT.sum(1, keepdim=True).clamp(min=1)
        weights_BT = torch.where(groups.mask_BT & (mean_B1 > 0), raw_BT / mean_B1, 1.0)
        largest_B = weights_BT.amax(1)
        return Credit(weights_BT, {"entropy/largest_weight": (largest_B.sum(), torch.ones_like(largest_B).sum())})


class SegmentValues(Method):
    """Value a segment by how much it raises the chance of a correct answer, by rollouts from its start and its end."""

    @dataclass
    class Settings(Settings):
        segment_tokens: int = field(default=16, metadata={"help": "Tokens of a segment."})
        segment_samples: int = field(default=4, metadata={"help": "Rollouts from each place between two segments."})

    how = "replace"

    def credit(self, groups: Groups) -> Tensor:
        L, n = self.settings.segment_tokens, self.settings.segment_samples
        completions, most = groups.completions, self.settings.max_completion_length  # of a whole rollout
        starts = [(row, at) for row, ids in enumerate(completions) for at in range(0, len(ids), L)]
        asked = [(row, completions[row][:at]) for row, at in starts for _ in range(n)]
        more, _ = self.tools.generate([groups.prompts[row] + ids for row, ids in asked], most)
        whole = [(ids + new)[:most] for (_, ids), new in zip(asked, more, strict=True)]
        right, _ = self.tools.grade([groups.rows[row] for row, _ in asked], whole)
        chances = iter(right.float().view(-1, n).mean(1).tolist())
        values_BT = torch.zeros(groups.mask_BT.shape, device=self.tools.device)
        for row, outcome in enumerate(groups.own_rows(groups.correct_PG).tolist()):
            places = [*(next(chances) for at in range(0, len(completions[row]), L)), float(outcome)]
            for i, (before, after) in enumerate(pairwise(places)):
                values_BT[row, i * L : (i + 1) * L] = after - before
        return values_BT * groups.mask_BT


class SecondOpinion(Method):
    """Weigh a token by how much less, or more, likely it is to a second model, to mean 1 over the rollout."""

    @dataclass
    class Settings(Settings):
        second_model: str = field(default="", metadata={"help": "A model with the policy's tokens."})

    how = "scale"

    def __init__(self, settings: Settings, tools: Tools):
        super().__init__(settings, tools)
        self.second = tools.frozen(settings.second_model)

    def credit(self, groups: Groups) -> Tensor:
        own_BT, _ = self.tools.token_stats(groups)
        other_BT, _ = self.tools.token_stats(groups, self.second)
        raw_BT = (1 + (own_BT - other_BT).abs()) * groups.mask_BT
        mean_B1 = raw_BT.sum(1, keepdim=True) / groups.mask_BT.sum(1, keepdim=True).clamp(min=1)
        return torch.where(groups.mask_BT, raw_BT / mean_B1, 1.0)


def early(groups: Groups) -> Tensor:
    """Trust the beginning of a completion: weights that fall from 2 to 0 over its tokens."""
    place_BT = groups.mask_BT.cumsum(1) / groups.mask_BT.sum(1, keepdim=True).clamp(min=1)
    return torch.where(groups.mask_BT, 2 - 2 * place_BT, 1.0)


early.how = "scale"
