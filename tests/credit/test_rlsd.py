"""RLSD against a slow loop, its references, annealing, and what happens without a reference."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktae_trl import KTAEGRPOConfig, tiny
from ktae_trl.arguments import UserError
from ktae_trl.credit import rlsd
from ktae_trl.credit.method import Groups
from ktae_trl.data import to_prompts
from ktae_trl.report import compare, records
from ktae_trl.report.models import load
from ktae_trl.rollouts.tools import TrainerTools
from tests.reference import rlsd_loop
from tests.trainers import difference, logged, make_trainer, prompts, replay, weights

RUN = {"credit": "rlsd", "rollout_func": replay, "max_steps": 1, "max_completion_length": 60}
RUN |= {"per_device_train_batch_size": 32, "console": False}


def trained(folder, monkeypatch, **settings):
    """Train, and return the trainer, the groups and the credit of each generation, and the tokens of each pass."""
    seen, passes = [], []
    credit, stats = rlsd.RLSD.credit, TrainerTools.token_stats

    def spy(self, groups):
        seen.append((groups, credit(self, groups)))
        return seen[-1][1]

    def count(self, groups, *more):
        passes.append((groups.prompt_mask_BL.sum(1) + groups.lengths_B).tolist())
        return stats(self, groups, *more)

    monkeypatch.setattr(rlsd.RLSD, "credit", spy)
    monkeypatch.setattr(TrainerTools, "token_stats", count)
    trainer = make_trainer(folder, **RUN | settings)
    trainer.train()
    return trainer, seen, passes


def rate(sums, name: str) -> float:
    total, count = sums[f"rlsd/{name}"]
    return total.item() / count.item()


# The formula


def test_weights_by_hand():
    """A token twice as likely, half as likely, 1.1 times as likely and unmoved, in a right and in a wrong rollout."""
    shift_BT = torch.tensor([[2.0, 0.5, 1.1, 1.0]]).log().repeat(3, 1)
    ratio_BT = rlsd.ratios(shift_BT, torch.tensor([0.7, -1.5, 0.0]))
    torch.testing.assert_close(
        ratio_BT, torch.tensor([[2.0, 0.5, 1.1, 1.0], [0.5, 2.0, 1 / 1.1, 1.0], [1.0, 1.0, 1.0, 1.0]])
    )
    expected = [[1.1, 0.9, 1.05, 1.0], [0.9, 1.1, 0.5 + 0.5 / 1.1, 1.0], [1.0] * 4]
    torch.testing.assert_close(rlsd.weights(ratio_BT, 0.5, 0.2), torch.tensor(expected))


@given(
    shift=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=20),
    advantage=st.sampled_from([-2.5, -1e-6, 1e-6, 0.3]),
    lam=st.floats(0, 1),
    epsilon=st.floats(1e-3, 3),
)
def test_weights_stay_within_their_bounds_and_follow_the_sign(shift, advantage, lam, epsilon):
    shift_BT = torch.tensor([sorted(shift)])
    ratio_BT = rlsd.ratios(shift_BT, torch.tensor([advantage]))
    w = rlsd.weights(ratio_BT, lam, epsilon)[0]
    assert w.isfinite().all()
    assert (w >= 0).all()
    assert (w >= 1 - lam * epsilon - 1e-6).all()
    assert (w <= 1 + lam * epsilon + 1e-6).all()
    rising = w.diff() if advantage > 0 else -w.diff()  # with A > 0, more likely tokens get more
    assert (rising >= -1e-6).all()
    assert (rlsd.weights(ratio_BT, 0.0, epsilon) == 1).all()


def test_lambda_falls_to_0_or_stays():
    assert [rlsd.annealed(0.5, 4, step) for step in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert [rlsd.annealed(0.5, 0, step) for step in (0, 1000)] == [0.5, 0.5]


def test_agreement_counts_tokens_that_both_prompts_move():
    shift_BT = torch.tensor([[0.5, -0.5, 0.5, 0.5, 0.005, 0.5]])
    other_BT = torch.tensor([[0.1, -0.1, -0.1, 0.005, 0.5, 0.5]])
    told_BT = torch.tensor([[True] * 5 + [False]])
    assert [x.item() for x in rlsd.agreement(shift_BT, other_BT, told_BT)] == [2, 3]


# Which rollout is the reference


def groups_of(ids_PGT, mask_PGT, own: slice, special_ids=(0,)) -> Groups:
    fields = dict.fromkeys(Groups._fields)
    return Groups(**fields | {"ids_PGT": ids_PGT, "mask_PGT": mask_PGT, "own": own, "special_ids": special_ids})


def test_partners_by_hand():
    """5 rollouts, of which 0, 2, 3 and 4 are right; 3 is a copy of 2, and 4 is masked out."""
    ids = torch.tensor([[[5, 6, 0], [7, 0, 0], [8, 9, 0], [8, 9, 0], [4, 4, 4]]])
    mask = torch.tensor([[[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 0, 0]]]).bool()
    right = torch.tensor([[True, False, True, True, True]])
    groups = groups_of(ids, mask, slice(0, 5))
    assert rlsd.partners(groups, right, 2) == [[8, 9], [8, 9], [5, 6], [5, 6], [5, 6]]
    assert rlsd.partners(groups, right, 1) == [None] * 5  # all are too long
    assert rlsd.partners(groups, ~right, 1) == [[7], None, [7], [7], [7]]
    assert rlsd.partners(groups._replace(own=slice(1, 3)), right, 2) == [[8, 9], [5, 6]]


@given(st.data())
def test_partners_are_those_of_a_loop(data):
    P, G, T = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 5)), 3
    seed = data.draw(st.integers(0, 10_000))
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (P, G, T), generator=make)
    mask = torch.rand(P, G, T, generator=make) < 0.8
    side = torch.rand(P, G, generator=make) < 0.5
    begin = data.draw(st.integers(0, P * G - 1))
    own = slice(begin, data.draw(st.integers(begin + 1, P * G)))
    completions = [
        [token for token, kept in zip(row, keep, strict=True) if kept and token != 0]
        for row, keep in zip(ids.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist(), strict=True)
    ]
    flat = side.flatten().tolist()
    chosen = [rlsd_loop.next_of_group(row, G, completions, flat, 2) for row in range(own.start, own.stop)]
    expected = [None if other is None else completions[other] for other in chosen]
    assert rlsd.partners(groups_of(ids, mask, own), side, 2) == expected


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        (
            {"solution": ["72"], "data_solution": " We add: so $\\boxed{72}$.\n"},
            "solution",
            "We add: so $\\boxed{72}$.",
        ),
        ({"solution": ["72"]}, "solution", None),  # gold answers
        ({"solution": ["72"], "data_solution": "72"}, "solution", None),  # no more than the answer
        ({"solution": ["72"], "data_solution": "$\\frac{1}{2}$"}, "solution", None),
        ({"solution": ["72"], "data_solution": ""}, "solution", None),
        ({"solution": ["72"], "data_solution": None}, "solution", None),
        ({"solution": "2 * 36\n#### 72"}, "solution", "2 * 36\n#### 72"),  # a dataset of TRL
        ({"solution": "72"}, "solution", None),
        ({"solution": "Half of the pens are blue, so there are six of them"}, "solution", "Half of the pens are "),
        ({}, "solution", None),
        ({"solution": ["72"], "answer": "72"}, "answer", "72"),
        ({"solution": ["72"], "answer": None}, "answer", None),
        ({"data_completion": "so 3"}, "completion", "so 3"),
    ],
)
def test_the_text_of_a_column(row, column, expected):
    found = rlsd.column_text(row, column)
    assert found == expected or (expected and found.startswith(expected) and expected.endswith(" "))


def test_a_column_that_is_missing_or_no_text():
    with pytest.raises(
        UserError, match=r"rlsd_reference: the dataset has no column 'work'\. Its columns: prompt, answer"
    ):
        rlsd.column_text({"prompt": "2 + 2", "answer": "4"}, "work")
    with pytest.raises(UserError, match=r"rlsd_reference: the column 'answer' must hold text, not int: 4\. Convert it"):
        rlsd.column_text({"answer": 4}, "answer")


# The prompt with a reference


def test_a_reference_goes_to_the_end_of_the_last_user_message(tokenizer):
    shots = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    messages = [{"role": "system", "content": "Add."}, *shots, {"role": "user", "content": "2 + 2"}]
    before = json.dumps(messages)
    longer = rlsd.with_reference(messages, r"So \boxed{4}.")
    assert json.dumps(messages) == before
    plain, told = (
        tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in (messages, longer)
    )
    assert told == rlsd_loop.rendered(messages, r"So \boxed{4}.")
    assert plain == rlsd_loop.rendered(messages, None)
    head, tail = plain.split("2 + 2")
    assert told.startswith(f"{head}2 + 2\n\n")
    assert told.endswith(tail)
    assert r"So \boxed{4}." in told


def test_other_forms_of_prompts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "2 + 2"}]}]
    (message,) = rlsd.with_reference(parts, "4!")
    assert [part["type"] for part in message["content"]] == ["text", "text"]
    assert "4!" in message["content"][1]["text"]
    text = rlsd.with_reference("Question: 2 + 2\nAnswer:", "4!")
    assert text.endswith("Question: 2 + 2\nAnswer:")
    assert text.index("4!") < text.index("Question")
    with pytest.raises(UserError, match="a prompt has no message with the role 'user'"):
        rlsd.with_reference([{"role": "system", "content": "Add."}], "4!")


# The whole, against the slow loop


def with_solutions(n: int) -> Dataset:
    """The offline problems; every other one has a worked solution."""
    rows = [json.loads(line) for line in tiny.TRAIN.read_text().splitlines()[:n]]
    texts = ["" if i % 2 else rf"It is {row['answer']}, so \boxed{{{row['answer']}}}." for i, row in enumerate(rows)]
    return to_prompts(Dataset.from_list([{**row, "solution": text} for row, text in zip(rows, texts, strict=True)]))


def by_loop(groups: Groups, tokenizer, column: str | None, lam: float, eps: float, longest: int, temperature: float):
    """Weights and the sums of the metrics, token by token, of one process that has all rollouts."""
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).double()
    G = groups.ids_PGT.shape[1]
    kept = [[t for t in ids if t not in groups.special_ids] for ids in groups.completions]
    trained = groups.mask_BT.any(1).tolist()
    kept = [ids if own else [] for ids, own in zip(kept, trained, strict=True)]
    right, scored = groups.correct_PG.flatten().tolist(), groups.scored_PG.flatten().tolist()
    sides = [
        [s and r for r, s in zip(right, scored, strict=True)],
        [s and not r for r, s in zip(right, scored, strict=True)],
    ]
    all_weights, moves, used, places = [], [], [], 0
    for row, completion in enumerate(groups.completions):
        A, messages = groups.advantages_B[row].item(), groups.rows[row]["prompt"]
        texts = []
        for side in sides:
            other = rlsd_loop.next_of_group(row, G, kept, side, longest)
            texts.append(None if other is None else tokenizer.decode(kept[other]))
        texts[0] = (column and groups.rows[row][column]) or texts[0]
        w = [1.0] * len(completion)
        if A != 0 and trained[row]:
            places += 1
            ids = [
                tokenizer(rlsd_loop.rendered(messages, text), add_special_tokens=False)["input_ids"]
                for text in [None, *texts]
            ]
            assert ids[0] == groups.prompts[row]
            p_own, p_right, p_wrong = (
                rlsd_loop.probabilities(model, prompt, completion, temperature) for prompt in ids
            )
            if texts[0] is not None:
                used.append(bool(column and groups.rows[row][column]))
                w = [rlsd_loop.weight(p, q, A, lam, eps) for p, q in zip(p_right, p_own, strict=True)]
                if texts[1] is not None:
                    moves += [(p / q, r / q) for p, q, r in zip(p_right, p_own, p_wrong, strict=True)]
        all_weights.append(w)
    apart = [(a, b) for a, b in moves if min(a, 1 / a) < 1 / 1.01005 and min(b, 1 / b) < 1 / 1.01005]
    share = sum((a > 1) == (b > 1) for a, b in apart) / len(apart)
    return all_weights, {"referenced": len(used) / places, "from_column": sum(used) / len(used), "agreement": share}


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("data", "column", "settings"),
    [
        (prompts, None, {}),
        (with_solutions, "data_solution", {}),
        (with_solutions, None, {"rlsd_reference": "rollout", "rlsd_lambda": 1.0, "rlsd_epsilon": 0.7}),
        (prompts, None, {"rlsd_max_reference_length": 30, "temperature": 0.8}),
        (prompts, None, {"mask_truncated_completions": True, "max_completion_length": 30}),
        (prompts, "answer", {"rlsd_reference": "answer"}),
    ],
    ids=["rollouts", "column", "rollout, not column", "short ones", "masked", "answers"],
)
def test_weights_and_metrics_are_those_of_the_loop(tmp_path, monkeypatch, tokenizer, data, column, settings):
    trainer, ((groups, credit),), passes = trained(tmp_path, monkeypatch, train_dataset=data(8), **settings)
    args = trainer.args
    expected, shares = by_loop(
        groups, tokenizer, column, args.rlsd_lambda, args.rlsd_epsilon, args.rlsd_max_reference_length, args.temperature
    )
    changed = 0
    for row, own in zip(credit.values_BT, expected, strict=True):
        torch.testing.assert_close(row[: len(own)], torch.tensor(own), atol=2e-5, rtol=0)
        assert (row[len(own) :] == 1).all()
        changed += sum(abs(w - 1) > 1e-3 for w in own)
    assert changed > 30
    assert len(passes) == 3
    for name, share in shares.items():
        assert rate(credit.sums, name) == pytest.approx(share, abs=0.02 if name == "agreement" else 1e-6), name
        assert logged(trainer, f"rlsd/{name}") == [pytest.approx(rate(credit.sums, name), abs=1e-6)]
    tokens = [(w, A) for own, A in zip(expected, groups.advantages_B.tolist(), strict=True) for w in own]
    if not settings.get("mask_truncated_completions"):
        ratio = sum(w * abs(A) for w, A in tokens) / sum(abs(A) for _, A in tokens)
        assert rate(credit.sums, "advantage_ratio") == pytest.approx(ratio, abs=1e-5)


def test_a_rollout_without_a_reference_keeps_its_advantage(tmp_path, monkeypatch):
    """With one right rollout in a group, this one has no reference; in a group of wrong ones, none has an advantage."""

    def one_in_the_first_group(completions, **kwargs):
        return [float(i == 3) for i in range(len(completions))]

    trainer, ((groups, credit),), _ = trained(tmp_path, monkeypatch, reward_funcs=one_in_the_first_group)
    changed = (credit.values_BT != 1).any(1)
    assert groups.advantages_B.nonzero().flatten().tolist() == list(range(8))
    assert changed.nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert logged(trainer, "rlsd/referenced") == [7 / 8]
    assert logged(trainer, "rlsd/from_column") == [0.0]


def test_no_reference_at_all_is_grpo_and_is_said(tmp_path, monkeypatch, caplog):
    settings = {"max_steps": 3, "rlsd_max_reference_length": 1}
    trainer, seen, passes = trained(tmp_path / "rlsd", monkeypatch, **settings)
    assert all((credit.values_BT == 1).all() for _, credit in seen)
    assert len(passes) == 9  # on another process there may be references
    assert logged(trainer, "rlsd/referenced") == [0.0] * 3
    assert not logged(trainer, "rlsd/agreement")
    plain = make_trainer(tmp_path / "none", **RUN | {"credit": "none", "max_steps": 3})
    plain.train()
    assert difference(weights(trainer), weights(plain)) < 1e-7
    assert (
        "has a reference solution, so credit: rlsd gives all tokens of a completion the same advantage" in caplog.text
    )
    assert "rlsd_max_reference_length (1 tokens)" in caplog.text


def test_a_prompt_that_the_model_cannot_hold_is_not_used(tmp_path, monkeypatch):
    trainer, ((groups, credit),), passes = trained(tmp_path, monkeypatch)
    plain, longer, _ = passes
    told = [i for i, (own, tokens) in enumerate(zip(plain, longer, strict=True)) if tokens > own]
    assert told == (credit.values_BT != 1).any(1).nonzero().flatten().tolist()
    T = groups.ids_BT.shape[1]  # all completions are padded to the longest one
    longer = [tokens - own + T for tokens, own in zip(longer, groups.lengths_B.tolist(), strict=True)]
    limit = sorted(longer[i] for i in told)[len(told) // 2]
    monkeypatch.setattr(TrainerTools, "context_length", limit)
    again = trainer.token_credit.method.credit(groups)
    short = [i for i in told if longer[i] <= limit]
    assert 0 < len(short) < len(told)
    assert (again.values_BT != 1).any(1).nonzero().flatten().tolist() == short
    assert again.sums["rlsd/referenced"][0] == len(short)
    assert max(passes[4]) <= limit


def test_the_model_s_limit_is_known(tmp_path):
    assert make_trainer(tmp_path, **RUN).token_credit.tools.context_length == 512


def test_a_rollout_func_with_another_template_is_refused(tmp_path):
    def other_template(prompts, trainer):
        found = replay(prompts, trainer)
        return {**found, "prompt_ids": [ids[1:] for ids in found["prompt_ids"]]}

    trainer = make_trainer(tmp_path, **RUN | {"rollout_func": other_template})
    with pytest.raises(UserError, match="the rollout has another prompt than the chat template makes of that row"):
        trainer.train()


def test_environments_are_refused(tmp_path, monkeypatch):
    """Their observations are added to the prompts, and TRL renders prompts with the tools of each environment."""
    trainer = make_trainer(tmp_path, **RUN)
    monkeypatch.setattr(trainer, "environment_factories", {None: object})
    with pytest.raises(UserError, match="credit: rlsd renders the prompts of the dataset, which environments change"):
        trainer.token_credit.tools.prompt_ids(["2 + 2"])


def test_prompts_that_are_text(tmp_path, monkeypatch):
    """As for base models: no chat template is used."""
    rows = [json.loads(line) for line in tiny.TRAIN.read_text().splitlines()[:8]]
    data = Dataset.from_list([{"prompt": f"{row['problem']} ", "solution": [row["answer"]]} for row in rows])

    def replayed(prompts, trainer):
        found = replay([[{"role": "user", "content": prompt}] for prompt in prompts], trainer)
        return {**found, "prompt_ids": trainer.processing_class(prompts)["input_ids"]}

    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    _, ((groups, credit),), _ = trained(tmp_path, monkeypatch, train_dataset=data, rollout_func=replayed)
    assert rate(credit.sums, "referenced") > 0.5
    row = int((credit.values_BT != 1).any(1).nonzero()[0])
    right = groups.correct_PG.flatten().tolist()
    kept = [[t for t in ids if t not in groups.special_ids] for ids in groups.completions]
    other = rlsd_loop.next_of_group(row, 8, kept, right, 1024)
    text = rlsd.with_reference(groups.rows[row]["prompt"], tokenizer.decode(kept[other]))
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    with_it, without = (
        rlsd_loop.probabilities(model, tokenizer(prompt)["input_ids"], groups.completions[row])
        for prompt in (text, groups.rows[row]["prompt"])
    )
    expected = [
        rlsd_loop.weight(p, q, groups.advantages_B[row].item(), 0.5, 0.2) for p, q in zip(with_it, without, strict=True)
    ]
    torch.testing.assert_close(credit.values_BT[row, : len(expected)], torch.tensor(expected), atol=2e-5, rtol=0)


# Over a training


def test_after_the_annealing_there_are_no_passes_and_training_is_grpo(tmp_path, monkeypatch):
    trainer, seen, passes = trained(tmp_path, monkeypatch, max_steps=4, rlsd_decay_steps=2, rlsd_agreement=False)
    assert logged(trainer, "rlsd/lambda") == [0.5, 0.25, 0.0, 0.0]
    assert len(passes) == 4  # two a generation, without the agreement
    assert not logged(trainer, "rlsd/agreement")
    for (groups, credit), bound in zip(seen, (0.1, 0.05, 0, 0), strict=True):
        assert (credit.values_BT - 1).abs().max() == pytest.approx(bound, abs=1e-6)
        assert (groups.advantages_B != 0).any()


def test_the_agreement_changes_nothing(tmp_path, monkeypatch):
    found = []
    for asked in (True, False):
        trainer, ((_, credit),), passes = trained(tmp_path, monkeypatch, rlsd_agreement=asked)
        found.append((credit.values_BT, weights(trainer)))
        assert len(passes) % 3 == (0 if asked else 2)
        assert ("agree" in trainer.token_credit.shown.columns) == asked
        monkeypatch.undo()
    assert torch.equal(found[0][0], found[1][0])
    assert difference(found[0][1], found[1][1]) == 0


CYCLES = {"steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": 16, "max_steps": 9}
CYCLES |= {"rlsd_decay_steps": 12, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 24}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("step", [4, 6])  # between two generations, inside a cycle
def test_a_resumed_run_has_the_lambda_of_its_step(tmp_path, step):
    """A generation is trained on in 4 steps, with the lambda of the first."""
    settings = {**RUN, **CYCLES, "train_dataset": prompts(12)}
    settings.pop("rollout_func")  # replayed rollouts would not notice other random states
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert logged(whole, "rlsd/lambda") == pytest.approx([0.5, 0.5 * 8 / 12, 0.5 * 4 / 12])
    shutil.copytree(tmp_path / f"whole/checkpoint-{step}", tmp_path / f"resumed/checkpoint-{step}")
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"resumed/checkpoint-{step}"))
    assert difference(weights(resumed), weights(whole)) == 0
    assert logged(resumed, "rlsd/lambda") == logged(whole, "rlsd/lambda")


# Settings, and recorded rollouts


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rlsd_lambda": 1.1}, "rlsd_lambda must be at least 0 and at most 1, not 1.1"),
        ({"rlsd_lambda": -0.1}, "rlsd_lambda must be at least 0"),
        ({"rlsd_lambda": float("nan")}, "rlsd_lambda must be at least 0"),
        ({"rlsd_epsilon": 0.0}, "rlsd_epsilon must be a positive number, not 0.0"),
        ({"rlsd_epsilon": float("inf")}, "rlsd_epsilon must be a positive number"),
        ({"rlsd_decay_steps": -1}, "rlsd_decay_steps must be at least 0, not -1"),
        ({"rlsd_max_reference_length": 0}, "rlsd_max_reference_length must be at least 1, not 0"),
        ({"rlsd_reference": ""}, "rlsd_reference is empty"),
    ],
)
def test_settings_are_checked(setting, words):
    with pytest.raises(UserError, match=words):
        KTAEGRPOConfig(output_dir="x", use_cpu=True, bf16=False, **setting)


def test_recorded_rollouts_lack_what_it_needs(tmp_path):
    make_trainer(tmp_path, **RUN | {"record_steps": 1}).train()
    record = records.read(records.files(tmp_path)[0])
    assert any(w != 1 for row in record.rows for w in row["credit"])
    with pytest.raises(UserError, match="uses step, which exists only in training"):
        compare(record, ["rlsd"], load("tiny"))


# The page


DOCS = Path(__file__).parents[2] / "docs"


def test_the_tokens_worked_by_hand():
    page = (DOCS / "methods/rlsd.md").read_text()
    rows = re.findall(r"^\| \d \| (.*) \|$", page, re.MULTILINE)
    shown = torch.tensor([[float(cell) for cell in row.split(" | ")] for row in rows])
    p_own, p_with, ratio, *both = shown.T
    torch.testing.assert_close(ratio, p_with / p_own)
    for A, expected in zip((1.0, -1.0), both, strict=True):
        found = rlsd.weights(rlsd.ratios((p_with / p_own).log()[None], torch.tensor([A])), 0.5, 0.2)[0]
        torch.testing.assert_close(found, expected, atol=5.1e-4, rtol=0)


def test_what_is_logged_has_a_row(tmp_path):
    trainer = make_trainer(tmp_path, **RUN)
    trainer.train()
    rows = set(re.findall(r"^\| `(rlsd/[^`]+)` \|", (DOCS / "reference/metrics.md").read_text(), re.MULTILINE))
    assert {name for name in trainer.state.log_history[0] if name.startswith("rlsd/")} == rows
    shown = [name for names in rlsd.RLSD.panels.values() for name in names] + [x[0] for x in rlsd.RLSD.columns.values()]
    assert set(shown) < rows
