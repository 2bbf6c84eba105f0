"""Measure how much time OAR-P saves by sharing prefixes, against whole sequences with the same token budget per batch.

python benchmarks/oar_cost.py [--prompt 200] [--completion 200] [--budget 16384] [--repeats 3]
"""

import argparse
import statistics
import time
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from ktae_trl.credit import oar
from ktae_trl.policy import Policy


def naive(question: oar.Question, args, policy: Policy) -> torch.Tensor:
    """Return the influences by perturbing each token in a full copy of prompt and completion."""
    _, ids, at, _, reasoning = question
    rows = max(1, int(args.oar_token_budget // question.cost(policy.tokens_per_logits)))
    found = []
    with torch.no_grad(), policy.reading():
        clean = policy.logits(ids[None], at[None]).mean(1).log_softmax(-1)
        for places in reasoning.split(rows):
            copies = ids.repeat(len(places), 1)
            copies[range(len(places)), places] = policy.tokenizer.pad_token_id
            changed = policy.logits(copies, at.expand(len(places), -1)).mean(1).log_softmax(-1)
            found.append((clean.exp() * (clean - changed)).sum(-1))
    return torch.cat(found).clamp(min=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--completion", type=int, default=200)
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    policy = Policy(model, SimpleNamespace(pad_token_id=0), Accelerator(cpu=True))
    length = arguments.prompt + arguments.completion
    ids = torch.randint(10, 300, (length,), generator=torch.Generator().manual_seed(0))
    answer = torch.arange(length - 6, length - 3)
    question = oar.Question([0], ids[:-4], answer - 1, ids[answer], torch.arange(arguments.prompt, length - 16))
    args = SimpleNamespace(oar_answer="answer_mean", oar_span=1, oar_token_budget=arguments.budget)

    def shared() -> torch.Tensor:
        return oar.perturbation_influence([question], args, policy)[0]

    torch.testing.assert_close(shared(), naive(question, args, policy), rtol=1e-3, atol=1e-6)
    seconds: dict[str, list[float]] = {"whole sequences": [], "shared prefix": []}
    for _ in range(arguments.repeats):
        for label, run in (("whole sequences", lambda: naive(question, args, policy)), ("shared prefix", shared)):
            started = time.perf_counter()
            run()
            seconds[label].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    for label, taken in seconds.items():
        print(f"{label:16}{statistics.median(taken):8.2f} s")
    print(f"{statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
