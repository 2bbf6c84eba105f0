"""What tests of whole measurements share: the command, and what a run leaves."""

import json
from pathlib import Path

import pytest

from ktae_trl.evaluation.run import main

ROOT = Path(__file__).parents[2]
QUICK = ["--config", "configs/eval/quickstart.yaml", "--limit", "24", "--samples", "4", "--batch_size", "16"]
DAMAGES = {
    "empty": b"",
    "half": b'{"model_name_or_path": "m',
    "a list": b"[1, 2]",
    "a number": b"17",
    "no text": b"\xff\xfe\x00",
    "missing": None,
}


def samples(folder, name="sums"):
    return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]


def complaint(words) -> str:
    with pytest.raises(SystemExit) as end:
        main(words)
    return str(end.value)


def damage(file: Path, kind: str) -> None:
    file.unlink()
    if DAMAGES[kind] is not None:
        file.write_bytes(DAMAGES[kind])
