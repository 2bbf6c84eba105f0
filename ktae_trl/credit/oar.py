"""OAR: outcome-grounded advantage reshaping. A token counts by its influence on the model's final answer.

Source: arXiv 2601.07408 (ACL 2026). Its hyperparameters could not be read in full: those of the authors' README are the
defaults here. B rollouts, T tokens of a completion, L tokens of prompt and completion, A tokens of an answer, V of the
vocabulary, H of a hidden state, R rows of one forward pass.
"""

import textwrap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from ktae_trl.arguments import UserError
from ktae_trl.credit.method import Card, Credit, Groups, Method, Settings, Tools
from ktae_trl.grading import answered, extraction

ANSWERS = ("answer_mean", "last", "answer_joint")
_PROMPT_END = 16  # tokens, enough for an open `<think>` and the white space behind it
FLOOR = 0.1  # of the weight of a token of little influence, before weights are scaled to mean 1


class Answer(NamedTuple):
    """Where a completion's final answer is, in tokens."""

    box: int  # tokens before this one end before the box (or the tag, or the mark: `answer_format`)
    tokens: list[int]  # those that hold a character of the answer, in order


class Question(NamedTuple):
    """What is asked of one rollout: how much its answer depends on each reasoning token."""

    row: int
    ids_L: Tensor  # prompt and completion, up to the last position that matters
    at_A: Tensor  # positions whose next-token distribution makes the answer
    targets_A: Tensor  # the tokens that do come there
    reasoning: Tensor  # positions of the reasoning tokens, ascending

    def cost(self, tokens_per_logits: float) -> float:
        """Return the memory of a row in a forward pass, in tokens."""
        return len(self.ids_L) + len(self.at_A) * tokens_per_logits


