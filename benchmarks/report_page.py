"""Measure the key-token page: time to make it, its size, and the time until a browser shows a group.

python benchmarks/report_page.py --browser                  # 200 groups x 16 rollouts x 1,000 tokens
python benchmarks/report_page.py --browser --arrays         # with the arrays that the trainer records
python benchmarks/report_page.py --browser --run runs/quickstart
"""

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ktae_trl.credit.combine import combine
from ktae_trl.credit.ktae.method import KTAE
from ktae_trl.credit.ktae.values import key_token_values
from ktae_trl.report import records, write_report
from ktae_trl.report.rows import group_advantages

VOCABULARY = 50_000
GROUPS_A_STEP = 8


def write_records(folder: Path, groups: int, G: int, T: int, arrays: bool = False, seed: int = 0) -> None:
    """Write records of token ids distributed as in text (Zipf's law, exponent 1.1).

    A quarter of the tokens come from 40 tokens that are specific to their group. With `arrays`, each token has an
    entropy, a log-probability, a ratio and a clip mask, random numbers that compress badly.
    """
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, VOCABULARY + 1) ** 1.1
    order = np.cumsum(weights / weights.sum())
    names = [f" w{i}" for i in range(VOCABULARY)]
    for first in range(0, groups, GROUPS_A_STEP):
        rows = []
        for group in range(min(GROUPS_A_STEP, groups - first)):
            ids = np.minimum(np.searchsorted(order, rng.random((G, T))), VOCABULARY - 1)
            own = rng.integers(0, VOCABULARY, 40)
            ids = np.where(rng.random((G, T)) < 0.25, own[rng.integers(0, 40, (G, T))], ids)
            correct = rng.random(G) < rng.random()
            verdicts = [bool(verdict) for verdict in correct]
            values = key_token_values(
                torch.tensor(ids)[None], torch.ones(1, G, T, dtype=torch.bool), torch.tensor(correct)[None]
            )[0]
            advantages = group_advantages(verdicts)
            for rollout in range(G):
                tokens = [names[i] for i in ids[rollout]]
                rows.append(
                    {
                        "step": first // GROUPS_A_STEP + 1,
                        "group": group,
                        "rollout": rollout,
                        "arrays": _arrays(rng, T) if arrays else {},
                        "prompt": f"Problem {first + group}: " + " ".join(names[i].strip() for i in own),
                        "completion": "".join(tokens),
                        "token_ids": ids[rollout].tolist(),
                        "tokens": tokens,
                        "trained": [True] * T,
                        "rewards": {"math_accuracy": float(verdicts[rollout])},
                        "correct": verdicts[rollout],
                        "advantage": advantages[rollout],
                        "credit": values[rollout].tolist(),
                        "advantages": combine(torch.tensor([advantages[rollout]]), values[rollout][None], "multiply")[
                            0
                        ].tolist(),
                    }
                )
        path = folder / records.FOLDER / f"step_{first // GROUPS_A_STEP + 1:06d}.parquet"
        records.write(path, records.Record(records.method_of(KTAE, "multiply", {}, generated_groups=64), rows))


def _arrays(rng: np.random.Generator, T: int) -> dict[str, list[float]]:
    return {
        "entropy": rng.exponential(0.3, T).tolist(),
        "log_probability": (-rng.exponential(0.3, T)).tolist(),
        "ratio": np.exp(rng.normal(0, 0.02, T)).tolist(),
        "clipped": (rng.random(T) < 0.01).astype(float).tolist(),
    }


def time_in_browser(page_file: Path, changes: int = 10) -> dict[str, float]:
    """Return the seconds in headless Chromium from opening the file, and from pressing `j`, until tokens are shown."""
    from playwright.sync_api import sync_playwright

    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    # Checked at each frame: does the page show tokens of a new group, and (with `attribute`) of all its rollouts?
    until = """([last, attribute]) => {
        const group = document.getElementById("group");
        return group && group.dataset.group !== last && group.querySelector(".t")
            && (!attribute || group.dataset[attribute] !== undefined) && group.dataset.group;
    }"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_file, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        started = time.perf_counter()
        page.goto(page_file.resolve().as_uri(), wait_until="commit")
        last = page.wait_for_function(until, arg=[None, None]).json_value()
        opened = time.perf_counter() - started
        page.wait_for_selector("#group[data-complete]", state="attached")
        page.wait_for_load_state()
        first, whole = [], []
        for _ in range(changes):
            started = time.perf_counter()
            page.keyboard.press("j")
            group = page.wait_for_function(until, arg=[last, None]).json_value()
            first.append(time.perf_counter() - started)
            page.wait_for_function(until, arg=[last, "complete"])
            whole.append(time.perf_counter() - started)
            last = group
        spans = page.locator(".t").count()
        browser.close()
    return {"opened": opened, "first": statistics.median(first), "whole": statistics.median(whole), "spans": spans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--arrays", action="store_true", help="with numbers of each token in addition to its value")
    parser.add_argument("--run", type=Path, help="measure the page of this run instead")
    parser.add_argument("--browser", action="store_true", help="also measure in Chromium (needs playwright)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if options.run is None:
            write_records(Path(folder), options.groups, options.rollouts, options.tokens, options.arrays)
            sizes = f"{options.groups} groups x {options.rollouts} rollouts x {options.tokens} tokens"
            print(f"{sizes}{', arrays' if options.arrays else ''}, {platform.machine()} CPU")
        run = options.run or folder
        size = sum(path.stat().st_size for path in records.files(run))
        started = time.perf_counter()
        page = write_report(run, Path(folder) / "report.html")
        seconds = time.perf_counter() - started
        print(f"records: {size / 1e6:.1f} MB; page: {page.stat().st_size / 1e6:.1f} MB, made in {seconds:.1f} s")
        if options.browser:
            took = time_in_browser(page)
            print(
                f"first tokens shown after {took['opened']:.2f} s; another group: first tokens after "
                f"{took['first']:.2f} s, all {took['spans']:,} tokens after {took['whole']:.2f} s (medians)"
            )


if __name__ == "__main__":
    main()
