"""OAR: outcome-grounded advantage reshaping (arXiv 2601.07408, ACL 2026).

The advantage of a token is weighted by the token's influence on the model's final answer. Formulas and default
hyperparameters are those of the authors' code and its README (Valsure/Outcome-Grounded-Advantage-Reshaping). The text
of the paper was not checked.

Departures from the authors' code:

- The threshold of a rollout does not depend on the rollouts before it.
- `oar_answer` is "answer_mean" by default for both variants. The README, and our recipes, use "last" for OAR-P.
- "last" is the distribution of the answer's first token. This is inferred from the code, which lacks that function.
- "answer_joint" is the joint log-probability of the answer tokens, a sum. The code takes the mean of their
  log-probabilities.
- OAR-P can perturb several tokens together (`oar_span`).
- The noise of OAR-G is seeded with the rollout's own tokens.
- Rollouts with advantage 0 are skipped, and identical rollouts are computed once.

Shape suffixes: B rollouts, T completion tokens, L tokens of prompt and completion, A answer tokens, V vocabulary, H
hidden size, R rows of a forward pass.
"""

import textwrap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ktae_trl.arguments import UserError
from ktae_trl.credit.decoding import decoded, need_fast
from ktae_trl.credit.method import Card, Credit, Groups, Method, Settings, Tools
from ktae_trl.grading import answered, extraction

ANSWERS = ("answer_mean", "last", "answer_joint")
_PROMPT_END = 16  # tokens at the end of a prompt, enough for an open `<think>` and the white space after it
FLOOR = 0.1  # smallest weight, before the weights are scaled to mean 1


class Answer(NamedTuple):
    """The token positions of a completion's final answer."""

    box: int  # all tokens before this one end before the box, tag or mark of `answer_format`
    tokens: list[int]  # tokens that contain a character of the answer, ascending


class Question(NamedTuple):
    """The inputs for the influence of each reasoning token of a rollout on its answer."""

    rows: list[int]  # the rollout's row in the batch, and those of identical rollouts
    ids_L: Tensor  # prompt and completion, up to the last position in `at_A`
    at_A: Tensor  # positions whose next-token distributions represent the answer
    targets_A: Tensor  # the token after each of these positions
    reasoning: Tensor  # positions of the reasoning tokens, ascending

    def cost(self, tokens_per_logits: float) -> float:
        """Return the memory that a row needs in a forward pass, in units of one token."""
        return len(self.ids_L) + len(self.at_A) * tokens_per_logits


class Prompts(NamedTuple):
    """The keys and values of the first tokens of all questions, which the rollouts of a prompt share."""

    cache: Any  # one row for each distinct prompt; None if the model cannot use one
    length: int  # tokens of each row in the cache


