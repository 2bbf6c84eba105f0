"""The offline model and task: a small language model that adds one-digit numbers, carefully or carelessly."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
TRAIN = Path(__file__).parent / "data" / "train.jsonl"
HELD_OUT = Path(__file__).parent / "data" / "held_out.jsonl"
