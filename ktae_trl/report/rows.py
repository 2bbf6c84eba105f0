"""Compute key tokens of rollouts from any source: tokenize the rollouts of a group, and value their tokens."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ktae_trl.arguments import UserError
from ktae_trl.credit.combine import combine as combine_with
from ktae_trl.credit.ktae.method import COMBINE, KTAE
from ktae_trl.grading import grade_many
from ktae_trl.report.dumps.rollout import ASSISTANT, Chat, Place, Rollout, group_key
from ktae_trl.report.dumps.rows import read
from ktae_trl.report.dumps.verdicts import deciding, threshold_of
from ktae_trl.report.group_view import as_groups
from ktae_trl.report.notebook import KeyTokens
from ktae_trl.report.page import progress
from ktae_trl.report.records import Method, Record, method_of
from ktae_trl.report.tokens import token_strings, visible

_COMPARED = 500  # characters of a decoded text that are compared with the file's own text
_LIKE = 0.5  # share of equal characters from which two texts are taken for the same


def explain(
    rows: Iterable[Mapping[str, Any]],
    tokenizer,
    *,
    combine: str = "multiply",
    fisher_weight: float = 1.0,
    ig_weight: float = 1.0,
    tf_weight: float = 1.0,
    leave_one_out: bool = False,
) -> KeyTokens:
    """Compute the token values that KTAE would give rollouts in training.

    Rows with the same prompt form a group, in any order. The advantage of a rollout is GRPO's as in TRL, with reward 1
    for a correct answer and 0 for a wrong one:

        A = (r - mean) / (std + 1e-4), with the unbiased standard deviation.

    Args:
        rows: Mappings with `prompt` and `completion` (strings or lists of chat messages), and with `correct` (true,
            false, or null if it could not be graded), `answers` (the accepted answer or a list of accepted answers) or
            `reward` (with two values, of which the higher is correct). With `answers`, the completion is graded as in
            training. Optional: `step` and `group` (rows of different steps or groups are not compared), `advantage`,
            `token_ids` of the completion, and lists with one number per token, such as `logprobs`.
        tokenizer: A transformers tokenizer, which should be that of the model that wrote the completions.
        combine: How the advantage A is changed: "multiply", "add" or "importance", as in `ktae_combine`.
        fisher_weight, ig_weight, tf_weight, leave_one_out: As in `key_token_table`.

    If all rollouts of a prompt are correct or all are wrong, or it has a single rollout, its values are 0. A rollout
    that cannot be graded (null, or answers that cannot be parsed) does not count in the statistics and has values of 0.
    A lone surrogate in a text is replaced by U+FFFD.

    Raises:
        ValueError: There are no rows, a row lacks a column or has a value of the wrong type (the message has its
            number), or a setting is unknown or out of range.
    """
    valuer = Valuer(method_with(combine, fisher_weight, ig_weight, tf_weight, leave_one_out), tokenizer)
    rollouts, names, values = [], [], []
    for number, row in enumerate(rows):
        try:
            (rollout,) = read(row, Place(Path()))
            name, value = deciding(rollout)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None
        rollouts.append(rollout)
        names.append(name)
        values.append(value)
    if not rollouts:
        raise UserError("No rollouts to explain: rows is empty")
    asked = [i for i, rollout in enumerate(rollouts) if rollout.answers and values[i] != values[i]]
    graded = grade_many([rollouts[i].text for i in asked], [rollouts[i].answers for i in asked])
    for i, verdict in zip(asked, graded, strict=True):
        values[i] = float("nan") if verdict is None else float(verdict)
    limit = threshold_of(np.array(values), names[0])
    groups: dict[bytes, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(group_key(rollout), []).append(i)
    seen: Counter[int] = Counter()
    explained = []
    for members in progress(groups.values(), "Valuing tokens"):
        own = [rollouts[i] for i in members]
        verdicts = [None if values[i] != values[i] else values[i] > limit for i in members]
        explained += valuer.rows(seen[own[0].step], own, verdicts)
        seen[own[0].step] += 1
    return KeyTokens(Record(valuer.method, explained), notes=tuple(map(visible, valuer.notes())))


def method_with(combine: str, fisher_weight: float, ig_weight: float, tf_weight: float, leave_one_out: bool) -> Method:
    """Return KTAE with these settings.

    Raises:
        UserError: A setting is unknown or out of range.
    """
    if combine not in COMBINE:
        raise UserError(f"combine must be one of {', '.join(COMBINE)}, not {combine!r}")
    weights = {"fisher_weight": fisher_weight, "ig_weight": ig_weight, "tf_weight": tf_weight}
    settings = KTAE.settings_from({**weights, "leave_one_out": leave_one_out}, combine)
    ktae = KTAE(SimpleNamespace(**settings), None)
    return method_of(ktae, ktae.how, settings)


class Valuer:
    """Turns groups of rollouts into rows of a record, with the values of their tokens.

    It counts what a reader should know of the tokens, for `notes`.
    """

    def __init__(self, method: Method, tokenizer, special_ids: Iterable[int] = ()):
        """Value tokens by `method`.

        Args:
            tokenizer: A transformers tokenizer; None if all rollouts have the strings of their tokens.
            special_ids: Ids that do not count, in addition to the tokenizer's padding and end.
        """
        self.tokenizer = tokenizer
        special = {*special_ids, *(getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))}
        self._ktae = KTAE(SimpleNamespace(**method.settings), None)
        self.method = method._replace(special_ids=tuple(sorted(special - {None})))
        self._strings: dict[int, str] = {}
        self._largest = max(tokenizer.get_vocab().values()) if tokenizer is not None else None
        self._beyond = self._unlike = self._checked = self._again = self._own_advantages = 0

    def rows(self, number: int, rollouts: list[Rollout], verdicts: list[bool | None]) -> list[dict[str, Any]]:
        """Return the rows of a group.

        Args:
            number: The number of the group in its step.
            verdicts: Whether each rollout is correct; None: it could not be graded.

        Raises:
            UserError: The ids of the rollouts are not those of the tokenizer.
        """
        rollouts = self._tokenized(rollouts)
        own = [rollout.advantage for rollout in rollouts]
        self._own_advantages += None not in own
        advantages = group_advantages(verdicts) if None in own else own
        group = [
            {
                "step": rollout.step,
                "group": number,
                "rollout": place,
                "prompt": self._decoded(rollout.prompt),
                "completion": rollout.text if rollout.text is not None else self._decoded(rollout.token_ids),
                "token_ids": rollout.token_ids,
                "tokens": rollout.tokens,
                "trained": rollout.trained,
                "rewards": _rewards(rollout, verdict),
                "correct": None if verdict is None else bool(verdict),
                "advantage": advantage,
                **({"chat": rollout.prompt.messages} if isinstance(rollout.prompt, Chat) else {}),
                **({"arrays": rollout.arrays} if rollout.arrays else {}),
                **({"segments": [{"role": role, "begin": at} for role, at in rollout.turns]} if rollout.turns else {}),
            }
            for place, (rollout, verdict, advantage) in enumerate(zip(rollouts, verdicts, advantages, strict=True))
        ]
        groups = as_groups(self.method, group)
        values_BT = self._ktae.credit(groups).values_BT
        advantages_BT = combine_with(groups.advantages_B, values_BT, self.method.how)
        for row, values, own in zip(group, values_BT.tolist(), advantages_BT.tolist(), strict=True):
            length = len(row["token_ids"])
            row["credit"], row["advantages"] = values[:length], own[:length]
        return group

    def notes(self) -> list[str]:
        """Return what a reader of the page should know of the tokens."""
        name = getattr(self.tokenizer, "name_or_path", "")
        notes = []
        if self._again:
            notes.append(
                f"{self._again:,} completions have no token ids and were tokenized again with "
                f"{name or 'the tokenizer'}, which may split a text differently from how the model wrote it."
            )
        if self._beyond:
            notes.append(
                f"{self._beyond:,} token ids are beyond the vocabulary of the tokenizer, whose largest is "
                f"{self._largest}. They are shown as ⟨id N⟩. Is it the tokenizer of the model?"
            )
        if self._unlike:
            notes.append(
                f"The tokens of {self._unlike:,} of {self._checked:,} rollouts differ from the text in the file."
            )
        if self._own_advantages:
            notes.append("The advantage A of a rollout is the one in the file.")
        return notes

    def _tokenized(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Return the rollouts with token ids, their strings, turns in tokens, and which of them are trained."""
        asked = [rollout for rollout in rollouts if rollout.token_ids is None]
        pieces = [piece for rollout in asked for piece in _pieces(rollout)]
        encoded = iter(self.tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else [])
        self._again += len(asked)
        result = []
        for rollout in rollouts:
            if rollout.token_ids is None:
                rollout = _of_pieces(rollout, [next(encoded) for _ in _pieces(rollout)])
            elif rollout.trained is None:
                rollout = rollout._replace(trained=[True] * len(rollout.token_ids))
            result.append(rollout)
        self._check(rollouts)
        return [one if one.tokens is not None else one._replace(tokens=self._of(one.token_ids)) for one in result]

    def _of(self, ids: list[int]) -> list[str]:
        """Return the strings of token ids."""
        new = set(ids) - self._strings.keys()
        self._strings |= token_strings([i for i in new if i <= self._largest], self.tokenizer)
        self._strings |= {i: f"⟨id {i}⟩" for i in new if i > self._largest}
        return [self._strings[i] for i in ids]

    def _decoded(self, found: str | list[int]) -> str:
        """Return a text, or that of token ids."""
        if isinstance(found, str):
            return found
        if max(found, default=0) > self._largest:
            return "".join(self._of(found))
        return self.tokenizer.decode(found)

    def _check(self, rollouts: list[Rollout]) -> None:
        """Count ids and texts that do not fit the tokenizer.

        Raises:
            UserError: Most ids of the group are beyond the vocabulary, or no text of the group is like its tokens.
        """
        given = [rollout for rollout in rollouts if rollout.token_ids is not None and rollout.tokens is None]
        ids = [i for rollout in given for i in rollout.token_ids]
        beyond = sum(i > self._largest for i in ids) if ids else 0
        if beyond > len(ids) / 2:
            raise self._misfit(
                f"{beyond:,} of {len(ids):,} token ids of a group, up to {max(ids)}, are beyond its vocabulary, whose "
                f"largest is {self._largest}"
            )
        texts = [(self._decoded(one.token_ids), one.text) for one in given if one.text and one.text.strip()]
        unlike = [pair for pair in texts if not _alike(*pair)]
        if unlike and len(unlike) == len(texts):
            decoded, text = unlike[0]
            raise self._misfit(f"the tokens of a rollout are {decoded[:60]!r}, its text in the file is {text[:60]!r}")
        self._beyond += beyond
        self._checked += len(texts)
        self._unlike += len(unlike)

    def _misfit(self, why: str) -> UserError:
        name = getattr(self.tokenizer, "name_or_path", "")
        return UserError(
            f"The tokenizer {name} does not fit the files: {why}. Choose that of the model with --tokenizer"
        )