class OAR(Method):
    """Weights by the influence of each token on the answer; a subclass says how influence is measured."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: oar_g` and `credit: oar_p`.

        Parameters:
            oar_answer (`str`, *optional*, defaults to `"answer_mean"`):
                What of the model's answer a token may influence: `"answer_mean"`, the mean logits where the answer's
                tokens are predicted; `"answer_joint"`, the log-probability of these tokens together; `"last"`, the
                distribution after the completion's last token.
            oar_quantile (`float`, *optional*, defaults to `0.25`):
                Tokens below this quantile of influence in their rollout lose weight, the others gain.
            oar_beta (`float`, *optional*, defaults to `1.0`):
                How much the most influential token gains, before weights are scaled to mean 1.
            oar_noise_std (`float`, *optional*, defaults to `0.001`):
                Standard deviation of the noise on the embeddings (`oar_g`). In bf16 the effect of so little is lost in
                rounding: take 0.01.
            oar_span (`int`, *optional*, defaults to `1`):
                Tokens in a row that are perturbed together and share their weight (`oar_p`). 4 costs about a quarter
                of 1.
            oar_token_budget (`int`, *optional*, defaults to `16384`):
                Tokens, with those of prompts, that a forward pass of OAR holds at most. Lower it if memory runs out:
                `oar_g` keeps all activations where there are no checkpoints, or reentrant ones (PEFT under ZeRO-3).
        """

        oar_answer: str = field(
            default="answer_mean",
            metadata={"help": "What tokens may influence: 'answer_mean', 'answer_joint' or 'last'."},
        )
        oar_quantile: float = field(
            default=0.25, metadata={"help": "Tokens below this quantile of influence lose weight, the others gain."}
        )
        oar_beta: float = field(default=1.0, metadata={"help": "How much the most influential token gains."})
        oar_noise_std: float = field(default=1e-3, metadata={"help": "Noise on the embeddings (oar_g)."})
        oar_span: int = field(default=1, metadata={"help": "Tokens in a row that are perturbed together (oar_p)."})
        oar_token_budget: int = field(default=16384, metadata={"help": "Tokens in a forward pass of OAR at most."})

        def check(self) -> None:
            if self.oar_answer not in ANSWERS:
                raise UserError(f"oar_answer={self.oar_answer!r} is unknown. Choose from: {', '.join(ANSWERS)}")
            if not 0 <= self.oar_quantile < 1:
                raise UserError(f"oar_quantile must be at least 0 and below 1, not {self.oar_quantile}")
            for name in ("oar_beta", "oar_noise_std"):
                if not 0 < getattr(self, name) < float("inf"):
                    raise UserError(f"{name} must be a positive number, not {getattr(self, name)}")
            for name in ("oar_span", "oar_token_budget"):
                if getattr(self, name) < 1:
                    raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")

    how = "scale"
    family = "oar"
    value = "weight w"
    columns = {
        "answered": ("oar/answered", "{:.0%}", "share of rollouts with an answer in the answer_format"),
        "|w-1|": ("oar/mean_change", "{:.2f}", "mean distance from 1 of the weights of reasoning tokens"),
    }
    panels = {"Shares": ["oar/answered", "oar/reshaped_tokens"], "Mean |w - 1|": ["oar/mean_change"]}
    needs_both_sides = False  # the rollout advantage, which the weights scale, may be that of any reward
    answered = "oar/answered"
    no_effect = ("oar_token_budget",)

    def __init__(self, settings: Any, tools: Tools):
        super().__init__(settings, tools)
        if not tools.tokenizer.is_fast:
            raise UserError(
                "OAR finds the answer by a tokenizer's offsets, which a slow one "
                f"({type(tools.tokenizer).__name__}) does not have. Load the fast one (use_fast=True, or a "
                "tokenizer.json), or take another method, such as credit: ktae"
            )

    def influence(self, questions: list[Question]) -> list[Tensor]:
        """Return, for each question, the influence (tokens,) of its reasoning tokens."""
        raise NotImplementedError

    def credit(self, groups: Groups) -> Credit:
        """Weigh the reasoning tokens of the rollouts."""
        mask_BT, ids_BT = groups.mask_BT, groups.ids_BT.long()
        reasoning_BT, questions, answered = torch.zeros_like(mask_BT), [], []
        places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        for row, (prompt, completion) in enumerate(zip(groups.prompts, groups.completions, strict=True)):
            answer = find_answer(completion, self.tools.tokenizer, self.settings.answer_format, prompt)
            if answer is None or not mask_BT[row, answer.tokens[-1]]:  # a tool's output, say
                continue
            answered.append(row)
            reasoning_BT[row] = mask_BT[row] & (places_T < answer.box)
            # A rollout with advantage 0 stays at 0, whatever its weights.
            if reasoning_BT[row].sum() >= 2 and groups.advantages_B[row] != 0:
                prompt = torch.tensor(prompt, dtype=torch.long, device=ids_BT.device)
                questions.append(_ask(row, prompt, ids_BT[row], reasoning_BT[row], answer, groups, self.settings))
        influence_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
        for question, influence in zip(questions, self.influence(questions), strict=True):
            influence_BT[question.row, reasoning_BT[question.row]] = influence.float()
        weights_BT = reshape(influence_BT, reasoning_BT, self.settings.oar_quantile, self.settings.oar_beta)
        asked_BT = torch.zeros_like(mask_BT)
        asked_BT[[question.row for question in questions]] = True
        asked_BT &= reasoning_BT
        sums = {
            "oar/answered": (torch.tensor(len(answered), device=mask_BT.device), mask_BT.any(1).sum()),
            "oar/reshaped_tokens": (asked_BT.sum(), mask_BT.sum()),
            "oar/mean_change": ((weights_BT - 1).abs().sum(), asked_BT.sum()),
        }
        return Credit(weights_BT, sums)


