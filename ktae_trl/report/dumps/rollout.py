"""A rollout, as all formats are read into it, and what reading them shares: checked values of a raw row.

Each check raises a `UserError` that names the field. The line is then skipped and counted.
"""

import json
import math
import re
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from ktae_trl.arguments import UserError

Row = dict[str, Any]
ASSISTANT = "assistant"
# What trainers call the log-probability of a sampled token, its entropy and its importance ratio.
_ARRAYS = {
    **dict.fromkeys(("logprobs", "inference_logprobs", "generation_logprobs"), "log_probability"),
    **dict.fromkeys(("entropy", "entropies"), "entropy"),
    "importance_ratio": "ratio",
}
_STEP = re.compile(r"(?:^|[^a-z])step[_-]?([0-9]{1,9})(?![0-9])", re.IGNORECASE)
_LARGEST = 2**31 - 1  # of the integers in a record
_VERDICTS = ("correct", "acc")


class Place(NamedTuple):
    """Where a row is."""

    path: Path
    at: int = 0  # byte at which its line begins, or its number in a Parquet file


class Chat(str):
    """A prompt of chat messages as readable text, with the messages as they were."""

    messages: list[dict[str, Any]]


class Rollout(NamedTuple):
    """One completion of a file, with what the file says about it.

    The completion is `token_ids` if the file has them, with the file's own `text` of them if it has that too, else
    `text`. `turns` are the roles in it, each with the index at which it begins: in `token_ids` or, without them, in
    `text`. Without turns, the whole completion is the model's.
    """

    prompt: str | Chat | list[int]  # text, chat messages, or ids to decode
    text: str | None = None
    token_ids: list[int] | None = None
    tokens: list[str] | None = None  # strings of `token_ids`
    turns: tuple[tuple[str, int], ...] = ()
    trained: list[bool] | None = None  # per token id; None: those of the assistant
    arrays: dict[str, list[float | None]] = {}  # further numbers per token id
    rewards: dict[str, float | None] = {}
    decides: tuple[str, float | None] | None = None  # name and value of what says whether it is correct
    answers: list[str] | None = None  # accepted answers, to grade it if nothing decides
    advantage: float | None = None
    step: int = 0
    group: Hashable = None  # identifies the group among those of the step; None: the prompt does


Read = Callable[[Row, Place], list[Rollout]]


def group_key(rollout: Rollout) -> bytes:
    """Return a digest that rollouts of a group share: of the step, and of the file's own group or else the prompt."""
    digest = blake2b(f"{rollout.step}\0".encode(), digest_size=16)
    if rollout.group is not None:
        digest.update(f"group\0{rollout.group!r}".encode(errors="surrogatepass"))
    elif isinstance(rollout.prompt, str):
        digest.update(b"text\0" + rollout.prompt.encode())
    else:
        digest.update(b"ids\0" + array("i", rollout.prompt).tobytes())
    return digest.digest()


# Values of a row


def value(row: Mapping[str, Any], name: str) -> Any:
    """Return a field that must be there."""
    if name not in row:
        raise UserError(f"{name} is missing")
    return row[name]


def text(row: Mapping[str, Any], name: str) -> str:
    """Return a string field, without lone surrogates, which no file could hold."""
    found = value(row, name)
    if not isinstance(found, str):
        raise UserError(f"{name} must be a string, not {found!r:.60}")
    return encodable(found)


def encodable(found: str) -> str:
    """Return the text with lone surrogates replaced by U+FFFD."""
    try:
        found.encode()
    except UnicodeEncodeError:
        return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return found


def number(found: Any, name: str) -> float | None:
    """Return a number or a truth value as a float, and None for null and NaN."""
    if found is None:
        return None
    if not isinstance(found, (bool, int, float)):
        raise UserError(f"{name} must be a number, not {found!r:.60}")
    try:
        found = float(found)
    except OverflowError:
        raise UserError(f"{name} is too large for a number") from None
    return None if math.isnan(found) else found


