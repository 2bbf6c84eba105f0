"""The `Tools` of a credit method: the model, extra rollouts, the correctness reward and a second model."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ktae_trl import trl_seam
from ktae_trl.arguments import UserError
from ktae_trl.credit.method import Groups
from ktae_trl.policy import Policy, most
from ktae_trl.rollouts.verdicts import AUTO, verdicts


class TrainerTools(Policy):
    """The `Tools` of a `KTAEGRPOTrainer`."""

    def __init__(self, trainer):
        super().__init__(trainer.model, trl_seam.tokenizer_of(trainer), trainer.accelerator)
        self.trainer = trainer
        self.eos_ids = tuple(trainer.eos_token_ids)
        self._frozen: dict[str, nn.Module] = {}

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done so far."""
        return self.trainer.state.global_step

    def prompt_ids(self, prompts: list) -> list[list[int]]:
        """Return the token ids of prompts, rendered as those of the run: see `Tools`."""
        trl_seam.need("prompt_ids", self.trainer)
        if self.trainer.environment_factories:
            raise UserError(
                f"credit: {self.trainer.args.credit} renders the prompts of the dataset, which environments change. "
                "Use another credit method, or train without environments"
            )
        return trl_seam.prompt_ids_of(self.trainer, prompts) if prompts else []

    def token_stats(self, groups: Groups, model: nn.Module | Literal["policy"] = "policy") -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and entropies of this process's tokens: see `Tools`."""
        if model is None:
            raise TypeError("token_stats: model is None. Omit it for the policy, or pass a model from `frozen`")
        trl_seam.need("token_stats", self.trainer)
        return self._read_groups(groups, trl_seam.token_stats, self.trainer.model if model == "policy" else model)

    def token_squares(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """Return pi(token) and the sum of pi^2 at this process's tokens: see `Tools`."""
        trl_seam.need("token_squares", self.trainer)
        return self._read_groups(groups, trl_seam.token_squares, self.trainer.model)

    def log_probabilities(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """Return the policy's log-probabilities of the tokens of completions. Collective.

        Processes may pass different numbers of completions.
        """
        trl_seam.need("token_stats", self.trainer)
        pad, own = self.eos_ids[0], len(prompts)
        filling = [[pad]] * (most(own, self.accelerator) - own)  # each process makes as many forward passes
        prompts, completions = [*prompts, *filling], [*completions, *filling]
        if not prompts:
            return []
        L, T = (max(map(len, rows)) for rows in (prompts, completions))
        logps_BT, _ = self._read(
            trl_seam.token_stats,
            self.trainer.model,
            torch.tensor([[*[pad] * (L - len(ids)), *ids] for ids in prompts], device=self.device),
            torch.tensor([[0] * (L - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device),
            torch.tensor([[*ids, *[pad] * (T - len(ids))] for ids in completions], device=self.device),
            torch.tensor([len(ids) for ids in completions], device=self.device),
        )
        return [logps_T[: len(ids)] for logps_T, ids in zip(logps_BT.tolist(), completions, strict=True)][:own]

    def _read_groups(self, groups: Groups, read: Callable, model: nn.Module) -> tuple[Tensor, Tensor]:
        return self._read(read, model, groups.prompt_ids_BL, groups.prompt_mask_BL, groups.ids_BT, groups.lengths_B)

    def _read(
        self,
        read: Callable,
        model: nn.Module,
        prompt_ids_BL: Tensor,
        prompt_mask_BL: Tensor,
        ids_BT: Tensor,
        lengths_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return what `read` computes for each token, 0 for padding."""
        T = ids_BT.shape[1]
        mask_BT = torch.arange(T, device=self.device) < lengths_B[:, None]
        with torch.no_grad(), self.reading():
            found = read(
                self.trainer,
                model,
                torch.cat([prompt_ids_BL, ids_BT.to(prompt_ids_BL.dtype)], 1),
                torch.cat([prompt_mask_BL, mask_BT.to(prompt_mask_BL.dtype)], 1),
                completion_length=T,
                rows=self.trainer.args.per_device_train_batch_size,
            )
        first_BT, second_BT = (x.float().masked_fill(~mask_BT, 0) for x in found)
        return first_BT, second_BT

    def generate(self, prefixes: list[list[int]], limit: int) -> tuple[list[list[int]], list[list[float]] | None]:
        """Sample a continuation of each prefix: see `Tools`.

        Without vLLM, at most as many prefixes are processed at once as a generation has rollouts on this process.
        """
        trl_seam.need("sampling", self.trainer)
        args = self.trainer.args
        at_once = args.per_device_train_batch_size * args.steps_per_generation
        if self.trainer.use_vllm:  # vLLM batches by itself
            at_once = max(len(prefixes), 1)
        rounds = max(most(-(-len(prefixes) // at_once), self.accelerator), 1)
        ids: list[list[int]] = []
        logprobs: list[list[float]] | None = []
        for begin in range(0, rounds * at_once, at_once):
            new, scores = self._continue(prefixes[begin : begin + at_once], limit)
            ids += new
            logprobs = None if scores is None else logprobs + scores
        return ids, logprobs

    def _continue(self, prefixes: list[list[int]], limit: int) -> tuple[list[list[int]], list[list[float]] | None]:
        own = longest = len(prefixes)
        trainer = self.trainer
        if trainer.use_vllm and (trainer.vllm_mode == "server" or trainer.args.vllm_tensor_parallel_size > 1):
            # vLLM then expects equally many prompts from each process and takes the limit from one of them.
            longest = most(own, self.accelerator)
        filling = [[self.eos_ids[0]]] * (max(longest, 1) - own)
        ids, logprobs = trl_seam.continuations(trainer, prefixes + filling, limit if longest else 1)
        return ids[:own], None if logprobs is None else logprobs[:own]

    def grade(self, rows: list[dict[str, Any]], completions: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return which completions are correct, and which could be graded: see `Tools`."""
        threshold = self.trainer.args.correctness_threshold
        if threshold == AUTO:
            raise UserError(
                f"correctness_threshold: {AUTO} compares the rollouts of a group, but credit: "
                f"{self.trainer.args.credit} grades single completions. Set correctness_threshold to a number"
            )
        sizes = gather_object([len(rows)])
        own, longest = len(rows), max(sizes)
        if not longest:
            nothing = torch.zeros(0, dtype=torch.bool, device=self.device)
            return nothing, nothing
        if min(sizes) < longest:  # TRL gathers equally many rewards from each process
            row, completion = next(pair for pair in gather_object([(rows[:1], completions[:1])]) if pair[0])
            rows = rows + row * (longest - own)
            completions = completions + completion * (longest - own)
        begin = self.accelerator.process_index * longest
        reward_N = self.rewards(rows, completions)[begin : begin + own]
        correct_1N, scored_1N = verdicts(reward_N[None], threshold)
        return correct_1N[0], scored_1N[0]

    def rewards(self, rows: list[dict[str, Any]], completions: list[list[int]]) -> Tensor:
        """Return the correctness reward of the completions of all processes. Collective; logs nothing.

        Args:
            rows: dataset row of each completion, with `prompt` and the columns that the reward function needs. All
                processes must pass equally many.
            completions: token ids, without the prompt.

        Returns:
            (N,) over all processes, NaN for completions without a reward.
        """
        trl_seam.need("grading", self.trainer)
        i = self.trainer.reward_func_names.index(self.trainer.correctness_reward)
        return trl_seam.rewards(self.trainer, i, rows, completions)

    def frozen(self, model_name: str) -> nn.Module:
        """Load a second model: see `Tools`."""
        trl_seam.need("frozen", self.trainer)
        if model_name not in self._frozen:
            self._frozen[model_name] = trl_seam.frozen_model(self.trainer, model_name)
        return self._frozen[model_name]
