"""What several processes need on a CPU only; importing it is enough for all but FSDP."""

import os

import torch
from accelerate import DistributedType, PartialState

# transformers reads an optimizer's state back to "cpu:0" if there are several processes, a name torch does not know.
torch.serialization.register_package(0, lambda _: None, lambda storage, name: storage if name == "cpu:0" else None)


def fsdp_settings() -> dict:
    """Let accelerate, which turns to FSDP from MULTI_GPU only, do so over gloo; return the setting that keeps it so."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return {}
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return {"accelerator_config": {"use_configured_state": True}}
