"""OAR: the answer in tokens, influence against single forwards and finite differences, weights by hand."""

import copy
import functools
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from ktae_trl import tiny
from ktae_trl.credit import oar
from ktae_trl.credit.method import Groups
from ktae_trl.policy import Policy
from tests.reference.oar_loop import influences
from tests.trainers import difference, first_batch, logged, make_trainer, prompts, replay, watch_batches, weights

# Where the answer is


def byte_level(*merged: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose tokens are the bytes and these, all reached by merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges = []
    for token in merged:
        text = byte.pre_tokenize_str(token)[0][0]
        for end in range(2, len(text) + 1):
            if text[:end] not in vocabulary:
                merges.append((text[: end - 1], text[end - 1]))
                vocabulary[text[:end]] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = byte, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def answer_of(text: str, *merged: str) -> tuple[str, list[str]] | None:
    tokenizer = byte_level(*merged)
    ids = tokenizer(text)["input_ids"]
    answer = oar.find_answer(ids, tokenizer)
    return answer and (tokenizer.decode(ids[: answer.box]), [tokenizer.decode(ids[i]) for i in answer.tokens])


def test_the_tokens_of_an_answer():
    assert answer_of(r"so \boxed{12}.") == ("so ", ["1", "2"])
    assert answer_of(r"so \boxed{12}.", r"\boxed{") == ("so ", ["1", "2"])


def test_braces_that_are_merged_with_the_answer():
    assert answer_of(r"so \boxed{5}.", "{5", "}.") == ("so ", ["{5"])
    assert answer_of(r"so \boxed{5}.", "5}.") == ("so ", ["5}."])
    assert answer_of(r"so \boxed{x^{2}}", "}}") == ("so ", ["x", "^", "{", "2", "}}"])


def test_a_token_that_holds_the_start_of_the_box_is_no_reasoning():
    assert answer_of(r"so \boxed{5}", r" \boxed{") == ("so", ["5"])


def test_the_last_box_counts_and_spaces_do_not():
    assert answer_of(r"\boxed{1}, no: \boxed{ 23 }") == (r"\boxed{1}, no: ", ["2", "3"])


def test_boxes_that_make_one_answer():
    assert answer_of(r"so \boxed{1} or \boxed{ 23 }") == ("so ", ["1", "2", "3"])


@pytest.mark.parametrize(
    ("text", "answer_format", "expected"),
    [
        ("so <answer>12</answer>", "tag", ("so ", ["1", "2"])),
        ("so\n#### 12\n", "hash", ("so\n", ["1", "2"])),
        ("so it is 12.", "last_number", ("so it is ", ["1", "2"])),
        ("so it is 12.", "auto", ("so it is ", ["1", "2"])),
        ("so it is 12.", "boxed", None),
        (r"<think>\boxed{3}</think> \boxed{12}", "boxed", (r"<think>\boxed{3}</think> ", ["1", "2"])),
        (r"<think>\boxed{3}</think> so", "boxed", None),
    ],
)
def test_answers_in_another_format(text, answer_format, expected):
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    answer = oar.find_answer(ids, tokenizer, answer_format)
    found = answer and (tokenizer.decode(ids[: answer.box]), [tokenizer.decode(ids[i]) for i in answer.tokens])
    assert found == expected


def test_an_end_token_is_no_part_of_the_answer():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    ids = tokenizer("#### 12<|end|>")["input_ids"]
    assert [tokenizer.decode(ids[i]) for i in oar.find_answer(ids, tokenizer, "hash").tokens] == ["1", "2"]


def test_characters_of_several_tokens():
    # π is two bytes, 😀 four; each byte is a token, and the text before has such characters too.
    before, held = answer_of(r"ππ😀: \boxed{2π😀}")
    assert before == "ππ😀: "
    assert len(held) == 1 + 2 + 4
    assert len(answer_of(r"\boxed{😀}")[1]) == 4


@pytest.mark.parametrize("text", ["", "no box", r"\boxed{}", r"\boxed{ }", r"\boxed{5", r"\boxed{1} then \boxed{2"])
def test_no_answer(text):
    assert answer_of(text) is None


def test_tokens_that_the_tokenizer_would_not_choose():
    tokenizer = byte_level(r"\boxed{", "12")
    ids = [token for letter in r"a \boxed{12}" for token in tokenizer(letter)["input_ids"]]
    assert ids != tokenizer(r"a \boxed{12}")["input_ids"]
    answer = oar.find_answer(ids, tokenizer)
    assert (answer.box, [tokenizer.decode(ids[i]) for i in answer.tokens]) == (2, ["1", "2"])


def byte_fallback() -> PreTrainedTokenizerFast:
    """As sentencepiece's: what is no piece is spelt in bytes."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *r"\boxed{}12", "▁so"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_bytes_that_make_no_character():
    tokenizer = byte_fallback()
    broken = [f"<0x{byte:02X}>" for byte in (0xF0, 0x9F, 0x98, 0x80, 0x9F, 0x0A, 0xE2)]
    ids = tokenizer.convert_tokens_to_ids(["▁so", *broken, *r"\boxed{12}"])
    answer = oar.find_answer(ids, tokenizer)
    assert (answer.box, answer.tokens) == (8, [15, 16])


def test_a_tokenizer_without_offsets_is_refused():
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match=r"offsets of a fast tokenizer, but .* is a slow one.*such as credit: ktae"):
        oar.OARG(None, SimpleNamespace(tokenizer=slow))
    with pytest.raises(ValueError, match="offsets"):
        oar.OARP(None, SimpleNamespace(tokenizer=slow))


# Weights


def test_weights_by_hand():
    # Two tokens that are no reasoning around four that are: influence e^x - 1 has log1p x. x = 0, 1, 2, 4 is I = 0,
    # 1/4, 1/2, 1; with q = 0.5, tau = (1/4 + 1/2) / 2 = 3/8. Below: max(0, 0.1) = 0.1 and (1/4) / (3/8) = 2/3. Above,
    # with beta 2: 1 + 2 (1/8) / (5/8) = 1.4 and 1 + 2 = 3. Their sum is 31 / 6, so the mean is 31 / 24.
    influence = torch.tensor([[9.0, *np.expm1([0.0, 1.0, 2.0, 4.0]), 7.0]])
    reasoning = torch.tensor([[False, True, True, True, True, False]])
    expected = np.array([0.1, 2 / 3, 1.4, 3.0]) / (31 / 24)
    found = oar.reshape(influence, reasoning, quantile=0.5, beta=2.0)
    np.testing.assert_allclose(found[0], [1, *expected, 1], atol=1e-6)


def test_nothing_to_tell_apart_is_weight_one():
    influence = torch.tensor([[3.0, 3.0, 3.0, 0.0], [1.0, 5.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    reasoning = torch.tensor([[True, True, True, False], [False, True, False, False], [False, False, False, False]])
    assert (oar.reshape(influence, reasoning) == 1).all()


numbers = st.lists(st.floats(0, 50, width=32), min_size=2, max_size=30)


@given(numbers, st.floats(0, 0.95), st.floats(0.1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_weights_are_positive_of_mean_one_and_ordered(values, quantile, beta, seed):
    influence = torch.tensor([values])
    reasoning = torch.ones_like(influence, dtype=torch.bool)
    weights = oar.reshape(influence, reasoning, quantile, beta)[0]
    assert weights.mean().item() == pytest.approx(1, abs=1e-4)
    assert (weights >= oar.FLOOR / (1 + beta) - 1e-6).all()  # before it is scaled, a mean is at most 1 + beta
    ordered = weights[influence[0].argsort(stable=True)]
    assert (ordered.diff() >= -1e-4).all()
    # Neither padding nor the other rollouts of the batch matter.
    generator = torch.Generator().manual_seed(seed)
    others = torch.rand(3, len(values) + 4, generator=generator) * 9
    mask = torch.rand(3, len(values) + 4, generator=generator) < 0.5
    others[1, :-4], mask[1] = influence[0], torch.arange(len(values) + 4) < len(values)
    torch.testing.assert_close(oar.reshape(others, mask, quantile, beta)[1, :-4], weights)


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.4, 0.9])
def test_the_threshold_is_numpy_s_quantile(quantile):
    influence = torch.rand(5, 33, dtype=torch.float64).float()
    reasoning = torch.rand(5, 33) < 0.7
    for row in range(5):
        I = np.log1p(influence[row][reasoning[row]].double().numpy())  # noqa: E741
        I = (I - I.min()) / (I.max() - I.min())  # noqa: E741
        tau = np.quantile(I, quantile)
        w = np.where(tau > I, np.maximum(I / (tau + 1e-8), 0.1), 1 + 1.5 * (I - tau) / (1 - tau + 1e-8))
        found = oar.reshape(influence, reasoning, quantile, 1.5)[row]
        np.testing.assert_allclose(found[reasoning[row]], w / w.mean(), rtol=1e-4, atol=1e-5)
        assert (found[~reasoning[row]] == 1).all()


# Influence

PROMPT = [5, 6, 7, 8, 9, 10, 11]
COMPLETION = [12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
REASONING, ANSWER = [0, 1, 2, 4, 5], [7, 8]  # 3 is not trained on
DEFAULTS = {"oar_answer": "answer_mean", "oar_span": 1, "oar_token_budget": 10_000, "oar_noise_std": 1e-3}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def policy(accelerator, model=None) -> Policy:
    model = model or AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float64)
    return Policy(model, SimpleNamespace(pad_token_id=0), accelerator)


class Counting(Policy):
    """A policy that notes the rows and tokens of each forward pass."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.shapes: list[tuple[int, int]] = []

    def logits(self, ids, *arguments, **more):
        self.shapes.append(tuple(ids.shape))
        return super().logits(ids, *arguments, **more)


def question(how: str, prompt=PROMPT, completion=COMPLETION) -> oar.Question:
    n = len(prompt)
    answer = ANSWER[:1] if how == "last" else ANSWER
    at = torch.tensor([n + place - 1 for place in answer])
    targets = torch.tensor([completion[place] for place in answer])
    ids = torch.tensor(prompt + completion)[: int(at[-1]) + 1]
    return oar.Question([0], ids, at, targets, n + torch.tensor(REASONING))


def config(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{**DEFAULTS, **changed})


@pytest.mark.parametrize("how", oar.ANSWERS)
@pytest.mark.parametrize(("span", "budget"), [(1, 10_000), (1, 1), (2, 200), (3, 10_000)])
def test_perturbation_is_a_loop_of_single_forwards(accelerator, how, span, budget):
    reached = policy(accelerator)
    expected = influences(reached.model, PROMPT, COMPLETION, REASONING, ANSWER, how, 0, span)
    args = config(oar_answer=how, oar_span=span, oar_token_budget=budget)
    (found,) = oar.perturbation_influence([question(how)], args, reached)
    assert max(expected) > 1e-4
    np.testing.assert_allclose(found.double(), expected, rtol=1e-5, atol=1e-9)


def test_layers_that_cannot_be_cut(accelerator):
    """A model with a sliding window: nothing is shared, and the result is the same."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=4, **small)).double()
    reached = policy(accelerator, model.eval())
    expected = influences(model, PROMPT, COMPLETION, REASONING, ANSWER, "answer_mean", 0)
    (found,) = oar.perturbation_influence([question("answer_mean")], config(), reached)
    np.testing.assert_allclose(found.double(), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("how", oar.ANSWERS)
def test_gradients_are_finite_differences(accelerator, how):
    """dJ/de_t . e_t is the slope of J along e_t, at the noisy embeddings."""
    reached, args = policy(accelerator), config(oar_answer=how)
    for module in reached.model.modules():
        if isinstance(module, Qwen2RMSNorm):  # it computes in float32
            module.forward = functools.partial(
                torch.rms_norm, normalized_shape=module.weight.shape, weight=module.weight, eps=module.variance_epsilon
            )
    asked = question(how)
    noisy = []

    def keep(ids, at, cache=None, change=None):
        if change is not None:
            own = reached.model.get_input_embeddings()(ids).detach()
            before = reached.model.get_input_embeddings()(asked.ids_L[: -ids.shape[1]])[None].detach()
            noisy.extend(torch.cat([before, some], 1) for some in (own, change(own).detach()))
        return Policy.logits(reached, ids, at, cache, change)

    reached.logits = keep
    (found,) = oar.gradient_influence([asked], args, reached)
    clean_embeddings, noisy_embeddings = noisy
    noise = noisy_embeddings - clean_embeddings
    touched = noise.abs().sum(-1)[0] > 0
    assert touched.nonzero().squeeze(1).tolist() == asked.reasoning.tolist()
    assert noise[0, asked.reasoning].std() == pytest.approx(1e-3, rel=0.1)

    def divergence_at(embeddings) -> float:
        def read(**inputs):
            logits = reached.model(**inputs).logits[0, asked.at_A].double()
            if how == "answer_joint":
                return logits.log_softmax(-1)[range(len(asked.at_A)), asked.targets_A].sum()
            return logits.mean(0).log_softmax(-1)

        with torch.no_grad():
            clean, moved = read(input_ids=asked.ids_L[None]), read(inputs_embeds=embeddings)
        return (clean - moved if how == "answer_joint" else (clean.exp() * (clean - moved)).sum()).item()

    for place, influence in zip(asked.reasoning.tolist(), found.tolist(), strict=True):
        step = torch.zeros_like(clean_embeddings)
        step[0, place] = clean_embeddings[0, place] * 1e-4
        slope = (divergence_at(noisy_embeddings + step) - divergence_at(noisy_embeddings - step)) / 2e-4
        assert influence == pytest.approx(abs(slope), rel=1e-3)


def plain_gradient(model, asked: oar.Question, std: float = 1e-3) -> torch.Tensor:
    """OAR-G of one rollout: whole sequences, no cache, no batch, the KL as it is defined."""

    def answer(embeddings):
        return model(inputs_embeds=embeddings).logits[0, asked.at_A].double().mean(0).log_softmax(-1)

    embeddings = model.get_input_embeddings()(asked.ids_L[None]).detach()
    seed = zlib.crc32(asked.ids_L.numpy().tobytes())
    noise = torch.randn(
        len(asked.reasoning),
        embeddings.shape[-1],
        generator=torch.Generator().manual_seed(seed),
        dtype=embeddings.dtype,
    )
    noisy = embeddings.clone()
    noisy[0, asked.reasoning] += std * noise
    noisy.requires_grad_()
    with torch.no_grad():
        clean = answer(embeddings)
    (gradient,) = torch.autograd.grad((clean.exp() * (clean - answer(noisy))).sum(), noisy)
    return (gradient * embeddings).sum(-1).abs()[0, asked.reasoning]


def several() -> list[oar.Question]:
    """Two rollouts of one prompt, and one of a shorter one."""
    return [
        question("answer_mean"),
        question("answer_mean", completion=COMPLETION[::-1]),
        question("answer_mean", [3, 4], COMPLETION[::-1]),
    ]


@pytest.mark.parametrize("budget", [10_000, 30, 1])
def test_prompts_are_computed_once_and_gradients_are_those_of_whole_sequences(accelerator, budget):
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float64)
    reached = Counting(model, SimpleNamespace(pad_token_id=0), accelerator)
    found = oar.gradient_influence(several(), config(oar_token_budget=budget), reached)
    for asked, influence in zip(several(), found, strict=True):
        torch.testing.assert_close(influence.double(), plain_gradient(model, asked), rtol=1e-4, atol=1e-9)
    # The shorter prompt has 2 tokens, so 2 of each prompt are computed first. Both prompts fit 10,000 and 30 tokens.
    first, *others = reached.shapes
    assert first == ((2, 2) if budget > 1 else (2, 1))
    rows = [[3, 3], [1, 1] * 3, [1, 1] * 3][[10_000, 30, 1].index(budget)]
    assert [n for n, _ in others] == rows
    whole = len(PROMPT) + ANSWER[-1]
    assert max(length for _, length in others) == whole - first[1]


def test_gradients_of_layers_that_cannot_be_cut(accelerator):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=4, **small)).double()
    reached = Counting(model.eval(), SimpleNamespace(pad_token_id=0), accelerator)
    found = oar.gradient_influence(several(), config(), reached)
    for asked, influence in zip(several(), found, strict=True):
        torch.testing.assert_close(influence.double(), plain_gradient(model, asked), rtol=1e-4, atol=1e-12)
    assert [n for n, _ in reached.shapes] == [3, 3]


def test_a_rollout_without_a_prompt(accelerator):
    reached = policy(accelerator)
    (found,) = oar.gradient_influence([question("answer_mean", [])], config(), reached)
    expected = plain_gradient(reached.model, question("answer_mean", []))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("questions", [0, 1, 2])
def test_processes_make_equally_many_passes(accelerator, questions):
    """The busiest process has two batches. Without any questions a process fills in."""
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float64)
    reached = Counting(model, SimpleNamespace(pad_token_id=0), accelerator)
    reached.missing_rounds = lambda rounds: 2 - rounds
    found = oar.gradient_influence(several()[:questions], config(oar_token_budget=1), reached)
    assert len(found) == questions
    assert len(reached.shapes) == 1 + 2 * 2


def test_gradients_do_not_depend_on_the_batch(accelerator):
    reached = policy(accelerator)
    asked = [question("answer_mean"), question("answer_mean", [3, 4], COMPLETION[::-1]), question("answer_joint")]
    together = oar.gradient_influence(asked, config(), reached)
    for one, found in zip(asked, together, strict=True):
        (alone,) = oar.gradient_influence([one], config(oar_token_budget=1), reached)
        torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-12)


def test_batches_keep_to_the_budget():
    def batches(*sizes: tuple[int, int], prompt: int = 0, logits: float = 0.0) -> list[list[int]]:
        """Return the batches of questions with these numbers of tokens from the reasoning on and of the answer."""
        return list(oar._in_batches([sized(prompt, *size) for size in sizes], 10, logits))

    def sized(prompt: int, own: int, answer: int) -> oar.Question:
        return oar.Question([0], torch.zeros(prompt + own), torch.zeros(answer), None, torch.tensor([prompt]))

    assert batches((5, 1), (9, 1), (3, 1), (5, 1), (4, 1)) == [[1], [0, 3], [4, 2]]
    assert batches((5, 1), (9, 1), (3, 2), (5, 1), (4, 1), logits=0.5) == [[1], [0], [3], [4, 2]]
    assert batches((4, 1), (3, 1), (2, 1), prompt=1) == [[0, 1], [2]]
    assert batches((4, 1), (2, 1), (1, 1), (1, 1)) == [[0, 1], [2, 3]]  # 1 is less than half of 4
    assert batches((50, 1), (60, 1)) == [[1], [0]]
    assert batches() == []


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 30.0])
def test_divergence_in_single_precision(size):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(4, 1000, generator=generator, dtype=torch.float64) * 5
    changed = clean + size * torch.randn(4, 1000, generator=generator, dtype=torch.float64)
    clean, changed = (x.log_softmax(-1) for x in (clean, changed))
    exact = torch.nn.functional.kl_div(changed, clean, log_target=True, reduction="none").sum(-1)
    found = oar.divergence(clean.float(), changed.float(), "answer_mean")
    np.testing.assert_allclose(found, exact, rtol=0.1 if size < 1e-5 else 2e-3, atol=0)


# Identical rollouts


def groups_of(tokenizer, texts: list[str], advantages: list[float], prompts: list[str], untrained=()) -> Groups:
    """Groups of one process with these completions; (row, place) in `untrained` are not trained on."""
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask_BT = pad([torch.ones_like(x, dtype=torch.bool) for x in ids])
    for row, place in untrained:
        mask_BT[row, place] = False
    prompt_ids = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    flags = torch.ones(1, len(texts), dtype=torch.bool)
    return Groups(
        pad(ids)[None],
        mask_BT[None],
        flags,
        flags,
        torch.tensor(advantages),
        pad(prompt_ids, padding_side="left"),
        pad([torch.ones_like(x) for x in prompt_ids], padding_side="left"),
        torch.tensor([len(x) for x in ids]),
        (tokenizer.pad_token_id, tokenizer.eos_token_id),
        slice(0, len(texts)),
    )


@pytest.mark.parametrize("method", [oar.OARG, oar.OARP])
def test_identical_rollouts_are_computed_once(accelerator, method):
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    reached = Counting(AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float64), tokenizer, accelerator)
    credited = method(config(answer_format="boxed", oar_quantile=0.25, oar_beta=1.0), reached)

    def credit(texts, advantages=None, asked=None, untrained=()):
        """Return the credit of these rollouts, and how many rows the model saw for them."""
        advantages, asked = advantages or [1.0] * len(texts), asked or ["16+3?"] * len(texts)
        reached.shapes.clear()
        found = credited.credit(groups_of(tokenizer, texts, advantages, asked, untrained))
        return found, sum(rows for rows, _ in reached.shapes)

    right, wrong = "16+3=19, so \\boxed{19}", "16+3 is 18, so \\boxed{18}"
    (of_right, rows), (of_wrong, more_rows) = credit([right]), credit([wrong])
    found, all_rows = credit([right, wrong, right, right, wrong], [0.5, -1.0, 2.0, 0.5, 0.0])
    assert all_rows <= rows + more_rows
    for row, alone in enumerate([of_right, of_wrong, of_right, of_right]):
        (expected,) = alone.values_BT
        assert expected.std() > 0.1
        torch.testing.assert_close(found.values_BT[row, : len(expected)], expected, rtol=0, atol=1e-3)
    assert (found.values_BT[4] == 1).all()
    reshaped, alone = found.sums["oar/reshaped_tokens"][0], [of_right, of_right, of_right, of_wrong]
    assert reshaped == sum(one.sums["oar/reshaped_tokens"][0] for one in alone)
    # Rollouts with another prompt, or with a token that is not trained on, are not identical.
    assert credit([right] * 2)[1] == rows
    assert credit([right] * 2, asked=["16+3?", "3+16?"])[1] == 2 * rows
    assert credit([right] * 2, untrained=[(1, 0)])[1] > rows


# Beside a training


@pytest.mark.parametrize("credit", ["oar_g", "oar_p"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradients_and_modes_of_training_are_left_alone(accelerator, credit, checkpointing):
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float64, attention_dropout=0.5)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    model.model.norm.eval()  # somebody's choice
    before = copy.deepcopy(model)
    model(torch.tensor([PROMPT])).logits.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    reached = policy(accelerator, model)
    influence = oar.gradient_influence if credit == "oar_g" else oar.perturbation_influence
    (found,) = influence([question("answer_mean")], config(), reached)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    hooks = [[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in some.modules()] for some in (model, before)]
    assert hooks[0] == hooks[1]
    # Without dropout, and with or without checkpoints the same.
    (plain,) = influence([question("answer_mean")], config(), policy(accelerator))
    torch.testing.assert_close(found, plain)


def test_checkpointed_layers_are_computed_again(accelerator):
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float64).train()
    model.gradient_checkpointing_enable()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    oar.gradient_influence([question("answer_mean")], config(), policy(accelerator, model))
    assert len(calls) == 3  # clean, noisy, and once more in the backward pass


OAR = {"max_completion_length": 40, "rollout_func": replay, "max_steps": 2}


def right_box(text: str) -> bool:
    return re.search(r"\\boxed\{-?\d+\}", text) is not None


@pytest.mark.parametrize("credit", ["oar_g", "oar_p"])
def test_training_by_its_weights(tmp_path, credit):
    trainer = make_trainer(tmp_path, credit=credit, **OAR)
    batches = watch_batches(trainer)
    before = weights(trainer)
    trainer.train()
    assert difference(before, weights(trainer)) > 0
    batch = batches[1]  # some of its rollouts are cut off
    tokenizer = trainer.processing_class
    changed = 0
    for row, ids in enumerate(batch["completion_ids"].tolist()):
        mask, credits = batch["completion_mask"][row].bool(), batch["credit"][row]
        text = tokenizer.decode(ids[: mask.sum()])
        if not right_box(text) or batch["advantages"][row] == 0:
            assert (credits == 1).all()
            continue
        changed += 1
        ends = np.cumsum([len(tokenizer.decode([token])) for token in ids])
        box = (ends <= text.rindex(r"\boxed{")).sum()
        assert (credits[box:] == 1).all()
        assert credits[:box].mean().item() == pytest.approx(1, abs=1e-5)
        assert credits[:box].std() > 0.1
    assert 0 < changed < len(batch["credit"])
    texts = [tokenizer.decode(ids) for ids in batch["completion_ids"].tolist()]
    assert logged(trainer, "oar/answered")[1] == pytest.approx(sum(map(right_box, texts)) / 16)
    assert 0 < logged(trainer, "oar/answered")[1] < 1
    assert logged(trainer, "oar/mean_change")[0] > 0.05
    assert all(np.isfinite(logged(trainer, "loss")))


@pytest.mark.parametrize("how", oar.ANSWERS)
def test_the_weights_of_a_rollout_are_those_of_the_loop(tmp_path, how):
    """From TRL's padded batch to weights: prompt, reasoning and answer are where they should be."""
    trainer = make_trainer(tmp_path, credit="oar_p", oar_answer=how, train_dataset=prompts(16), **OAR)
    batch = first_batch(trainer)
    tokenizer, checked = trainer.processing_class, 0
    tolerance = 0.1 if how == "answer_joint" else 1e-3  # a lost log-probability of 1e-6 is rounding
    for row in batch["advantages"].nonzero().squeeze(1).tolist():
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist()
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
        pieces = [tokenizer.decode([token]) for token in completion]
        box = re.search(r"\\boxed\{(-?\d+)\}", "".join(pieces))
        if box is None or completion[-1] != tokenizer.eos_token_id:
            continue
        ends = np.cumsum([len(piece) for piece in pieces])
        begins = ends - [len(piece) for piece in pieces]
        reasoning = np.flatnonzero(ends <= box.start()).tolist()
        answer = np.flatnonzero((begins < box.end(1)) & (ends > box.start(1))).tolist()
        assert "".join(pieces[i] for i in answer) == box[1]
        expected = influences(trainer.model.eval(), prompt, completion, reasoning, answer, how, 0)
        weights_T = oar.reshape(torch.tensor([expected]), torch.ones(1, len(expected), dtype=torch.bool))[0]
        torch.testing.assert_close(batch["credit"][row][reasoning], weights_T, rtol=0, atol=tolerance)
        checked += 1
    assert checked > 3


@pytest.mark.parametrize("credit", ["oar_g", "oar_p"])
def test_training_in_mixed_precision(tmp_path, credit):
    """Under autocast to bf16 the weights are near those of single precision, where influence is not tiny."""
    found = {}
    for bf16 in (True, False):
        trainer = make_trainer(tmp_path, credit=credit, bf16=bf16, oar_noise_std=0.01, **OAR)
        batches = watch_batches(trainer)
        trainer.train()
        assert all(np.isfinite(logged(trainer, "loss")))
        found[bf16] = batches[0]["credit"]
    assert torch.isfinite(found[True]).all()
    changed = (found[False] != 1).any(1)
    assert torch.equal(changed, (found[True] != 1).any(1))
    both = torch.stack([found[True][changed].flatten(), found[False][changed].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_one_process_gives_a_rollout_the_same_weights_in_any_batch(tmp_path):
    found = []
    for size in (16, 8):
        trainer = make_trainer(
            tmp_path, credit="oar_g", per_device_train_batch_size=size, train_dataset=prompts(16), **OAR
        )
        batch = first_batch(trainer)
        found.append({tuple(ids): w for ids, w in zip(batch["completion_ids"].tolist(), batch["credit"], strict=True)})
    shared = found[0].keys() & found[1].keys()
    assert shared
    for ids in shared:
        torch.testing.assert_close(found[0][ids], found[1][ids], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("credit", "setting"),
    [
        ("oar_g", {"oar_answer": "answer_joint"}),
        ("oar_p", {"oar_quantile": 0.6}),
        ("oar_g", {"oar_beta": 3.0}),
        ("oar_g", {"oar_noise_std": 0.1}),
        ("oar_p", {"oar_span": 3}),
        ("oar_p", {"oar_token_budget": 200}),
    ],
)
def test_every_setting_reaches_the_weights(tmp_path, monkeypatch, credit, setting):
    found, passes = [], []
    for changed in ({}, setting):
        calls, logits = [], Policy.logits
        monkeypatch.setattr(Policy, "logits", lambda *a, f=logits, c=calls, **k: c.append(1) or f(*a, **k))
        trainer = make_trainer(tmp_path, credit=credit, **changed, **OAR)
        found.append(first_batch(trainer)["credit"])
        passes.append(len(calls))
        monkeypatch.undo()
    if "oar_token_budget" in setting:  # smaller passes, the same weights
        assert passes[1] > passes[0] > 0
        torch.testing.assert_close(*found, rtol=0, atol=1e-2)
    else:
        assert difference({"": found[0]}, {"": found[1]}) > 0.1


# Bad input


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"oar_quantile": 1.0}, "oar_quantile must be at least 0 and below 1, not 1.0"),
        ({"oar_quantile": -0.1}, "oar_quantile must be at least 0"),
        ({"oar_beta": 0.0}, "oar_beta must be a positive number, not 0.0"),
        ({"oar_beta": float("nan")}, "oar_beta must be a positive number"),
        ({"oar_noise_std": 0.0}, "oar_noise_std must be a positive number"),
        ({"oar_span": 0}, "oar_span must be at least 1"),
        ({"oar_token_budget": 0}, "oar_token_budget must be at least 1"),
        ({"oar_answer": "mean"}, r"oar_answer='mean' is unknown.*answer_mean, last, answer_joint"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, setting, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, credit="oar_g", **setting)


def test_padding_that_is_an_ordinary_token_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    tokenizer.pad_token = "7"
    with pytest.raises(ValueError, match=r"'7' \(id \d+\) is an ordinary token.*or use credit: oar_g"):
        make_trainer(tmp_path, credit="oar_p", processing_class=tokenizer, **OAR)
    make_trainer(tmp_path, credit="oar_g", processing_class=tokenizer, **OAR)
