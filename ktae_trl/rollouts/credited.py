"""The token credit of a run: passes generated rollouts from the trainer to the credit method."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ktae_trl import trl_seam
from ktae_trl.arguments import UserError
from ktae_trl.credit import find_method
from ktae_trl.credit.method import GRPO, Credit, Method
from ktae_trl.rollouts.groups import whole_groups
from ktae_trl.rollouts.tools import TrainerTools
from ktae_trl.rollouts.verdicts import Verdicts


class TokenCredit:
    """The credit method of a run and its connection to the trainer.

    Attributes:
        tools: the method's access to the model and the rewards.
        kind: the class of the method.
        method: the method; None with `credit: none`.
        shown: the method, or its class if there is no object, for what console, page and card show.
        how: how values and rollout advantages are combined; None with `credit: none`.
        special_ids: padding and every end-of-sequence id.
    """

    def __init__(self, args, trainer):
        """Create the method. `trainer` must be initialized, except for its dataloaders."""
        self.args, self.trainer = args, trainer
        self.tools = TrainerTools(trainer)
        self.special_ids = tuple({self.tools.tokenizer.pad_token_id, *self.tools.eos_ids})
        kind = find_method(args.credit)
        check_sampler(kind, trainer)
        if kind is not GRPO:
            trl_seam.need("credit", trainer)
        if kind.samples_itself():
            trl_seam.need("sampling", trainer)
        self.kind = kind
        self.method = None if kind is GRPO else kind(args, self.tools)
        self.shown = self.method or kind
        self.how = None if self.method is None else self.method.how

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Make the trainer generate with the method's own sampler, if it has one, while it trains.

        The sampler is installed as TRL's `rollout_func`. A `rollout_func` that is already set is kept.
        """
        trainer = self.trainer
        if not self.kind.samples_itself() or not trainer.model.training or trainer.rollout_func is not None:
            yield
            return
        with trl_seam.changed(trainer, rollout_func=self._sample):
            yield

    def _sample(self, prompts: list, _) -> dict[str, list | None]:
        prompt_ids = trl_seam.prompt_ids_of(self.trainer, prompts)
        completions, logprobs, trained = self.method.sample(prompt_ids)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": logprobs,
            "env_mask": trained,
        }

    def state(self) -> dict[str, Tensor]:
        """Return what the method has learned from earlier generations, for a checkpoint."""
        return {} if self.method is None else self.method.state()

    def add_to(
        self, batch: dict[str, Tensor], rows: list[dict[str, Any]], judged: Verdicts
    ) -> dict[str, tuple[float, float]]:
        """Add the token values of a generation to the batch, as `credit` (B, T). Collective.

        Nothing is added with `credit: none`, for groups of one rollout, and in evaluation. With `credit_in_evaluation`
        values are added in evaluation too, unless the method samples its own rollouts.

        Args:
            batch: TRL's batch of this process.
            rows: dataset row of each rollout of this process.
            judged: verdicts for the rollouts of all processes.

        Returns:
            Numerators and denominators of the method's metrics over all processes.

        Raises:
            UserError: the method returned something other than a value for each token.
        """
        wanted = self.trainer.model.training or (self.args.credit_in_evaluation and not self.kind.samples_itself())
        if self.method is None or not wanted or judged.correct_PG.shape[1] == 1:
            return {}
        started = time.perf_counter()
        self.tools.model = self.trainer.model  # transformers replaces it under FSDP1
        self.tools.images = "pixel_values" in batch
        groups = whole_groups(batch, judged, rows, self.special_ids, self.trainer.accelerator)
        credit = self.method.credit(groups)
        if self.trainer.model.training:
            self.method.learn(groups)
        if not isinstance(credit, Credit):
            credit = Credit(credit)
        if not isinstance(credit.values_BT, Tensor) or credit.values_BT.shape != groups.ids_BT.shape:
            shape = getattr(credit.values_BT, "shape", type(credit.values_BT).__name__)
            raise UserError(
                f"credit={self.args.credit!r} must return a value for each token of this process's rollouts: a tensor "
                f"of shape {tuple(groups.ids_BT.shape)}, not {shape if isinstance(shape, str) else tuple(shape)}"
            )
        values_BT = credit.values_BT.detach().to(batch["advantages"].device, torch.float32)
        batch["credit"] = values_BT[:, : batch["completion_ids"].shape[1]]
        sums = {}
        if credit.sums:
            stacked = torch.stack([torch.stack(pair).float() for pair in credit.sums.values()])
            pooled = self.trainer.accelerator.reduce(stacked, "sum").tolist()
            sums = dict(zip(credit.sums, map(tuple, pooled), strict=True))
        # `tolist` above synchronized with the device, so the time is complete. A mean over nothing is left out: TRL
        # would log None, and TensorBoard's writer would warn at every step.
        means = {name: total / count for name, (total, count) in sums.items() if count}
        trl_seam.log_metrics(self.trainer, means | {f"{self.kind.family}/seconds": time.perf_counter() - started})
        return sums


def check_sampler(kind: type[Method], trainer) -> None:
    """Raise a UserError if a method that samples its own rollouts is combined with another source, or with images."""
    images = {"image", "images"} & set(getattr(trainer.train_dataset, "column_names", None) or ())
    if kind.samples_itself() and (trainer.rollout_func or trainer.tools or trainer.environment_factories or images):
        raise UserError(
            f"credit={kind.name!r} samples its own rollouts from text, so a rollout_func, tools, environments and "
            "images are not supported. Remove them, or use another credit method"
        )
