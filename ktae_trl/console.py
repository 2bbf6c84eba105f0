"""Training metrics as a table that a person can read while it grows."""

from transformers import ProgressCallback

# Column -> (metric, format). A column appears if its metric was logged.
_COLUMNS = {
    "reward": ("reward", "{:.3f}"),
    "right": ("{correctness}", "{:.1%}"),
    "informative": ("ktae/informative_groups", "{:.0%}"),
    "K right": ("ktae/value_right", "{:+.3f}"),
    "K wrong": ("ktae/value_wrong", "{:+.3f}"),
    "|K|>0.9": ("ktae/saturated", "{:.1%}"),
    "|A'|/|A|": ("ktae/advantage_ratio", "{:.2f}"),
    "length": ("completions/mean_length", "{:.1f}"),
    "cut off": ("completions/clipped_ratio", "{:.0%}"),
    "entropy": ("entropy", "{:.3f}"),
    "s/step": ("step_time", "{:.2f}"),
}
_WIDTH = 11


class MetricsTable(ProgressCallback):
    """The progress bar of `Trainer`, and above it a line of metrics per log in place of the whole dictionary."""

    def __init__(self, correctness: str):
        super().__init__()
        self._metrics = {
            name: (key.format(correctness=f"rewards/{correctness}/mean"), form)
            for name, (key, form) in _COLUMNS.items()
        }
        self._header: list[str] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:  # another process than the first, or not training
            return
        prefix = "eval_" if any(key.startswith("eval_") for key in logs) else ""
        cells = {
            name: form.format(logs[prefix + key])
            for name, (key, form) in self._metrics.items()
            if logs.get(prefix + key) is not None
        }
        if not cells:
            return
        if not self._header:
            self._header = list(cells)
            self._write(["step", *self._header])
        label = f"{state.global_step}{' held-out' if prefix else ''}"
        self._write([label, *(cells.get(name, "") for name in self._header)])

    def _write(self, cells: list[str]) -> None:
        first, *rest = cells
        self.training_bar.write(f"{first:<13}" + "".join(f"{cell:>{_WIDTH}}" for cell in rest))