def integer(found: Any, name: str) -> int:
    """Return a whole number, which may be written as text."""
    whole = str(found) if isinstance(found, (int, str)) else ""
    if isinstance(found, float) and found.is_integer():
        whole = str(int(found))
    if not re.fullmatch(r"-?[0-9]{1,10}", whole) or abs(int(whole)) > _LARGEST:
        raise UserError(f"{name} must be a whole number, not {found!r:.60}")
    return int(whole)


def token_ids(found: Any, name: str) -> list[int]:
    """Return a list of token ids."""
    if not isinstance(found, list) or not all(type(i) is int and 0 <= i <= _LARGEST for i in found):
        raise UserError(f"{name} must be a list of token ids, not {found!r:.60}")
    return found


def mask(found: Any, name: str, length: int) -> list[bool]:
    """Return a list of `length` truth values, which may be written as numbers."""
    if not isinstance(found, list) or not all(isinstance(one, (bool, int, float)) for one in found):
        raise UserError(f"{name} must be a list of truth values, not {found!r:.60}")
    if len(found) != length:
        raise UserError(f"{name} has {len(found)} values for {length} tokens")
    return [one == 1 for one in found]


def numbers(found: Any, length: int) -> list[float | None] | None:
    """Return a list of `length` numbers or nulls, and None if it is something else or has only nulls."""
    if not isinstance(found, list) or len(found) != length or not length:
        return None
    if not all(one is None or isinstance(one, (bool, int, float)) for one in found):
        return None
    try:
        found = [None if one is None else float(one) for one in found]
    except OverflowError:
        return None
    return None if all(one is None for one in found) else found


def arrays(row: Mapping[str, Any], trained: list[bool] | None, length: int, taken: Iterable[str] = ()) -> dict:
    """Return the lists of a row with one number per token, by the name under which the page knows them.

    Log-probabilities are None where a token was not sampled, for which files have fillers such as 0.
    """
    result: dict[str, list[float | None]] = {}
    for name, values in row.items():
        if name not in taken and (found := numbers(values, length)) is not None:
            known = _ARRAYS.get(name)
            known = known if known and known not in result else encodable(name)
            if trained is not None and name.endswith("logprobs"):
                found = [one if kept else None for one, kept in zip(found, trained, strict=True)]
            result[known] = found
    return result


def of_sequence(
    ids: list[int],
    trained: list[bool],
    columns: Mapping[str, Any],
    advantages: list[float | None] | None = None,
    turns: Iterable[tuple[str, int]] = (),
) -> Rollout:
    """Return the rollout of a sequence of a prompt and a completion, which begins with the first trained token.

    Args:
        ids, trained: Per token of the sequence.
        columns: Lists, of which those with one number per token of the sequence become arrays.
        advantages: Per token. If they differ among the trained ones, the rollout has their mean, and they are an array.
        turns: Roles in the sequence, each with the index at which it begins.
    """
    if True not in trained:
        raise UserError("no token was trained on, so it is unknown where the completion begins")
    begin = trained.index(True)
    rest, length = trained[begin:], len(ids) - begin
    cut = {k: v[begin:] for k, v in columns.items() if isinstance(v, list) and len(v) == len(ids)}
    found = arrays(cut, rest, length)
    credit = (advantages or [])[begin:]
    known = [one for one, kept in zip(credit, rest, strict=False) if kept and one is not None]
    if len(set(known)) > 1:
        found["advantage"] = credit
    turns = [(role, max(at - begin, 0)) for role, at in turns]
    ends = [*(at for _, at in turns[1:]), length]
    turns = [turn for turn, end in zip(turns, ends, strict=False) if turn[1] < end]  # not those of the prompt
    return Rollout(
        ids[:begin],
        token_ids=ids[begin:],
        turns=() if {role for role, _ in turns} <= {ASSISTANT} else tuple(turns),
        trained=rest,
        arrays=found,
        advantage=sum(known) / len(known) if known else None,
    )


