"""Datasets from the Hub, files and folders."""

import logging
from pathlib import Path

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk

from ktae_trl.arguments import TINY, WORD_PROBLEMS, UserError, loading
from ktae_trl.data import files as data_files
from ktae_trl.preflight import ENDINGS, check_dataset, ending

_HERE = Path(__file__).parent
# The package's own problems: a file for each split.
_OWN = {
    TINY: {"train": _HERE.parent / "tiny/data/train.jsonl", "test": _HERE.parent / "tiny/data/held_out.jsonl"},
    WORD_PROBLEMS: {split: _HERE / WORD_PROBLEMS / f"{split}.jsonl" for split in ("train", "test")},
}
logger = logging.getLogger(__name__)


def load(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Load a dataset from the Hub or from local files.

    Args:
        name: a Hub id; the path of a JSON Lines, JSON, CSV or Parquet file (also `.gz`; see `data_files.read`) or of a
            `save_to_disk` folder; or `tiny` or `word_problems`, the package's own problems (splits train and test).
        config: the configuration of a Hub dataset.
        split: of a Hub dataset or of a saved `DatasetDict`, or a part of it, such as `train[:100]`. A file, or a folder
            with a single dataset, has one split, which any name selects.

    Raises:
        NotFoundError: a path or a Hub dataset that does not exist.
        UserError: an empty or malformed file (with the number of the bad line), or an unknown split.
    """
    check_dataset(name)
    path = Path(name)
    if name in _OWN:
        dataset = _part({part: data_files.read(file) for part, file in _OWN[name].items()}, split, name)
    elif path.is_dir():
        with loading(f"The folder {name}"):
            saved = load_from_disk(name)
        dataset = _part(dict(saved) if isinstance(saved, DatasetDict) else saved, split, name)
    elif ending(path) in ENDINGS:
        dataset = _part(data_files.read(path), split, name)
    else:
        with loading(f"The dataset {name!r}"):
            dataset = load_dataset(name, config, split=split)
        if mixed := [column for column, feature in dataset.features.items() if "Json(" in str(feature)]:
            logger.warning(
                "%s: `datasets` reads columns of several types (%s) as JSON: a text such as '[1, 2]' becomes a list. "
                "If this changes problems or answers, download the file and set dataset_name to its path",
                name,
                ", ".join(mixed),
            )
    if len(dataset) == 0:
        raise UserError(f"{name} has no rows")
    return dataset


def _part(saved: Dataset | dict[str, Dataset], split: str, name: str) -> Dataset:
    """Return the split, or the part of a split, that `split` names."""
    try:
        asked = ReadInstruction.from_spec(split)
    except ValueError:
        raise UserError(f"{split!r} is not a split of {name}. Write train, train[:100] or train[10%:20%]") from None
    if isinstance(saved, Dataset):
        saved = {split.partition("[")[0]: saved}
    try:
        parts = asked.to_absolute({split_name: len(dataset) for split_name, dataset in saved.items()})
    except ValueError:
        raise UserError(f"{name} has no split {split!r}. There are: {', '.join(saved)}") from None
    return concatenate_datasets([saved[part.splitname].select(range(part.from_, part.to)) for part in parts])
