"""Samples of `ktae eval`: `BENCHMARK.jsonl` in the folder of its results. The samples of a problem are a group."""

import json
from pathlib import Path

from ktae_trl.report.dumps.rollout import Place, Rollout, Row, number, text

NEEDS = {"id", "sample", "prompt", "completion", "verdict"}


def read(row: Row, place: Place) -> list[Rollout]:
    """Read a line: `id`, `prompt`, `completion` and `verdict`."""
    verdict = number(row["verdict"], "verdict")
    return [
        Rollout(
            text(row, "prompt"),
            text(row, "completion"),
            rewards={"correct": verdict},
            decides=("correct", verdict),
            group=(str(place.path), str(row["id"])),
        )
    ]


def tokenizer(paths: list[Path]) -> str | None:
    """Return the model that was evaluated, from the settings next to the samples."""
    try:
        settings = json.loads((paths[0].parent / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = settings.get("model_name_or_path") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else None
