"""What a credit method may ask of the training: the model, extra rollouts, the correctness reward, a second model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ktae_trl import trl_seam
from ktae_trl.arguments import UserError
from ktae_trl.credit.method import Groups
from ktae_trl.rollouts.verdicts import AUTO, verdicts


class Policy:
    """The model that is trained: logits at chosen positions, in evaluation mode.

    No parameter gets a gradient, and what DDP, DeepSpeed or FSDP2 do in a training step does not happen: forwards go
    through the model itself, and gradients are asked for with `torch.autograd.grad`, for embeddings only.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator):
        self.model, self.tokenizer, self.accelerator = model, tokenizer, accelerator
        self.device = accelerator.device
        self.images = False  # whether the rollouts have any

    @property
    def tokens_per_logits(self) -> float:
        """Return how many tokens' hidden states take as much memory as one logit vector."""
        config = self.model.config.get_text_config()
        return config.vocab_size / config.hidden_size

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Put the model in evaluation mode, and back as it was.

        Layers that are checkpointed in training are here too where gradients are on (not with `use_reentrant`, which
        knows no `torch.autograd.grad`); dropout, which is inside of them, is off.

        Raises:
            ValueError: the rollouts have images, which do not come this way.
        """
        if self.images:
            raise UserError("This credit method reads the model by text only: it does not go with images")
        modules = list(self.model.modules())
        training = [module.training for module in modules]
        self.model.eval()
        if torch.is_grad_enabled():
            for module in modules:
                module.training = trl_seam.recomputes(module)
        try:
            yield
        finally:
            for module, was in zip(modules, training, strict=True):
                module.training = was

    def logits(
        self,
        ids_BL: Tensor,
        at_BA: Tensor,
        cache: DynamicCache | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the logits at chosen positions: see `Tools`."""

        def pick(head: nn.Module, inputs: tuple) -> tuple:
            hidden, *rest = inputs  # no logits of the whole batch: they can be larger than all else
            return hidden.gather(1, at_BA[..., None].expand(-1, -1, hidden.shape[-1])), *rest

        hooks = [self.model.get_output_embeddings().register_forward_pre_hook(pick)]
        if change is not None:
            embedding = self.model.get_input_embeddings()
            hooks.append(embedding.register_forward_hook(lambda module, inputs, output: change(output)))
        try:
            output = self.model(input_ids=ids_BL, past_key_values=cache, use_cache=cache is not None)
        finally:
            for hook in hooks:
                hook.remove()
        return output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))

    def empty_cache(self) -> DynamicCache:
        """Return a cache for `logits` to fill."""
        return DynamicCache(config=self.model.config)

    def beginning(self, cache: DynamicCache, length: int, rows: int) -> tuple[DynamicCache | None, int]:
        """Return the first `length` tokens of a cache with one row, for so many rows: see `Tools`."""
        if length == 0 or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None, 0
        cut = (tuple(x[:, :, :length].expand(rows, -1, -1, -1) for x in (keys, values)) for keys, values, *_ in cache)
        return DynamicCache(cut, self.model.config), length

    def missing_rounds(self, rounds: int) -> int:
        """Return how many rounds of forwards the process with most makes beyond the `rounds` of this one."""
        kind = self.accelerator.distributed_type
        plugin = self.accelerator.state.deepspeed_plugin
        if kind != DistributedType.FSDP and not (kind == DistributedType.DEEPSPEED and plugin.zero_stage == 3):
            return 0
        return most(rounds, self.accelerator) - rounds


