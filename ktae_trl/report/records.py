"""Records of the rollouts of a training run, for reports and pandas: one Parquet file per recorded step.

`OUTPUT_DIR/rollouts/step_000010.parquet` contains whole groups, one row per rollout. `metrics.jsonl` in the same folder
has one line per log of the trainer.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ktae_trl.arguments import UserError
from ktae_trl.files.lines import read_json_lines
from ktae_trl.files.writing import open_to_append, replace_json_lines, replacing

FOLDER = "rollouts"
METRICS = "metrics.jsonl"
SCHEMA_VERSION = 2  # version 1 had other metadata
_METADATA = b"ktae_trl"
_NAME = re.compile(r"step_(\d+)\.parquet", re.ASCII)
logger = logging.getLogger(__name__)


def schema(rewards: list[str], arrays: list[str] = ()) -> pa.Schema:
    """Return the columns of a record.

    Args:
        rewards: The names of the reward functions.
        arrays: The names of the arrays with one number per token. The trainer's are those of
            `trl_seam.numbers_in_loss`: `log_probability`, `entropy`, `ratio`, `clipped` and `sampling_log_probability`.
    """
    # Parquet has no struct without fields, and records from before there were arrays have no such column.
    numbers = {"arrays": pa.struct({name: pa.list_(pa.float32()) for name in arrays})} if arrays else {}
    return pa.schema(
        {
            "schema_version": pa.int8(),
            "step": pa.int32(),  # the first optimizer step that trains on the rollout
            "group": pa.int32(),  # index of the prompt in the generation
            "rollout": pa.int32(),  # index of the rollout in its group
            "prompt": pa.string(),  # as the model reads it
            "completion": pa.string(),
            "token_ids": pa.list_(pa.int32()),
            "tokens": pa.list_(pa.string()),
            # False: not trained on in this row (a tool's output, or a tree's segment that another row trains on).
            "trained": pa.list_(pa.bool_()),
            "rewards": pa.struct({name: pa.float32() for name in rewards}),  # null: the function returned None
            "correct": pa.bool_(),  # null: it could not be graded
            "advantage": pa.float32(),  # A of the rollout
            "credit": pa.list_(pa.float32()),  # value of each token; null without a credit method
            "advantages": pa.list_(pa.float32()),  # A' of each token
            # Further numbers of each token, such as its entropy. Null where there is none: for tokens that are not
            # trained on, and for rows on which the run had not trained when it ended.
            **numbers,
        }
    )


class Method(NamedTuple):
    """The credit method of a record, with everything needed to compute K again and to display the record."""

    credit: str  # as in the config: ktae, oar_g, ..., none, or a dotted path
    how: str | None  # how credit changes the advantages: multiply, add, scale, replace; None without credit
    settings: dict[str, Any] = {}  # the method's fields of the config
    title: str = ""
    value: str = ""  # the name of a token's value, ending with its symbol
    panels: dict[str, list[str]] = {}  # title of a panel of curves -> its metrics
    shares_tokens: bool = False  # rows share tokens, and each shared token is trained on in one row
    special_ids: tuple[int, ...] = ()
    generated_groups: int | None = None  # groups in the generation, of which the record may hold only some

    @property
    def value_name(self) -> str:
        """Return the name of a token's value, or "" without credit."""
        names = {"scale": "weight w", "replace": "token advantage v", None: ""}
        return self.value or names.get(self.how, "token value c")

    @property
    def symbol(self) -> str:
        """Return the symbol of a token's value."""
        return self.value_name.rpartition(" ")[2]


def method_of(kind, how: str | None, settings: dict[str, Any], **more) -> Method:
    """Return the `Method` of a credit method.

    Args:
        kind: The method, or its class.
        how: How credit changes the advantages; None without credit.
        settings: The method's fields of the config.
        more: The other fields of `Method`.
    """
    return Method(kind.name, how, settings, kind.title, kind.value, kind.panels, kind.shares_tokens, **more)


def _of_schema_1(fields: dict[str, Any]) -> Method:
    """Return the method of a record of version 0.1, which has KTAE's settings for every credit method."""
    from ktae_trl.credit import METHODS  # loads torch
    from ktae_trl.credit.ktae.method import KTAE
    from ktae_trl.credit.method import GRPO

    weights = {name: fields.pop(name) for name in KTAE.options({}) if name in fields}
    credit, how = fields.pop("credit"), fields.pop("how")
    kind = {**METHODS, GRPO.name: GRPO}.get(credit)
    if kind is None:
        return Method(credit, how, **fields)
    settings = KTAE.settings_from(weights, how) if kind is KTAE else {}
    return method_of(kind, how, settings, **fields)


class Record(NamedTuple):
    """Rollouts with the values of their tokens: a recorded step, or rollouts from any source.

    The rows have the columns of `schema` and are sorted by group. `arrays` may be absent. Rows that are not read from a
    file of records may also have `segments`, the turns of a completion in order, each as
    `{"role": str, "begin": index of its first token}` (absent: the assistant's alone), `chat`, the messages of which
    `prompt` is a readable form (absent: the model read `prompt`), and `compared`, one list of token values per method
    in `compared`.
    """

    method: Method
    rows: list[dict[str, Any]]
    compared: tuple[Method, ...] = ()  # further methods, each with values of its own for the same tokens


