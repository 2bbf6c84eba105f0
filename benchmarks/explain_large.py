"""Measure `ktae explain` on gigabytes of rollouts: time, peak memory, size of the page.

python benchmarks/explain_large.py                      # 5 GB of verl's JSON Lines: needs that much disk, in /tmp
python benchmarks/explain_large.py --gigabytes 0.1 1    # how time and memory grow
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROMPTS, ROLLOUTS, SENTENCES = 64, 16, 66  # per step, per prompt, per rollout (about 1,000 tokens)
_MEASURED = """
import resource, sys
from ktae_trl.report.run import main
main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def sentences(count: int = 4000, seed: int = 0) -> list[str]:
    """Sentences of made-up words with the frequencies of a language."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwyp", k=rng.randint(2, 8))) for _ in range(8000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    return [" ".join(rng.choices(words, weights, k=12)) + "." for _ in range(count)]


def tokenizer(texts: list[str], folder: Path) -> Path:
    """Train and save a tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>"]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=16_000, special_tokens=special, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(folder)
    return folder


def write_rollouts(folder: Path, size: int, texts: list[str], seed: int = 0) -> tuple[int, int]:
    """Write `size` bytes of rollouts, one file per step, and return the numbers of steps and rollouts."""
    rng = random.Random(seed)
    written, step = 0, 0
    folder.mkdir()
    while written < size:
        step += 1
        with open(folder / f"{step}.jsonl", "w") as file:
            for prompt in range(PROMPTS):
                right = rng.random()
                question = f"Problem {prompt} of step {step}: {texts[(step * PROMPTS + prompt) % len(texts)]}"
                for _ in range(ROLLOUTS):
                    correct = rng.random() < right
                    output = " ".join([*rng.choices(texts, k=SENTENCES), "yes" if correct else "no"])
                    row = {"input": question, "output": output, "gts": "yes", "score": float(correct), "step": step}
                    written += file.write(json.dumps(row) + "\n")
    return step, step * PROMPTS * ROLLOUTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[5.0])
    parser.add_argument("--max_groups", type=int, default=400)
    options = parser.parse_args()
    texts = sentences()
    for gigabytes in options.gigabytes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = tokenizer(texts, folder / "tokenizer")
            steps, rollouts = write_rollouts(folder / "rollouts", int(gigabytes * 1e9), texts)
            words = ["explain", str(folder / "rollouts"), "--tokenizer", str(model), "-o", str(folder / "page.html")]
            words += ["--max_groups", str(options.max_groups)]
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _MEASURED, *words],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
            seconds = time.perf_counter() - started
            memory = int(done.stdout.splitlines()[-1])
            page = (folder / "page.html").stat().st_size
            print(
                f"{gigabytes:g} GB, {steps:,} steps, {rollouts:,} rollouts: {seconds:.0f} s, peak memory "
                f"{memory / 1e6:.0f} MB, page {page / 1e6:.1f} MB"
            )


if __name__ == "__main__":
    main()
