"""Measure time and memory of key-token values: their growth, and a comparison with a copy, a sort and a slow loop.

python benchmarks/ktae_cost.py                  # four sweeps and 1,024 groups x 16 rollouts x 1,024 tokens: 3 minutes
python benchmarks/ktae_cost.py --short          # without the sweeps: half a minute
python benchmarks/ktae_cost.py --device cuda
"""

import argparse
import ctypes
import gc
import math
import os
import platform
import statistics
import threading
import time
import unittest.mock
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from ktae_trl.credit.ktae import values as ktae
from ktae_trl.credit.ktae.values import key_token_values


class Size(NamedTuple):
    groups: int = 64
    rollouts: int = 16
    tokens: int = 1024
    vocabulary: int = 151_936

    def __str__(self) -> str:
        return f"{self.groups:,} groups x {self.rollouts} rollouts x {self.tokens:,} tokens, {self.vocabulary:,} ids"


# One dimension is varied at a time, from the default size above.
SWEEPS = {
    "groups": [1, 4, 16, 64, 256, 1024],
    "rollouts": [4, 8, 16, 32, 64],
    "tokens": [128, 256, 512, 1024, 2048, 4096, 8192],
    "vocabulary": [32_000, 64_000, 128_000, 256_000],
}
AIM, AIM_SECONDS = Size(groups=1024), 0.1


