"""RLSD token by token: prompts put together as strings, one whole forward pass each, probabilities divided."""

import torch

INTRO = "For reference, here is a solution of this problem:"


def rendered(messages: list[dict], reference: str | None) -> str:
    """The offline model's chat template, with the reference at the end of the last message."""
    *before, last = messages
    text = last["content"]
    if reference is not None:
        text = f"{text}\n\n{INTRO}\n\n{reference}\n\nNow solve the problem yourself, in your own way."
    turns = [(message["role"], message["content"]) for message in before] + [(last["role"], text)]
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns) + "<|im_start|>assistant\n"


def probabilities(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    after = logits[len(prompt) - 1 : -1].softmax(-1)
    return [after[i][token].item() for i, token in enumerate(completion)]


def next_of_group(row: int, G: int, completions: list[list[int]], side: list[bool], longest: int) -> int | None:
    """The next rollout of the group of 8, say 5: 6, 7, 0, 1, 2, 3 and 4 are tried in this order."""
    first = row // G * G
    order = [*range(row + 1, first + G), *range(first, row)]
    for other in order:
        if side[other] and 0 < len(completions[other]) <= longest and completions[other] != completions[row]:
            return other
    return None


def weight(p_with: float, p_without: float, advantage: float, lam: float, eps: float) -> float:
    if advantage == 0:
        return 1.0
    ratio = p_with / p_without if advantage > 0 else p_without / p_with
    return (1 - lam) + lam * min(max(ratio, 1 - eps), 1 + eps)