class OAR(Method):
    """Weights by the influence of each token on the answer. Subclasses define how influence is measured."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: oar_g` and `credit: oar_p`.

        Parameters:
            oar_answer (`str`, *optional*, defaults to `"answer_mean"`):
                Representation of the model's answer on which influence is measured: `"answer_mean"`, the distribution
                of the mean logits over the positions that predict the answer tokens; `"answer_joint"`, the joint
                log-probability of the answer tokens, which is the sum of their log-probabilities; `"last"`, the
                distribution of the answer's first token.
            oar_quantile (`float`, *optional*, defaults to `0.25`):
                Quantile of influence in a rollout. Tokens below it lose weight, the others gain weight.
            oar_beta (`float`, *optional*, defaults to `1.0`):
                Weight that the most influential token gains, before the weights are scaled to mean 1.
            oar_noise_std (`float`, *optional*, defaults to `0.001`):
                Standard deviation of the noise on the embeddings (`oar_g`). In bf16, set it to 0.01: the effect of
                0.001 is smaller than the rounding error.
            oar_span (`int`, *optional*, defaults to `1`):
                Number of consecutive tokens that are replaced together and share their influence (`oar_p`). A span of 4
                costs about a quarter as much as a span of 1.
            oar_token_budget (`int`, *optional*, defaults to `16384`):
                Maximum number of tokens, including prompts, in a forward pass of OAR. Lower it if memory runs out.
                `oar_g` keeps all activations in memory if gradient checkpointing is off or reentrant (PEFT under
                ZeRO-3).
        """

        oar_answer: str = field(
            default="answer_mean",
            metadata={"help": "Representation of the answer: 'answer_mean', 'answer_joint' or 'last'."},
        )
        oar_quantile: float = field(
            default=0.25, metadata={"help": "Tokens below this quantile of influence lose weight, others gain."}
        )
        oar_beta: float = field(default=1.0, metadata={"help": "Weight that the most influential token gains."})
        oar_noise_std: float = field(
            default=1e-3, metadata={"help": "Standard deviation of the noise on embeddings (oar_g)."}
        )
        oar_span: int = field(default=1, metadata={"help": "Consecutive tokens that are replaced together (oar_p)."})
        oar_token_budget: int = field(default=16384, metadata={"help": "Maximum tokens in a forward pass of OAR."})

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
        "answered": ("oar/answered", "{:.0%}", "share of rollouts that contain an answer (see answer_format)"),
        "|w-1|": ("oar/mean_change", "{:.2f}", "mean |w - 1| over reasoning tokens, which precede the answer"),
    }
    panels = {"Shares": ["oar/answered", "oar/reshaped_tokens"], "Mean |w - 1|": ["oar/mean_change"]}
    needs_both_sides = False  # the weights scale rollout advantages from any reward
    answered = "oar/answered"
    no_effect = ("oar_token_budget",)

    def __init__(self, settings: Any, tools: Tools):
        super().__init__(settings, tools)
        need_fast(tools.tokenizer, "OAR")

    def influence(self, questions: list[Question]) -> list[Tensor]:
        """Return the influence of the reasoning tokens of each question, one tensor (tokens,) per question."""
        raise NotImplementedError

    def credit(self, groups: Groups) -> Credit:
        """Compute the weights of the tokens of this process's rollouts."""
        mask_BT, ids_BT = groups.mask_BT, groups.ids_BT.long()
        reasoning_BT, answered = torch.zeros_like(mask_BT), []
        questions: dict[tuple, Question] = {}  # identical rollouts share one
        places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        for row, (prompt, completion) in enumerate(zip(groups.prompts, groups.completions, strict=True)):
            answer = find_answer(completion, self.tools.tokenizer, self.settings.answer_format, prompt)
            if answer is None or not mask_BT[row, answer.tokens[-1]]:  # in the output of a tool, for example
                continue
            answered.append(row)
            reasoning_BT[row] = mask_BT[row] & (places_T < answer.box)
            # With advantage 0 the weights have no effect.
            if reasoning_BT[row].sum() >= 2 and groups.advantages_B[row] != 0:
                same = (tuple(prompt), tuple(completion), tuple(mask_BT[row].tolist()))
                if same not in questions:
                    prompt = torch.tensor(prompt, dtype=torch.long, device=ids_BT.device)
                    questions[same] = _ask(prompt, ids_BT[row], reasoning_BT[row], answer, self.settings.oar_answer)
                questions[same].rows.append(row)
        influence_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
        asked_BT = torch.zeros_like(mask_BT)
        for question, influence in zip(questions.values(), self.influence(list(questions.values())), strict=True):
            for row in question.rows:
                influence_BT[row, reasoning_BT[row]] = influence.float()
                asked_BT[row] = reasoning_BT[row]
        weights_BT = reshape(influence_BT, reasoning_BT, self.settings.oar_quantile, self.settings.oar_beta)
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
    does = f"Each token gets the advantage of its rollout, weighted by the token's influence on the answer{does}"
    return Card(name, does, ("oar",), paper)


class OARG(OAR):
    """OAR-G: influence from one backward pass to the embeddings."""

    name = "oar_g"
    title = "OAR-G (influence by gradients)"
    card = _card("OAR-G", ", which is estimated from the gradient of the answer with respect to the token's embedding.")

    def influence(self, questions: list[Question]) -> list[Tensor]:
        return gradient_influence(questions, self.settings, self.tools)


class OARP(OAR):
    """OAR-P: influence from one forward pass per token or span, with that token or span replaced by padding."""

    name = "oar_p"
    title = "OAR-P (influence by perturbation)"
    card = _card("OAR-P", ", which is measured by replacing the token with padding.")

    def __init__(self, settings: Any, tools: Tools):
        super().__init__(settings, tools)
        tokenizer = tools.tokenizer
        token = tokenizer.added_tokens_decoder.get(tokenizer.pad_token_id)  # `all_special_ids` always has it
        if token is None or not token.special:
            raise UserError(
                f"oar_p replaces tokens with the padding token, but {tokenizer.pad_token!r} "
                f"(id {tokenizer.pad_token_id}) is an ordinary token of this tokenizer. Set tokenizer.pad_token to a "
                "special token, or use credit: oar_g"
            )

    def influence(self, questions: list[Question]) -> list[Tensor]:
        return perturbation_influence(questions, self.settings, self.tools)


