"""The interface of a credit method: its base class, its input and its output.

A method receives whole groups (`Groups`) and returns a value for each token of this process's rollouts (`Credit`). Its
file holds everything that belongs to it: settings, model card, console columns, panels of the page, and sampling if the
method samples its own rollouts. It accesses the model, the rewards and other processes only through `Tools`.

Shape suffixes: P prompts, G rollouts in a group, B rollouts of this process, T completion tokens, L prompt tokens (or
tokens of prompt and completion, in `Tools.logits`), A positions.
"""

import dataclasses
import inspect
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, nn


class Groups(NamedTuple):
    """All groups of which this process holds at least one rollout, in the order of generation.

    The groups are complete. This process may hold only a part of its first and last group, so `own` selects its B
    rollouts from the P * G.
    """

    ids_PGT: Tensor  # token ids
    mask_PGT: Tensor  # bool: tokens that are trained on (not padding, not tool output)
    correct_PG: Tensor  # bool: the final answer is correct
    scored_PG: Tensor  # bool: the final answer could be graded
    advantages_B: Tensor  # rollout advantages of this process's rollouts
    prompt_ids_BL: Tensor  # token ids of the prompts of this process's rollouts, padded on the left
    prompt_mask_BL: Tensor  # 1 for prompt tokens, 0 for padding
    lengths_B: Tensor  # completion tokens of this process's rollouts, trained on or not
    special_ids: tuple[int, ...]  # padding and every end-of-sequence id
    own: slice
    rows: list[dict[str, Any]] = []  # dataset row of each of this process's rollouts: `prompt`, `solution`, ...

    def own_rows(self, x: Tensor) -> Tensor:
        """Select this process's rollouts: (P, G, ...) to (B, ...)."""
        return x.flatten(0, 1)[self.own]

    @property
    def ids_BT(self) -> Tensor:  # noqa: N802
        """Return the token ids of this process's rollouts."""
        return self.own_rows(self.ids_PGT)

    @property
    def mask_BT(self) -> Tensor:  # noqa: N802
        """Return which tokens of this process's rollouts are trained on."""
        return self.own_rows(self.mask_PGT)

    @property
    def mixed_P(self) -> Tensor:  # noqa: N802
        """Return which groups have both correct and wrong rollouts that are scored and have a trained token."""
        return both_sides(self.mask_PGT & self.scored_PG[..., None], self.correct_PG)

    @property
    def prompts(self) -> list[list[int]]:
        """Return the prompt of each of this process's rollouts as token ids, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.prompt_ids_BL, self.prompt_mask_BL.bool(), strict=True)]

    @property
    def completions(self) -> list[list[int]]:
        """Return the completion of each of this process's rollouts as token ids, without padding."""
        return [ids[:n] for ids, n in zip(self.ids_BT.tolist(), self.lengths_B.tolist(), strict=True)]


def both_sides(alive_PGT: Tensor, correct_PG: Tensor) -> Tensor:
    """Return which groups have both correct and wrong rollouts with a token in `alive_PGT`, (P,) bool."""
    votes_PG = alive_PGT.any(-1)
    return (votes_PG & correct_PG).any(1) & (votes_PG & ~correct_PG).any(1)


class Credit(NamedTuple):
    """A value for each token of this process's rollouts, and the method's metrics."""

    values_BT: Tensor  # float32; the method's `how` defines their meaning
    # Metric name -> (numerator, denominator), both 0-d. Each is summed over processes before the division.
    sums: dict[str, tuple[Tensor, Tensor]] = {}


class Samples(NamedTuple):
    """Rollouts that a method sampled itself: one row for each prompt it received."""

    completions: list[list[int]]  # token ids
    logprobs: list[list[float]] | None  # log-probability of each token, if the sampler returns them
    trained: list[list[int]]  # 1 for tokens that are trained on in this row, else 0


class Card(NamedTuple):
    """The method's entry in a model card. Without a paper, the card cites GRPO's."""

    name: str  # "KTAE"
    does: str = ""  # one or two sentences
    tags: tuple[str, ...] = ()
    paper: dict[str, str] | None = None  # title, id (arXiv), citation (BibTeX)