def _rewards(rollout: Rollout, verdict: bool | None) -> dict[str, float | None]:
    graded = rollout.decides is None and rollout.answers is not None
    return {**rollout.rewards, "correct": None if verdict is None else float(verdict)} if graded else rollout.rewards


def _pieces(rollout: Rollout) -> list[str]:
    """Return the texts of the turns of a rollout, which are tokenized one by one."""
    begins = [at for _, at in rollout.turns] or [0]
    return [rollout.text[begin:end] for begin, end in zip(begins, [*begins[1:], None], strict=True)]


def _of_pieces(rollout: Rollout, pieces: list[list[int]]) -> Rollout:
    """Return a rollout with the ids of its turns. Those of other roles than the assistant's are not trained."""
    roles = [role for role, _ in rollout.turns] or [ASSISTANT]
    begins = np.cumsum([0, *map(len, pieces)]).tolist()
    trained = [role == ASSISTANT for role, piece in zip(roles, pieces, strict=True) for _ in piece]
    turns = tuple(zip(roles, begins[:-1], strict=True)) if rollout.turns else ()
    return rollout._replace(token_ids=[i for piece in pieces for i in piece], trained=trained, turns=turns)


def _alike(decoded: str, text: str) -> bool:
    """Return whether decoded tokens have a text in them, or are much like it, apart from white space."""
    decoded, text = ("".join(one.split()) for one in (decoded, text))
    if text in decoded:
        return True
    return difflib.SequenceMatcher(None, decoded[:_COMPARED], text[:_COMPARED], autojunk=False).ratio() >= _LIKE


def group_advantages(verdicts: list[bool | None]) -> list[float]:
    """Return GRPO's advantages of a group as in TRL 1.16, with reward 1 for correct and 0 for wrong rollouts.

    The advantage is 0 for a rollout without a verdict, and for all rollouts if all verdicts are equal or if fewer than
    two rollouts have one.
    """
    rewards = torch.tensor([float("nan") if verdict is None else float(verdict) for verdict in verdicts])
    known = rewards[~rewards.isnan()]
    if len(known) < 2:
        return [0.0] * len(verdicts)
    return ((rewards - known.mean()) / (known.std() + 1e-4)).nan_to_num(nan=0.0).tolist()
