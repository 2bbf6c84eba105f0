"""What a credit method is: its class, what it is given, and what it returns.

A method sees whole groups (`Groups`) and returns a value for each token of this process's rollouts (`Credit`). All that
belongs to it stands in its own file: settings, model card, console columns, panels of the page, how it samples. It
reaches the model, the rewards and other processes through `Tools` only.
"""

import dataclasses
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn


class Groups(NamedTuple):
    """The whole groups of which a process holds at least one rollout, in the order of generation.

    P prompts, G rollouts each, T tokens at most. A process may hold a part of its first and last group only: `own`
    picks its B rollouts from the P * G.
    """

    ids_PGT: Tensor  # token ids
    mask_PGT: Tensor  # bool: tokens that are trained on (not padding, not tool output)
    correct_PG: Tensor  # bool: the final answer is right
    scored_PG: Tensor  # bool: the final answer could be judged
    advantages_B: Tensor  # rollout advantages of the own rollouts
    prompt_ids_BL: Tensor  # token ids of the own rollouts' prompts, padded on the left
    prompt_mask_BL: Tensor  # 1 where there is a prompt token
    lengths_B: Tensor  # tokens of the own rollouts, trained on or not
    special_ids: tuple[int, ...]  # padding and every end-of-sequence id
    own: slice
    rows: list[dict[str, Any]] = []  # of the dataset, one for each own rollout: `prompt`, `solution`, ...

    def own_rows(self, x: Tensor) -> Tensor:
        """Turn (P, G, ...) into the (B, ...) of this process."""
        return x.flatten(0, 1)[self.own]

    @property
    def ids_BT(self) -> Tensor:  # noqa: N802
        """Return the token ids of the own rollouts."""
        return self.own_rows(self.ids_PGT)

    @property
    def mask_BT(self) -> Tensor:  # noqa: N802
        """Return which tokens of the own rollouts are trained on."""
        return self.own_rows(self.mask_PGT)

    @property
    def prompts(self) -> list[list[int]]:
        """Return the prompt of each own rollout as token ids, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.prompt_ids_BL, self.prompt_mask_BL.bool(), strict=True)]

    @property
    def completions(self) -> list[list[int]]:
        """Return the completion of each own rollout as token ids, without padding."""
        return [ids[:n] for ids, n in zip(self.ids_BT.tolist(), self.lengths_B.tolist(), strict=True)]


class Credit(NamedTuple):
    """What a credit method says about each token of this process's rollouts."""

    values_BT: Tensor  # float32, meaning as the method's `how` says
    # Metric name -> (numerator, denominator), both 0-d. Processes are pooled by summing each before dividing.
    sums: dict[str, tuple[Tensor, Tensor]] = {}


class Samples(NamedTuple):
    """Rollouts that a method sampled itself, a row for each prompt that it was given."""

    completions: list[list[int]]  # token ids
    logprobs: list[list[float]] | None  # of each token, if the sampler tells
    trained: list[list[int]]  # 1 for a token that is trained on in this row


class Card(NamedTuple):
    """What a model card says of the method. Without a paper it names GRPO's."""

    name: str  # "KTAE"
    does: str = ""  # a sentence
    tags: tuple[str, ...] = ()
    paper: dict[str, str] | None = None  # title, id (arXiv), citation (BibTeX)


