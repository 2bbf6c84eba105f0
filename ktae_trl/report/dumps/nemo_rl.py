"""NeMo-RL: `train_data_step{N}.jsonl` and `val_data_step{N}.jsonl` in the folder of its logs. A line is a rollout."""

from typing import Any

from ktae_trl.arguments import UserError
from ktae_trl.report.dumps.rollout import (
    Place,
    Rollout,
    Row,
    decides,
    encodable,
    integer,
    mask,
    number,
    numbers,
    of_sequence,
    step_in,
    token_ids,
    value,
)

NEEDS = {"content", "rewards"}
_NO_ARRAYS = {"content", "rewards", "token_ids", "token_loss_mask", "advantages", "input_lengths"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: `content`, the texts of the messages, `rewards`, and perhaps lists per token, which may be padded.

    `token_ids`, `token_loss_mask`, `advantages`, `generation_logprobs` and other log-probabilities. Values may be
    lists of length 1. Older files have no ids. Then the last text is the completion.
    """
    row = {name: _single(one) for name, one in row.items()}
    texts = [row["content"]] if isinstance(row.get("content"), str) else row["content"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"content must be a text or a list of texts, not {texts!r:.60}")
    texts = list(map(encodable, texts))
    if "token_ids" in row:
        rollout = _with_ids(row)._replace(text=texts[-1] if texts else None)
    elif len(texts) > 1:
        rollout = Rollout("\n\n".join(texts[:-1]), texts[-1], advantage=_advantage(row.get("advantages")))
    else:
        raise UserError("content has neither token_ids nor several messages, so it is unknown where the prompt ends")
    found = {"reward": number(_first(row["rewards"]), "rewards")}
    return [rollout._replace(rewards=found, decides=decides(found, found), step=step_in(place.path))]


def _with_ids(row: Row) -> Rollout:
    ids = token_ids(_listed(row["token_ids"]), "token_ids")
    padded = len(ids)
    length = integer(_first(row["input_lengths"]), "input_lengths") if "input_lengths" in row else padded
    cut = {
        name: one[:length] if isinstance(one, list) and len(one) == padded else one
        for name, one in row.items()
        if name not in _NO_ARRAYS
    }
    kept = mask(_listed(value(row, "token_loss_mask")), "token_loss_mask", padded)[:length]
    credit = row.get("advantages")
    credit = [credit] * padded if isinstance(credit, (int, float)) else credit
    credit = numbers(credit, padded)
    return of_sequence(ids[:length], kept, cut, credit and credit[:length])


def _single(one: Any) -> Any:
    """Return the element of a list of length 1: the batches that are logged have one row."""
    return one[0] if isinstance(one, list) and len(one) == 1 else one


def _listed(one: Any) -> Any:
    return one if isinstance(one, list) else [one]  # the list of a single token was taken for a batch


def _first(one: Any) -> Any:
    return one[0] if isinstance(one, list) and one else one


def _advantage(found: Any) -> float | None:
    return number(found, "advantages") if isinstance(found, (int, float)) else None