class Tools(Protocol):
    """A method's access to the model and the rewards.

    Calls are collective unless stated otherwise: all processes must make the same calls in the same order, each with
    its own rollouts. No call sets a parameter's gradient or logs anything.
    """

    tokenizer: Any  # transformers tokenizer
    device: Any  # torch.device of this process
    eos_ids: tuple[int, ...]  # end-of-sequence ids
    tokens_per_logits: float  # memory of one logit vector, in units of one token's hidden state
    vocabulary: int  # number of token ids of the model
    context_length: int | None  # maximum tokens that the model can read, prompt and completion; None: no limit is known
    step: int  # optimizer steps done so far, also those before a resume

    def prompt_ids(self, prompts: list[Any]) -> list[list[int]]:
        """Return the token ids of prompts, rendered as those of the run: its chat template and its settings.

        Not collective. For `token_stats` after another prompt, replace `prompt_ids_BL` and `prompt_mask_BL` in the
        groups.

        Args:
            prompts: conversations or texts, such as `row["prompt"]` of `Groups.rows`. There may be none.

        Raises:
            UserError: the run has environments, whose observations are a part of the prompts.
        """

    def token_stats(self, groups: Groups, model: nn.Module | Literal["policy"] = "policy") -> tuple[Tensor, Tensor]:
        """Return the log-probability and entropy (nats) of the tokens of this process's rollouts.

        The model runs in evaluation mode, and the run's temperature is applied. The pass is TRL's, which does not keep
        the logits in memory.

        Args:
            groups: groups without images.
            model: the policy (default), or a model returned by `frozen`.

        Returns:
            Two (B, T) float32 tensors, 0 for padding.

        Raises:
            TypeError: the model is None.
            UserError: the rollouts contain images.
        """

    def token_squares(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """Return pi(token) and the sum of pi^2 over the vocabulary, at the tokens of this process's rollouts.

        One pass of the policy, as for `token_stats`.

        Args:
            groups: groups without images.

        Returns:
            Two (B, T) float32 tensors, 0 for padding.

        Raises:
            UserError: the rollouts contain images.
        """

    def of_groups(self, groups: Groups, x: Tensor) -> Tensor:
        """Return numbers of this process's rollouts for all rollouts of its groups, which may be on other processes.

        Args:
            groups: the groups.
            x: (B, ...), with the same shape on all processes: a number for each rollout or token, such as entropies.

        Returns:
            (P, G, ...), in the order of `groups.ids_PGT`.
        """

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes. It has the same shape on each of them."""

    def generate(self, prefixes: list[list[int]], limit: int) -> tuple[list[list[int]], list[list[float]] | None]:
        """Sample a continuation of at most `limit` tokens for each prefix, with the run's sampling settings.

        Args:
            prefixes: token ids. Their number may differ between processes and may be 0.
            limit: maximum number of new tokens.

        Returns:
            The new token ids, including the end-of-sequence id if the text ended, and their log-probabilities (None
            without vLLM).
        """

    def grade(self, rows: list[dict[str, Any]], completions: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Grade completions with the correctness reward.

        Args:
            rows: dataset row of each completion, such as those in `Groups.rows`. Their number N may differ between
                processes and may be 0.
            completions: token ids, without the prompt.

        Returns:
            Which completions are correct and which could be graded: two (N,) bool tensors.

        Raises:
            UserError: `correctness_threshold` is "auto", which compares the rollouts of a group.
        """

    def frozen(self, model_name: str) -> nn.Module:
        """Load a second causal language model for `token_stats`, in evaluation mode and without gradients.

        It is loaded once per run and prepared for the device, DeepSpeed and FSDP2. Call this in the method's
        `__init__`. The model must use the same token ids as the policy.

        Args:
            model_name: a folder or a model id on the Hub.

        Raises:
            UserError: the model cannot be loaded, or has fewer token ids than the policy's tokenizer.
        """

    # Logits at chosen positions, for methods that run the policy themselves.

    def reading(self) -> AbstractContextManager:
        """Return a context with the policy in evaluation mode, for `logits` and its backward pass.

        Raises:
            UserError: the rollouts contain images.
        """

    def logits(self, ids_BL: Tensor, at_BA: Tensor, cache: Any = None, change: Any = None) -> Tensor:
        """Return the next-token logits at A positions of each row.

        Args:
            ids_BL: token ids of prompt and completion, padded on the right with any id.
            at_BA: positions in these rows. The logits at a position predict the token after it.
            cache: keys and values of the tokens before the rows. The call appends those of the rows.
            change: maps the token embeddings (B, L, H) to those that the model reads instead.

        Returns:
            (B, A, V) in float32 or a wider type, V the vocabulary.
        """

    def empty_cache(self) -> Any:
        """Return an empty cache for `logits`. Not collective.

        Returns None if the model's cache cannot be cut, as with sliding-window or recurrent layers, or if its layers
        use gradient checkpointing in `reading`.
        """

    def beginning(self, cache: Any, length: int, rows: Tensor) -> tuple[Any, int]:
        """Return the first `length` tokens of these rows of a cache, and their number. Not collective.

        Args:
            cache: a cache that `logits` has filled. It is not changed. With None, the result is None and 0.
            length: number of tokens.
            rows: (R,) int. A row may occur several times.
        """

    def missing_rounds(self, rounds: int) -> int:
        """Return how many more calls of `logits` the busiest process makes than this one.

        Under ZeRO-3 and FSDP2 each call gathers weights from all processes, so all processes must make equally many.
        Make up the difference with calls on a single token. In other set-ups the result is 0. Call this before the
        first `logits`.

        Args:
            rounds: calls of `logits` that this process needs.
        """


@dataclass
class Settings:
    """Base of the config fields of a method. `KTAEGRPOConfig` inherits those of every method."""

    def check(self) -> None:
        """Raise a UserError that names a field with an invalid value."""


class Method:
    """A token-level credit method. A run has one object of the class.

    A subclass sets the attributes it needs and overrides `credit`. See `docs/methods/your_own.md`. If what a run shows
    depends on its settings, `__init__` sets `title`, `card`, `value`, `columns` or `panels` on the object.
    """

    Settings: ClassVar[type] = Settings
    how: str = "multiply"  # how values and rollout advantages are combined (see `combine`); fixed after `__init__`

    name: ClassVar[str] = ""  # the value of `credit` in the config; set by `find_method`
    family: ClassVar[str] = ""  # first part of the names of its metrics; the name if empty
    title: str = ""  # on the page
    card: Card | None = None
    value: str = ""  # name of a token's value, with its symbol last: "weight w"
    columns: dict[str, tuple[str, ...]] = {}  # console: column -> (metric, format, meaning)
    panels: dict[str, list[str]] = {}  # page: title of a chart -> its metrics, `*` matches any text

    # Names under which recorded rollouts are valued by this method with other settings: name -> these settings.
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    needs_both_sides: ClassVar[bool] = True  # gives no credit in a group without both correct and wrong rollouts
    answered: ClassVar[str] = ""  # metric: share of rollouts in which it found an answer, if it looks for one
    shares_tokens: ClassVar[bool] = False  # rows share tokens, and each shared token is trained in one row only
    no_effect: ClassVar[tuple[str, ...]] = ()  # fields that do not change the values, such as batch sizes

    def __init__(self, settings: Any, tools: Tools):
        """Check the tokenizer and load what the method needs.

        Args:
            settings: the run's `KTAEGRPOConfig`, which has the fields of `Settings`.
            tools: access to the model and the rewards.
        """
        self.settings, self.tools = settings, tools

    def sample(self, prompts: list[list[int]]) -> Samples:
        """Sample one rollout for each prompt. Without an override, TRL samples.

        Args:
            prompts: token ids. The G copies of a prompt are consecutive.
        """
        raise NotImplementedError

    def credit(self, groups: Groups) -> Credit | Tensor:
        """Return a value for every token of this process's rollouts: a `Credit`, or a (B, T) tensor for no metrics."""
        raise NotImplementedError(f"{type(self).__name__} does not define credit(groups)")

    # For a method whose values depend on earlier generations.

    def learn(self, groups: Groups) -> None:
        """Learn from a generation of the training, after its `credit` was computed. Not called in evaluation."""

    def state(self) -> dict[str, Tensor]:
        """Return what was learned, for a checkpoint. It is the same on all processes."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up the `state` of a checkpoint, of a run with the same `credit`."""

    @classmethod
    def check_run(cls, config: Any) -> None:
        """Raise a UserError if another setting of the run (a `KTAEGRPOConfig`) is incompatible with this method."""

    @classmethod
    def content(cls, config: Any) -> dict[str, Any]:
        """Return what the values depend on besides settings, such as the hash of a file. It is compared at resume."""
        return {}

    @classmethod
    def no_signal(cls, sums: dict[str, float], config: Any, first: str) -> str | None:
        """Return a warning if the first generations gave no credit although groups had both sides, else None.

        Args:
            sums: numerators of the method's metrics over these generations.
            first: what they were: "the first 6 groups (3 generations)".
        """
        return None

    @classmethod
    def samples_itself(cls) -> bool:
        """Return whether the method samples its own rollouts instead of TRL."""
        return cls.sample is not Method.sample

    @classmethod
    def settings_of(cls, config: Any) -> dict[str, Any]:
        """Return the method's own fields and their values in a config."""
        fields = dataclasses.fields(cls.Settings)
        return {field.name: getattr(config, field.name) for field in fields}


class GRPO(Method):
    """TRL's GRPO, without token credit."""

    name = "none"
    title = "GRPO (one advantage for all tokens)"
    card = Card("GRPO", "Every token of a completion gets the advantage of its rollout.")
    needs_both_sides = False


def from_function(function: Any) -> type[Method]:
    """Make a method from a function that maps `Groups` to a (B, T) tensor or a `Credit`.

    The function's attribute `how`, "multiply" by default, sets how values and advantages are combined.
    """

    def credit(self, groups: Groups) -> Credit | Tensor:
        return function(groups)

    how = getattr(function, "how", Method.how)
    return type(function.__name__, (Method,), {"how": how, "credit": credit, "__doc__": inspect.getdoc(function)})
