"""prime-rl: `rollouts/step_N/train/effective/traces.jsonl`, and `token_exports/step_N/rank_R.jsonl` of its trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ktae_trl.arguments import UserError
from ktae_trl.report.dumps.rollout import (
    ASSISTANT,
    Place,
    Rollout,
    Row,
    decides,
    encodable,
    joined,
    mask,
    messages,
    number,
    numbers,
    of_sequence,
    prompt,
    step,
    token_ids,
    value,
)

NEEDS = {"group", "run", "traces"}
NEEDS_TOKENS = {"token_ids", "loss_mask", "rewards"}
_NO_ARRAYS = {"token_ids", "position_ids", "loss_mask", "losses", "rewards", "advantages"}
_PER_TOKEN = ("logprobs", "entropies", "trainer_logprobs", "reference_logprobs", "advantages")  # of a node


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line, an episode: `group.id`, `run.work.step`, and `traces`, each a graph of messages.

    A trace has a rollout for each path from its first message to a last one: each is a sample of training. Traces that
    do not train the policy are left out.
    """
    group, work = _field(row, "group", "id"), _field(row, "run", "work")
    at = step(work if isinstance(work, dict) else {}, place.path, "step")
    found = []
    for trace in _objects(row, "traces"):
        if _field(trace, "agent", "trainable") is not False:
            key = None if group is None else (str(group), str(_field(trace, "agent", "name")))
            found += [one._replace(step=at, group=key) for one in _of_trace(trace)]
    return found


def files(paths: list[Path]) -> list[Path]:
    """Leave out `all/traces.jsonl` where `effective/traces.jsonl` has those of its rollouts that were trained on."""
    there = set(paths)
    return [
        path for path in paths if path.parent.name != "all" or path.parent.parent / "effective" / path.name not in there
    ]


def read_tokens(row: Row, place: Place) -> list[Rollout]:
    """Read a line of a token export: lists per token, `token_ids`, `loss_mask`, `rewards`, `advantages` and others."""
    ids = token_ids(row["token_ids"], "token_ids")
    trained = mask(row["loss_mask"], "loss_mask", len(ids))
    columns = {name: one for name, one in row.items() if name not in _NO_ARRAYS}
    rollout = of_sequence(ids, trained, columns, numbers(row.get("advantages"), len(ids)))
    scores = numbers(row["rewards"], len(ids)) or [None] * len(ids)
    found = {"reward": number(scores[trained.index(True)], "rewards")}
    at = step(row, place.path, "export_step", "step")
    return [rollout._replace(rewards=found, decides=decides(found, found), step=at)]


def _of_trace(trace: Row) -> Iterator[Rollout]:
    rewards = trace.get("rewards") or {}
    if not isinstance(rewards, dict):
        raise UserError(f"rewards must be an object, not {rewards!r:.60}")
    found = {
        encodable(name): number(one.get("score") if isinstance(one, dict) else one, f"rewards.{name}")
        for name, one in rewards.items()
    }
    for path in _paths(_objects(trace, "nodes")):
        if any(_sampled(node) for node in path):
            rollout = _with_ids(path) if any(node.get("token_ids") for node in path) else _with_texts(path)
            yield rollout._replace(rewards=found, decides=decides(found, found))


def _paths(nodes: list[Row]) -> Iterator[list[Row]]:
    """Yield the paths from a root to each leaf of a graph. Nodes without `parent` follow each other."""
    parents = [node.get("parent", i - 1 if i else None) for i, node in enumerate(nodes)]
    if not all(parent is None or (type(parent) is int and 0 <= parent < i) for i, parent in enumerate(parents)):
        raise UserError("the parent of a node must be the number of a node before it")
    for leaf in sorted(set(range(len(nodes))) - set(parents)):
        path, i = [], leaf
        while i is not None:
            path.append(nodes[i])
            i = parents[i]
        yield path[::-1]


def _with_ids(path: list[Row]) -> Rollout:
    """Return the rollout of a path: what comes before the first token that was sampled is its prompt."""
    ids, trained, turns = [], [], []
    columns: dict[str, list[float | None]] = {name: [] for name in _PER_TOKEN}
    for node in path:
        own = token_ids(node.get("token_ids") or [], "token_ids")
        sampled = mask(node["mask"], "mask", len(own)) if node.get("mask") else [_sampled(node)] * len(own)
        turns.append((encodable(_role(node)), len(ids)))
        ids, trained = ids + own, trained + sampled
        for name, values in columns.items():
            values += _spread(node.get(name), sampled)
    advantages = columns.pop("advantages")
    said = [_field(node, "message", "content") for node in path if _sampled(node)]
    text = next((text for text in reversed(said) if text and isinstance(text, str)), None)
    return of_sequence(ids, trained, columns, advantages, turns)._replace(text=text and encodable(text))


def _with_texts(path: list[Row]) -> Rollout:
    """Return the rollout of a path whose model was behind an endpoint that returns no token ids."""
    first = next(i for i, node in enumerate(path) if _sampled(node))
    before, after = ([value(node, "message") for node in some] for some in (path[:first], path[first:]))
    content, turns = joined(messages(after, "message"))
    return Rollout(prompt(before, "message"), content, turns=turns)


def _spread(values: Any, sampled: list[bool]) -> list[float | None]:
    """Return one value per token of a node, which has one per sampled token, or one per token."""
    found = numbers(values, sum(sampled))
    if found is None:
        return numbers(values, len(sampled)) or [None] * len(sampled)
    left = iter(found)
    return [next(left) if kept else None for kept in sampled]


def _sampled(node: Row) -> bool:
    return bool(node.get("sampled", _role(node) == ASSISTANT))


def _role(node: Row) -> str:
    role = _field(node, "message", "role")
    return role if isinstance(role, str) else ""


def _field(row: Any, *names: str) -> Any:
    for name in names:
        row = row.get(name) if isinstance(row, dict) else None
    return row


def _objects(row: Row, name: str) -> list[Row]:
    found = value(row, name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{name} must be a list of objects, not {found!r:.60}")
    return found
