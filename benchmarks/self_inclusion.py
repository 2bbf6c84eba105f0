"""Measure how much of K is self-inclusion, the vote of a rollout for its own label, on the recorded rollouts of a run.

python benchmarks/self_inclusion.py runs/quickstart [--shuffles 20]

A run records rollouts with `record_steps`. K is computed with and without the rollout's own vote (`leave_one_out`),
with the true labels and with the labels shuffled within each group. Shuffled labels carry no information, so what K
still says about a rollout's own side is self-inclusion.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ktae_trl.credit.ktae.values import key_token_values  # noqa: E402
from ktae_trl.report import records  # noqa: E402
from ktae_trl.report.group_view import counted, split  # noqa: E402


class Group(NamedTuple):
    """The scored rollouts of one recorded group, as tensors of shape (1, G, ...)."""

    ids: torch.Tensor
    mask: torch.Tensor
    correct: torch.Tensor
    special_ids: tuple[int, ...]


def read(folder: Path) -> list[Group]:
    """Return the recorded groups with both correct and wrong rollouts."""
    groups = []
    for file in records.files(folder):
        record = records.read(file)
        for rows in split(record):
            rows = [row for row in rows if row["correct"] is not None]
            longest = max((len(row["token_ids"]) for row in rows), default=0)
            ids, mask = torch.zeros(1, len(rows), longest, dtype=torch.int64), torch.zeros(1, len(rows), longest)
            for i, row in enumerate(rows):
                ids[0, i, : len(row["token_ids"])] = torch.tensor(row["token_ids"])
                mask[0, i, : len(row["token_ids"])] = torch.tensor(counted(record.method, row), dtype=torch.float)
            correct = torch.tensor([[row["correct"] for row in rows]])
            if 0 < correct.sum() < len(rows):
                groups.append(Group(ids, mask.bool(), correct, record.method.special_ids))
    return groups


def look(groups: list[Group], leave_one_out: bool, generator: np.random.Generator | None) -> dict[str, float]:
    """Return statistics of K over all tokens, with the true labels or (with `generator`) labels shuffled per group."""
    K, right = [], []
    for group in groups:
        correct = group.correct
        if generator is not None:
            correct = correct[:, generator.permutation(correct.shape[1])]
        values = key_token_values(
            group.ids, group.mask, correct, leave_one_out=leave_one_out, ignore_ids=group.special_ids
        )
        K.append(values[group.mask])
        right.append(correct[..., None].expand_as(group.mask)[group.mask])
    K, right = torch.cat(K), torch.cat(right)
    return {
        "in right rollouts": K[right].mean().item(),
        "in wrong rollouts": K[~right].mean().item(),
        "for the own side": torch.where(right, K, -K).mean().item(),
        "mean |K|": K.abs().mean().item(),
        "saturated": (K.abs() > 0.9).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output_dir of a run with recorded rollouts")
    parser.add_argument("--shuffles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    groups = read(arguments.run)
    if not groups:
        sys.exit(f"self_inclusion.py: no recorded group of {arguments.run} has both correct and wrong rollouts")
    tokens = sum(int(group.mask.sum()) for group in groups)
    print(f"{len(groups)} groups with correct and wrong rollouts, {tokens:,} tokens, {arguments.shuffles} shuffles\n")
    found = {}
    for labels in ("as they are", "shuffled"):
        for leave_one_out in (False, True):
            if labels == "shuffled":
                rng = np.random.default_rng(arguments.seed)
                looks = [look(groups, leave_one_out, rng) for _ in range(arguments.shuffles)]
            else:
                looks = [look(groups, leave_one_out, None)]
            found[labels, leave_one_out] = {name: [one[name] for one in looks] for name in looks[0]}
    names = [*next(iter(found.values()))]
    print(f"{'labels':14}{'leave one out':>14}" + "".join(f"{name:>22}" for name in names))
    for (labels, leave_one_out), figures in found.items():
        cells = [
            f"{np.mean(x):+.3f}" + (f" +- {np.std(x, ddof=1):.3f}" if len(x) > 1 else "") for x in figures.values()
        ]
        print(f"{labels:14}{'yes' if leave_one_out else 'no':>14}" + "".join(f"{cell:>22}" for cell in cells))
    whole, chance = (np.mean(found[labels, False]["for the own side"]) for labels in ("as they are", "shuffled"))
    print(f"\nWith shuffled labels, mean K for a rollout's own side is {chance / whole:.0%} of that with true labels.")


if __name__ == "__main__":
    main()
