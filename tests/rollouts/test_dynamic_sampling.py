"""Dynamic sampling: what is trained on, where the prompts come from, and that a resumed run draws the same ones."""

import itertools
import logging
import math
import random
import shutil

import numpy
import pandas
import pytest
import torch
from datasets import IterableDataset
from scipy.stats import betabinom
from transformers import AutoModelForCausalLM
from trl.trainer.utils import RepeatSampler

from ktae_trl import tiny, trl_seam
from ktae_trl.rewards import boxed_format, math_accuracy
from ktae_trl.rollouts.dynamic import DynamicSampling, PromptStream, groups_to_generate
from ktae_trl.rollouts.verdicts import verdicts
from tests.trainers import around, difference, logged, make_trainer, prompts, replay, weights

# 8 rollouts of 2 prompts a generation.
SAMPLING = {"dynamic_sampling": True, "max_completion_length": 12}


def alternating(completions, **kwargs):
    """Right and wrong in turn: every group is informative."""
    return [float(i % 2) for i in range(len(completions))]


def number(prompt) -> int:
    """Which of the first 64 training problems it is."""
    return NUMBERS[prompt[-1]["content"]]


NUMBERS = {row["prompt"][-1]["content"]: i for i, row in enumerate(prompts(64))}


def third(prompts, completions, **kwargs):
    """Only every third problem has right and wrong answers; the others are all right or all wrong."""
    numbers = [number(prompt) for prompt in prompts]
    return [float(i % 2 if n % 3 == 0 else n % 3 == 1) for i, n in enumerate(numbers)]


def watch(trainer) -> list[dict]:
    """Collect each generation batch with the numbers of its prompts."""
    batches = []

    def spy(generate, inputs):
        batch = generate(inputs)
        asked, _ = trl_seam.last_texts(trainer, len(batch["completion_ids"]))
        batches.append({**batch, "numbers": [number(prompt) for prompt in asked]})
        return batch

    around(trainer, "batch", spy)
    return batches


# The stream


def test_the_stream_has_the_order_of_trl_s_sampler_without_gaps():
    stream = PromptStream(10, seed=3)
    drawn = stream.take(4) + stream.take(7) + stream.take(19)
    sampler = RepeatSampler(range(10), mini_repeat_count=1, seed=3)
    assert drawn == [index for _ in range(3) for index in sampler]


def test_no_prompt_comes_again_before_the_others():
    stream = PromptStream(7, seed=0)
    drawn = list(itertools.chain.from_iterable(stream.take(n) for n in (3, 3, 3, 5, 7)))
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert drawn[:7] != drawn[7:14]