def _card(name: str, does: str) -> Card:
    paper = {
        "title": "Outcome-Grounded Advantage Reshaping for Fine-Grained Credit Assignment in Mathematical Reasoning",
        "id": "2601.07408",
        "citation": textwrap.dedent("""\
            @inproceedings{li2026oar,
                title     = {{Outcome-Grounded Advantage Reshaping for Fine-Grained Credit Assignment
                             in Mathematical Reasoning}},
                author    = {Ziheng Li and Liu Kang and Feng Xiao and Luxi Xing and Qingyi Si and Zhuoran Li
                             and Weikang Gong and Deqing Yang and Yanghua Xiao and Hongcheng Guo},
                booktitle = {Proceedings of the 64th Annual Meeting of the Association for Computational Linguistics},
                year      = 2026,
                eprint    = {arXiv:2601.07408},
            }"""),
    }
    does = f"Each token's advantage is that of its rollout, weighted by the token's influence on the answer{does}"
    return Card(name, does, ("oar",), paper)


class OARG(OAR):
    """OAR-G: influence by one backward pass to the embeddings."""

    name = "oar_g"
    title = "OAR-G (influence by gradients)"
    card = _card("OAR-G", ", as the gradient of the answer at its embedding tells it.")

    def influence(self, questions: list[Question]) -> list[Tensor]:
        return gradient_influence(questions, self.settings, self.tools)


class OARP(OAR):
    """OAR-P: influence by one forward pass for each token or span, with padding in its place."""

    name = "oar_p"
    title = "OAR-P (influence by perturbation)"
    card = _card("OAR-P", ": what its absence does to it.")

    def __init__(self, settings: Any, tools: Tools):
        super().__init__(settings, tools)
        tokenizer = tools.tokenizer
        token = tokenizer.added_tokens_decoder.get(tokenizer.pad_token_id)  # `all_special_ids` has it, whatever it is
        if token is None or not token.special:
            raise UserError(
                f"oar_p puts the padding token in a token's place, but {tokenizer.pad_token!r} "
                f"(id {tokenizer.pad_token_id}) is an ordinary token of this tokenizer. Set tokenizer.pad_token to a "
                "special one, or take credit: oar_g"
            )

    def influence(self, questions: list[Question]) -> list[Tensor]:
        return perturbation_influence(questions, self.settings, self.tools)


def _ask(
    row: int, prompt: Tensor, ids_T: Tensor, reasoning_T: Tensor, answer: Answer, groups: Groups, settings: Any
) -> Question:
    if settings.oar_answer == "last":
        special = torch.tensor(groups.special_ids, device=ids_T.device)
        told = torch.isin(ids_T[: groups.lengths_B[row]], special, invert=True).nonzero()
        at_A = len(prompt) + told[-1]
        targets_A = torch.zeros_like(at_A)  # not read
    else:
        tokens_A = torch.tensor(answer.tokens, device=ids_T.device)
        at_A, targets_A = len(prompt) + tokens_A - 1, ids_T[tokens_A]
    ids_L = torch.cat([prompt, ids_T])[: int(at_A[-1]) + 1]
    return Question(row, ids_L, at_A, targets_A, len(prompt) + reasoning_T.nonzero().squeeze(1))


def find_answer(
    ids: list[int], tokenizer, answer_format: str = "boxed", prompt_ids: Sequence[int] = ()
) -> Answer | None:
    r"""Find the tokens of the final answer, where the rewards find it; None without one, or with an empty one.

    The text is that of the tokens as they were sampled, which need not be those that the tokenizer would choose. A
    token that holds a brace and a part of the answer belongs to the answer, and so do all tokens of one character.

    Args:
        ids: of the completion, without padding.
        answer_format: see `ktae_trl.grading.find_answer`.
        prompt_ids: a prompt can open a `<think>`.
    """
    stream, chunks, ends = DecodeStream(skip_special_tokens=True), [], [0]
    for token in ids:
        try:
            chunk = stream.step(tokenizer.backend_tokenizer, token)
        except Exception:  # it has no class of its own: bytes that make no character
            stream = DecodeStream(skip_special_tokens=True)
            chunk = stream.step(tokenizer.backend_tokenizer, token)
        chunks.append(chunk or "")  # "" inside of a character
        ends.append(ends[-1] + len(chunks[-1]))
    text = "".join(chunks)
    said = _said(text, ids, tokenizer, prompt_ids)
    answer = extraction.find_answer(said, answer_format)
    if answer is None:
        return None
    shift = len(text) - len(said) if said.endswith(text) else text.rfind(said)
    held = [
        i
        for i, (begin, end) in enumerate(pairwise(ends))
        for first, last in answer.spans
        if (begin < last + shift and first + shift < end) or first + shift <= begin == end < last + shift
    ]
    if not held:
        return None
    return Answer(sum(end <= answer.begin + shift for end in ends[1:]), held)


