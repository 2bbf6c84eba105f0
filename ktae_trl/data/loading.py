"""Datasets of the Hub, of files and of folders."""

import logging
from pathlib import Path

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk

from ktae_trl.arguments import TINY, WORD_PROBLEMS, NotFoundError, UserError, loading
from ktae_trl.data import files as data_files

_HERE = Path(__file__).parent
# The package's own problems: the files of their splits.
_OWN = {
    TINY: {"train": _HERE.parent / "tiny/data/train.jsonl", "test": _HERE.parent / "tiny/data/held_out.jsonl"},
    WORD_PROBLEMS: {split: _HERE / WORD_PROBLEMS / f"{split}.jsonl" for split in ("train", "test")},
}
logger = logging.getLogger(__name__)


def load(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """Load a dataset from the Hub or from local files.

    Args:
        name: Hub id, or the path of a JSON Lines, JSON, CSV or Parquet file (`.gz` too; see `data_files.read`) or of a
            `save_to_disk` folder, or `tiny` or `word_problems` for the package's own problems (splits train and test).
        config: of a Hub dataset.
        split: of a Hub dataset or of a saved `DatasetDict`, or a part of it, such as `train[:100]`. A file, or a folder
            with a single dataset, is one split of any name.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: an empty or malformed file (with the number of the bad line), or an unknown split.
    """
    path = Path(name)
    ending = data_files.ending(path)
    if name in _OWN:
        dataset = _part({part: data_files.read(file) for part, file in _OWN[name].items()}, split, name)
    elif path.is_dir():
        with loading(f"The folder {name}"):
            saved = load_from_disk(name)
        dataset = _part(dict(saved) if isinstance(saved, DatasetDict) else saved, split, name)
    elif ending in data_files.ENDINGS:
        dataset = _part(data_files.read(path), split, name)
    elif path.is_file() or ending in data_files.NOT_READ:
        known = ", ".join(data_files.ENDINGS)
        raise UserError(f"{name} has a format that is not read. Known endings: {known}, also with .gz")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise NotFoundError(
            f"{name} is neither a data file ({', '.join(data_files.ENDINGS)}) nor a folder (looked in {Path.cwd()})"
        )
    else:
        with loading(f"The dataset {name!r}"):
            dataset = load_dataset(name, config, split=split)
        if mixed := [column for column, feature in dataset.features.items() if "Json(" in str(feature)]:
            logger.warning(
                "%s: columns that mix types (%s) are read as JSON by `datasets`: a text such as '[1, 2]' becomes a "
                "list. If it matters for problems or answers, download the file and name it as dataset_name",
                name,
                ", ".join(mixed),
            )
    if len(dataset) == 0:
        raise UserError(f"{name} holds no problems")
    return dataset


def _part(saved: Dataset | dict[str, Dataset], split: str, name: str) -> Dataset:
    """Return the split, or the part of one, that `split` asks for."""
    try:
        asked = ReadInstruction.from_spec(split)
    except ValueError:
        raise UserError(f"{split!r} is no split of {name}. Write train, train[:100] or train[10%:20%]") from None
    if isinstance(saved, Dataset):
        saved = {split.partition("[")[0]: saved}
    try:
        parts = asked.to_absolute({split_name: len(dataset) for split_name, dataset in saved.items()})
    except ValueError:
        raise UserError(f"{name} has no split {split!r}. There are: {', '.join(saved)}") from None
    return concatenate_datasets([saved[part.splitname].select(range(part.from_, part.to)) for part in parts])