def rewards(row: Mapping[str, Any], taken: Iterable[str]) -> dict[str, float | None]:
    """Return the numbers and truth values of a row, other than those in `taken`, by name."""
    kinds = (bool, int, float)
    return {encodable(k): number(v, k) for k, v in row.items() if k not in taken and isinstance(v, kinds)}


def decides(found: Mapping[str, float | None], names: Iterable[str] = ()) -> tuple[str, float | None] | None:
    """Return which reward says whether a rollout is correct, with its value.

    A reward called `correct` or `acc` does, or else the only one in `names`. None: the user must choose.
    """
    names = [name for name in _VERDICTS if name in found][:1] or list(names)
    return (names[0], found[names[0]]) if len(names) == 1 else None


# Messages


def messages(found: Any, name: str) -> list[tuple[str, str]]:
    """Return chat messages as (role, text). Calls of tools are text, as JSON."""
    if not isinstance(found, list) or not all(isinstance(message, Mapping) for message in found):
        raise UserError(f"{name} must be a string or a list of chat messages, not {found!r:.60}")
    return [(str(message.get("role") or ""), _content(message, name)) for message in found]


def _content(message: Mapping[str, Any], name: str) -> str:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):  # text among images
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    if content is None and ("content" in message or message.get("tool_calls")):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{name} must be a string or a list of chat messages, not {message!r:.60}")
    calls = message.get("tool_calls")
    return encodable(content + (json.dumps(calls, default=str) if calls else ""))


def prompt(found: Any, name: str = "prompt") -> str:
    """Return a prompt, a string or chat messages, as readable text: a `Chat` if it has messages."""
    if isinstance(found, str):
        return encodable(found)
    chat = Chat("\n\n".join(f"{encodable(role)}: {content}" for role, content in messages(found, name)))
    chat.messages = found
    return chat


def completion(found: Any, name: str = "completion") -> tuple[str, tuple[tuple[str, int], ...]]:
    """Return the text of a completion, a string or chat messages, and its turns (see `Rollout`)."""
    if isinstance(found, str):
        return encodable(found), ()
    return joined(messages(found, name))


def joined(parts: list[tuple[str, str]]) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Return the joined texts of (role, text) and their turns, without turns if all is the assistant's."""
    turns, length = [], 0
    for role, content in parts:
        turns.append((encodable(role), length))
        length += len(content)
    return "".join(content for _, content in parts), () if {role for role, _ in parts} <= {ASSISTANT} else tuple(turns)


# Steps and columns


def step(row: Mapping[str, Any], path: Path, *names: str) -> int:
    """Return the step in the first of the fields `names` that a row has, or else the one in the path of its file."""
    found = next((name for name in names if row.get(name) is not None), None)
    return integer(row[found], found) if found else step_in(path)


def step_in(path: Path) -> int:
    """Return the step in a path, as in `12.jsonl`, `train_data_step12.jsonl` or `step_12/rank_0.jsonl`, or 0."""
    stem = Path(path.name.removesuffix(".gz")).stem
    if re.fullmatch("[0-9]{1,9}", stem):
        return int(stem)
    found = (_STEP.search(name) for name in (stem, *path.parts[-2:-5:-1]))
    return next((int(step[1]) for step in found if step), 0)


def by_row(row: Row, main: str) -> list[Row]:
    """Return the rows of a row whose columns are lists as long as that of `main`; other values hold for all rows."""
    column = value(row, main)
    if not isinstance(column, list):
        raise UserError(f"{main} must be a list, with one value per rollout, not {column!r:.60}")
    lists = {name for name, one in row.items() if isinstance(one, list) and len(one) == len(column)}
    return [{name: one[i] if name in lists else one for name, one in row.items()} for i in range(len(column))]
