"""Key tokens for a person to read: a page of a run's records, and the same for rollouts of any origin.

    records (Parquet) -> group_view (statistics again, what is shown of a group) -> contents, curves -> page (HTML)
    rows of any origin -> a record -> the same, or a notebook

`tokens` shows token strings safely; a console can use it too. Lazy: importing this loads none of it.
"""

import importlib

_HOMES = {
    "write_report": "ktae_trl.report.page",
    "explain": "ktae_trl.report.rows",
    "KeyTokens": "ktae_trl.report.notebook",
}
__all__ = ["KeyTokens", "explain", "write_report"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
