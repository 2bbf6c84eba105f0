"""Records of this package: `OUTPUT_DIR/rollouts/step_000010.parquet`. A row is a rollout."""

from functools import lru_cache
from pathlib import Path

from ktae_trl.arguments import UserError
from ktae_trl.report import records
from ktae_trl.report.dumps.rollout import (
    Place,
    Rollout,
    Row,
    encodable,
    integer,
    mask,
    number,
    numbers,
    step,
    text,
    token_ids,
)

NEEDS = {"schema_version", "group", "token_ids", "tokens", "trained"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a row with the columns of `records.schema`. Its values of tokens are not used: they are computed again."""
    ids = token_ids(row["token_ids"], "token_ids")
    tokens = row["tokens"]
    if not isinstance(tokens, list) or len(tokens) != len(ids) or not all(isinstance(one, str) for one in tokens):
        raise UserError(f"tokens must have one string for each of the {len(ids)} token ids")
    trained = mask(row["trained"], "trained", len(ids))
    if method(place.path).shares_tokens:  # another row trains on what they share, but all of them have it
        trained = [True] * len(ids)
    rewards, arrays = (row.get(name) if isinstance(row.get(name), dict) else {} for name in ("rewards", "arrays"))
    return [
        Rollout(
            text(row, "prompt"),
            text(row, "completion"),
            ids,
            tokens,
            trained=trained,
            arrays={k: found for k, v in arrays.items() if (found := numbers(v, len(ids))) is not None},
            rewards={encodable(name): number(reward, name) for name, reward in rewards.items()},
            decides=("correct", number(row.get("correct"), "correct")),
            advantage=number(row.get("advantage"), "advantage"),
            step=step(row, place.path, "step"),
            group=(str(place.path.parent), integer(row["group"], "group")),
        )
    ]


@lru_cache
def method(path: Path) -> records.Method:
    """Return the method of a record."""
    return records.read(path).method
