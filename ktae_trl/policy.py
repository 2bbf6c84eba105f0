"""A causal language model as credit methods read it: logits at chosen positions, in evaluation mode.

In training it is the policy (`rollouts.tools`). Outside of training it is any model that reads recorded rollouts
(`report.models`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ktae_trl import trl_seam
from ktae_trl.arguments import UserError
from ktae_trl.credit.method import Groups


class Policy:
    """A model, its tokenizer, and the processes that it runs on: the part of `Tools` that needs nothing else.

    Forward passes go through the model itself, and gradients are computed with `torch.autograd.grad` for embeddings
    only. So no parameter gets a gradient, and the training-step logic of DDP, DeepSpeed and FSDP2 does not run.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator):
        self.model, self.tokenizer, self.accelerator = model, tokenizer, accelerator
        self.device = accelerator.device
        self.images = False  # whether the rollouts contain images

    @property
    def tokens_per_logits(self) -> float:
        """Return the memory of one logit vector, in units of one token's hidden state."""
        return self.vocabulary / self.model.config.get_text_config().hidden_size

    @property
    def vocabulary(self) -> int:
        """Return the number of token ids of the model."""
        return self.model.config.get_text_config().vocab_size

    @property
    def context_length(self) -> int | None:
        """Return the maximum number of tokens that the model can read, or None if its config does not define it."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Put the model in evaluation mode, and restore its modes at the end.

        With gradients on, layers use gradient checkpointing here as in training, but with dropout off. Reentrant
        checkpointing is not used because it does not support `torch.autograd.grad`.

        Raises:
            UserError: the rollouts contain images.
        """
        if self.images:
            raise UserError("This credit method does not support rollouts with images. Use another one")
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
            hidden, *rest = inputs  # select before the head: logits of all positions can be huge
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

    def of_groups(self, groups: Groups, x: Tensor) -> Tensor:
        """Return numbers of this process's rollouts for all rollouts of its groups: see `Tools`."""
        return whole(x, groups.ids_PGT.shape[1], self.accelerator)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes: see `Tools`."""
        return self.accelerator.reduce(x, "sum")

    def empty_cache(self) -> DynamicCache | None:
        """Return an empty cache for `logits`, or None if the model cannot use one: see `Tools`."""
        cache = DynamicCache(config=self.model.config)
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        if any(module.training and trl_seam.recomputes(module) for module in self.model.modules()):
            return None  # such layers ignore the cache
        return cache

    def beginning(self, cache: DynamicCache | None, length: int, rows: Tensor) -> tuple[DynamicCache | None, int]:
        """Return the first `length` tokens of these rows of a cache: see `Tools`."""
        if cache is None or length == 0:
            return None, 0

        def cut(x: Tensor) -> Tensor:
            x = x[:, :, :length]
            return x.expand(len(rows), -1, -1, -1) if len(x) == 1 else x[rows]  # `expand` needs no memory

        return DynamicCache(((cut(keys), cut(values)) for keys, values, *_ in cache), self.model.config), length

    def missing_rounds(self, rounds: int) -> int:
        """Return how many more rounds the busiest process makes than this one: see `Tools`."""
        kind = self.accelerator.distributed_type
        plugin = self.accelerator.state.deepspeed_plugin
        if kind != DistributedType.FSDP and not (kind == DistributedType.DEEPSPEED and plugin.zero_stage == 3):
            return 0
        return most(rounds, self.accelerator) - rounds


def most(number: int, accelerator: Accelerator) -> int:
    """Return the maximum of `number` over all processes. Collective."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def whole(x: Tensor, G: int, accelerator: Accelerator) -> Tensor:
    """Complete the groups of which this process holds rollouts from other processes. Collective.

    Args:
        x: (B, ...), a row for each rollout of this process. All processes have the same shape.
        G: rollouts in a group.
        accelerator: of the run.

    Returns:
        (P, G, ...): the P groups of which this process holds at least one rollout.
    """
    B = len(x)
    begin = accelerator.process_index * B
    first, last = begin // G, -(-(begin + B) // G)  # groups, in the order of all processes
    if B % G:  # some groups are spread over processes
        x = accelerator.gather(x.contiguous())[first * G : last * G]
    return x.unflatten(0, (-1, G))
