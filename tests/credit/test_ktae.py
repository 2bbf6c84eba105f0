import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import fisher_exact
from torch.overrides import TorchFunctionMode

from benchmarks.ktae_cost import Size, make
from ktae_trl.credit.ktae import counting
from ktae_trl.credit.ktae import values as ktae
from ktae_trl.credit.ktae.values import key_token_strengths, key_token_table, key_token_values
from tests.reference import ktae_loop


def random_groups(seed, P=3, G=8, T=40, vocabulary=30, lengths=True):
    """Groups of all kinds: mixed, all right, all wrong; unequal lengths, holes in the mask, an empty rollout."""
    rng = np.random.default_rng(seed)
    ids = torch.tensor(rng.zipf(1.3, (P, G, T)) % vocabulary)
    length = torch.tensor(rng.integers(0 if lengths else T, T + 1, (P, G)))
    mask = (torch.arange(T) < length[..., None]) & torch.tensor(rng.random((P, G, T)) < 0.9)
    correct = torch.tensor(rng.random((P, G)) < rng.random((P, 1)))
    return ids, mask, correct


# The reference material


def test_reference_vectors(shared):
    vectors = np.load(shared / "reference" / "ktae_vectors.npz")
    for i in range(int(vectors["count"])):
        group = {k: vectors[f"{i}/{k}"] for k in ("ids", "mask", "correct", "weights", "value_exact")}
        fisher, gain, tf = group["weights"].tolist()
        ids, mask, correct = (torch.tensor(group[k])[None] for k in ("ids", "mask", "correct"))
        values = key_token_values(
            ids, mask, correct, fisher_weight=fisher, ig_weight=gain, tf_weight=tf, ignore_ids=[151643]
        )[0].numpy()
        np.testing.assert_allclose(values, group["value_exact"], atol=1e-5)
        sound = vectors[f"{i}/official_p_ok"].astype(bool)
        np.testing.assert_allclose(values[sound], vectors[f"{i}/value_official"][sound], atol=1e-5)


# The slow loop


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0, 1, 1), (1, 0, 0.5), (2, 1, 0), (0.3, 0.7, 3)])
def test_slow_loop(numba, leave_one_out, weights, monkeypatch):
    monkeypatch.setattr(ktae, "NUMBA", numba and ktae.NUMBA)
    options = {
        **dict(zip(("fisher_weight", "ig_weight", "tf_weight"), map(float, weights), strict=True)),
        "leave_one_out": leave_one_out,
        "ignore_ids": (3, 5),
    }
    nonzero = 0
    for seed in range(6):
        ids, mask, correct = random_groups(seed, G=[2, 4, 8, 16, 5, 3][seed])
        scored = torch.tensor(np.random.default_rng(seed).random(correct.shape) < 0.85)
        values = key_token_values(ids, mask, correct, scored=scored, **options)
        expected = ktae_loop.key_token_values(ids, mask, correct, scored=scored, **options)
        np.testing.assert_allclose(values, expected, atol=1e-5)
        nonzero += (expected != 0).sum()
    assert nonzero > 100


def test_table_holds_the_statistics_of_every_token_of_informative_groups():
    ids, mask, _ = random_groups(0)
    correct = torch.tensor([[True, False] * 4, [True] * 8, [True] + [False] * 7])
    mask[2, 0, 0] = True  # the only right rollout of the last group votes
    table = key_token_table(ids, mask, correct)
    seen = set()
    for u in range(len(table.token)):
        p, token = table.group[u].item(), table.token[u].item()
        seen.add((p, token))
        present = ((ids[p] == token) & mask[p]).any(-1)
        votes = mask[p].any(-1)
        right, wrong = votes & correct[p], votes & ~correct[p]
        a, b = (present & right).sum().item(), (present & wrong).sum().item()
        n_right, n_wrong = right.sum().item(), wrong.sum().item()
        assert (table.a[u], table.b[u], table.n_right[p], table.n_wrong[p]) == (a, b, n_right, n_wrong)
        expected = fisher_exact([[a, b], [n_right - a, n_wrong - b]])[1]
        assert table.p[u].item() == pytest.approx(expected, rel=1e-6)
        assert table.F[u].item() == pytest.approx(0 if expected > 1 - 1e-12 else np.exp(-2 * expected), rel=1e-6)
        strength = (table.F[u] + table.IG[u]) / 2
        where = (ids[p] == token) & mask[p]
        torch.testing.assert_close(
            table.values[p][where], torch.tanh(strength * table.D[u] / 2).expand(int(where.sum()))
        )
    assert seen == {(p, int(t)) for p in (0, 2) for t in ids[p][mask[p]].unique()}