def make(size: Size, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids distributed as in text (Zipf's law, exponent 1.1), a mask and the correctness of the rollouts.

    Lengths are from T/4 to T, and each rollout is correct with probability 1/2.
    """
    groups, G, T, vocabulary = size
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocabulary + 1) ** 1.1
    ranks = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random((groups, G, T)))
    ids = torch.tensor(rng.permutation(vocabulary)[np.minimum(ranks, vocabulary - 1)])
    mask = torch.arange(T) < torch.tensor(rng.integers(T // 4, T + 1, (groups, G, 1)))
    return ids, mask, torch.tensor(rng.random((groups, G)) < 0.5)


def log_probability(a: int, b: int, n_right: int, n_wrong: int) -> float:
    """Return the log probability of a 2 x 2 table, computed with factorials as in the paper (arXiv 2505.16826)."""
    cells = (a, b, n_right - a, n_wrong - b)
    margins = (n_right, n_wrong, a + b, n_right + n_wrong - a - b)
    log_factorial = (math.lgamma(n + 1) for n in margins)
    return sum(log_factorial) - sum(math.lgamma(n + 1) for n in (*cells, n_right + n_wrong))


def entropy(*counts: int) -> float:
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n)


def loop_over_tables(
    ids: np.ndarray, mask: np.ndarray, correct: np.ndarray, vocabulary: int, skip_absent: bool
) -> np.ndarray:
    """Return K of one group by the formulas of `key_token_table`, with a Python loop over tables of vocabulary size.

    With `skip_absent`, the loop runs only over tokens that occur, the fastest variant of it.
    """
    present = np.zeros((len(ids), vocabulary), dtype=bool)
    counts = np.zeros((2, vocabulary))
    for i, (row, m, right) in enumerate(zip(ids, mask, correct, strict=True)):
        present[i, row[m]] = True
        np.add.at(counts[int(not right)], row[m], 1)
    n_right, n_wrong = int(correct.sum()), int((~correct).sum())
    G = n_right + n_wrong
    lengths = mask[correct].sum(), mask[~correct].sum()
    values = np.zeros(vocabulary)
    for token in np.flatnonzero(present.any(0)) if skip_absent else range(vocabulary):
        a, b = int(present[correct, token].sum()), int(present[~correct, token].sum())
        k = a + b
        likely = log_probability(a, b, n_right, n_wrong) + 1e-7
        tables = [log_probability(x, k - x, n_right, n_wrong) for x in range(max(0, k - n_wrong), min(n_right, k) + 1)]
        p = sum(math.exp(x) for x in tables if x <= likely)
        fisher = 0.0 if max(tables) <= likely else math.exp(-2 * p)
        gain = entropy(n_right, n_wrong) - (k / G * entropy(a, b) if k else 0.0)
        gain -= (G - k) / G * entropy(n_right - a, n_wrong - b) if k < G else 0.0
        tf = []
        for side in (0, 1):
            f = counts[side, token] / lengths[side]
            tf.append(3 * f / (f + 2 * (0.5 + 0.5 * lengths[side] / (sum(lengths) / 2))))
        direction = math.asin(math.sqrt(a / n_right)) - math.asin(math.sqrt(b / n_wrong))
        direction += tf[0] / (tf[1] + 1e-5) - tf[1] / (tf[0] + 1e-5)
        values[token] = math.tanh((fisher + gain) / 2 * direction / 2)
    return values[ids] * mask


def timed(function: Callable, device: torch.device, repeats: int) -> float:
    """Return the median seconds per call, after two calls to warm up."""
    times = []
    for i in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i > 1:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def least(function: Callable, device: torch.device, repeats: int) -> tuple[float, float]:
    """Return the least seconds per call, on the clock and of processor time (all threads), after a call to warm up.

    The least is the time with the fewest disturbances by other programs. They disturb processor time less.
    """
    function()
    clocks, processors = [], []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock, processor = time.perf_counter(), time.process_time()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        clocks.append(time.perf_counter() - clock)
        processors.append(time.process_time() - processor)
    return min(clocks), min(processors)


def by_sorting(*inputs: torch.Tensor, **options) -> torch.Tensor:
    """Return the key-token values as they are computed without numba."""
    with unittest.mock.patch.object(ktae, "NUMBA", False):
        return key_token_values(*inputs, **options)


def peak_memory(function: Callable, device: torch.device) -> int:
    """Return the peak growth of memory in bytes; on a CPU, that of the process, sampled by a thread."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.0005):
            peak = max(peak, resident())

    grown = []
    for _ in range(3):
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return freed memory, so that its reuse counts as growth
        peak = before = resident()
        over = threading.Event()
        watcher = threading.Thread(target=watch)
        watcher.start()
        result = function()  # kept until the last sample
        peak = max(peak, resident())
        over.set()
        watcher.join()
        del result
        grown.append(peak - before)
    return max(grown)


def sweep(name: str, values: list[int], device: torch.device, repeats: int, seed: int) -> None:
    """Print time and memory over one dimension, and the exponents of their growth."""
    heads = {"seconds": 10, "ns / token": 12, "copies": 8, "sorts": 8, "leave one out": 15, "MiB": 8, "/ ids": 7}
    print(f"{name:>12}" + "".join(f"{head:>{width}}" for head, width in heads.items()))
    seconds, peaks = [], []
    for value in values:
        inputs = [x.to(device) for x in make(Size(**{name: value}), seed)]
        ids = inputs[0]
        other = torch.empty_like(ids)
        copy = timed(lambda ids=ids, other=other: other.copy_(ids), device, repeats)
        sort = timed(lambda ids=ids: ids.view(len(ids), -1).sort(dim=1), device, repeats)
        seconds.append(timed(lambda inputs=inputs: key_token_values(*inputs), device, repeats))
        left_out = timed(lambda inputs=inputs: key_token_values(*inputs, leave_one_out=True), device, repeats)
        peaks.append(peak_memory(lambda inputs=inputs: key_token_values(*inputs), device))
        print(
            f"{value:12,}{seconds[-1]:10.4f}{seconds[-1] / ids.numel() * 1e9:12.1f}{seconds[-1] / copy:8.1f}"
            f"{seconds[-1] / sort:8.2f}{left_out:15.4f}{peaks[-1] / 2**20:8.1f}{peaks[-1] / ids.nbytes:7.1f}",
            flush=True,
        )
    of_time, of_memory = growth(values, seconds), growth(values, peaks)
    print(f"{'':12}time grows as {name} to the power of {of_time}, memory of {of_memory}\n")


def growth(values: list[int], costs: list[float]) -> str:
    """Return the exponent of a power law fitted to these points, with its standard error."""
    fit = stats.linregress(np.log(values), np.log(costs))
    return f"{fit.slope:.2f} +- {fit.stderr:.2f}"


def against_the_loop(size: Size, device: torch.device, repeats: int, loop_groups: int, seed: int) -> None:
    """Print the times of one size, a copy, a sort and the loop; check that the loop gives the same values."""
    ids, mask, correct = make(size, seed)
    mixed = [g for g in range(size.groups) if 0 < correct[g].sum() < size.rollouts][:loop_groups]

    def loop(groups: list[int], skip_absent: bool) -> tuple[float, list[np.ndarray]]:
        """Return the processor seconds for all groups, extrapolated from the given ones, and the values of those."""
        started = time.process_time()
        values = [
            loop_over_tables(*(x[g].numpy() for x in (ids, mask, correct)), size.vocabulary, skip_absent)
            for g in tqdm(groups, desc="slow loop", leave=False)
        ]
        return (time.process_time() - started) / len(groups) * size.groups, values

    on_device = [x.to(device) for x in (ids, mask, correct)]
    flat = on_device[0].view(size.groups, -1)
    place = torch.empty_like(flat)
    measured = {
        "copy of the ids, into memory that is there": lambda: place.copy_(flat),
        "copy of the ids, into new memory": flat.clone,
        "sort of the ids": lambda: flat.sort(dim=1),
        "key_token_values": lambda: key_token_values(*on_device),
        "key_token_values, leave_one_out": lambda: key_token_values(*on_device, leave_one_out=True),
        "key_token_values without numba": lambda: by_sorting(*on_device),
        "key_token_values without numba, leave_one_out": lambda: by_sorting(*on_device, leave_one_out=True),
    }
    rows = {label: least(function, device, repeats) for label, function in measured.items()}
    if mixed:
        whole, _ = loop(mixed[:1], skip_absent=False)
        kind, slow = loop(mixed, skip_absent=True)
        fast = key_token_values(*on_device)
        error = max(np.abs(fast[g].cpu().numpy() - expected).max() for g, expected in zip(mixed, slow, strict=True))
        assert error < 1e-5, f"key_token_values and the loop differ by {error}"
        rows[f"loop over tokens that occur ({len(mixed)} groups, scaled)"] = kind, kind
        rows["loop over the vocabulary (1 group, scaled)"] = whole, whole
    print(f"{size}, least of {repeats} (the loops: once)")
    print(f"{'':50}{'seconds':>10}{'processor':>11}{'ns / token':>12}{'times key_token_values':>24}")
    for label, (seconds, processor) in rows.items():
        times = processor / rows["key_token_values"][1]
        print(f"{label:50}{seconds:10.4f}{processor:11.4f}{processor / ids.numel() * 1e9:12.1f}{times:24,.2f}")
    peak = peak_memory(lambda: key_token_values(*on_device), device)
    print(f"peak memory {peak / 2**20:,.0f} MiB, {peak / ids.nbytes:.1f} times the int64 ids")
    if mixed:
        print(f"largest difference to the loop {error:.0e}")
    if size == AIM:
        reached = "reached" if rows["key_token_values"][0] <= AIM_SECONDS else "not reached"
        print(
            f"aim of {AIM_SECONDS} s: {reached}, with a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="skip the sweeps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loop_groups", type=int, default=8, help="number of groups for the slow loop, 0: no loop")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, seed {arguments.seed}\n")
    if not arguments.short:
        print(f"One dimension at a time, about {Size()}\n")
        for dimension, values in SWEEPS.items():
            sweep(dimension, values, device, arguments.repeats, arguments.seed)
    against_the_loop(AIM, device, arguments.repeats, arguments.loop_groups, arguments.seed)


if __name__ == "__main__":
    main()