def _said(text: str, ids: list[int], tokenizer, prompt_ids: Sequence[int]) -> str:
    """Return what the reward functions read of a completion.

    TRL hands them the content of the message that a tokenizer with a response template finds, else the whole text.
    """
    if getattr(tokenizer, "response_template", None) is not None:
        try:
            said = tokenizer.parse_response(list(ids), prefix=list(prompt_ids)).get("content") or ""
        except (ValueError, TypeError, AttributeError):  # where TRL takes the whole text
            said = text
        if said in text:
            return said
    return answered(tokenizer.decode(prompt_ids[-_PROMPT_END:]), text)


def reshape(influence_BT: Tensor, reasoning_BT: Tensor, quantile: float = 0.25, beta: float = 1.0) -> Tensor:
    """Turn influences into weights of mean 1 over each rollout's reasoning tokens (bi-level reshaping).

        I   = log(1 + influence), min-max normalised within the rollout
        tau = the quantile of I in the rollout (linear interpolation)
        w   = max(I / (tau + 1e-8), 0.1)                  where I < tau
        w   = 1 + beta (I - tau) / (1 - tau + 1e-8)       where I >= tau
        w   = w / mean(w)

    Source: arXiv 2601.07408, section on bi-level reshaping.

    Args:
        influence_BT: (B, T) influence of each token, not negative. What is not reasoning is not read.
        reasoning_BT: (B, T) bool, the tokens that share the rollout's advantage.
        quantile: in [0, 1).
        beta: how much the tokens above the quantile gain at most.

    Returns:
        (B, T) float32. 1 at all other tokens, and everywhere in a rollout with fewer than two reasoning tokens or with
        the same influence of all of them.
    """
    n_B1 = reasoning_BT.sum(1, keepdim=True)
    I_BT = influence_BT.float().clamp(min=0).log1p()
    low_B1 = I_BT.masked_fill(~reasoning_BT, torch.inf).amin(1, keepdim=True)
    high_B1 = I_BT.masked_fill(~reasoning_BT, -torch.inf).amax(1, keepdim=True)
    differs_B1 = (n_B1 >= 2) & (high_B1 > low_B1)
    I_BT = ((I_BT - low_B1) / (high_B1 - low_B1)).masked_fill(~reasoning_BT, torch.inf)
    sorted_BT = I_BT.sort(1).values  # the others last
    place_B1 = quantile * (n_B1 - 1).clamp(min=0)
    below_B1 = place_B1.floor().long()
    above_B1 = torch.minimum(below_B1 + 1, (n_B1 - 1).clamp(min=0))
    tau_B1 = torch.lerp(sorted_BT.gather(1, below_B1), sorted_BT.gather(1, above_B1), place_B1 - below_B1)
    w_BT = torch.where(
        tau_B1 > I_BT,
        (I_BT / (tau_B1 + 1e-8)).clamp(min=FLOOR),
        1 + beta * (I_BT - tau_B1) / (1 - tau_B1 + 1e-8),
    )
    mean_B1 = w_BT.masked_fill(~reasoning_BT, 0).sum(1, keepdim=True) / n_B1.clamp(min=1)
    return torch.where(reasoning_BT & differs_B1, w_BT / mean_B1, 1.0)


