"""What a training shows in the terminal: metrics as a table that grows, and a right and a wrong rollout in colour."""

import logging

from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from transformers import ProgressCallback

from ktae_trl.credit import find_method
from ktae_trl.report.group_view import LONGEST_TOKEN, clip
from ktae_trl.report.records import Record
from ktae_trl.report.tokens import colour, shade, visible

logger = logging.getLogger(__name__)

# Column -> (metric, format)
_COLUMNS = {
    "reward": ("reward", "{:.3f}"),
    "right": ("correctness/right", "{:.1%}"),  # of the rollouts that could be judged
    "length": ("completions/mean_length", "{:.1f}"),
    "cut off": ("completions/clipped_ratio", "{:.0%}"),
    "entropy": ("entropy", "{:.3f}"),
    "s/step": ("step_time", "{:.2f}"),
}
_SAMPLING_COLUMNS = {
    "batches": ("dynamic_sampling/generations", "{:.1f}"),
    "mixed": ("dynamic_sampling/informative_groups", "{:.0%}"),  # of all that were sampled
}


_PROMPT_CHARACTERS, _TOKENS = 300, 400  # of a sample, that are printed
_LEGEND = {
    "multiply": [("{} = -1: speaks for wrong", -1.0), ("0", 0.0), ("{} = +1: speaks for right", 1.0)],
    "add": [("{} = -1: speaks for wrong", -1.0), ("0", 0.0), ("{} = +1: speaks for right", 1.0)],
    "scale": [("{} = 0: no weight", -1.0), ("1", 0.0), ("{} = 2 and more", 1.0)],
    "replace": [("least advantage", -1.0), ("0", 0.0), ("greatest advantage", 1.0)],
}


class MetricsTable(ProgressCallback):
    """The progress bar of `Trainer`, and above it a line of metrics per log in place of the whole dictionary."""

    def __init__(self, credit: str, dynamic_sampling: bool):
        super().__init__()
        self._columns = _COLUMNS | find_method(credit).columns | (_SAMPLING_COLUMNS if dynamic_sampling else {})

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._write("step", self._columns)

    def on_log(self, args, state, control, logs=None, **kwargs):
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        if f"{prefix}reward" not in logs:  # the summary at the end
            return
        values = [(logs.get(prefix + metric), form) for metric, form in self._columns.values()]
        cells = ["" if value is None else form.format(value) for value, form in values]
        self._write(f"{state.global_step}{' eval' if prefix else ''}", cells)

    def _write(self, label: str, cells) -> None:
        if self.training_bar is not None:  # only the first process has one
            self.training_bar.write(f"{label:<8}" + "".join(f"{cell:>9}" for cell in cells))


def print_sample(record: Record, step: int) -> None:
    """Print a right and a wrong rollout of a group, as far as it has them, each token on the colour of its credit.

    A terminal that cannot show it, or is gone, is a warning.
    """
    how, symbol = record.method.how, record.method.symbol
    prompt = visible(" ".join(record.rows[0]["prompt"].split()))  # its end holds the question
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(f"Step {step}: {'...' if len(prompt) > _PROMPT_CHARACTERS else ''}{prompt[-_PROMPT_CHARACTERS:]}"),
        caption=Text.assemble(*((f" {name.format(symbol)} ", _style(value)) for name, value in _LEGEND[how])),
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="",
    )
    most = max((abs(value) for row in record.rows for value in row["credit"]), default=0.0)
    cells = []
    first = {row["correct"]: row for row in reversed(record.rows)}
    for correct, name in ((True, "right"), (False, "wrong"), (None, "not judged")):
        if correct in first and len(cells) < 2:
            row = first[correct]
            table.add_column(f"{name}, A = {row['advantage']:+.2f}, {len(row['tokens'])} tokens", ratio=1)
            cells.append(_coloured(row, how, most))
    table.add_row(*cells)
    try:
        Console().print(table)
    except (UnicodeEncodeError, OSError) as error:
        logger.warning("The sample of step %d could not be printed: %s", step, error)


def _coloured(row: dict, how: str, most: float) -> Text:
    text = Text()
    for token, value in zip(row["tokens"][:_TOKENS], row["credit"][:_TOKENS], strict=True):
        text.append(clip(visible(token), LONGEST_TOKEN), _style(shade(value, how, most)))
    if len(row["tokens"]) > _TOKENS:
        text.append(f" ... {len(row['tokens']) - _TOKENS} more tokens")
    return text


def _style(value: float) -> Style | str:
    """Return white on the dark scale, which can be read on any ground; nothing for a token without credit."""
    red, green, blue = colour(value, dark=True)
    return Style.parse(f"#ffffff on #{red:02x}{green:02x}{blue:02x}") if value else ""
