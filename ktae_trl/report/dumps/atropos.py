"""Atropos: the file `data_path_to_save_groups`. A line is a group."""

from ktae_trl.arguments import UserError
from ktae_trl.report.dumps.rollout import (
    Place,
    Rollout,
    Row,
    decides,
    encodable,
    number,
    numbers,
    of_sequence,
    step_in,
    token_ids,
    value,
)

NEEDS = {"tokens", "masks", "scores"}
_UNTRAINED = -100
_NO_ARRAYS = {"tokens", "masks", "scores", "advantages", "messages"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line, with one value per rollout in each list.

    `tokens`, `masks` (-100 where untrained), `scores`, and perhaps `advantages` (per token or per rollout), `messages`
    and log-probabilities.
    """
    several = row["tokens"]
    if not isinstance(several, list):
        raise UserError(f"tokens must be a list of lists of token ids, not {several!r:.60}")
    lists = {name: one for name, one in row.items() if isinstance(one, list) and len(one) == len(several)}
    return [
        _rollout({name: one[i] for name, one in lists.items()})._replace(
            step=step_in(place.path), group=(str(place.path), place.at)
        )
        for i in range(len(several))
    ]


def _rollout(one: Row) -> Rollout:
    ids = token_ids(value(one, "tokens"), "tokens")
    masks = value(one, "masks")
    if not isinstance(masks, list) or len(masks) != len(ids):
        raise UserError(f"masks must have one value for each of the {len(ids)} tokens")
    columns = {name: values for name, values in one.items() if name not in _NO_ARRAYS}
    credit = one.get("advantages")
    if isinstance(credit, (int, float)):
        credit = [credit] * len(ids)
    rollout = of_sequence(ids, [kept != _UNTRAINED for kept in masks], columns, numbers(credit, len(ids)))
    found = {"score": number(value(one, "scores"), "scores")}
    return rollout._replace(text=_said(one.get("messages")), rewards=found, decides=decides(found, found))


def _said(messages: object) -> str | None:
    """Return the text of the last message. Without chat messages it is the text of the whole sequence."""
    last = messages[-1] if isinstance(messages, list) and messages else messages
    content = last.get("content") if isinstance(last, dict) else last
    return encodable(content) if content and isinstance(content, str) else None