def write(path: Path, record: Record) -> None:
    """Write a record atomically."""
    names, arrays = ({name for row in record.rows for name in row.get(kind, ())} for kind in ("rewards", "arrays"))
    metadata = json.dumps(record.method._asdict(), default=str).encode()
    columns = schema(sorted(names), sorted(arrays)).with_metadata({_METADATA: metadata})
    rows = [{"schema_version": SCHEMA_VERSION, **row} for row in record.rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, pa.Table.from_pylist(rows, columns))


def add_arrays(path: Path, arrays: dict[tuple[int, int], dict[str, Sequence[float]]]) -> None:
    """Add arrays to rows of a record, atomically. Other rows keep theirs.

    Args:
        arrays: For a group and a rollout, its arrays by name, with one number for each token and perhaps for padding
            after them. NaN becomes null.

    Raises:
        ValueError: The file is not a Parquet file.
    """
    table = _table(path)
    column = table.column_names.index("arrays") if "arrays" in table.column_names else None
    found = [None] * len(table) if column is None else table["arrays"].to_pylist()
    lengths = pc.list_value_length(table["token_ids"]).to_pylist()
    for i, key in enumerate(zip(table["group"].to_pylist(), table["rollout"].to_pylist(), strict=True)):
        if key in arrays:
            found[i] = {name: values[: lengths[i]] for name, values in arrays[key].items()}
    names = sorted({name for row in found if row for name in row})
    if not names:
        return
    values = pa.array(found, schema([], names).field("arrays").type, from_pandas=True)
    added = table.append_column("arrays", values) if column is None else table.set_column(column, "arrays", values)
    _replace(path, added)


def _replace(path: Path, table: pa.Table) -> None:
    with replacing(path) as draft:
        pq.write_table(table, draft, compression="zstd")


def _table(path: str | Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from None


def read(path: str | Path) -> Record:
    """Read a record.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a record or has an unsupported schema version.
    """
    table = _table(path)
    text = (table.schema.metadata or {}).get(_METADATA)
    if text is None or "schema_version" not in table.column_names:
        raise UserError(f"{path} is not a record of ktae_trl: its metadata is missing")
    versions = set(table["schema_version"].to_pylist())
    if versions - {1, SCHEMA_VERSION}:
        raise UserError(
            f"{path} has schema version {max(versions)}, but this ktae_trl reads versions 1 and {SCHEMA_VERSION}. Use "
            "the version of ktae_trl that wrote it"
        )
    try:
        method = (_of_schema_1 if 1 in versions else lambda fields: Method(**fields))(json.loads(text))
    except TypeError as error:
        raise UserError(
            f"{path} was written by another version of ktae_trl. Use that version to read it ({error})"
        ) from None
    method = method._replace(special_ids=tuple(method.special_ids))
    rows = table.drop_columns("schema_version").to_pylist()
    for row in rows:
        row["arrays"] = {name: values for name, values in (row.get("arrays") or {}).items() if values is not None}
    return Record(method, rows)


def folder_of(folder: str | Path) -> Path:
    """Return the folder of records for a run's folder (its subfolder `rollouts`) or a folder of records."""
    folder = Path(folder)
    return folder / FOLDER if (folder / FOLDER).is_dir() else folder


def files(folder: str | Path) -> list[Path]:
    """Return the records of a run, sorted by step. Files with other names, such as copies, are ignored."""
    found = folder_of(folder).glob("step_*.parquet")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def file_name(step: int) -> str:
    return f"step_{step:06}.parquet"


def step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def forget(folder: Path, step: int) -> int:
    """Remove the records and metrics of all steps after `step`, and return the number of removed records.

    If the file of metrics is a link, it is replaced by a copy.
    """
    later = [path for path in files(folder) if step_of(path) > step]
    for path in later:
        path.unlink()
    metrics = read_metrics(folder)
    kept = [entry for entry in metrics if entry["step"] <= step]
    if len(kept) < len(metrics) or (folder / METRICS).is_symlink():  # lines are appended to a file of the run's own
        replace_json_lines(folder / METRICS, kept)
    return len(later)


def append_metrics(folder: Path, entry: dict[str, Any]) -> None:
    """Append a line to the metrics. Values that are not finite numbers become null."""
    folder.mkdir(parents=True, exist_ok=True)
    finite = {k: v if isinstance(v, (int, float)) and math.isfinite(v) else None for k, v in entry.items()}
    with open_to_append(folder / METRICS) as lines:
        lines.write(json.dumps(finite) + "\n")


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Return the trainer's logs, one entry per step and one per evaluation. Of repeated values, the last counts."""
    path = folder_of(folder) / METRICS
    if not path.exists():
        return []
    found: dict[tuple[int, bool], dict] = {}
    for number, entry in read_json_lines(path, skip_damaged=True):
        if not isinstance(entry.get("step"), int):
            logger.warning("Ignored %s, line %d: it has no step", path, number)
            continue
        found.setdefault((entry["step"], any(name.startswith("eval_") for name in entry)), {}).update(entry)
    return [found[key] for key in sorted(found)]