def test_an_unshuffled_stream():
    assert PromptStream(3, seed=0, shuffle=False).take(7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("position", [0, 3, 9, 10, 25])
def test_the_stream_goes_on_from_a_position(position):
    whole, resumed = PromptStream(10, seed=1), PromptStream(10, seed=1)
    whole.take(position)
    resumed.take(31)  # somewhere else before
    resumed.restore(whole.state())
    assert resumed.take(14) == whole.take(14)


def test_prompts_that_are_solved_twice_are_skipped_by_hand():
    stream = PromptStream(3, seed=0, shuffle=False, skip_solved=2)
    drawn = []
    for n, solved in (
        (3, [True, False, False]),  # pass 1
        (3, [True, True, False]),  # pass 2: prompt 0 was solved twice
        (2, [True, False]),  # pass 3 without 0; so was prompt 1
        (1, [False]),  # pass 4 without 0 and 1
        (2, [True, False]),  # pass 5: 0 is drawn, 1 is skipped for the second time
        (2, [False, True]),  # pass 6: 1 is drawn; 0 was solved three times, so it is skipped
    ):
        drawn.append(stream.take(n))
        stream.note(drawn[-1], solved)
    assert drawn == [[0, 1, 2], [0, 1, 2], [1, 2], [2], [0, 2], [1, 2]]
    assert (stream.position, stream.skipped) == (18, 5)


@pytest.mark.parametrize("skip", [1, 3])
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_skipped_prompts_follow_from_all_verdicts_so_far(skip, share):
    """Compared with a rule that reads each prompt's whole history; also in a stream that is restored each time."""
    rng, size = random.Random(0), 7
    stream = PromptStream(size, seed=2, skip_solved=skip)
    order = PromptStream(size, seed=2).take(80 * size)
    history = {index: [] for index in range(size)}  # of each prompt: pass and verdict
    position = 0
    for _ in range(60):
        wanted = []
        while len(wanted) < 2:
            index, at = order[position], position // size
            last = history[index][-2:]
            if not (len(last) == 2 and all(right for _, right in last) and at - last[-1][0] <= skip):
                wanted.append((index, at))
            position += 1
        restored = PromptStream(size, seed=2, skip_solved=skip)
        restored.restore(stream.state())
        stream = restored
        assert stream.take(2) == [index for index, _ in wanted]
        right = [rng.random() < share for _ in wanted]
        stream.note([index for index, _ in wanted], right)
        for (index, at), verdict in zip(wanted, right, strict=True):
            history[index].append((at, verdict))
    assert stream.skipped > 20
    for seen in history.values():  # no prompt is lost
        assert max(later - earlier for (earlier, _), (later, _) in itertools.pairwise(seen)) == skip + 1


# How much is generated


def test_the_size_of_a_generation_by_hand():
    # 4 of 8 were informative: p = 5/10. 13 groups: 6.5 - sqrt(13/4 x 23/11) = 3.89; 14: 7 - sqrt(14/4 x 24/11) = 4.24
    assert groups_to_generate(4, 4, 8, most=16) == 14
    assert groups_to_generate(4, 4, 8, most=12) == 12
    assert [groups_to_generate(4, 4, 8, most=16, unit=unit) for unit in (2, 4, 8)] == [14, 16, 16]
    assert groups_to_generate(1, 0, 8, most=16) == 16  # p = 1/10: 10 would be informative once, if at all
    assert groups_to_generate(8, 0, 0, most=8) == 8  # nothing is known before the first generation


def size_from_scipy(missing: int, informative: float, generated: float, most: int, unit: int) -> int:
    for n in range(unit, most + 1, unit):
        enough = []
        for smaller in range(n - unit + 1, n + 1):  # n is what the smallest of these is rounded up to
            found = betabinom(smaller, informative + 1, generated - informative + 1)
            enough.append(smaller >= missing and found.mean() - found.std() >= missing)
        if any(enough):
            return n
    return most


@pytest.mark.parametrize("unit", [1, 2, 8])
def test_the_size_is_that_of_a_beta_binomial_distribution(unit):
    for missing, informative, generated in itertools.product((1, 3, 17), (0, 1, 5.5, 30), (30, 61.25)):
        for most in (24, 64):
            arguments = (missing, informative, generated, most, unit)
            assert groups_to_generate(*arguments) == size_from_scipy(*arguments), arguments


def test_five_of_six_generations_are_large_enough():
    for informative in (8, 32, 64, 96, 120):
        n = groups_to_generate(40, informative, 128, most=10_000)
        assert 0.8 < betabinom(n, informative + 1, 128 - informative + 1).sf(39) < 0.95


@pytest.mark.parametrize(
    ("groups", "G", "processes", "unit"),
    [(4, 2, 1, 1), (4, 2, 2, 2), (3, 8, 2, 1), (3, 8, 6, 3), (8, 3, 4, 4), (6, 4, 4, 1), (6, 2, 4, 2)],
)
def test_each_process_generates_equally_many_rollouts(groups, G, processes, unit):
    """Whole groups if it has whole groups of a whole batch."""
    dynamic = sampling("", groups=groups, G=G, processes=processes)
    assert dynamic._unit == unit
    assert groups % unit == unit * G % processes == 0


def test_every_generation_is_divided_over_the_processes():
    """On the first of two processes: 2 of 6 groups are missing, 3 would be enough, so 4 are generated, 2 on each."""
    of_both = iter([[1, 0] * 4 + [1, 1] * 2, [1, 0] * 4])
    generated = []

    def generate(rows):
        generated.append([row["number"] for row in rows])
        return [{"completion_ids": [1]} for _ in rows]

    def grade(rows, rollouts):
        rewards = torch.tensor(next(of_both)).float()
        assert len(rewards) == 2 * len(rows)
        return rewards[:, None], verdicts(rewards.view(-1, 2), 0.0)

    dataset = [{"number": number} for number in range(20)]
    shape = {"groups": 6, "num_generations": 2, "max_batches": 9, "num_processes": 2}
    dynamic = DynamicSampling(dataset, generate, grade, **shape, seed=0, shuffle=False)
    dynamic.informative = dynamic.generated = 2_000
    assert groups_to_generate(2, 1_000 + 4, 1_000 + 6, most=6) == 3
    dynamic.batch(0)
    assert generated == [[0, 0, 1, 1, 2, 2], [6, 6, 7, 7]]


# Which groups are chosen, on one process with groups of two: R right, W wrong, ? unscorable


def sampling(
    kinds, *, groups=3, max_batches=10, size=9, generate=None, G=2, processes=1, **settings
) -> DynamicSampling:
    """Dynamic sampling that is told what comes of each group: `kinds`, one after another."""
    kinds = iter(kinds)

    def write(rows):
        return [{"completion_ids": [row["number"], place]} for place, row in enumerate(rows)]

    def grade(rows, rollouts):
        values = {"R": 1.0, "W": 0.0, "?": math.nan}
        groups = list(itertools.islice(kinds, len(rows) // G))
        rewards = torch.tensor([[values[kind]] for kind in "".join(groups)])
        assert len(rows) == len(rollouts) == len(rewards)
        return rewards, verdicts(rewards.view(-1, G), 0.0)

    dataset = [{"number": number} for number in range(size)]
    shape = {"groups": groups, "num_generations": G, "max_batches": max_batches, "num_processes": processes}
    return DynamicSampling(dataset, generate or write, grade, **shape, seed=0, shuffle=False, **settings)


def test_the_first_informative_groups_are_chosen_and_the_surplus_is_dropped():
    dynamic = sampling(["RW", "RR", "WW", "W?", "WR", "RW", "RW"])
    batch = dynamic.batch(0)
    assert [row["number"] for row in batch.rows] == [0, 0, 4, 4, 5, 5]
    assert [rollout["completion_ids"][0] for rollout in batch.rollouts] == [0, 0, 4, 4, 5, 5]
    assert batch.rewards[:, 0].tolist() == [1, 0, 0, 1, 1, 0]
    assert batch.metrics == {
        "dynamic_sampling/generations": 2,
        "dynamic_sampling/groups_per_needed": pytest.approx(6 / 3),
        "dynamic_sampling/informative_groups": pytest.approx(3 / 6),
        "dynamic_sampling/all_right": pytest.approx(1 / 6),
        "dynamic_sampling/all_wrong": pytest.approx(2 / 6),
        "dynamic_sampling/accuracy": pytest.approx(5 / 11),
        "dynamic_sampling/surplus": 0,
        "dynamic_sampling/filled": 0,
        "dynamic_sampling/discarded_tokens": pytest.approx(6 / 12),
        "dynamic_sampling/tokens_per_trained": pytest.approx(12 / 6),
        "dynamic_sampling/skipped": 0,
        "dynamic_sampling/reused": 0,
    }
    assert batch.state == {"dynamic_sampling/prompts": 6, "dynamic_sampling/epoch": pytest.approx(6 / 9)}


def test_surplus_and_filling_are_counted(caplog):
    # One is missing, 2 of 3 were informative: p = 3/5. 2 groups: 1.2 - sqrt(0.48 x 7/6) < 1. So three are generated.
    batch = sampling(["RW", "RR", "RW", "RW", "RW", "??"]).batch(0)
    assert [row["number"] for row in batch.rows] == [0, 0, 2, 2, 3, 3]
    assert batch.state["dynamic_sampling/prompts"] == 6
    assert batch.metrics["dynamic_sampling/surplus"] == 1
    assert caplog.records == []
    none = sampling(["RR", "??", "WW"] * 8, max_batches=4)
    for _ in range(2):
        batch = none.batch(5)
        assert batch.metrics["dynamic_sampling/generations"] == 4
        assert batch.metrics["dynamic_sampling/filled"] == 1
        assert batch.metrics["dynamic_sampling/surplus"] == 0
    assert [row["number"] for row in batch.rows] == [3, 3, 4, 4, 5, 5]
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(" among ")[0] for line in told] == [
        "Dynamic sampling has drawn all 9 training prompts by optimizer step 5 and starts pass 2 over them.",
        "Dynamic sampling found only 0 of 3 groups with both correct and wrong rollouts",
        "Dynamic sampling has drawn all 9 training prompts by optimizer step 5 and starts pass 3 over them.",
    ]


def test_a_restored_one_draws_what_would_have_come():
    whole, resumed = (sampling(["RW", "RR"] * 24) for _ in range(2))
    whole.batch(0)
    resumed.restore(whole.state())
    for _ in range(3):
        assert resumed.batch(0).rows == whole.batch(0).rows
        assert (resumed.informative, resumed.generated) == (whole.informative, whole.generated) != (0, 0)


def test_solved_prompts_are_skipped_and_counted():
    """Of 4 prompts, the second is solved in each pass: it is skipped in the third one."""
    kinds = ["RW", "RR", "RW", "RW"] * 2 + ["RW"] * 4
    dynamic = sampling(kinds, groups=4, max_batches=1, size=4, skip_solved=1)
    batches = [dynamic.batch(0) for _ in range(3)]
    assert [batch.metrics["dynamic_sampling/skipped"] for batch in batches] == [0, 0, 1]
    assert [row["number"] for row in batches[-1].rows] == [0, 0, 2, 2, 3, 3, 0, 0]
    assert batches[-1].state == {"dynamic_sampling/prompts": 12, "dynamic_sampling/epoch": 13 / 4}


def test_a_small_generation_completes_a_batch():
    """30 of 32 were informative: p = 31/34, and 3 groups have 2.74 - sqrt(0.24 x 37/35) >= 2."""
    dynamic = sampling(["RW"] * 30 + ["RR"] * 2 + ["RW", "WW", "RW"], groups=32, size=40)
    batch = dynamic.batch(0)
    assert [row["number"] for row in batch.rows][-6:] == [29, 29, 32, 32, 34, 34]
    assert batch.metrics["dynamic_sampling/groups_per_needed"] == 35 / 32
    assert batch.metrics["dynamic_sampling/generations"] == 2
    assert batch.metrics["dynamic_sampling/filled"] == batch.metrics["dynamic_sampling/surplus"] == 0


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_few_groups_more_than_necessary_are_generated(share, reuse):
    """At most 15% more than there are up to the last informative group that is needed."""
    rng = random.Random(1)
    kinds = ["RW" if rng.random() < share else "WW" for _ in range(9_000)]
    settings = {"keep": (lambda rollouts: None)} if reuse else {}
    dynamic = sampling(kinds, groups=128, max_batches=100, size=9_000, **settings)
    for _ in range(5):
        assert dynamic.batch(0).metrics["dynamic_sampling/filled"] == 0
    informative = [place for place, kind in enumerate(kinds, 1) if kind == "RW"]
    assert dynamic.stream.position <= 1.15 * informative[5 * 128 - 1]


def test_earlier_batches_count_half_in_the_share():
    dynamic = sampling(["RW", "RR", "RW", "RW", "RR", "WW", "RW", "RW", "RW"])
    seen = []
    for _ in range(2):
        dynamic.batch(0)
        seen.append((dynamic.informative, dynamic.generated))
    assert seen == [(2 + 1, 3 + 3), (3 / 2 + 3, 6 / 2 + 3)]


def test_kept_groups_come_first_in_the_next_batch():
    noted = []

    def keep(rollouts):
        noted.append([rollout["completion_ids"][0] for rollout in rollouts])

    kinds = ["RW", "RR", "RW", "RW", "RW", "??", "RR", "RW", "WR"]
    first, second = (sampling(kinds, size=12, keep=keep) for _ in range(2))
    batch = first.batch(0)  # two generations of 3; the group of prompt 4 is left
    assert noted == [[4, 4]]
    assert [row["number"] for row in batch.rows] == [0, 0, 2, 2, 3, 3]
    # 4 tokens a group: 24 were generated, 12 are trained on, 4 are kept.
    assert batch.metrics["dynamic_sampling/discarded_tokens"] == pytest.approx(8 / 24)
    assert batch.metrics["dynamic_sampling/tokens_per_trained"] == pytest.approx(24 / 12)
    assert (batch.metrics["dynamic_sampling/surplus"], batch.metrics["dynamic_sampling/reused"]) == (1, 0)
    second.batch(0)
    second.restore_kept(first.kept_groups())  # as a checkpoint holds them
    for dynamic in (first, second):
        batch = dynamic.batch(1)
        assert [row["number"] for row in batch.rows] == [4, 4, 7, 7, 8, 8]
        assert [rollout["completion_ids"] for rollout in batch.rollouts] == [
            [4, 2],
            [4, 3],
            [7, 2],
            [7, 3],
            [8, 4],
            [8, 5],
        ]
        assert batch.rewards[:, 0].tolist() == [1, 0, 1, 0, 0, 1]
        assert batch.metrics["dynamic_sampling/reused"] == 1
        assert batch.metrics["dynamic_sampling/groups_per_needed"] == 1
        assert batch.metrics["dynamic_sampling/informative_groups"] == pytest.approx(2 / 3)  # of those generated now
        assert batch.metrics["dynamic_sampling/discarded_tokens"] == pytest.approx(4 / 12)
        assert batch.metrics["dynamic_sampling/tokens_per_trained"] == 1
        assert dynamic.kept_groups() is None


def test_kept_groups_in_a_checkpoint_are_plain_values(tmp_path):
    """A `rollout_func` and a reward function may return NumPy's numbers and arrays, or anything as a column."""

    def write(rows):
        columns = {"length": numpy.float32(0.1), "note": PromptStream}
        logprobs = numpy.array([-0.5, -0.25])
        return [{"completion_ids": [numpy.int64(3)], "logprobs": logprobs, "columns": columns} for _ in rows]

    dynamic = sampling(["RW", "RR", "RW", "RW", "RW", "??"], generate=write, keep=lambda rollouts: None)
    dynamic.batch(0)
    torch.save(dynamic.kept_groups(), tmp_path / "kept.pt")
    dynamic.restore_kept(torch.load(tmp_path / "kept.pt", weights_only=True))
    rollouts = [rollout for _, rollout in dynamic.kept.rollouts]
    columns = {"length": float(numpy.float32(0.1)), "note": str(PromptStream)}
    assert rollouts == [{"completion_ids": [3], "logprobs": [-0.5, -0.25], "columns": columns}] * 2


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_batch_is_not_filled_earlier_than_with_whole_generations(share):
    """At most max_batches x P groups are generated, the same ones as with generations of P."""
    for seed in range(20):
        rng = random.Random(seed)
        kinds = [("RW" if rng.random() < share else "WW") for _ in range(4 * 8)]
        batch = sampling(kinds, groups=8, max_batches=4, size=40).batch(0)
        whole = min(8, sum(kind == "RW" for kind in kinds))
        assert round(8 * (1 - batch.metrics["dynamic_sampling/filled"])) == whole
        assert batch.metrics["dynamic_sampling/groups_per_needed"] <= 4


def test_rows_are_copies():
    """A reward function, or what generates, may change its row."""

    def change(rows):
        for row in rows:
            assert row.keys() == {"number"}
            row["mine"] = 1
        return [{"completion_ids": [1]} for _ in rows]

    dynamic = sampling(["WW"] * 9 + ["RW"] * 3, generate=change)
    assert all(row.keys() == {"number"} for row in dynamic.batch(0).rows)


# In training


@pytest.mark.parametrize("credit", ["ktae", "none"])
def test_every_step_s_groups_are_informative(tmp_path, credit):
    settings = {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 12, "credit": credit}
    trainer = make_trainer(tmp_path, train_dataset=prompts(24), reward_funcs=third, **SAMPLING, **settings)
    batches = watch(trainer)
    trainer.train()
    assert len(batches) == 3
    for batch in batches:
        assert len(batch["numbers"]) == 32
        assert all(n % 3 == 0 for n in batch["numbers"])
        assert all(len(set(batch["numbers"][begin : begin + 8])) == 1 for begin in range(0, 32, 8))
        assert (batch["advantages"].abs() > 0.5).all()
        assert ("credit" in batch) == (credit == "ktae")
        assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert set(logged(trainer, "dynamic_sampling/filled")) == {0}
    assert set(logged(trainer, "frac_reward_zero_std")) == {0}
    # TRL's metrics are those of what is trained on; the accuracy of all that was sampled has its own.
    assert set(logged(trainer, "reward")) == {0.5}
    assert all(n > 1 for n in logged(trainer, "dynamic_sampling/generations"))
    lengths = [batch["completion_mask"].sum(1).float().mean().item() for batch in batches]
    assert logged(trainer, "completions/mean_length") == pytest.approx(lengths)
    tokens = itertools.accumulate((b["prompt_mask"].sum() + b["completion_mask"].sum()).item() for b in batches)
    assert sorted(set(logged(trainer, "num_tokens"))) == list(tokens)
    drawn = logged(trainer, "dynamic_sampling/prompts")
    assert drawn == [4 * g for g in itertools.accumulate(logged(trainer, "dynamic_sampling/groups_per_needed"))]


@pytest.mark.parametrize("right", [0.0, 1.0, None])
def test_a_task_without_informative_groups_goes_on(tmp_path, caplog, right):
    trainer = make_trainer(
        tmp_path,
        train_dataset=prompts(5),
        reward_funcs=[lambda completions, **kwargs: [right] * len(completions), boxed_format],
        correctness_reward="<lambda>",
        dynamic_sampling_max_batches=3,
        **SAMPLING,
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 3
    assert logged(trainer, "dynamic_sampling/generations") == [3, 3, 3]
    assert logged(trainer, "dynamic_sampling/filled") == [1, 1, 1]
    assert logged(trainer, "dynamic_sampling/all_right") == [1.0 if right else 0.0] * 3
    assert logged(trainer, "dynamic_sampling/prompts") == [6, 12, 18]  # three times through five prompts
    said = [record.message for record in caplog.records]
    assert len([line for line in said if "found only 0 of 2 groups" in line and "among 6 generated" in line]) == 1
    assert len([line for line in said if "all 5 training prompts" in line]) == 3


def test_the_batch_is_filled_with_what_there_is(tmp_path):
    """Two of six prompts are informative, so one generation of four prompts cannot hold four that are."""
    trainer = make_trainer(
        tmp_path,
        train_dataset=prompts(6),
        reward_funcs=third,
        steps_per_generation=2,
        max_steps=2,
        dynamic_sampling_max_batches=1,
        **SAMPLING,
    )
    batches = watch(trainer)
    trainer.train()
    informative = [n % 3 == 0 for n in batches[0]["numbers"]]
    assert logged(trainer, "dynamic_sampling/filled") == [1 - sum(informative) / 32]
    assert (batches[0]["advantages"] != 0).tolist() == informative


def test_rewards_of_none_do_not_count(tmp_path):
    """A group with right and unscorable rollouts only is not informative, one with all three kinds is."""

    def sometimes(prompts, completions, **kwargs):
        kinds = {0: [1.0, None], 1: [0.0, None], 2: [1.0, 0.0, None, None]}
        return [kinds[number(prompt) % 3][i % len(kinds[number(prompt) % 3])] for i, prompt in enumerate(prompts)]

    trainer = make_trainer(tmp_path, reward_funcs=sometimes, **SAMPLING)
    batches = watch(trainer)
    trainer.train()
    assert all(n % 3 == 2 for batch in batches for n in batch["numbers"])
    assert all((batch["advantages"] == 0).float().mean() == 0.5 for batch in batches)


def test_correctness_decides_not_the_sum_of_rewards(tmp_path):
    """A length penalty gives every group a spread of rewards; informative are those with right and wrong answers."""

    def penalty(completions, **kwargs):
        return [-0.1 * (i % 5) for i in range(len(completions))]

    trainer = make_trainer(tmp_path, reward_funcs=[third, penalty], correctness_reward="third", **SAMPLING)
    batches = watch(trainer)
    trainer.train()
    assert all(n % 3 == 0 for batch in batches for n in batch["numbers"])


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("settings", [{}, {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 20}])
def test_it_is_plain_training_if_every_group_is_informative(tmp_path, settings):
    """On 16 prompts, whole batches, over several epochs; bit for bit."""
    common = {"train_dataset": prompts(8), "reward_funcs": alternating, "max_steps": 10, **settings}
    plain = make_trainer(tmp_path / "plain", max_completion_length=12, **common)
    plain.train()
    dynamic = make_trainer(tmp_path / "dynamic", **SAMPLING, **common)
    start = weights(dynamic)
    dynamic.train()
    assert difference(weights(dynamic), weights(plain)) == 0
    assert difference(weights(dynamic), start) > 1e-4
    own = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "ktae/seconds"}
    for ours, theirs in zip(dynamic.state.log_history, plain.state.log_history, strict=True):
        assert {k: v for k, v in theirs.items() if k not in own} == {
            k: v for k, v in ours.items() if k not in own and not k.startswith("dynamic_sampling/")
        }


def test_columns_that_reward_functions_log_stay_with_their_rollouts(tmp_path):
    calls = []

    def third_with_notes(prompts, completions, log_extra, log_metric, **kwargs):
        calls.append(len(prompts))
        log_extra("number", [number(prompt) for prompt in prompts])
        log_metric("third/generated", float(len(prompts)))
        return third(prompts, completions)

    trainer = make_trainer(tmp_path, reward_funcs=third_with_notes, max_steps=1, log_completions=True, **SAMPLING)
    batches = watch(trainer)
    trainer.train()
    (table,) = (tmp_path / "completions").glob("*.parquet")
    assert pandas.read_parquet(table)["number"].tolist() == batches[0]["numbers"]
    assert logged(trainer, "third/generated") == [16]
    assert sum(calls) == 16 * logged(trainer, "dynamic_sampling/groups_per_needed")[0]  # nothing is graded twice


def test_a_rollout_func_with_masks_and_fields_of_its_own(tmp_path):
    """Its masks reach the loss, its fields the reward functions."""

    def rollouts(prompts, trainer):
        output = replay(prompts, trainer)
        output["env_mask"] = [[1] * (len(ids) - 3) + [0] * 3 for ids in output["completion_ids"]]
        output["lengths"] = [len(ids) for ids in output["completion_ids"]]
        return output

    def third_of_length(prompts, completions, completion_ids, lengths, **kwargs):
        assert lengths == [len(ids) for ids in completion_ids]
        return third(prompts, completions)

    trainer = make_trainer(tmp_path, reward_funcs=third_of_length, rollout_func=rollouts, max_steps=2, **SAMPLING)
    batches = watch(trainer)
    trainer.train()
    assert trainer.rollout_func is rollouts
    for batch in batches:
        lengths = batch["completion_mask"].sum(1)
        assert (batch["tool_mask"] * batch["completion_mask"]).sum(1).tolist() == (lengths - 3).tolist()
        assert batch["num_items_in_batch"] == (lengths - 3).sum()


def test_evaluation_never_resamples(tmp_path):
    trainer = make_trainer(tmp_path, reward_funcs=third, eval_dataset=prompts(6), **SAMPLING)
    batches = watch(trainer)
    trainer.evaluate()
    assert sorted({n for batch in batches for n in batch["numbers"]}) == list(range(6))
    assert trainer.dynamic_sampling.state()["position"] == 0


# Resume

CYCLES = {
    **SAMPLING,
    "reward_funcs": third,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 16,
    "save_strategy": "steps",
    "save_steps": 1,
    "dynamic_sampling_skip_solved": 1,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, train_dataset=prompts(14), **CYCLES)
    batches = watch(trainer)
    trainer.train()
    return folder, trainer, batches


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("step", [4, 7, 8, 14])  # between generations and inside a cycle, in three epochs of prompts
def test_a_resumed_run_draws_the_same_prompts(uninterrupted, tmp_path, step):
    folder, whole, batches = uninterrupted
    assert logged(whole, "dynamic_sampling/epoch")[-1] > 3
    assert max(logged(whole, "dynamic_sampling/skipped")) > 0
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    resumed = make_trainer(tmp_path, train_dataset=prompts(14), **CYCLES)
    drawn = watch(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    left = batches[-(-step // 4) :]
    assert [batch["numbers"] for batch in drawn] == [batch["numbers"] for batch in left]
    assert difference(weights(resumed), weights(whole)) == 0
    assert logged(resumed, "dynamic_sampling/prompts") == logged(whole, "dynamic_sampling/prompts")


# Surplus groups in the next batch


def two_thirds(prompts, completions, **kwargs):
    """Two of three problems have right and wrong answers; the others are all wrong."""
    return [float(i % 2 and number(prompt) % 3 > 0) for i, prompt in enumerate(prompts)]


REUSE = {**SAMPLING, "dynamic_sampling_reuse": True, "reward_funcs": two_thirds, "num_generations": 4}


def logps_of(policy: dict[str, torch.Tensor], batch) -> torch.Tensor:
    """Log-probabilities of the completion's tokens, (B, T), without the trainer's code."""
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    model.load_state_dict(policy, strict=False)  # without the tied output layer
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, :-1].log_softmax(-1)
    return logits.gather(2, ids[:, 1:, None])[:, :, 0][:, -batch["completion_ids"].shape[1] :]


def test_the_ratio_of_kept_rollouts_is_to_the_policy_that_sampled_them(tmp_path):
    """Log-probabilities and the loss, computed from copies of the weights."""
    trainer = make_trainer(tmp_path, train_dataset=prompts(40), max_steps=8, credit="none", loss_type="grpo", **REUSE)
    policies, losses, kept, seen = [], [], [], []

    def at_generation(generate, inputs):
        policies.append(weights(trainer))
        batch = generate(inputs)
        kept.append(trl_seam.last_metric(trainer, "dynamic_sampling/reused"))
        return batch

    def at_loss(compute, model, batch):
        seen.append({name: values.clone() for name, values in batch.items()})
        losses.append(compute(model, batch))
        return losses[-1]

    around(trainer, "batch", at_generation)
    around(trainer, "loss", at_loss)
    trainer.train()
    assert sum(kept) > 1
    ratios = []
    for i, batch in enumerate(seen):
        mask = batch["completion_mask"].bool()
        with torch.no_grad():
            now, before = logps_of(policies[i], batch), logps_of(policies[i - 1], batch)
        older = batch.get("older_logps", torch.full_like(now, torch.nan))
        reused = ~older.isnan().all(1)
        assert reused.sum() == 4 * kept[i]
        torch.testing.assert_close(older[reused][mask[reused]], before[reused][mask[reused]], rtol=0, atol=1e-4)
        ratio = torch.where(reused[:, None], now - before, 0).exp()
        advantages = batch["advantages"][:, None]
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        assert losses[i].item() == pytest.approx(((loss * mask).sum(1) / mask.sum(1)).mean().item(), abs=1e-4)
        ratios += ratio[reused][mask[reused]].tolist()
    assert max(ratios) > 1.2
    assert min(ratios) < 0.8


def test_vllm_s_correction_needs_no_log_probabilities_of_ours(tmp_path, monkeypatch):
    """TRL then weights each rollout by the policy over vLLM's at the time of sampling, whose logprobs it has."""
    trainer = make_trainer(tmp_path, **REUSE)
    rollouts = [{"prompt_ids": [1, 2], "completion_ids": [3], "logprobs": [-0.5]}]
    monkeypatch.setattr(trl_seam, "corrects_sampling", lambda trainer: True)
    trainer.dynamic_sampling.keep(rollouts)
    assert "older_logps" not in rollouts[0]
    monkeypatch.undo()
    trainer.dynamic_sampling.keep(rollouts)
    assert len(rollouts[0]["older_logps"]) == 1


def test_without_surplus_nothing_changes(tmp_path):
    """Every group is informative: bit for bit as without."""
    found = []
    for reuse in (True, False):
        settings = {**SAMPLING, "reward_funcs": alternating, "dynamic_sampling_reuse": reuse}
        trainer = make_trainer(tmp_path / str(reuse), **settings)
        trainer.train()
        found.append(weights(trainer))
    assert difference(*found) == 0


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run_has_the_kept_groups(tmp_path, caplog, accumulated):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "train_dataset": prompts(40)}
    # With two passes an optimizer step and one a generation, groups are kept within a step too.
    settings = {**REUSE, **saving, "gradient_accumulation_steps": accumulated, "steps_per_generation": 1}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    reused = logged(whole, "dynamic_sampling/reused")
    step = next(i for i in range(1, 5) if reused[i])  # the checkpoint of this step holds groups
    if accumulated == 1:
        file = torch.load(tmp_path / f"whole/checkpoint-{step}/rollouts_0.pt", weights_only=True)
        assert len(file["kept"]["indices"]) == reused[step]
        assert all(len(one["older_logps"]) == len(one["completion_ids"]) for _, one in file["kept"]["rollouts"])
    checkpoint = tmp_path / f"checkpoint-{step}"
    shutil.copytree(tmp_path / f"whole/checkpoint-{step}", checkpoint)
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert difference(weights(resumed), weights(whole)) == 0
    assert logged(resumed, "dynamic_sampling/reused") == reused
    # Groups that another temperature sampled are not used, and none without the setting.
    for changed in ({"temperature": 0.9}, {"dynamic_sampling_reuse": False}) if accumulated == 1 else ():
        caplog.clear()
        other = make_trainer(tmp_path / str(changed), **{**settings, **changed, "max_steps": step + 1})
        other.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
        assert logged(other, "dynamic_sampling/reused")[-1] == 0
        assert f"The {reused[step]:.0f} groups that" in caplog.text


# Bad input


def test_an_iterable_dataset_is_refused(tmp_path):
    data = prompts(8)
    iterable = IterableDataset.from_generator(lambda: iter(data))
    with pytest.raises(ValueError, match=r"not of type IterableDataset\. Load the dataset without streaming"):
        make_trainer(tmp_path, train_dataset=iterable, **SAMPLING)


def test_tools_are_refused(tmp_path):
    images = prompts(8).add_column("image", ["a picture"] * 8)
    with pytest.raises(ValueError, match="does not support tools, environments or images"):
        make_trainer(tmp_path, train_dataset=images, **SAMPLING)


def test_images_inside_of_prompts_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, **SAMPLING)

    def with_images(generate, asked):
        *rest, _, tool_images = generate(asked)
        return *rest, [["an image"]] * len(asked), tool_images

    around(trainer, "generation", with_images)
    with pytest.raises(ValueError, match="does not support prompts with images"):
        trainer.train()


def test_a_column_that_is_logged_too_short_is_named(tmp_path):
    def short(completions, log_extra, **kwargs):
        log_extra("half", ["x"] * (len(completions) // 2))
        return alternating(completions)

    with pytest.raises(ValueError, match=r"A reward function logged \d+ values of 'half' for \d+ completions"):
        make_trainer(tmp_path, reward_funcs=short, **SAMPLING).train()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dynamic_sampling_max_batches": 0}, "dynamic_sampling_max_batches must be at least 1, not 0"),
        ({"dynamic_sampling_skip_solved": -1}, "dynamic_sampling_skip_solved must be at least 0, not -1"),
        (
            {"dynamic_sampling_reuse": True, "dynamic_sampling": False},
            r"dynamic_sampling_reuse is True, but has an effect only with dynamic sampling\. Set dynamic_sampling",
        ),
        (
            {"dynamic_sampling_reuse": True, "steps_per_generation": 2},
            r"a generation has 2 forward passes \(steps_per_generation 2 x num_iterations 1\) and an optimizer step 1 "
            r"\(gradient_accumulation_steps\)\. Set .* or gradient_accumulation_steps to a multiple of 2$",
        ),
        ({"dynamic_sampling_reuse": True, "credit": "tree"}, "does not support credit: tree, which samples its own"),
        (
            {"dynamic_sampling_skip_solved": 2, "dynamic_sampling": False},
            r"dynamic_sampling_skip_solved is 2, but has an effect only with dynamic sampling\. Set dynamic_sampling",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, **{**SAMPLING, **settings})


@pytest.mark.parametrize(
    ("rewards", "named", "words"),
    [
        ([math_accuracy, third], None, r"There are several \(math_accuracy, third\)\. Set correctness_reward"),
        ([boxed_format], None, "'boxed_format' does not check answers"),
        ([boxed_format, math_accuracy], "boxed_format", "'boxed_format' does not check answers"),
    ],
)
def test_a_reward_that_says_what_is_right_is_needed(tmp_path, rewards, named, words):
    with pytest.raises(ValueError, match=rf"dynamic_sampling needs a reward function that decides .*{words}"):
        make_trainer(tmp_path, reward_funcs=rewards, correctness_reward=named, **SAMPLING)
