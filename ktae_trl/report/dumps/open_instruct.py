"""open-instruct: `RUN_rollouts_000000.jsonl`, where a line is a rollout, and `RUN_metadata.jsonl`."""

from collections.abc import Iterable
from pathlib import Path

from ktae_trl.arguments import UserError
from ktae_trl.files.lines import read_json_lines
from ktae_trl.report.dumps.rollout import (
    Place,
    Rollout,
    Row,
    arrays,
    decides,
    integer,
    number,
    rewards,
    step,
    token_ids,
)

NEEDS = {"prompt_tokens", "response_tokens", "reward"}
_NO_REWARDS = {"reward", "step", "prompt_idx", "sample_idx", "advantage"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: `step`, `prompt_idx`, `prompt_tokens`, `response_tokens`, `reward`, `advantage`, `logprobs`."""
    ids = token_ids(row["response_tokens"], "response_tokens")
    index = row.get("prompt_idx")
    found = {"reward": number(row["reward"], "reward"), **rewards(row, _NO_REWARDS)}
    return [
        Rollout(
            token_ids(row["prompt_tokens"], "prompt_tokens"),
            token_ids=ids,
            arrays=arrays(row, None, len(ids), {"prompt_tokens", "response_tokens", "ground_truth"}),
            rewards=found,
            decides=decides(found, ["reward"]),
            advantage=number(row.get("advantage"), "advantage"),
            step=step(row, place.path, "step"),
            group=None if index is None else (_run(place.path), integer(index, "prompt_idx")),
        )
    ]


def tokenizer(paths: Iterable[Path]) -> str | None:
    """Return the name of the model in the metadata of a run."""
    for path in paths:
        metadata = path.with_name(f"{_run(path)}_metadata.jsonl")
        if metadata.is_file():
            try:
                rows = [row for _, row in read_json_lines(metadata)]
            except UserError:
                continue
            names = [name for row in rows if isinstance(name := row.get("model_name"), str) and name != "unknown"]
            if names:
                return names[0]
    return None


def _run(path: Path) -> str:
    return path.name.partition("_rollouts_")[0]
