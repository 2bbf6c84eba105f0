"""Value the rollouts of a record by several credit methods, to compare them token by token."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ktae_trl.arguments import UserError, nearest
from ktae_trl.credit import METHODS, find_method
from ktae_trl.credit.method import Groups, Method
from ktae_trl.grading import check_format
from ktae_trl.report import records
from ktae_trl.report.group_view import as_groups, split
from ktae_trl.report.records import Record


def names() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the names that `compare` knows, each with its credit method and the settings that it fixes."""
    variants = {name: (kind.name, own) for kind in METHODS.values() for name, own in kind.variants.items()}
    return {name: (name, {}) for name, kind in METHODS.items() if not kind.samples_itself()} | variants


def compare(
    record: Record,
    chosen: Iterable[str],
    model=None,
    tokenizer=None,
    *,
    answer_format: str = "boxed",
    settings: Mapping[str, Any] | None = None,
) -> Record:
    """Value the rollouts of a record by several credit methods.

    A method has the settings of the record's own method where it knows them, else its defaults. Its values are those
    that it would give in a training with this model on these rollouts, in float32.

    Args:
        record: Its rows need `token_ids`, `trained`, `correct` and `advantage`, and, for a method that needs a model,
            `prompt` (the text that the model read) and `tokens`.
        chosen: Keys of `names()`, or dotted paths of a user's own methods.
        model: The model that generated the rollouts, for methods that need one: a folder, a model id on the Hub, or the
            result of `models.load`. Load it once to compare many records.
        tokenizer: Its tokenizer. Default: the one saved with the model.
        answer_format: As in `KTAEGRPOConfig`, for methods that look for the answer.
        settings: Other settings of the chosen methods, by their names in the config. What a name of `names()` fixes
            takes precedence.

    Returns:
        The record, with a `Method` for each name in `compared`, whose title is the name, and in each row's `compared` a
        list of token values per method, in the same order.

    Raises:
        UserError: A name or a setting is unknown, a method needs a model and there is none or samples its own rollouts,
            or the model does not fit the rollouts.
    """
    given = dict(settings or {})
    check_format(answer_format)
    chosen = list(dict.fromkeys(chosen))
    if not chosen:
        raise UserError(f"No methods to compare. Choose from: {', '.join(names())}")
    kinds = [_found(name) for name in chosen]
    fields = {field.name for kind, _ in kinds for field in dataclasses.fields(kind.Settings)}
    if unknown := [name for name in given if name not in fields]:
        raise UserError(f"{', '.join(chosen)} have no setting {unknown[0]!r}{nearest(unknown[0], fields)}")
    if model is not None:
        from ktae_trl.report.models import opened

        model = opened(model, tokenizer)
        model.check(record.rows)
    methods, compared = [], []
    for name, (kind, fixed) in zip(chosen, kinds, strict=True):
        fields = _fields(kind, record.method.settings | given | fixed)
        own = _Settings(**fields, answer_format=answer_format)
        kind.Settings.check(own)
        method = kind(own, model or _NoModel(name))
        own = records.method_of(method, method.how, fields, special_ids=record.method.special_ids)
        methods.append(method)
        compared.append(own._replace(title=name))
    rows = []
    for group in split(record):
        prompts = model.prompts(group) if model else ()
        groups = _on(as_groups(record.method, group, prompts), model.device if model else "cpu")
        values = [_values(method, groups) for method in methods]
        rows += [
            {**row, "compared": [own[: len(row["token_ids"])] for own in of_row]}
            for row, *of_row in zip(group, *values, strict=True)
        ]
    return record._replace(rows=rows, compared=tuple(compared))


class _UnknownSettingError(UserError, AttributeError):
    """A setting of the run that a record does not hold."""


class _Settings(SimpleNamespace):
    """The settings of a method, without the other fields of a run's config."""

    def __getattr__(self, name: str):
        raise _UnknownSettingError(
            f"This credit method reads the setting {name!r} of a training run, which recorded rollouts do not have"
        )


class _NoModel:
    """The tools of a method if there is no model. Any use is an error that asks for one."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, tool: str):
        raise UserError(f"The method {self._name!r} needs the model that generated the rollouts: --model PATH")


def _found(name: str) -> tuple[type[Method], dict[str, Any]]:
    known = names()
    if name in known:
        credit, fixed = known[name]
        return find_method(credit), fixed
    if name not in METHODS and "." not in name:
        raise UserError(f"Unknown method {name!r}{nearest(name, known)}. Choose from: {', '.join(known)}")
    kind = find_method(name)
    if kind.samples_itself():
        raise UserError(
            f"The method {name!r} samples its own rollouts, so it cannot value others. Choose from: {', '.join(known)}"
        )
    return kind, {}


def _fields(kind: type[Method], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a method's settings, with defaults for those that are missing."""
    known = {field.name for field in dataclasses.fields(kind.Settings)}
    return dataclasses.asdict(kind.Settings(**{name: value for name, value in settings.items() if name in known}))


def _on(groups: Groups, device) -> Groups:
    return Groups(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in groups))


def _values(method: Method, groups: Groups) -> list[list[float]]:
    found = method.credit(groups)
    return getattr(found, "values_BT", found).detach().float().tolist()