def _ask(prompt: Tensor, ids_T: Tensor, reasoning_T: Tensor, answer: Answer, represented: str) -> Question:
    tokens = answer.tokens[:1] if represented == "last" else answer.tokens
    tokens_A = torch.tensor(tokens, device=ids_T.device)
    at_A = len(prompt) + tokens_A - 1
    ids_L = torch.cat([prompt, ids_T])[: int(at_A[-1]) + 1]
    return Question([], ids_L, at_A, ids_T[tokens_A], len(prompt) + reasoning_T.nonzero().squeeze(1))


def find_answer(
    ids: list[int], tokenizer, answer_format: str = "boxed", prompt_ids: Sequence[int] = ()
) -> Answer | None:
    r"""Find the tokens of the final answer, in the place where the reward functions find it.

    The tokens are decoded as they were sampled, which may differ from how the tokenizer would split the text. A token
    that contains a brace and a part of the answer belongs to the answer. So do all tokens of a character that is split
    into several tokens.

    Args:
        ids: token ids of the completion, without padding.
        tokenizer: a fast tokenizer.
        answer_format: see `ktae_trl.grading.find_answer`.
        prompt_ids: token ids of the prompt, which may end with an open `<think>`.

    Returns:
        None if there is no answer or it is empty.
    """
    words = decoded(ids, tokenizer)
    text = words.text
    said = _said(text, ids, tokenizer, prompt_ids)
    answer = extraction.find_answer(said, answer_format)
    if answer is None:
        return None
    shift = len(text) - len(said) if said.endswith(text) else text.rfind(said)
    held = sorted({i for begin, end in answer.spans for i in words.tokens(begin + shift, end + shift)})
    if not held:
        return None
    return Answer(sum(end <= answer.begin + shift for end in words.ends[1:]), held)


def _said(text: str, ids: list[int], tokenizer, prompt_ids: Sequence[int]) -> str:
    """Return the part of a completion that the reward functions read.

    With a response template in the tokenizer, TRL passes them the content of the parsed message, else the whole text.
    """
    if getattr(tokenizer, "response_template", None) is not None:
        try:
            said = tokenizer.parse_response(list(ids), prefix=list(prompt_ids)).get("content") or ""
        except (ValueError, TypeError, AttributeError):  # TRL uses the whole text then
            said = text
        if said in text:
            return said
    return answered(tokenizer.decode(prompt_ids[-_PROMPT_END:]), text)


