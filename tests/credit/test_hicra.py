"""HICRA: n-grams in texts and tokens against a slow loop, values and metrics by hand, lists and their errors."""

import gzip
import json
import random
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from ktae_trl import KTAEGRPOConfig, tiny
from ktae_trl.arguments import UserError
from ktae_trl.credit import hicra
from ktae_trl.credit.combine import combine
from ktae_trl.credit.hicra import HICRA, clauses, find_ngrams, planning_tokens, read_ngrams
from ktae_trl.credit.method import Groups
from ktae_trl.report.mining import Said, mine
from ktae_trl.tiny import task
from ktae_trl.training.changes import own_settings
from ktae_trl.training.first_look import Seen, no_signal
from tests.credit.test_oar import byte_fallback, byte_level
from tests.reference import hicra_loop
from tests.trainers import first_batch, logged, make_trainer, replay

NGRAMS = frozenset({"let us first", "let us first find", "first find the value of", "let's check it", "déjà vu ici"})


def found(text: str, ngrams=NGRAMS) -> list[str]:
    return [text[begin:end] for begin, end in find_ngrams(text, ngrams)]


# In texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So let us first find it.", ["let us first find"]),
        ("Let us first, LET US FIRST", ["Let us first", "LET US FIRST"]),
        ("Let us, first find the value of x", ["Let us, first find", "first find the value of"]),  # they overlap
        ("let us  first", ["let us  first"]),
        ("let us\u00a0first", ["let us\u00a0first"]),
        ("Let\u2019s check it, let's check it", ["Let\u2019s check it", "let's check it"]),
        ("'let us first'", ["let us first"]),
        ("**Let us first**", ["Let us first"]),
        ("\\text{let us first}", ["let us first"]),
        ("Déjà vu ici", ["Déjà vu ici"]),
        ("let us", []),
        ("let us firstly", []),
        ("outlet us first", []),
        ("let us first's", []),
        ("let us first2", []),
        ("\\let us first", []),
        ("let us. First", []),
        ("let us\nfirst", []),
        ("let us 1 first", []),
        ("let us-first", []),
        ("let us ,first", []),
        ("let us,first", []),
        ("", []),
    ],
)
def test_what_is_an_n_gram(text, expected):
    assert found(text) == expected


PARTS = (
    *(
        "let",
        "us",
        "first",
        "find",
        "the",
        "value",
        "of",
        "let's",
        "let\u2019s",
        "check",
        "it",
        "déjà",
        "vu",
        "ici",
        "Let",
    ),
    *("x", "x2", "2", "\\frac", "'", "\u2019", "_", ".", "-", "\n", "😀", "LET", "firsT"),
)
BETWEEN = (" ", " ", " ", " ", ", ", ",", "", "  ", "\u00a0", "\n", ". ")


def random_text(rng: random.Random) -> str:
    """Words, symbols, and n-grams that a change of their spaces or ends may have broken."""
    parts = []
    for _ in range(12):
        planned = rng.choice(sorted(NGRAMS)).replace(" ", rng.choice([" ", " ", ", ", "\u00a0", "\n", "-"]))
        part = rng.choice([*PARTS, planned, planned.upper(), planned.replace("'", "\u2019")])
        parts += [part, rng.choice(BETWEEN)]
    return "".join(parts)


def test_texts_against_the_slow_loop():
    rng, hits = random.Random(0), 0
    for _ in range(300):
        text = random_text(rng)
        own = {i for begin, end in find_ngrams(text, NGRAMS) for i in range(begin, end)}
        assert own == hicra_loop.characters(text, NGRAMS), text
        hits += bool(own)
    assert 100 < hits < 300


def test_the_words_of_a_text():
    text = "Wait, I don't see x_1 or \\alpha. A b²-c"
    words = [[word.form for word in words] for words in clauses(text)]
    assert words == [["wait", "i", "don't", "see"], ["or"], ["a", "b²"], ["c"]]


# In tokens


def test_tokens_against_the_slow_loop():
    """Byte-level tokens that end anywhere: inside of words, of characters, and of the spaces between words."""
    rng = random.Random(1)
    tokenizer = byte_level(
        " let us", "us f", "st,", " value of", "é", "à ", "j\u00e0", "first", " \u00a0", "e v", "t\u2019"
    )
    decode = {character: byte for byte, character in byte_characters().items()}
    hits = 0
    for _ in range(200):
        ids = tokenizer(random_text(rng))["input_ids"]
        pieces = [bytes(decode[c] for c in token) for token in tokenizer.convert_ids_to_tokens(ids)]
        own = planning_tokens(ids, tokenizer, NGRAMS, len(ids) + 2).tolist()
        assert own == [*hicra_loop.planning(pieces, NGRAMS), False, False]
        hits += any(own)
    assert hits > 50


