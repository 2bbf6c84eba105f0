"""What FSDP needs on a CPU only."""

import os

import torch
from accelerate import DistributedType, PartialState


def fsdp_settings() -> dict:
    """Let accelerate, which turns to FSDP from MULTI_GPU only, do so over gloo; return the setting that keeps it so."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true" or torch.cuda.is_available():
        return {}
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return {"accelerator_config": {"use_configured_state": True}}