def reshape(influence_BT: Tensor, reasoning_BT: Tensor, quantile: float = 0.25, beta: float = 1.0) -> Tensor:
    """Convert influences to weights with mean 1 over each rollout's reasoning tokens (bi-level reshaping).

        I   = log(1 + influence), min-max normalised within the rollout
        tau = quantile of I in the rollout (linear interpolation)
        w   = max(I / (tau + 1e-8), 0.1)                  where I < tau
        w   = 1 + beta (I - tau) / (1 - tau + 1e-8)       where I >= tau
        w   = w / mean(w)

    Source: the authors' code (Valsure/Outcome-Grounded-Advantage-Reshaping) of arXiv 2601.07408.

    Args:
        influence_BT: (B, T) influence of each token, at least 0. Only reasoning tokens are read.
        reasoning_BT: (B, T) bool, the reasoning tokens.
        quantile: in [0, 1).
        beta: largest gain of a token above the quantile.

    Returns:
        (B, T) float32. The weight is 1 for all other tokens, and for all tokens of a rollout with fewer than two
        reasoning tokens or with equal influence of all of them.
    """
    n_B1 = reasoning_BT.sum(1, keepdim=True)
    I_BT = influence_BT.float().clamp(min=0).log1p()
    low_B1 = I_BT.masked_fill(~reasoning_BT, torch.inf).amin(1, keepdim=True)
    high_B1 = I_BT.masked_fill(~reasoning_BT, -torch.inf).amax(1, keepdim=True)
    differs_B1 = (n_B1 >= 2) & (high_B1 > low_B1)
    I_BT = ((I_BT - low_B1) / (high_B1 - low_B1)).masked_fill(~reasoning_BT, torch.inf)
    sorted_BT = I_BT.sort(1).values  # other tokens (inf) come last
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

    Args:
        logits_RAV: (R, A, V) logits at the answer's positions.
        targets_RA: (R, A) answer tokens; read with `answer_joint` only.
        valid_RA: (R, A) bool, which positions are not padding.
        answer: "answer_mean", "last" or "answer_joint".

    Returns:
        `answer_mean` and `last`: (R, V), the log-softmax of the mean logits over the positions (`last` has one).
        `answer_joint`: (R, 1), the sum of the answer tokens' log-probabilities.
    """
    if answer == "answer_joint":
        log_probs_RA = logits_RAV.log_softmax(-1).gather(-1, targets_RA[..., None]).squeeze(-1)
        return (log_probs_RA * valid_RA).sum(1, keepdim=True)
    weights_RA = valid_RA / valid_RA.sum(1, keepdim=True)
    return torch.einsum("rav,ra->rv", logits_RAV, weights_RA.to(logits_RAV.dtype)).log_softmax(-1)


def divergence(clean: Tensor, changed: Tensor, answer: str) -> Tensor:
    """Return the change of the answer, (R,): KL(clean || changed), or with `answer_joint` the log-probability lost.

    For most tokens the KL is smaller than the rounding error of sum p log(p / q). Since p and q have the same sum, it
    equals sum p (q / p - 1 - log(q / p)), in which the rounding error of the log-probabilities is squared.

    Args:
        clean, changed: from `answer_log_probs`.
        answer: "answer_mean", "last" or "answer_joint".
    """
    lost = clean - changed
    if answer == "answer_joint":
        return lost.sum(-1)
    p = clean.exp()
    little = lost.clamp(-1, 1)
    return torch.where(lost == little, p * (torch.expm1(-little) + little), p * lost + changed.exp() - p).sum(-1)


def gradient_influence(questions: list[Question], settings: Any, tools: Tools) -> list[Tensor]:
    """Return the influence of the reasoning tokens of each question by OAR-G, one tensor (tokens,) per question.

        J = KL(P || P_noisy), with noise of N(0, oar_noise_std^2) on the embeddings e of the reasoning tokens
        I_t = |sum_h (dJ / de_t)_h e_t,h|

    The tokens before the reasoning have no noise, so each distinct prompt is computed once and without a gradient, if
    the model's cache allows it (`Tools.empty_cache`).

    The noise is seeded with the rollout's own tokens. In float32 a rollout therefore gets the same weights, up to
    rounding, in every batch, on every process and in a resumed run. In bf16 the gradient, which is about P_noisy - P,
    is lost in the rounding error of the forward passes if the noise is small: set `oar_noise_std` to 0.01.

    Source: the authors' code (Valsure/Outcome-Grounded-Advantage-Reshaping) of arXiv 2601.07408.
    """
    batches = list(_in_batches(questions, settings.oar_token_budget, tools.tokens_per_logits))
    extra = tools.missing_rounds(len(batches))
    second = torch.ones(1, dtype=torch.long, device=tools.device)
    filling = Question([], torch.zeros_like(second).repeat(2), second, second, second)
    influences: dict[int, Tensor] = {}
    with torch.enable_grad(), tools.reading():
        if batches or extra:
            prompts, prompt_N = _read_prompts(questions or [filling], settings, tools)
        for batch in batches:
            found = _differentiate([questions[i] for i in batch], prompts, prompt_N[batch], settings, tools)
            influences |= zip(batch, found, strict=True)
        for _ in range(extra):
            _differentiate([filling], Prompts(None, 0), second, settings, tools)
    return [influences[i] for i in range(len(questions))]


def _in_batches(questions: list[Question], budget: int, tokens_per_logits: float) -> Iterator[list[int]]:
    """Yield batches of questions, longest reasoning first, that fit the budget or have one row.

    Rows are padded to the longest. From its first reasoning token on, a row has at least half as many tokens as the
    longest of its batch.
    """
    own = [len(question.ids_L) - int(question.reasoning[0]) for question in questions]

    def padded(batch: list[int]) -> float:
        longest = max(len(questions[i].ids_L) for i in batch)
        return len(batch) * (longest + max(len(questions[i].at_A) for i in batch) * tokens_per_logits)

    batch: list[int] = []
    for i in sorted(range(len(questions)), key=own.__getitem__, reverse=True):
        if batch and (2 * own[i] < own[batch[0]] or padded([*batch, i]) > budget):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _read_prompts(questions: list[Question], settings: Any, tools: Tools) -> tuple[Prompts, Tensor]:
    """Compute the tokens before the reasoning of each distinct prompt. Also return each question's row in the cache.

    All rows have the same length, that of the shortest prompt, so that no padding is needed.
    """
    cache = tools.empty_cache()
    if cache is None:
        return Prompts(None, 0), torch.zeros(len(questions), dtype=torch.long, device=tools.device)
    length = min(int(question.reasoning[0]) for question in questions)
    passed = max(length, 1)  # with an empty prompt, a pass on one token: each process makes this call
    ids_PL, prompt_N = torch.stack([q.ids_L[:passed] for q in questions]).unique(dim=0, return_inverse=True)
    passed = min(passed, max(settings.oar_token_budget // len(ids_PL), 1))
    length = min(length, passed)
    with torch.no_grad():
        tools.logits(ids_PL[:, :passed], torch.zeros_like(ids_PL[:, :1]), cache)
    return Prompts(cache, length), prompt_N


def _differentiate(
    batch: list[Question], prompts: Prompts, prompt_R: Tensor, settings: Any, tools: Tools
) -> list[Tensor]:
    pad, begin = torch.nn.utils.rnn.pad_sequence, prompts.length
    ids_RL = pad([q.ids_L[begin:] for q in batch], batch_first=True)
    at_RA = pad([q.at_A - begin for q in batch], batch_first=True)
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
            noise[row, question.reasoning - begin] = torch.randn(
                shape, generator=generator, device=noise.device, dtype=noise.dtype
            )
        noisy_embeddings = (clean_embeddings + settings.oar_noise_std * noise).requires_grad_()
        return noisy_embeddings

    def read(change: Any = None) -> Tensor:
        before, _ = tools.beginning(prompts.cache, begin, prompt_R)
        logits_RAV = tools.logits(ids_RL, at_RA, before, change)
        return answer_log_probs(logits_RAV, targets_RA, valid_RA, settings.oar_answer)

    with torch.no_grad():
        clean = read()
    (gradient,) = torch.autograd.grad(divergence(clean, read(add_noise), settings.oar_answer).sum(), noisy_embeddings)
    influence_RL = (gradient.float() * clean_embeddings.float()).sum(-1).abs()
    return [influence_RL[row, question.reasoning - begin] for row, question in enumerate(batch)]


def perturbation_influence(questions: list[Question], settings: Any, tools: Tools) -> list[Tensor]:
    """Return the influence of the reasoning tokens of each question by OAR-P, one tensor (tokens,) per question.

        I_t = KL(P || P_t), P_t with token t replaced by padding

    With `answer_joint`, I_t is the log-probability lost, or 0 if the answer becomes more likely. With `oar_span` k > 1,
    k consecutive reasoning tokens are replaced together and share their influence. The keys and values before the first
    replaced token are reused from the pass that computes P, if the model's cache allows it (`Tools.empty_cache`).

    Source: the authors' code (Valsure/Outcome-Grounded-Advantage-Reshaping) of arXiv 2601.07408, without spans.
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
        before, begin = tools.beginning(cache, int(reasoning[spans[0] * settings.oar_span]), torch.zeros_like(spans))
        logits_RAV = tools.logits(ids_RL[:, begin:], (at_A - begin).expand(R, -1), before)
        influences.append(divergence(clean, _read(logits_RAV, targets_A, settings.oar_answer), settings.oar_answer))
    return torch.cat(influences)[span_L[reasoning]].clamp(min=0)  # < 0: rounding, or the answer is likelier without it


def _read(logits_RAV: Tensor, targets_A: Tensor, answer: str) -> Tensor:
    targets_RA = targets_A.expand(len(logits_RAV), -1)
    return answer_log_probs(logits_RAV, targets_RA, torch.ones_like(targets_RA, dtype=torch.bool), answer)