def answer_log_probs(logits_RAV: Tensor, targets_RA: Tensor, valid_RA: Tensor, answer: str) -> Tensor:
    """Represent answers by log-probabilities.

    `answer_mean` and `last`: (R, V), of the softmax of the mean logits over the answer's positions (`last`: one).
    `answer_joint`: (R, 1), of the answer's tokens together.
    """
    if answer == "answer_joint":
        log_probs_RA = logits_RAV.log_softmax(-1).gather(-1, targets_RA[..., None]).squeeze(-1)
        return (log_probs_RA * valid_RA).sum(1, keepdim=True)
    weights_RA = valid_RA / valid_RA.sum(1, keepdim=True)
    return torch.einsum("rav,ra->rv", logits_RAV, weights_RA.to(logits_RAV.dtype)).log_softmax(-1)


def divergence(clean: Tensor, changed: Tensor, answer: str) -> Tensor:
    """Return how far the answer moved, (R,): KL(clean || changed), or the log-probability lost (`answer_joint`).

    Most tokens move it by so little that the rounding of log-probabilities would be more than sum p log(p / q). Since
    p and q have the same sum, it is also sum p (q / p - 1 - log(q / p)), where that rounding enters squared.
    """
    lost = clean - changed
    if answer == "answer_joint":
        return lost.sum(-1)
    p = clean.exp()
    little = lost.clamp(-1, 1)
    return torch.where(lost == little, p * (torch.expm1(-little) + little), p * lost + changed.exp() - p).sum(-1)


def gradient_influence(questions: list[Question], settings: Any, tools: Tools) -> list[Tensor]:
    """Return, for each question, the influence (tokens,) of its reasoning tokens by OAR-G.

        J = KL(P || P_noisy), with noise of N(0, oar_noise_std^2) on the embeddings e of the reasoning tokens
        I_t = |sum_h (dJ / de_t)_h e_t,h|

    The noise is drawn by the rollout's own tokens: in float32 the same rollout gets the same weights in every batch, on
    every process, and in a resumed run. In bf16 the gradient, which is about P_noisy - P, drowns in the rounding of the
    forward passes if the noise is small: take 0.01.
    """
    sizes = [(len(question.ids_L), len(question.at_A) * tools.tokens_per_logits) for question in questions]
    batches = list(_in_batches(sizes, settings.oar_token_budget))
    extra = tools.missing_rounds(len(batches))
    influences: dict[int, Tensor] = {}
    with torch.enable_grad(), tools.reading():
        for batch in batches:
            influences |= zip(batch, _differentiate([questions[i] for i in batch], settings, tools), strict=True)
        for _ in range(extra):
            one = torch.zeros(1, dtype=torch.long, device=tools.device)
            _differentiate([Question(0, one, one, one, one)], settings, tools)
    return [influences[i] for i in range(len(questions))]


