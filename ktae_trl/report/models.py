"""Models that read recorded rollouts: the `Tools` of credit methods outside of training, and log-probabilities."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jinja2 import TemplateError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ktae_trl import trl_seam
from ktae_trl.arguments import UserError, loading, model_path
from ktae_trl.credit.method import Groups
from ktae_trl.policy import Policy
from ktae_trl.report.records import Record
from ktae_trl.report.tokens import token_strings, visible

_TOKENS = 8192  # of prompts and completions in a forward pass
_OTHER = 0.1  # from this share of token ids with another text on, a tokenizer is not that of the rollouts
_ONLY_IN_TRAINING = ("generate", "grade", "frozen", "eos_ids", "step", "prompt_ids")  # of `Tools`


class Reader(Policy):
    """A model that reads rollouts: the tools of a credit method that need neither a training nor rewards."""

    def __init__(self, name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        accelerator = Accelerator()
        super().__init__(model.to(accelerator.device), tokenizer, accelerator)
        self.name = name
        trl_seam.add_token_stats(model)

    def __getattr__(self, tool: str):
        if tool in _ONLY_IN_TRAINING:
            raise UserError(f"This credit method uses {tool}, which exists only in training. Choose another method")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {tool!r}")

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise a UserError if the model lacks token ids of rollouts, or its tokenizer gives them other texts.

        Args:
            rows: Rows of a record.
        """
        texts = {i: text for row in rows for i, text in zip(row["token_ids"], row["tokens"], strict=True)}
        size = self.model.get_input_embeddings().num_embeddings
        if texts and max(texts) >= size:
            raise UserError(
                f"The rollouts have the token id {max(texts)}, but the model {self.name!r} has only {size} token ids. "
                "Use the model that generated them, or one with the same tokenizer"
            )
        found = token_strings(texts, self.tokenizer)
        other = [i for i, text in texts.items() if found[i] != text]
        if len(other) > _OTHER * len(texts):
            own, recorded = (visible(some[other[0]])[:80] for some in (found, texts))
            raise UserError(
                f"The tokenizer of {self.name!r} does not fit the rollouts: {len(other)} of their {len(texts)} token "
                f"ids have another text, such as {other[0]}, which is {own!r} and not {recorded!r}. Use the model that "
                "generated them, or one with the same tokenizer"
            )

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Return the token ids of each row's prompt: of the text that the model read, or of its chat messages.

        Raises:
            UserError: A prompt has chat messages, for which the tokenizer has no template that fits.
        """
        known: dict[str, list[int]] = {}
        for row in rows:
            if row["prompt"] not in known:
                known[row["prompt"]] = self._prompt(row["prompt"], row.get("chat"))
        return [known[row["prompt"]] for row in rows]

    def _prompt(self, prompt: str, chat: list[dict[str, Any]] | None) -> list[int]:
        if chat is not None:
            try:
                prompt = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except (ValueError, TemplateError) as error:
                raise UserError(
                    f"The rollouts' prompts are chat messages, which the chat template of {self.name!r} cannot turn "
                    f"into a text: {error}. Use a model with a chat template that fits"
                ) from None
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def token_stats(self, groups: Groups, model: str = "policy") -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and entropies of the rollouts' tokens at temperature 1: see `Tools`."""
        logps_BT, entropies_BT, _ = self._read(groups)
        return logps_BT.nan_to_num(0.0), entropies_BT.nan_to_num(0.0)

    def token_squares(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """Return pi(token) and the sum of pi^2 at the rollouts' tokens at temperature 1: see `Tools`."""
        logps_BT, _, squares_BT = self._read(groups)
        mask_BT = torch.arange(squares_BT.shape[1], device=self.device) < groups.lengths_B[:, None]
        return (logps_BT.exp() * mask_BT).nan_to_num(0.0), squares_BT.nan_to_num(0.0)

    def _read(self, groups: Groups) -> tuple[Tensor, ...]:
        found = pad_sequence(self.read(groups.prompts, groups.completions), batch_first=True)  # (B, T, 3)
        missing = groups.ids_BT.shape[1] - found.shape[1]
        return nn.functional.pad(found, (0, 0, 0, missing)).unbind(-1)

    def read(self, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
        """Return three numbers of each completion token, (tokens, 3) float32 per rollout.

        They are the log-probability, the entropy (nats) and the sum of pi^2 over the vocabulary. Logits are not kept in
        memory. The first token after an empty prompt has NaN: the model predicts nothing there.
        """
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        found: dict[int, Tensor] = {}
        for batch in _batches(lengths, _TOKENS):
            rows = [torch.tensor(prompts[i] + completions[i], device=self.device) for i in batch]
            wanted = [torch.arange(lengths[i], device=self.device) >= len(prompts[i]) for i in batch]
            with torch.no_grad(), self.reading():
                stats = trl_seam.token_stats_of(
                    self.model, pad_sequence(rows, batch_first=True), pad_sequence(wanted, batch_first=True)
                )
            padded = nn.functional.pad(
                torch.stack(stats, -1).float(), (0, 0, 1, 0), value=torch.nan
            )  # as long as the rows
            found |= {i: padded[row, len(prompts[i]) : lengths[i]] for row, i in enumerate(batch)}
        return [found.get(i, torch.empty(0, 3, device=self.device)) for i in range(len(lengths))]


def _batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Yield batches of rows of similar length, longest first, that have at most `budget` tokens or one row."""
    left = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    while left:
        rows = max(1, budget // lengths[left[0]])
        yield left[:rows]
        left = left[rows:]


def load(name: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Reader:
    """Load a model to read rollouts, in float32.

    Args:
        name: A folder, such as a checkpoint's, a model id on the Hub, or `tiny`.
        tokenizer: Default: the one saved with the model.

    Raises:
        UserError: The model or its tokenizer cannot be loaded.
    """
    path = model_path(str(name))
    with loading(f"The model {str(name)!r}", by="--model"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)  # differences are often below bf16's
    if tokenizer is None:
        with loading(f"The tokenizer of {str(name)!r}", by="--model"):
            tokenizer = AutoTokenizer.from_pretrained(path)
    return Reader(str(name), model.requires_grad_(False).eval(), tokenizer)


def opened(model: str | Path | Reader, tokenizer: PreTrainedTokenizerBase | None = None) -> Reader:
    """Return a loaded model unchanged, and load one that is named."""
    return model if isinstance(model, Reader) else load(model, tokenizer)


def log_probabilities(record: Record, models: Mapping[str, str | Path | Reader]) -> Record:
    """Add the log-probabilities of all tokens under one or more models, such as two checkpoints.

    Args:
        record: Its rows need `prompt` (the text that a model reads), `token_ids` and `tokens`.
        models: Name -> a folder, a model id on the Hub, or the result of `load`. A model that is given by its name is
            loaded with its own tokenizer, and freed before the next one is loaded.

    Returns:
        The record, with an array `log-probability (NAME)` for each model in each row: nats at temperature 1, also for
        tokens that are not trained on. It is null for the first token after an empty prompt.

    Raises:
        UserError: A model cannot be loaded, or does not fit the rollouts.
    """
    arrays = [dict(row.get("arrays") or {}) for row in record.rows]
    for name, model in models.items():
        reader = opened(model)
        reader.check(record.rows)
        prompts = reader.prompts(record.rows)
        stats = reader.read(prompts, [row["token_ids"] for row in record.rows])
        for own, found in zip(arrays, stats, strict=True):
            logps = found[:, 0].tolist()
            own[f"log-probability ({name})"] = [None if math.isnan(logp) else logp for logp in logps]
        del reader
    rows = [{**row, "arrays": own} for row, own in zip(record.rows, arrays, strict=True)]
    return record._replace(rows=rows)


def named(words: Sequence[str]) -> dict[str, str]:
    """Read the values of `--model NAME[=PATH]`: name -> path. A path without a name has the name of its last part.

    Raises:
        UserError: A name or path is empty, or two have the same name.
    """
    found: dict[str, str] = {}
    for word in words:
        name, given, path = word.partition("=")
        name, path = (name, path) if given else (Path(word).name, word)
        if not name or not path:
            raise UserError(f"--model {word!r} must be NAME=PATH or PATH")
        if name in found:
            raise UserError(f"--model: {found[name]} and {path} have the same name {name!r}. Give names: NAME=PATH")
        found[name] = path
    return found
