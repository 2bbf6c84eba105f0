"""Show key tokens: an HTML page or a notebook view of a run's records, or of rollouts from any source.

    records (Parquet) -> group_view (statistics, data of a group) -> contents, curves -> page (HTML)
    rows from any source -> a record -> the same page, or a notebook view

`tokens` makes token strings safe to display, on a page or in a console. Importing the package loads no other module.
"""

import importlib

_HOMES = {
    "write_report": "ktae_trl.report.page",
    "explain": "ktae_trl.report.rows",
    "KeyTokens": "ktae_trl.report.notebook",
    "compare": "ktae_trl.report.methods",
    "log_probabilities": "ktae_trl.report.models",
}
__all__ = ["KeyTokens", "compare", "explain", "log_probabilities", "write_report"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