# By hand


def test_group_of_four_by_hand():
    """Two right rollouts (7 9), (7 8); two wrong ones (6 9), (6 8). All lengths equal, so the TF norm is 1.

    Token 7: a = 2, b = 0. The tables with a + b = 2 weigh C(2,a) C(2,2-a) = 1, 4, 1 of 6: p = 1/3, F = exp(-2/3).
    IG = 1 bit. D = pi/2 + 3 (1/2) / (1/2 + 2) / 1e-5 = pi/2 + 60000: saturated. Token 6 is its mirror image.
    Tokens 8 and 9: a = b = 1, the most likely table: p = 1, F = 0, IG = 0, so K = 0.
    """
    ids = torch.tensor([[[7, 9], [7, 8], [6, 9], [6, 8]]])
    correct = torch.tensor([[True, True, False, False]])
    table = key_token_table(ids, torch.ones_like(ids), correct)
    assert table.values.tolist() == [[[1, 0], [1, 0], [-1, 0], [-1, 0]]]
    order = table.token.argsort()
    table = table._replace(**{name: getattr(table, name)[order] for name in ("token", "a", "b", "p", "F", "IG", "D")})
    assert table.token.tolist() == [6, 7, 8, 9]
    assert (table.a.tolist(), table.b.tolist()) == ([0, 2, 1, 1], [2, 0, 1, 1])
    torch.testing.assert_close(table.p, torch.tensor([1 / 3, 1 / 3, 1.0, 1.0]))
    torch.testing.assert_close(table.F, torch.tensor([0.5134171, 0.5134171, 0.0, 0.0]))
    torch.testing.assert_close(table.IG, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(table.D, torch.tensor([-1.0, 1.0, 0.0, 0.0]) * (torch.pi / 2 + 60_000))


def test_group_of_four_by_hand_without_term_frequency():
    """tf_weight = 0. Three right rollouts of which two have token 1, one wrong without it: a = 2, b = 0, c = 1, d = 1.

    P(a = 2) = C(3,2) C(1,0) / C(4,2) = 1/2 and so is P(a = 1): p = 1, F = 0.
    H(Y) = 0.8112781; H(Y | present) = 0; H(Y | absent) = 1 with weight 1/2: IG = 0.3112781, S = 0.1556391.
    D = asin sqrt(2/3) = 0.9553166, S D = 0.1486846, K = tanh(0.0743423) = 0.0742056.
    """
    ids = torch.tensor([[[1, 4], [1, 4], [4, 4], [4, 4]]])
    correct = torch.tensor([[True, True, True, False]])
    values = key_token_values(ids, torch.ones_like(ids), correct, tf_weight=0.0)
    torch.testing.assert_close(values[0, :2, 0], torch.full((2,), 0.0742056), atol=1e-6, rtol=0)
    assert values[0, 0, 1] == 0  # every rollout has token 4


def test_leave_one_out_by_hand():
    """A token that only one rollout has says nothing about that rollout once it does not vote for itself."""
    ids = torch.tensor([[[1, 9], [9, 9], [9, 9], [9, 9]]])
    correct = torch.tensor([[True, True, False, False]])
    ones = torch.ones_like(ids)
    assert key_token_values(ids, ones, correct)[0, 0, 0] > 0.9
    assert key_token_values(ids, ones, correct, leave_one_out=True)[0, 0, 0] == 0
    only_right = torch.tensor([[True, False, False, False]])  # without it no right rollout is left
    assert (key_token_values(ids, ones, only_right, leave_one_out=True)[0, 0] == 0).all()


# Degenerate groups


def test_groups_without_two_sides_have_no_key_tokens():
    ids, mask, _ = random_groups(1, P=2)
    for leave_one_out in (False, True):
        correct = torch.tensor([[True] * 8, [False] * 8])
        table = key_token_table(ids, mask, correct, leave_one_out=leave_one_out)
        assert (table.values == 0).all()
        assert len(table.token) == 0


def test_empty_and_unscored_rollouts_do_not_vote():
    ids, mask, correct = random_groups(2, P=1, G=6, lengths=False)
    correct = torch.tensor([[True, True, False, False, True, False]])
    expected = key_token_values(ids[:, :4], mask[:, :4], correct[:, :4])
    empty = mask.clone()
    empty[:, 4:] = False
    torch.testing.assert_close(key_token_values(ids, empty, correct)[:, :4], expected)
    scored = torch.tensor([[True] * 4 + [False] * 2])
    values = key_token_values(ids, mask, correct, scored=scored)
    torch.testing.assert_close(values[:, :4], expected)
    assert (values[:, 4:] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0), (1, 1, 3)])