class Tools(Protocol):
    """A method's way to the model and the rewards.

    Unless it says otherwise, a call is collective: all processes must make the same calls in the same order, each with
    its own rollouts. Nothing here gives a parameter a gradient, and nothing is logged.
    """

    tokenizer: Any  # of transformers
    device: Any  # torch.device of this process
    eos_ids: tuple[int, ...]  # ids that end a text
    tokens_per_logits: float  # memory of a logit vector, in hidden states of one token

    def token_stats(self, groups: Groups, model: nn.Module | Literal["policy"] = "policy") -> tuple[Tensor, Tensor]:
        """Return the log-probability and the entropy of each own token, (B, T) float32 each; 0 for padding.

        In evaluation mode, at the run's temperature, by TRL's own pass, which keeps no logits.

        Args:
            groups: with text only.
            model: by default the policy; or what `frozen` returned.

        Raises:
            TypeError: the model is None.
        """

    def generate(self, prefixes: list[list[int]], limit: int) -> tuple[list[list[int]], list[list[float]] | None]:
        """Sample a continuation of each prefix (token ids), of at most `limit` tokens, by the run's sampling settings.

        The number of prefixes may differ between processes and may be 0. Returns the new ids, with the end-of-sequence
        id if the text ended, and their log-probabilities (with vLLM; else None).
        """

    def grade(self, rows: list[dict[str, Any]], completions: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return which completions are right, and which could be judged, (N,) bool each, by the correctness reward.

        N may differ between processes and may be 0.

        Args:
            rows: of the dataset, one for each completion, such as those of `Groups.rows`.
            completions: token ids, without the prompt.

        Raises:
            ValueError: `correctness_threshold` is "auto", which compares the rollouts of a group.
        """

    def frozen(self, model_name: str) -> nn.Module:
        """Return a second causal language model, for `token_stats`: in evaluation mode, without gradients.

        Loaded once a run, and prepared for the device, DeepSpeed and FSDP2. Call it in the method's `__init__`. Its
        tokens must be those of the policy.

        Args:
            model_name: a folder or a name on the Hub.
        """

    # Logits at chosen positions, for methods that ask the model themselves.

    def reading(self) -> AbstractContextManager:
        """Put the policy in evaluation mode, and back as it was. `logits`, and its backward pass, go in here."""

    def logits(self, ids_BL: Tensor, at_BA: Tensor, cache: Any = None, change: Any = None) -> Tensor:
        """Return the logits (B, A, V), float32 or better, at A positions of each row: what is said to come after them.

        Args:
            ids_BL: token ids, padded on the right (with anything: later tokens are not seen by earlier ones).
            at_BA: positions in these rows.
            cache: what came before the rows; it grows by them.
            change: a function of the embeddings (B, L, H) of the tokens, which the model reads in their place.
        """

    def empty_cache(self) -> Any:
        """Return a cache for `logits` to fill. Not collective."""

    def beginning(self, cache: Any, length: int, rows: int) -> tuple[Any, int]:
        """Return the first `length` tokens of a cache of one row, repeated for `rows` rows, and their number.

        None and 0 for a model whose layers (sliding windows, recurrent ones) do not keep what came before in a form
        that can be cut. Not collective.
        """

    def missing_rounds(self, rounds: int) -> int:
        """Return how many calls of `logits` the process with most makes beyond the `rounds` of this one.

        Under ZeRO-3 and FSDP2 the weights are gathered from all processes, so all must make as many: fill with calls of
        any one token. Elsewhere 0. Call it before the first round.
        """


@dataclass
class Settings:
    """Fields of the config that belong to one method. `KTAEGRPOConfig` inherits those of each method."""

    def check(self) -> None:
        """Raise a UserError that names the field which is out of range."""


class Method:
    """Token-level credit: one object a run.

    A subclass sets the attributes that it needs and writes `credit`. See `docs/methods/your_own.md`.
    """

    Settings: ClassVar[type] = Settings
    how: str = "multiply"  # how values meet the rollout advantages: see `combine`. Fixed once the object is made.

    name: ClassVar[str] = ""  # as in the config; set when it is found there
    family: ClassVar[str] = ""  # first part of its metrics' names; the name if empty
    title: ClassVar[str] = ""  # for the page
    card: ClassVar[Card | None] = None
    value: ClassVar[str] = ""  # what a token's value is called, its symbol last: "weight w"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {}  # console: column -> (metric, format, what it means)
    panels: ClassVar[dict[str, list[str]]] = {}  # page: title of a curve -> its metrics, `*` for any letters

    needs_both_sides: ClassVar[bool] = True  # a group teaches nothing unless it has right and wrong rollouts
    answered: ClassVar[str] = ""  # the metric that counts rollouts in which it found an answer, if it looks for one
    shares_tokens: ClassVar[bool] = False  # rows share tokens, each of which is trained in one row
    no_effect: ClassVar[tuple[str, ...]] = ()  # fields that change no value, such as sizes of batches

    def __init__(self, settings: Any, tools: Tools):
        """Check the tokenizer and load what the method needs.

        Args:
            settings: the run's `KTAEGRPOConfig`, which has the fields of `Settings`.
            tools: see `Tools`.
        """
        self.settings, self.tools = settings, tools

    def sample(self, prompts: list[list[int]]) -> Samples:
        """Sample a rollout for each prompt (token ids), the G rows of a prompt side by side.

        TRL samples for a method that does not override this.
        """
        raise NotImplementedError

    def credit(self, groups: Groups) -> Credit | Tensor:
        """Value every token of the own rollouts; a tensor (B, T) is a `Credit` without metrics of its own."""
        raise NotImplementedError(f"{type(self).__name__} has no method credit(groups)")

    @classmethod
    def check_run(cls, config: Any) -> None:
        """Raise a UserError if other settings of the run (a `KTAEGRPOConfig`) do not go with this method."""

    @classmethod
    def no_signal(cls, sums: dict[str, float], config: Any, first: str) -> str | None:
        """Return a warning if the first generations taught nothing although groups had both sides, else None.

        Args:
            sums: numerators of the method's metrics over these generations.
            first: what they were: "the first 6 groups (3 generations)".
        """
        return None

    @classmethod
    def samples_itself(cls) -> bool:
        """Return whether the method samples its rollouts itself."""
        return cls.sample is not Method.sample

    @classmethod
    def settings_of(cls, config: Any) -> dict[str, Any]:
        """Return the fields that belong to the method, with their values in a config."""
        fields = dataclasses.fields(cls.Settings)
        return {field.name: getattr(config, field.name) for field in fields}


class GRPO(Method):
    """No token credit: TRL's GRPO."""

    name = "none"
    title = "GRPO (one advantage for all tokens)"
    card = Card("GRPO", "Every token of a completion gets the same advantage, that of its rollout.")
    needs_both_sides = False


def from_function(function: Any) -> type[Method]:
    """Make a method of a function from `Groups` to a (B, T) tensor or a `Credit`.

    Its attribute `how`, if it has one, says how the values meet the advantages; the default is "multiply".
    """

    def credit(self, groups: Groups) -> Credit | Tensor:
        return function(groups)

    how = getattr(function, "how", Method.how)
    return type(function.__name__, (Method,), {"how": how, "credit": credit, "__doc__": inspect.getdoc(function)})
