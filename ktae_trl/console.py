"""Training metrics as a table that a person can read while it grows."""

from transformers import ProgressCallback

# Column -> (metric, format)
_COLUMNS = {
    "reward": ("reward", "{:.3f}"),
    "right": ("rewards/{correctness}/mean", "{:.1%}"),
    "length": ("completions/mean_length", "{:.1f}"),
    "cut off": ("completions/clipped_ratio", "{:.0%}"),
    "entropy": ("entropy", "{:.3f}"),
    "s/step": ("step_time", "{:.2f}"),
}
_OAR_COLUMNS = {
    "answered": ("oar/answered", "{:.0%}"),
    "|w-1|": ("oar/mean_change", "{:.2f}"),
}
_CREDIT_COLUMNS = {
    "ktae": {
        "mixed": ("ktae/informative_groups", "{:.0%}"),
        "K right": ("ktae/value_right", "{:+.3f}"),
        "K wrong": ("ktae/value_wrong", "{:+.3f}"),
        "|K|>.9": ("ktae/saturated", "{:.0%}"),
        "A'/A": ("ktae/advantage_ratio", "{:.2f}"),
    },
    "oar_g": _OAR_COLUMNS,
    "oar_p": _OAR_COLUMNS,
    "tree": {
        "tokens": ("tree/generated_tokens", "{:.0f}"),  # of a prompt
        "A≠0": ("tree/trained_share", "{:.0%}"),
    },
}
_SAMPLING_COLUMNS = {
    "batches": ("dynamic_sampling/generations", "{:.1f}"),
    "mixed": ("dynamic_sampling/informative_groups", "{:.0%}"),  # of all that were sampled
}


class MetricsTable(ProgressCallback):
    """The progress bar of `Trainer`, and above it a line of metrics per log in place of the whole dictionary."""

    def __init__(self, correctness: str, credit: str, dynamic_sampling: bool):
        super().__init__()
        columns = _COLUMNS | _CREDIT_COLUMNS.get(credit, {})
        columns |= _SAMPLING_COLUMNS if dynamic_sampling else {}
        self._columns = {
            name: (metric.format(correctness=correctness), form) for name, (metric, form) in columns.items()
        }

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
