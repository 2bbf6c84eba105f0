"""Token-level credit assignment for TRL's GRPO.

The public names are imported on first use, so that `import ktae_trl.grading` loads neither torch nor trl.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {"KTAEGRPOConfig": "ktae_trl.config", "KTAEGRPOTrainer": "ktae_trl.trainer"}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
