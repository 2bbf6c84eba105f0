"""Key-token values on a GPU: those of the CPU, one wait for the device, and their cost."""

import statistics
import warnings

import pytest
import torch

from benchmarks.ktae_cost import Size, make
from ktae_trl.credit.ktae.values import key_token_values

LARGE = Size(groups=1024)  # x 16 rollouts x 1,024 tokens
both_ways = pytest.mark.parametrize("leave_one_out", [False, True], ids=["", "leave one out"])


@both_ways
def test_values_are_those_of_the_cpu(gpu, figures, leave_one_out):
    inputs = (*make(Size(groups=64), seed=0), torch.rand(64, 16) < 0.9)
    options = {"leave_one_out": leave_one_out, "ignore_ids": [0]}
    expected = key_token_values(*inputs[:3], scored=inputs[3], **options)
    on_gpu = [x.to(gpu) for x in inputs]
    found = key_token_values(*on_gpu[:3], scored=on_gpu[3], **options)
    assert found.device.type == "cuda"
    figures["largest difference"] = f"{(found.cpu() - expected).abs().max().item():.1e}"
    assert torch.allclose(found.cpu(), expected, rtol=0, atol=1e-6)
    assert expected.abs().max() > 0.5


@both_ways
def test_the_gpu_is_waited_for_once(gpu, figures, leave_one_out):
    inputs = [x.to(gpu) for x in make(Size(groups=8), seed=0)]
    key_token_values(*inputs, leave_one_out=leave_one_out)  # what is loaded at a first call
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            key_token_values(*inputs, leave_one_out=leave_one_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    figures["waits"] = len([w for w in told if "synchronizing" in str(w.message)])
    assert figures["waits"] == 1


@both_ways
def test_time_and_memory_of_1024_groups(gpu, figures, leave_one_out):
    inputs = [x.to(gpu) for x in make(LARGE, seed=0)]
    seconds = []
    for _ in range(12):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        began.record()
        key_token_values(*inputs, leave_one_out=leave_one_out)
        ended.record()
        torch.cuda.synchronize()
        seconds.append(began.elapsed_time(ended) / 1000)
    figures["ms"] = round(1000 * statistics.median(seconds[2:]), 1)
    figures["memory, times that of the ids"] = round(
        (torch.cuda.max_memory_allocated() - before) / (inputs[0].numel() * 8), 1
    )
    assert figures["ms"] <= (50 if not leave_one_out else 100)
    assert figures["memory, times that of the ids"] <= (22 if leave_one_out else 18)
