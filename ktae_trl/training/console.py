"""What a training prints: its metrics as a table, and sample rollouts in colour."""

import logging
import sys
from typing import NamedTuple

import datasets.config
import transformers.trainer
from huggingface_hub import constants
from rich import box
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar, set_tqdm_hook

from ktae_trl.credit.method import Method
from ktae_trl.report.group_view import LONGEST_TOKEN, clip
from ktae_trl.report.records import Record
from ktae_trl.report.tokens import colour, shade, visible

logger = logging.getLogger(__name__)


class Column(NamedTuple):
    """A column of the table."""

    metric: str
    form: str  # of its values, for `str.format`
    meaning: str = ""  # for the legend


_COLUMNS = {
    "reward": Column("reward", "{:.3f}", "mean reward: the weighted sum of the reward functions"),
    "correct": Column("correctness/right", "{:.1%}", "share of graded rollouts that are correct"),
    "length": Column("completions/mean_length", "{:.1f}", "mean number of tokens in a completion"),
    "cut off": Column("completions/clipped_ratio", "{:.0%}", "share of completions that reached the length limit"),
    "entropy": Column("entropy", "{:.3f}", "mean entropy of the next-token distribution, in nats"),
    "s/step": Column("step_time", "{:.2f}", "seconds per optimizer step"),
}
_LENGTH_WITH_SHARED_TOKENS = (
    "mean number of trained tokens per completion; a shared token counts once (in evaluations: all tokens)"
)
_SAMPLING_COLUMNS = {
    "batches": Column("dynamic_sampling/generations", "{:.1f}", "generations needed to fill a batch with mixed groups"),
    "mixed": Column(
        "dynamic_sampling/informative_groups",
        "{:.0%}",
        "share of sampled groups, including replaced ones, that have both correct and wrong rollouts",
    ),
}
_LINES_PER_HEAD = 50

_PROMPT_CHARACTERS, _TOKENS = 300, 400  # printed of a sample
_SCALES = {
    "multiply": [("{} = -1: typical of wrong rollouts", -1.0), ("0", 0.0), ("{} = +1: of correct rollouts", 1.0)],
    "add": [("{} = -1: typical of wrong rollouts", -1.0), ("0", 0.0), ("{} = +1: of correct rollouts", 1.0)],
    "scale": [("{} = 0: no weight", -1.0), ("1", 0.0), ("{} = 2 or more", 1.0)],
    "replace": [("lowest advantage", -1.0), ("0", 0.0), ("highest advantage", 1.0)],
}


# Lines and bars


