"""The model that is trained, as a credit method may use it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer


class Policy:
    """The narrow way from a credit method to the model: logits at chosen positions, in evaluation mode.

    No parameter gets a gradient, and what DDP, DeepSpeed or FSDP2 do in a training step does not happen: forwards go
    through the model itself, and gradients are asked for with `torch.autograd.grad`, for embeddings only.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, images: bool = False
    ):
        self.model, self.tokenizer, self.accelerator = model, tokenizer, accelerator
        self.images = images
        config = model.config.get_text_config()
        # A logit vector takes as much memory as the hidden states of so many tokens.
        self.tokens_per_logits = config.vocab_size / config.hidden_size

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Put the model in evaluation mode, and back as it was.

        Layers that are checkpointed in training are here too where gradients are on (not with `use_reentrant`, which
        knows no `torch.autograd.grad`); dropout, which is inside of them, is off.

        Raises:
            ValueError: the rollouts have images, which do not come this way.
        """
        if self.images:
            raise ValueError("This credit method reads the model by text only: it does not go with images")
        modules = list(self.model.modules())
        training = [module.training for module in modules]
        self.model.eval()
        if torch.is_grad_enabled():
            for module in modules:
                checkpoint = getattr(module, "_gradient_checkpointing_func", None)  # a partial
                if getattr(module, "gradient_checkpointing", False) and checkpoint is not None:
                    module.training = not checkpoint.keywords.get("use_reentrant")
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
        """Return the logits (B, A, V), float32 or better, at A positions of each row: what is said to come after them.

        Args:
            ids_BL: token ids, padded on the right (with anything: later tokens are not seen by earlier ones).
            at_BA: positions in these rows.
            cache: what came before the rows; it grows by them.
            change: what to make of the embeddings (B, L, H) of the tokens.
        """

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
        """Return the first `length` tokens of a cache with one row, for so many rows, and how many tokens these are.

        None and 0 for a model whose layers (sliding windows, recurrent ones) do not keep what came before in a form
        that can be cut.
        """
        if length == 0 or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None, 0
        cut = (tuple(x[:, :, :length].expand(rows, -1, -1, -1) for x in (keys, values)) for keys, values, *_ in cache)
        return DynamicCache(cut, self.model.config), length

    def missing_rounds(self, rounds: int) -> int:
        """Return how many rounds of forwards the process with most makes beyond the `rounds` of this one.

        Under ZeRO-3 and FSDP2 a forward gathers weights from all processes, so that all must make as many; elsewhere 0.
        All processes must call this together, before the first round.
        """
        kind = self.accelerator.distributed_type
        plugin = self.accelerator.state.deepspeed_plugin
        if kind != DistributedType.FSDP and not (kind == DistributedType.DEEPSPEED and plugin.zero_stage == 3):
            return 0
        all_of_them = self.accelerator.gather(torch.tensor([rounds], device=self.accelerator.device))
        return int(all_of_them.max()) - rounds
