"""What key-token values cost: time against one sort and a per-token loop over vocabulary-sized tables, and memory.

python benchmarks/ktae_cost.py                              # 64 groups x 16 rollouts x 1,024 tokens
python benchmarks/ktae_cost.py --groups 1024 --device cuda
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from ktae_trl.credit.ktae import key_token_values

VOCABULARY = 151_936


def rollouts(groups: int, G: int, T: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids as in text (Zipf's law, exponent 1.1), lengths from T/4 to T, half of the rollouts right."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, VOCABULARY + 1) ** 1.1
    ranks = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random((groups, G, T)))
    ids = torch.tensor(rng.permutation(VOCABULARY)[np.minimum(ranks, VOCABULARY - 1)])
    mask = torch.arange(T) < torch.tensor(rng.integers(T // 4, T + 1, (groups, G, 1)))
    return ids, mask, torch.tensor(rng.random((groups, G)) < 0.5)


def log_probability(a: int, b: int, n_right: int, n_wrong: int) -> float:
    """Probability of a 2 x 2 table in log space by factorials, as the paper writes it."""
    cells = (a, b, n_right - a, n_wrong - b)
    margins = (n_right, n_wrong, a + b, n_right + n_wrong - a - b)
    log_factorial = (math.lgamma(n + 1) for n in margins)
    return sum(log_factorial) - sum(math.lgamma(n + 1) for n in (*cells, n_right + n_wrong))


def entropy(*counts: int) -> float:
    total = sum(counts)
    return -sum(n / total * math.log2(n / total) for n in counts if n)


def loop_over_tables(ids: np.ndarray, mask: np.ndarray, correct: np.ndarray, skip_absent: bool) -> np.ndarray:
    """K of one group by the paper's formulas: tables as large as the vocabulary and a Python loop over their entries.

    With `skip_absent` only over the tokens that occur, which is the kindest form of it.
    """
    present = np.zeros((len(ids), VOCABULARY), dtype=bool)
    counts = np.zeros((2, VOCABULARY))
    for i, (row, m, right) in enumerate(zip(ids, mask, correct, strict=True)):
        present[i, row[m]] = True
        np.add.at(counts[int(not right)], row[m], 1)
    n_right, n_wrong = int(correct.sum()), int((~correct).sum())
    G = n_right + n_wrong
    lengths = mask[correct].sum(), mask[~correct].sum()
    values = np.zeros(VOCABULARY)
    for token in np.flatnonzero(present.any(0)) if skip_absent else range(VOCABULARY):
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
    """Return the median seconds of a call, after two that do not count."""
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


def peak_memory(function: Callable, device: torch.device) -> int:
    """Return by how many bytes memory grew at most while `function` ran."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum(sizes).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--loop_groups", type=int, default=16, help="groups that the slow loop is timed on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    ids, mask, correct = rollouts(arguments.groups, arguments.rollouts, arguments.tokens, arguments.seed)
    mixed = [g for g in range(arguments.groups) if 0 < correct[g].sum() < arguments.rollouts][: arguments.loop_groups]

    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{arguments.groups} groups x {arguments.rollouts} rollouts x {arguments.tokens} tokens, ids to {VOCABULARY:,}"
    )
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, seed {arguments.seed}\n")

    def loop(groups: list[int], skip_absent: bool) -> tuple[float, list[np.ndarray]]:
        """Return the seconds for all groups, scaled from the given ones, and the values of these."""
        started = time.perf_counter()
        values = [
            loop_over_tables(*(x[g].numpy() for x in (ids, mask, correct)), skip_absent)
            for g in tqdm(groups, desc="slow loop")
        ]
        return (time.perf_counter() - started) / len(groups) * arguments.groups, values

    whole, _ = loop(mixed[:2], skip_absent=False)
    kind, slow = loop(mixed, skip_absent=True)

    on_device = [x.to(device) for x in (ids, mask, correct)]
    fast = key_token_values(*on_device)
    error = max(np.abs(fast[g].cpu().numpy() - expected).max() for g, expected in zip(mixed, slow, strict=True))
    assert error < 1e-5, f"the two disagree by {error}"

    flat = on_device[0].view(arguments.groups, -1)
    sort = timed(lambda: flat.sort(dim=1), device, arguments.repeats)
    print(f"{'':42}{'seconds':>9}{'sorts':>9}{'faster than loop':>18}{'peak / ids':>12}")
    print(f"{'one sort of the same ids':42}{sort:9.4f}{1:9.2f}")
    print(f"{'loop over the tables (2 groups, scaled)':42}{whole:9.1f}{whole / sort:9.0f}")
    print(f"{f'loop, absent skipped ({len(mixed)} groups, scaled)':42}{kind:9.1f}{kind / sort:9.0f}")
    narrow = (on_device[0].int(), *on_device[1:])
    for label, inputs, options in (
        ("key_token_values", on_device, {}),
        ("key_token_values, leave_one_out", on_device, {"leave_one_out": True}),
        ("key_token_values, int32 ids", narrow, {}),
    ):
        seconds = timed(lambda i=inputs, o=options: key_token_values(*i, **o), device, arguments.repeats)
        memory = peak_memory(lambda i=inputs, o=options: key_token_values(*i, **o), device) / ids.nbytes
        faster = f"{whole / seconds:.0f} ({kind / seconds:.0f}) x"
        print(f"{label:42}{seconds:9.4f}{seconds / sort:9.2f}{faster:>18}{memory:12.1f}")
    print(f"\nlargest difference on {len(mixed)} groups: {error:.1e}; peak / ids: in sizes of int64 ids")


if __name__ == "__main__":
    main()