def _in_batches(sizes: list[tuple[float, float]], budget: int) -> Iterator[list[int]]:
    """Put rows of similar size together, the largest first: at least one a batch, and no more than the budget.

    Rows of a batch are padded in both of their sizes, tokens and logits.
    """
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sum(sizes[i])):
        padded = [max(some) for some in zip(*(sizes[j] for j in [*batch, i]), strict=True)]
        if batch and sum(padded) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _differentiate(batch: list[Question], settings: Any, tools: Tools) -> list[Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ids_RL = pad([q.ids_L for q in batch], batch_first=True)
    at_RA = pad([q.at_A for q in batch], batch_first=True)
    targets_RA = pad([q.targets_A for q in batch], batch_first=True)
    valid_RA = pad([torch.ones_like(q.at_A, dtype=torch.bool) for q in batch], batch_first=True)
    clean_embeddings = noisy_embeddings = None

    def add_noise(embeddings_RLH: Tensor) -> Tensor:
        nonlocal clean_embeddings, noisy_embeddings
        clean_embeddings = embeddings_RLH.detach()
        noise = torch.zeros_like(clean_embeddings)
        for row, question in enumerate(batch):
            generator = torch.Generator(noise.device).manual_seed(zlib.crc32(question.ids_L.cpu().numpy().tobytes()))
            shape = (len(question.reasoning), noise.shape[-1])
            noise[row, question.reasoning] = torch.randn(
                shape, generator=generator, device=noise.device, dtype=noise.dtype
            )
        noisy_embeddings = (clean_embeddings + settings.oar_noise_std * noise).requires_grad_()
        return noisy_embeddings

    with torch.no_grad():
        clean = answer_log_probs(tools.logits(ids_RL, at_RA), targets_RA, valid_RA, settings.oar_answer)
    noisy = answer_log_probs(tools.logits(ids_RL, at_RA, change=add_noise), targets_RA, valid_RA, settings.oar_answer)
    (gradient,) = torch.autograd.grad(divergence(clean, noisy, settings.oar_answer).sum(), noisy_embeddings)
    influence_RL = (gradient.float() * clean_embeddings.float()).sum(-1).abs()
    return [influence_RL[row, question.reasoning] for row, question in enumerate(batch)]


def perturbation_influence(questions: list[Question], settings: Any, tools: Tools) -> list[Tensor]:
    """Return, for each question, the influence (tokens,) of its reasoning tokens by OAR-P.

        I_t = KL(P || P_t), P_t with token t replaced by padding

    With `oar_span` k > 1, k reasoning tokens in a row are replaced together and share their influence. The keys and
    values of all that comes before the first replaced token are computed once, in the pass that gives P; so the prompt
    is not computed again for each token.
    """
    plans = []
    for question in questions:
        spans = -(-len(question.reasoning) // settings.oar_span)
        rows = max(1, int(settings.oar_token_budget // question.cost(tools.tokens_per_logits)))
        plans.append(torch.arange(spans, device=question.ids_L.device).split(rows))
    extra = tools.missing_rounds(sum(1 + len(chunks) for chunks in plans))
    with torch.no_grad(), tools.reading():
        influences = [_perturb(*plan, settings, tools) for plan in zip(questions, plans, strict=True)]
        for _ in range(extra):
            one = torch.zeros(1, 1, dtype=torch.long, device=tools.device)
            tools.logits(one, one)
    return influences


def _perturb(question: Question, chunks: tuple[Tensor, ...], settings: Any, tools: Tools) -> Tensor:
    _, ids_L, at_A, targets_A, reasoning = question
    cache = tools.empty_cache()
    clean = _read(tools.logits(ids_L[None], at_A[None], cache), targets_A, settings.oar_answer)
    span_L = torch.full_like(ids_L, -1)
    span_L[reasoning] = torch.arange(len(reasoning), device=ids_L.device) // settings.oar_span
    influences = []
    for spans in chunks:
        R = len(spans)
        ids_RL = torch.where(span_L == spans[:, None], tools.tokenizer.pad_token_id, ids_L)
        before, begin = tools.beginning(cache, int(reasoning[spans[0] * settings.oar_span]), R)
        logits_RAV = tools.logits(ids_RL[:, begin:], (at_A - begin).expand(R, -1), before)
        influences.append(divergence(clean, _read(logits_RAV, targets_A, settings.oar_answer), settings.oar_answer))
    return torch.cat(influences)[span_L[reasoning]].clamp(min=0)  # rounding; a token that speaks against the answer


def _read(logits_RAV: Tensor, targets_A: Tensor, answer: str) -> Tensor:
    targets_RA = targets_A.expand(len(logits_RAV), -1)
    return answer_log_probs(logits_RAV, targets_RA, torch.ones_like(targets_RA, dtype=torch.bool), answer)