def test_empty_batches(shape):
    ids = torch.ones(shape, dtype=torch.long)
    assert key_token_values(ids, ids, torch.ones(shape[:2])).shape == shape


def test_ignored_ids_have_no_value_but_count_in_the_length():
    ids = torch.tensor([[[1, 2, 0], [1, 3, 0], [4, 2, 0], [4, 1, 0]]])
    correct = torch.tensor([[True, True, False, False]])
    ones = torch.ones_like(ids)
    with_eos = key_token_values(ids, ones, correct, ignore_ids=[0])
    expected = ktae_loop.key_token_values(ids, ones, correct, ignore_ids=[0])
    assert (with_eos[..., 2] == 0).all()
    np.testing.assert_allclose(with_eos, expected, atol=1e-6)


# Properties


@st.composite
def groups(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    shape = {"P": draw(st.integers(1, 3)), "G": draw(st.integers(2, 9)), "T": draw(st.integers(1, 24))}
    vocabulary = draw(st.sampled_from([2, 5, 40]))
    options = {
        "leave_one_out": draw(st.booleans()),
        "tf_weight": draw(st.sampled_from([0.0, 1.0, 5.0])),
        "ig_weight": draw(st.sampled_from([0.0, 1.0])),
    }
    return seed, random_groups(seed, vocabulary=vocabulary, **shape), options


@settings(deadline=None, max_examples=60)
@given(groups())
def test_order_of_rollouts_does_not_matter(drawn):
    seed, (ids, mask, correct), options = drawn
    permutation = torch.tensor(np.random.default_rng(seed).permutation(ids.shape[1]))
    values = key_token_values(ids, mask, correct, **options)
    permuted = key_token_values(ids[:, permutation], mask[:, permutation], correct[:, permutation], **options)
    torch.testing.assert_close(permuted, values[:, permutation], atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=60)
@given(groups())
def test_swapping_right_and_wrong_flips_the_sign(drawn):
    _, (ids, mask, correct), options = drawn
    values = key_token_values(ids, mask, correct, **options)
    torch.testing.assert_close(key_token_values(ids, mask, ~correct, **options), -values, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=60)
@given(groups())
def test_padding_and_masked_tokens_change_nothing(drawn):
    seed, (ids, mask, correct), options = drawn
    values = key_token_values(ids, mask, correct, **options)
    rng = np.random.default_rng(seed)
    noise = torch.tensor(rng.integers(-100, 50, ids.shape))
    wider = torch.cat([torch.where(mask, ids, noise), noise], dim=-1)
    padded = key_token_values(wider, torch.cat([mask, torch.zeros_like(mask)], dim=-1), correct, **options)
    torch.testing.assert_close(padded[..., : ids.shape[-1]], values, atol=0, rtol=0)
    assert (padded[..., ids.shape[-1] :] == 0).all()


@settings(deadline=None, max_examples=60)
@given(groups())
def test_relabelling_tokens_changes_nothing(drawn):
    seed, (ids, mask, correct), options = drawn
    names = torch.tensor(np.random.default_rng(seed).choice(2**40, int(ids.max()) + 1, replace=False))
    torch.testing.assert_close(
        key_token_values(names[ids], mask, correct, **options),
        key_token_values(ids, mask, correct, **options),
        atol=1e-6,
        rtol=0,
    )


@settings(deadline=None, max_examples=100)
@given(groups())
def test_values_lie_between_minus_one_and_one(drawn):
    _, (ids, mask, correct), options = drawn
    values = key_token_values(ids, mask, correct, **options)
    assert values.dtype == torch.float32
    assert values.device == ids.device
    assert values.isfinite().all()
    assert (values.abs() <= 1).all()
    assert (values[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_any_integer_type(dtype):
    ids, mask, correct = random_groups(4)
    values = key_token_values(ids.to(dtype), mask.to(torch.int8), correct.int())
    torch.testing.assert_close(values, key_token_values(ids, mask, correct))


def test_groups_do_not_influence_each_other():
    ids, mask, correct = random_groups(5, P=4)
    together = key_token_values(ids, mask, correct)
    for p in range(4):
        alone = key_token_values(ids[p : p + 1], mask[p : p + 1], correct[p : p + 1])
        torch.testing.assert_close(together[p : p + 1], alone)


# Cost


@pytest.mark.parametrize(("leave_one_out", "times"), [(False, 18), (True, 22)])
@pytest.mark.parametrize("vocabulary", [300, 151_936, 2**40])
def test_memory_is_in_proportion_to_the_ids(leave_one_out, times, vocabulary):
    """What is taken beside the input, even if hardly a token comes twice and whatever the vocabulary."""
    ids = torch.randint(0, vocabulary, (16, 16, 1024))
    mask, correct = torch.ones_like(ids, dtype=torch.bool), torch.arange(16).expand(16, 16) % 2 == 0
    key_token_values(ids, mask, correct, leave_one_out=leave_one_out)  # fills the caches of the tables
    tracemalloc.start()  # NumPy's memory
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            key_token_values(ids, mask, correct, leave_one_out=leave_one_out)
        _, arrays = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allocated = tensors = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            tensors = max(tensors, allocated)
    assert ids.nbytes < arrays  # with the values
    assert tensors > 0
    assert arrays + tensors <= times * ids.nbytes


# Counting


def random_counting(P=5, G=8, T=40, vocabulary=60, seed=3):
    rng = np.random.default_rng(seed)
    ids = torch.tensor(rng.integers(0, vocabulary, (P, G, T)))
    counted = torch.tensor(rng.random((P, G, T)) < 0.7)
    counted[1] = False
    return ids, counted, torch.tensor(rng.random((P, G)) < 0.5)


def as_dict(ids, counted, right, counts):
    """Counts in a form that no order of the entries changes; `spread` is used on the way."""
    G, T = ids.shape[1:]
    columns = zip(*(x.tolist() for x in (counts.a, counts.b, counts.count_right, counts.count_wrong)), strict=True)
    tokens = dict(zip(zip(counts.group.tolist(), counts.token.tolist(), strict=True), columns, strict=True))
    of = counts.pairs.token if counts.pairs else torch.arange(len(counts.token))

    def spread(values):
        out = torch.empty(ids.shape, dtype=values.dtype)
        counts.spread(values, out)
        return out

    token = spread(counts.token.index_select(0, of.long()) + 1) - 1
    assert torch.equal(token, torch.where(counted, ids, -1))
    group = spread(counts.group.index_select(0, of.long()) + 1)
    assert torch.equal(group[counted], (torch.arange(len(ids)) + 1)[:, None, None].expand_as(ids)[counted].int())
    if not counts.pairs:
        return tokens
    rollout = spread(counts.pairs.rollout + 1).view(-1)
    assert torch.equal(rollout, ((torch.arange(len(ids) * G) + 1).repeat_interleave(T) * counted.view(-1)).int())
    return tokens, spread(counts.pairs.count).view(-1).tolist()


def expected_counts(ids, counted, right):
    """The counts of each token of each group, and of each position in its rollout, by Python's sets and Counter."""
    texts = [[row[m].tolist() for row, m in zip(*group, strict=True)] for group in zip(ids, counted, strict=True)]
    expected = {}
    for p, group in enumerate(texts):
        for token in {token for text in group for token in text}:
            sides = [[text for text, y in zip(group, right[p], strict=True) if y == side] for side in (True, False)]
            expected[p, token] = (
                *(sum(token in text for text in side) for side in sides),
                *(sum(text.count(token) for text in side) for side in sides),
            )
    own = [
        text.count(token) if m else 0
        for p, group in enumerate(texts)
        for text, row, marks in zip(group, ids[p].tolist(), counted[p].tolist(), strict=True)
        for token, m in zip(row, marks, strict=True)
    ]
    return expected, own


@pytest.mark.parametrize("pairs", [False, True])
def test_counts(pairs):
    ids, counted, right = random_counting()
    expected, own = expected_counts(ids, counted, right)
    sizes = torch.arange(2 * len(ids)).view(2, -1)
    counts, listed = counting.count(ids, counted, right, sizes, pairs=pairs)
    assert listed == sizes.tolist()
    found = as_dict(ids, counted, right, counts)
    assert found == ((expected, own) if pairs else expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_counts_of_the_compiled_loop(threads, monkeypatch):
    loops = compiled_loop(monkeypatch, threads)
    ids, counted, right = random_counting()
    P, G, _ = ids.shape
    voters = loops.Voters(np.zeros((P, 1), np.int32), *np.ones((2, P, 1), np.float32))
    tables = loops.Tables(*np.zeros((2, (G + 1) ** 2), np.float32), G + 1)
    _, columns = loops.key_token_values(ids, counted, right, ~right, voters, tables, 1.0, [], keep=True)
    group, token, *counts = (x.tolist() for x in columns)
    found = dict(zip(zip(group, token, strict=True), zip(*counts, strict=True), strict=True))
    assert found == expected_counts(ids, counted, right)[0]
    assert len(found) == len(group)


def compiled_loop(monkeypatch, threads):
    """The loops, on threads for batches however small."""
    pytest.importorskip("numba")
    from ktae_trl.credit.ktae import loops

    monkeypatch.setattr(loops, "_PART", 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    return loops


@pytest.mark.parametrize("shift", [-30, 2**33])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("numba", [True, False])
def test_ids_out_of_range_are_counted_too(shift, leave_one_out, numba, monkeypatch):
    if numba:
        compiled_loop(monkeypatch, threads=3)
    monkeypatch.setattr(ktae, "NUMBA", numba)
    ids, mask, correct = random_groups(8, P=5)
    ids = torch.where(mask, ids, -100 - shift)  # what is masked does not matter

    def columns(shift):
        options = {"leave_one_out": leave_one_out, "ignore_ids": [3 + shift, 5 + shift, -7 + shift]}
        table = key_token_table(ids + shift, mask, correct, **options)
        statistics = zip(*(x.tolist() for x in (table.group, table.token - shift, *table[5:])), strict=True)
        return table.values, sorted(statistics)

    (found, statistics), (expected, expected_statistics) = columns(shift), columns(0)
    assert torch.equal(found, expected)
    assert statistics == expected_statistics
    assert {token for _, token, *_ in statistics} & {1, 2, 3, 4, 5} == {1, 2, 4}


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_threads_change_no_bit(leave_one_out, monkeypatch):
    compiled_loop(monkeypatch, threads=1)
    inputs = random_groups(9, P=7)
    alone = key_token_table(*inputs, leave_one_out=leave_one_out)
    used = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: used.append(3) or 3)
    for together, expected in zip(key_token_table(*inputs, leave_one_out=leave_one_out), alone, strict=True):
        assert torch.equal(together, expected)
    assert used


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("measure", [key_token_values, key_token_strengths])
def test_the_compiled_loop_and_pytorch_agree(leave_one_out, measure, monkeypatch):
    """On groups as of text, with several h3; the slow loop is too slow for these."""
    pytest.importorskip("numba")
    ids, mask, correct = make(Size(groups=12, tokens=300), seed=1)
    scored = torch.rand(correct.shape, generator=torch.Generator().manual_seed(0)) < 0.9
    weights = [{}] if measure is key_token_strengths else [{"tf_weight": h3} for h3 in (0.0, 1e-3, 1.0)]
    for options in weights:
        options |= {"leave_one_out": leave_one_out, "scored": scored, "ignore_ids": [int(ids[0, 0, 0])]}
        by_loop = measure(ids, mask, correct, **options)
        with monkeypatch.context() as without:
            without.setattr(ktae, "NUMBA", False)
            by_sort = measure(ids, mask, correct, **options)
        assert (by_sort.abs() > 0.01).float().mean() > 0.01
        torch.testing.assert_close(by_loop, by_sort, rtol=0, atol=3e-7)


def test_hyperbolic_tangent_of_the_compiled_loop():
    pytest.importorskip("numba")
    from ktae_trl.credit.ktae import loops

    x = np.concatenate([np.linspace(0, 12, 997), np.geomspace(1e-9, 1, 97), [1e3, 1e30, np.inf]])
    found = np.array([loops.tanh(y) for y in x])
    np.testing.assert_allclose(found, np.tanh(x), rtol=2e-8, atol=1e-14)
    assert (found <= 1).all()
    assert [loops.tanh(-y) for y in x] == (-found).tolist()


class Sorted(TorchFunctionMode):
    """Counts the elements that PyTorch sorts."""

    NAMES = {"sort", "msort", "argsort", "topk", "kthvalue", "unique", "unique_consecutive", "lexsort", "median"}

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__.strip("_").removesuffix("2")
        self.elements += args[0].numel() if name in self.NAMES else 0
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("measure", [key_token_values, key_token_strengths, key_token_table])
def test_without_numba_each_id_is_sorted_once(leave_one_out, measure, monkeypatch):
    """In several rounds, with the tables, which sort the tables of each split."""
    monkeypatch.setattr(ktae, "NUMBA", False)
    ids, mask, correct = random_groups(3, P=6, T=400)
    monkeypatch.setattr(ktae, "_ROUND", 2 * ids[0].numel())
    ktae.fisher_p_table.cache_clear()
    with Sorted() as mode:
        measure(ids, mask, correct, leave_one_out=leave_one_out, ignore_ids=[0])
    assert ids.numel() < mode.elements < 1.5 * ids.numel()
    with Sorted() as mode:
        ids.unique(), ids.sort(), ids[0].argsort(), torch.sort(ids[1]), torch.unique(ids[2])
    assert mode.elements == 2.5 * ids.numel()


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_groups_are_valued_in_rounds(leave_one_out, monkeypatch):
    monkeypatch.setattr(ktae, "NUMBA", False)
    ids, mask, correct = random_groups(7, P=7)
    whole = key_token_table(ids, mask, correct, leave_one_out=leave_one_out)
    monkeypatch.setattr(ktae, "_ROUND", 2 * ids[0].numel())
    for found, expected in zip(key_token_table(ids, mask, correct, leave_one_out=leave_one_out), whole, strict=True):
        assert torch.equal(found, expected)


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ids": torch.ones(4, 5, dtype=torch.long)}, ValueError, r"ids must have shape .* not \(4, 5\)"),
        ({"ids": torch.ones(2, 4, 5)}, TypeError, "ids must be integers, not torch.float32"),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask must have shape \(2, 4, 5\).* not \(2, 4\)"),
        ({"correct": torch.ones(2, 5)}, ValueError, r"correct must have shape \(2, 4\)"),
        ({"scored": torch.ones(8)}, ValueError, r"scored must have shape \(2, 4\)"),
        ({"ig_weight": -1.0}, ValueError, "ig_weight must be a finite number >= 0, not -1.0"),
        ({"tf_weight": float("nan")}, ValueError, "tf_weight must be a finite number"),
        ({"fisher_weight": 0.0, "ig_weight": 0.0}, ValueError, "fisher_weight and ig_weight are both 0"),
    ],
)
def test_bad_input(change, error, words):
    good = {
        "ids": torch.ones(2, 4, 5, dtype=torch.long),
        "mask": torch.ones(2, 4, 5),
        "correct": torch.ones(2, 4),
    }
    with pytest.raises(error, match=words):
        key_token_values(**{**good, **change})


class Waits(TorchFunctionMode):
    """Collects the operations that make the host wait for a device, or copy from it."""

    ALWAYS = {
        "tolist",
        "item",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "cpu",
        "numpy",
        "nonzero",
        "unique",
    } | {*("masked_select", "argwhere", "bincount", "equal", "allclose", "is_nonzero", "unique_consecutive")}

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        of_mask = name in ("__getitem__", "__setitem__") and "bool" in str([getattr(a, "dtype", a) for a in args[1:2]])
        of_lengths = name == "repeat_interleave" and isinstance((args[1:2] or [0])[0], torch.Tensor)
        if name in self.ALWAYS or of_mask or of_lengths:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("measure", [key_token_values, key_token_strengths])
def test_a_gpu_is_waited_for_once(measure, leave_one_out, monkeypatch):
    """The way that GPUs take, run on the CPU. tests/gpu counts it with CUDA's own warnings."""
    monkeypatch.setattr(ktae, "NUMBA", False)
    ids, mask, correct = random_groups(3, P=5)
    with Waits() as waits:
        measure(ids, mask, correct, leave_one_out=leave_one_out, ignore_ids=[0])
    assert waits.seen == ["tolist"]
    with Waits() as waits:
        ids[mask].sum().item()
    assert waits.seen == ["__getitem__", "item"]