def say(text: str = "") -> None:
    """Print a line at once, above any progress bar. Characters that the output cannot encode become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    tqdm.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()  # a log file is written in blocks otherwise


def shows_bars() -> bool:
    """Return whether a progress bar can be redrawn in place: in a terminal, and as a widget of a notebook."""
    return sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)


class _Notice(logging.Filter):
    """Drops the messages of a logger that begin with a text."""

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


# Neither says anything about the run, and there is nothing to do about them.
_NOTICES = {
    "DeepSpeed": _Notice("Setting accelerator to CPU"),
    "transformers.tokenization_utils_tokenizers": _Notice("Ignoring clean_up_tokenization_spaces=True for BPE"),
}


def quieten_libraries() -> None:
    """Silence what other libraries print that says nothing about the run. For programs: it holds for the whole process.

    Progress bars of `datasets` are off. Those of transformers and huggingface_hub are off unless they can be redrawn in
    place, and disappear when they are done. `HF_DATASETS_DISABLE_PROGRESS_BARS=0` and `HF_HUB_DISABLE_PROGRESS_BARS=0`
    in the environment keep them.
    """
    if datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None:
        datasets.disable_progress_bars()
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        if shows_bars():
            set_tqdm_hook(lambda bar, arguments, options: bar(*arguments, **{"leave": False} | options))
        else:
            disable_progress_bar()
    for name, notice in _NOTICES.items():
        logging.getLogger(name).addFilter(notice)


# Metrics


class MetricsTable(TrainerCallback):
    """Prints a line of metrics per log, and below the first line what the columns mean."""

    def __init__(self, method: Method | type[Method], dynamic_sampling: bool):
        columns = _COLUMNS | method.columns | (_SAMPLING_COLUMNS if dynamic_sampling else {})
        self.columns = {name: Column(*column) for name, column in columns.items()}
        if method.shares_tokens:
            self.columns["length"] = self.columns["length"]._replace(meaning=_LENGTH_WITH_SHARED_TOKENS)
        self._kept = ", for the groups that were kept" if dynamic_sampling else ""
        self._explained = False
        self._lines_below_head: int | None = None  # None: the next line needs a head

    def on_train_begin(self, args, state, control, **kwargs):
        self._lines_below_head = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        values = [(logs.get(prefix + column.metric), column.form) for column in self.columns.values()]
        if all(value is None for value, _ in values):  # the summary at the end
            return
        steps = f" of {state.max_steps}" if state.max_steps > 0 else ""
        width = max(len(f"step{steps}"), len(f"{state.max_steps} eval")) + 2
        if self._lines_below_head in (None, _LINES_PER_HEAD):
            self._lines_below_head = 0
            self._write(f"step{steps}", width, self.columns)
        cells = ["" if value is None else form.format(value) for value, form in values]
        self._write(f"{state.global_step}{' eval' if prefix else ''}", width, cells)
        self._lines_below_head += 1
        if not self._explained:
            self._explained = True
            passes = args.steps_per_generation * args.num_iterations
            reuses = args.logging_steps < passes / args.gradient_accumulation_steps
            say(f"\n{self.legend(evaluates=args.eval_strategy != 'no', reuses=reuses)}\n")
            self._lines_below_head = None

    def legend(self, *, evaluates: bool, reuses: bool = False) -> str:
        """Return what each column means, a line each.

        Args:
            evaluates: whether there are lines of evaluations.
            reuses: whether there are lines of steps that train only on rollouts of an earlier step.
        """
        meanings = {name: column.meaning or f"the metric {column.metric}" for name, column in self.columns.items()}
        if evaluates:
            meanings["N eval"] = "the same after step N, on the held-out problems"
        if reuses:
            meanings["(empty)"] = "no rollouts were sampled: these steps train on those of an earlier step"
        width = max(map(len, meanings))
        lines = [f"  {name:<{width}}  {meaning}" for name, meaning in meanings.items()]
        return "\n".join([f"Each line is a mean over the steps since the previous line{self._kept}:", *lines])

    def _write(self, label: str, width: int, cells) -> None:
        cells = (f"{cell:>{max(6, len(name)) + 2}}" for name, cell in zip(self.columns, cells, strict=True))
        say(f"{label:<{width}}{''.join(cells)}".rstrip())


class ProgressBar(ProgressCallback):
    """The progress bar of `Trainer`, without the dictionaries of metrics."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def show_metrics(trainer) -> None:
    """Show the metrics of a trainer as a table, in place of the dictionaries that transformers prints."""
    printing = (PrinterCallback, transformers.trainer.DEFAULT_PROGRESS_CALLBACK)
    for callback in [each for each in trainer.callback_handler.callbacks if type(each) in printing]:
        trainer.remove_callback(callback)
    trainer.add_callback(MetricsTable(trainer.token_credit.shown, trainer.args.dynamic_sampling))
    if shows_bars() and not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar())


# Samples


def print_sample(record: Record, step: int) -> None:
    """Print a correct and a wrong rollout of a group, if it has them, with each token on the colour of its credit.

    If the terminal is gone or cannot show it, a warning is logged.
    """
    how, symbol = record.method.how, record.method.symbol
    prompt = visible(" ".join(record.rows[0]["prompt"].split()))  # its end holds the question
    table = Table(
        box=box.SIMPLE_HEAD,
        title=Text(f"Step {step}: {'...' if len(prompt) > _PROMPT_CHARACTERS else ''}{prompt[-_PROMPT_CHARACTERS:]}"),
        caption=Text.assemble(*((f" {name.format(symbol)} ", _style(value)) for name, value in _SCALES[how])),
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="",
    )
    most = max((abs(value) for row in record.rows for value in row["credit"]), default=0.0)
    cells = []
    first = {row["correct"]: row for row in reversed(record.rows)}
    for correct, name in ((True, "correct"), (False, "wrong"), (None, "not graded")):
        if correct in first and len(cells) < 2:
            row = first[correct]
            table.add_column(f"{name}, A = {row['advantage']:+.2f}, {len(row['tokens'])} tokens", ratio=1)
            cells.append(_coloured(row, how, most))
    table.add_row(*cells)
    try:
        Console().print(table)
    except (UnicodeEncodeError, OSError) as error:
        logger.warning("Could not print the sample of step %d: %s", step, error)


def _coloured(row: dict, how: str, most: float) -> Text:
    text = Text()
    for token, value in zip(row["tokens"][:_TOKENS], row["credit"][:_TOKENS], strict=True):
        text.append(clip(visible(token), LONGEST_TOKEN), _style(shade(value, how, most)))
    if len(row["tokens"]) > _TOKENS:
        text.append(f" ... {len(row['tokens']) - _TOKENS} more tokens")
    return text


def _style(value: float) -> Style | str:
    """Return white text on the dark scale, which is readable on any background; no style without credit."""
    red, green, blue = colour(value, dark=True)
    return Style.parse(f"#ffffff on #{red:02x}{green:02x}{blue:02x}") if value else ""