def byte_characters() -> dict[int, str]:
    """The characters with which byte-level tokenizers write bytes, as in GPT-2: printable ones as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


def test_every_token_of_a_split_character_counts():
    tokenizer = byte_level()
    ids = tokenizer("😀 à vu ici 😀")["input_ids"]
    held = planning_tokens(ids, tokenizer, {"à vu ici"}, len(ids))
    assert held.tolist() == [False] * 5 + [True] * 9 + [False] * 5


def test_bytes_that_make_no_character_end_an_n_gram():
    tokenizer = byte_fallback()

    def planned(*pieces: str) -> list[bool]:
        return planning_tokens(
            tokenizer.convert_tokens_to_ids(list(pieces)), tokenizer, {"so so so"}, len(pieces)
        ).tolist()

    so = "▁so"
    assert planned("1", so, so, so, "{") == [False, True, True, True, False]
    assert planned("<0xF0>", so, so, so, "{") == [False, True, True, True, False]
    assert planned(so, so, "<0xF0>", so, "{") == [False] * 5
    assert planned(so, so, so, "1", so) == [False] * 5  # so1


# Values and metrics


class Rollouts:
    """Groups of completions of a tokenizer with special tokens."""

    def __init__(self, texts: list[str], correct: list[bool], scored: list[bool], advantages: list[float]):
        self.tokenizer = byte_level(" us", " first", " find", "let")
        self.tokenizer.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|turn|>"]})
        self.tokenizer.pad_token = "<|end|>"
        completions = [self.tokenizer(text)["input_ids"] for text in texts]
        T, end = max(map(len, completions)), self.tokenizer.eos_token_id
        ids_PGT = torch.tensor([[[*ids, *[end] * (T - len(ids))] for ids in completions]])
        lengths_B = torch.tensor([len(ids) for ids in completions])
        mask_PGT = (torch.arange(T) < lengths_B[:, None])[None]
        sides = (torch.tensor([side]) for side in (correct, scored))
        prompts = torch.ones(len(texts), 1, dtype=torch.long)
        own = slice(0, len(texts))
        A = torch.tensor(advantages)
        self.groups = Groups(ids_PGT, mask_PGT, *sides, A, prompts, prompts, lengths_B, (end,), own)

    def credit(self, ngrams_file, alpha: float = 0.2):
        settings = SimpleNamespace(hicra_alpha=alpha, hicra_ngrams=str(ngrams_file))
        return HICRA(settings, SimpleNamespace(tokenizer=self.tokenizer)).credit(self.groups)


@pytest.fixture
def ngrams(tmp_path):
    path = tmp_path / "ngrams.txt"
    path.write_text("let us first\nfind us first\n")
    return path


def test_values_and_metrics_by_hand(ngrams):
    """ "let us first" has 3 tokens (`let`, ` us`, ` first`), ".", "x" and the end one each."""
    texts = ["let us first.<|end|>", "x.let us first<|end|>", "x.<|end|>", "let us first<|end|>"]
    rollouts = Rollouts(texts, [True, False, False, True], [True, True, True, False], [1.0, -1.0, 0.0, -2.0])
    values_BT, sums = rollouts.credit(ngrams)
    assert values_BT.dtype == torch.float32
    planned = [[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]
    assert values_BT.tolist() == (torch.tensor(planned) * torch.tensor(0.2)).tolist()
    ratios = {name: (int(total), int(count)) for name, (total, count) in sums.items()}
    assert ratios == {
        "hicra/planning_tokens": (9, 5 + 6 + 3 + 4),
        "hicra/planning_right": (3, 5),  # the fourth could not be graded
        "hicra/planning_wrong": (3, 6 + 3),
        "hicra/planning_rollouts": (3, 4),
    }
    advantages_BT = combine(rollouts.groups.advantages_B, values_BT, HICRA.how)
    torch.testing.assert_close(advantages_BT[0], torch.tensor([1.2, 1.2, 1.2, 1, 1, 1]))
    torch.testing.assert_close(advantages_BT[1], torch.tensor([-1, -1, -0.8, -0.8, -0.8, -1]))
    assert (advantages_BT[2] == 0).all()


def test_the_largest_alpha_takes_all_blame_and_turns_no_sign(ngrams):
    rollouts = Rollouts(["let us first."] * 2, [True, False], [True, True], [0.7, -0.7])
    advantages_BT = combine(rollouts.groups.advantages_B, rollouts.credit(ngrams, 1.0).values_BT, HICRA.how)
    torch.testing.assert_close(advantages_BT[0], torch.tensor([1.4, 1.4, 1.4, 0.7]))
    torch.testing.assert_close(advantages_BT[1], torch.tensor([0, 0, 0, -0.7]))


def test_special_and_masked_tokens_have_no_value(ngrams):
    """A special token between the words has no text, and a tool's words are not the model's."""
    rollouts = Rollouts(["let<|turn|> us first", "let us first."], [True, False], [True, True], [1.0, -1.0])
    rollouts.groups.mask_PGT[0, 1, 1] = False
    values_BT, sums = rollouts.credit(ngrams)
    assert (values_BT > 0).tolist() == [[True, False, True, True], [True, False, True, False]]
    assert [int(x) for x in sums["hicra/planning_tokens"]] == [5, 7]


def test_a_part_of_the_groups_is_valued_like_all_of_them(ngrams):
    """A process that holds the middle of a group, with padding that the others need."""
    texts = ["let us first" + "." * n for n in (4, 0, 2)]
    rollouts = Rollouts(texts, [True, False, True], [True] * 3, [1.0, -1.0, 1.0])
    whole = rollouts.credit(ngrams).values_BT
    groups = rollouts.groups
    part = [x[1:2] for x in (groups.advantages_B, groups.prompt_ids_BL, groups.prompt_mask_BL, groups.lengths_B)]
    names = ("advantages_B", "prompt_ids_BL", "prompt_mask_BL", "lengths_B")
    rollouts.groups = groups._replace(**dict(zip(names, part, strict=True)), own=slice(1, 2))
    assert torch.equal(rollouts.credit(ngrams).values_BT, whole[1:2])
    assert whole[1].sum() > 0


def test_a_tokenizer_without_offsets_is_refused():
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(UserError, match="HICRA needs the character offsets of a fast tokenizer"):
        HICRA(SimpleNamespace(hicra_ngrams=None), SimpleNamespace(tokenizer=slow))


# Lists


def test_a_list_is_read_with_comments_and_any_spelling(tmp_path):
    lines = {
        "\ufeffon the other hand": "on the other hand",  # as editors under Windows begin a file
        "# Mine": None,
        "": None,
        "First, let us  # 3 problems": "first let us",
        "  Let\u2019s check it\r": "let's check it",
        "let's check it": "let's check it",
        "we need to find the": "we need to find the",
    }
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_ngrams(str(path)) == set(lines.values()) - {None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"list.txt \(hicra_ngrams\) is empty. Write one n-gram of 3 to 5 words per line"),
        ("# let us first\n", r"list.txt \(hicra_ngrams\) is empty"),
        ("let us first\nlet us\n", r"list.txt, line 2: 'let us' has 2 words. An n-gram has 3 to 5 words"),
        ("we need to find the value", "line 1: .* has 6 words"),
        ("let us first, # comma", "line 1: 'let us first,' has characters that no n-gram has"),
        ("find x = 2", "line 1: 'find x = 2' has characters that no n-gram has. Write words of letters"),
        ("let us. First", "has characters that no n-gram has"),
        ("1. let us first", "has characters that no n-gram has"),
        ("...", "has characters that no n-gram has"),
    ],
)
def test_bad_lists_name_the_line(tmp_path, text, words):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_ngrams(str(path))


def test_lists_that_are_no_text_files(tmp_path):
    with pytest.raises(UserError, match=r"There is no list of n-grams nowhere.txt .*`ktae mine-ngrams RUN -o FILE`"):
        read_ngrams("nowhere.txt")
    with pytest.raises(UserError, match="cannot be read as a text file"):
        read_ngrams(str(tmp_path))
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as a text file"):
        read_ngrams(str(tmp_path / "x"))


def test_the_lists_of_the_package():
    general = read_ngrams(None)
    lines = (hicra.LISTS / "general.txt").read_text().splitlines()
    assert len(general) == sum(bool(line) and not line.startswith("#") for line in lines)  # none twice
    assert {"we need to find", "let's check the", "on the other hand", "let us first find"} <= general
    rng = random.Random(0)
    problem = "What is 7 - 9 + 5 + 3 ="
    said = " ".join(task.solution(problem, habit, rng) for habit in task.HABITS)
    assert {" ".join(text.lower().split()) for text in found(said, read_ngrams("tiny"))} == read_ngrams("tiny")


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.01, float("nan")])
def test_alpha_that_would_turn_a_sign_is_refused(alpha):
    with pytest.raises(UserError, match=f"hicra_alpha must be above 0 and at most 1, not {re.escape(str(alpha))}"):
        KTAEGRPOConfig(output_dir="x", hicra_alpha=alpha, use_cpu=True, bf16=False)


def test_a_missing_list_is_an_error_of_the_config():
    with pytest.raises(UserError, match=r"There is no list of n-grams nowhere.txt"):
        KTAEGRPOConfig(output_dir="x", hicra_ngrams="nowhere.txt", use_cpu=True, bf16=False)


# In training


def test_the_values_of_a_training_step(tmp_path):
    """The two n-grams of the offline task have no letters around them, so plain matching finds them too."""
    settings = {"credit": "hicra", "hicra_ngrams": "tiny", "hicra_alpha": 0.5, "max_completion_length": 40}
    batch = first_batch(make_trainer(tmp_path, rollout_func=replay, **settings))
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    for ids, own in zip(batch["completion_ids"].tolist(), batch["credit"].tolist(), strict=True):
        ends = [len(tokenizer.decode(ids[:i], skip_special_tokens=True)) for i in range(len(ids) + 1)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        inside = {k for match in re.finditer("The answer is|That is about", text) for k in range(*match.span())}
        assert own == [0.5 * any(k in inside for k in range(*tokens)) for tokens in pairwise(ends)]
    assert set(batch["credit"].flatten().tolist()) == {0.0, 0.5}


def test_a_training_logs_its_metrics(tmp_path):
    settings = {"credit": "hicra", "hicra_ngrams": "tiny", "max_completion_length": 60, "max_steps": 1}
    trainer = make_trainer(tmp_path, rollout_func=replay, per_device_train_batch_size=32, **settings)
    trainer.train()
    shares = {name: logged(trainer, f"hicra/planning_{name}") for name in ("tokens", "right", "wrong", "rollouts")}
    assert all(0 < share <= 1 for (share,) in shares.values()), shares
    assert logged(trainer, "hicra/seconds")


def test_no_n_gram_in_the_first_generations_is_said():
    def said(count: float, **args) -> str | None:
        seen = Seen(generations=3, groups=6, informative=6, stats={"hicra/planning_tokens": count})
        settings = {"credit": "hicra", "hicra_ngrams": None, "dynamic_sampling": False, **args}
        return no_signal(seen, SimpleNamespace(**settings), "math_accuracy")

    assert said(1.0) is None
    words = said(0.0)
    assert words.startswith("The rollouts of the first 6 groups (3 generations) contain none of the planning n-grams")
    assert "(the package's list)" in words
    assert "ktae mine-ngrams RUN -o ngrams.txt" in words
    assert "(hicra_ngrams: mine.txt)" in said(0.0, hicra_ngrams="mine.txt")


# The page


PAGE = (Path(__file__).parents[2] / "docs/methods/hicra.md").read_text()


def test_the_advantages_on_the_page(ngrams):
    rows = re.findall(r"^\| (a planning n-gram|anything else) \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE)
    rollouts = Rollouts(["let us first."] * 2, [True, False], [True, True], [0.94, -0.94])
    values_BT = rollouts.credit(ngrams).values_BT
    advantages_BT = combine(rollouts.groups.advantages_B, values_BT, HICRA.how)
    expected = [
        [f"{K:g}", *(f"{A:.2f}" for A in sides)] for K, sides in ((0.2, advantages_BT[:, 0]), (0, advantages_BT[:, 3]))
    ]
    assert [list(row[1:]) for row in rows] == expected


def test_the_figures_on_the_page(shared):
    """How many solutions contain n-grams of the package's list, and which n-grams are mined from them."""
    with gzip.open(shared / "graded_outputs" / "qwen2.5_math_7b_grpo_ktae.jsonl.gz", "rt") as lines:
        said = [json.loads(line)["output"] for line in lines]
    places = [{i for place in find_ngrams(text, read_ngrams(None)) for i in range(*place)} for text in said]
    with_one, inside = sum(map(bool, places)) / len(said), sum(map(len, places)) / sum(map(len, said))
    page = " ".join(PAGE.split())
    assert f"In {len(said)} solutions" in page
    assert f"{with_one:.0%} contain one of its n-grams, which hold {inside:.1%} of the characters" in page
    for one in mine((Said(str(i), text) for i, text in enumerate(said)), 5, 4):
        assert f" {one.ngram} {one.problems} {one.rollouts} {one.times / one.rollouts:.2f} {one.example[:20]}" in page


def test_a_run_that_resumes_with_other_ngrams_is_told(tmp_path):
    file = tmp_path / "list.txt"

    def settings() -> dict:
        return own_settings(KTAEGRPOConfig(credit="hicra", hicra_ngrams=str(file), use_cpu=True, bf16=False))

    file.write_text("let us first\nwe need to find\n")
    before = settings()
    file.write_text("# sorted\nwe need to find\nlet us first\n")
    assert settings() == before
    file.write_text("let us first\n")
    assert settings() != before