class TrainerTools(Policy):
    """The `Tools` of a `KTAEGRPOTrainer`."""

    def __init__(self, trainer):
        super().__init__(trainer.model, trl_seam.tokenizer_of(trainer), trainer.accelerator)
        self.trainer = trainer
        self.eos_ids = tuple(trainer.eos_token_ids)
        self._frozen: dict[str, nn.Module] = {}

    def token_stats(self, groups: Groups, model: nn.Module | Literal["policy"] = "policy") -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies of the own tokens: see `Tools`."""
        if model is None:
            raise TypeError("token_stats needs a model: leave it out for the policy, or give what `frozen` returned")
        trl_seam.need("token_stats", self.trainer)
        T = groups.ids_PGT.shape[2]
        mask_BT = torch.arange(T, device=self.device) < groups.lengths_B[:, None]
        rows = self.trainer.args.per_device_train_batch_size
        with torch.no_grad(), self.reading():
            logps_BT, entropies_BT = trl_seam.token_stats(
                self.trainer,
                self.trainer.model if model == "policy" else model,
                torch.cat([groups.prompt_ids_BL, groups.ids_BT.to(groups.prompt_ids_BL.dtype)], 1),
                torch.cat([groups.prompt_mask_BL, mask_BT.to(groups.prompt_mask_BL.dtype)], 1),
                completion_length=T,
                rows=rows,
            )
        return logps_BT.float().masked_fill(~mask_BT, 0), entropies_BT.float().masked_fill(~mask_BT, 0)

    def generate(self, prefixes: list[list[int]], limit: int) -> tuple[list[list[int]], list[list[float]] | None]:
        """Sample a continuation of each prefix: see `Tools`.

        With transformers at most as many at once as the rollouts of a generation.
        """
        trl_seam.need("sampling", self.trainer)
        args = self.trainer.args
        at_once = args.per_device_train_batch_size * args.steps_per_generation
        if self.trainer.use_vllm:  # which queues them itself
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
            # vLLM then takes as many prompts from each process, and the limit from one.
            longest = most(own, self.accelerator)
        filling = [[self.eos_ids[0]]] * (max(longest, 1) - own)
        ids, logprobs = trl_seam.continuations(trainer, prefixes + filling, limit if longest else 1)
        return ids[:own], None if logprobs is None else logprobs[:own]

    def grade(self, rows: list[dict[str, Any]], completions: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return which completions are right, and which could be judged: see `Tools`."""
        threshold = self.trainer.args.correctness_threshold
        if threshold == AUTO:
            raise UserError(
                f"correctness_threshold: {AUTO} compares the rollouts of a group, but credit: "
                f"{self.trainer.args.credit} grades completions by themselves. Set correctness_threshold to a number"
            )
        sizes = gather_object([len(rows)])
        own, longest = len(rows), max(sizes)
        if not longest:
            nothing = torch.zeros(0, dtype=torch.bool, device=self.device)
            return nothing, nothing
        if min(sizes) < longest:  # TRL gathers as many rewards from each process
            row, completion = next(pair for pair in gather_object([(rows[:1], completions[:1])]) if pair[0])
            rows = rows + row * (longest - own)
            completions = completions + completion * (longest - own)
        begin = self.accelerator.process_index * longest
        reward_N = self.rewards(rows, completions)[begin : begin + own]
        correct_1N, scored_1N = verdicts(reward_N[None], threshold)
        return correct_1N[0], scored_1N[0]

    def rewards(self, rows: list[dict[str, Any]], completions: list[list[int]]) -> Tensor:
        """Return the correctness reward of the completions of all processes, NaN where there is none; logs nothing.

        All processes must call it, with as many completions each.

        Args:
            rows: of a dataset, one per completion: `prompt`, and the columns that the reward function takes.
            completions: the tokens of each.
        """
        trl_seam.need("grading", self.trainer)
        i = self.trainer.reward_func_names.index(self.trainer.correctness_reward)
        return trl_seam.rewards(self.trainer, i, rows, completions)

    def frozen(self, model_name: str) -> nn.Module:
        """Return a second model: see `Tools`."""
        trl_seam.need("frozen", self.trainer)
        if model_name not in self._frozen:
            self._frozen[model_name] = trl_seam.frozen_model(self.trainer, model_name)
        return self._frozen[model_name]


def most(number: int, accelerator: Accelerator) -> int:
    """Return the largest of the processes' numbers. Collective."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
