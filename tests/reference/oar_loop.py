"""OAR-P token by token: one whole forward pass each, no cache, no batch."""

import torch


def representation(model, ids: list[int], at: list[int], answer: list[int], how: str) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    if how == "answer_joint":
        return sum(logits[i].log_softmax(-1)[token] for i, token in zip(at, answer, strict=True))
    return torch.stack([logits[i] for i in at]).mean(0).softmax(-1)


def influences(model, prompt: list[int], completion: list[int], reasoning, answer, how, pad, span=1) -> list[float]:
    """`reasoning` and `answer` are places in the completion. For `last` only the answer's first token is predicted."""
    n = len(prompt)
    answer = answer[:1] if how == "last" else answer
    at = [n + place - 1 for place in answer]
    tokens = [completion[place] for place in answer]
    clean = representation(model, prompt + completion, at, tokens, how)
    found = []
    for first in range(0, len(reasoning), span):
        places = reasoning[first : first + span]
        changed = [pad if i in places else token for i, token in enumerate(completion)]
        other = representation(model, prompt + changed, at, tokens, how)
        if how == "answer_joint":
            influence = max(0.0, (clean - other).item())
        else:
            influence = sum(p * (p.log() - q.log()) for p, q in zip(clean, other, strict=True) if p > 0).item()
        found += [influence] * len(places)
    return found
