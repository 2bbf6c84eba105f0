"""AReaL: `rollout/{version}/{task_id}.jsonl`, which `dump_to_file` writes. A file is a group, a line a rollout."""

import re

from ktae_trl.report.dumps.rollout import (
    Place,
    Rollout,
    Row,
    completion,
    decides,
    joined,
    messages,
    number,
    prompt,
    rewards,
    step,
)

NEEDS = {"task_id", "sample_idx", "reward", "prompt", "completion"}
_NO_REWARDS = {"reward", "task_id", "sample_idx", "seqlen", "prompt_len", "head_version", "tail_version"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: `task_id`, `reward`, `prompt`, `completion`, and `segments` (`role`, `text`) of several turns.

    The step is the version of the weights, by which the folder of the file is called.
    """
    content, turns = completion(row["completion"])
    if segments := row.get("segments"):
        if isinstance(segments, list):
            segments = [{**one, "content": one.get("text")} if isinstance(one, dict) else one for one in segments]
        content, turns = joined(messages(segments, "segments"))
    folder = place.path.parent
    found = {"reward": number(row["reward"], "reward"), **rewards(row, _NO_REWARDS)}
    return [
        Rollout(
            prompt(row["prompt"]),
            content,
            turns=turns,
            rewards=found,
            decides=decides(found, ["reward"]),
            step=int(folder.name) if re.fullmatch("[0-9]{1,9}", folder.name) else step(row, folder, "tail_version"),
            group=(str(folder), str(row["task_id"])),
        )
    ]
