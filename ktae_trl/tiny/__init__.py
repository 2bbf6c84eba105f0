"""The offline model and task: a small language model that has learnt to add, carefully and carelessly."""

from pathlib import Path

NAME = "tiny"  # stands for the model (`model_name_or_path`) and for the problems, train and test (`dataset_name`)
MODEL = Path(__file__).parent / "model"
TRAIN = Path(__file__).parent / "data" / "train.jsonl"
HELD_OUT = Path(__file__).parent / "data" / "held_out.jsonl"


def model_path(name: str) -> str:
    """Return where the model of this name is: the offline model's folder for `tiny`, else the name itself."""
    return str(MODEL) if name == NAME else name
