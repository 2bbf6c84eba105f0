"""Tree sampling without a model: values and advantages worked by hand and by recursion, and how trees are laid out."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from ktae_trl.credit import tree
from ktae_trl.credit.method import Groups
from ktae_trl.credit.tree import Shape, TreeRPO, advantages_by_depth, node_values, sample, sibling_advantages
from tests.reference.tree_loop import Node, compare, nodes, rows

EOS, NAN = 99, math.nan
NO_PROMPTS = (None, None, None)  # trees are valued without them


def settings(
    N: int, D: int, L: int, min_spread: float = 0.1, normalizer: str = "bernoulli", spread: str = "range"
) -> SimpleNamespace:
    return SimpleNamespace(
        tree_branching=N,
        tree_depth=D,
        tree_segment_tokens=L,
        tree_min_spread=min_spread,
        tree_normalizer=normalizer,
        tree_spread=spread,
    )


# Values and advantages


def test_a_tree_by_hand():
    """Four leaves, right, wrong, right, right: the first pair tells its two apart, the second does not."""
    values = node_values(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 2)
    assert [level.tolist() for level in values] == [[[0.75]], [[0.5, 1.0]], [[1.0, 0.0, 1.0, 1.0]]]
    first, second = advantages_by_depth(values[-1], 2, 0.1, "bernoulli")
    # 1/4 from the mean 3/4, over sqrt(3/16)
    torch.testing.assert_close(first, torch.tensor([[-1.0, 1.0]]) / math.sqrt(3))
    torch.testing.assert_close(second, torch.tensor([[1.0, -1.0, 0.0, 0.0]]))
    first, second = advantages_by_depth(values[-1], 2, 0.1, "none")
    torch.testing.assert_close(first, torch.tensor([[-0.25, 0.25]]))
    torch.testing.assert_close(second, torch.tensor([[0.5, -0.5, 0.0, 0.0]]))
    first, second = advantages_by_depth(values[-1], 2, 0.1, "std")
    # the unbiased deviation of {1/2, 1} is sqrt(1/8), that of {0, 1} sqrt(1/2)
    torch.testing.assert_close(first, torch.tensor([[-0.25, 0.25]]) / (math.sqrt(1 / 8) + 1e-4))
    torch.testing.assert_close(second, torch.tensor([[0.5, -0.5, 0.0, 0.0]]) / (math.sqrt(1 / 2) + 1e-4))


def test_an_uneven_tree_by_hand():
    """Segments of 2 tokens at most. The first child ended at once and is right, so it has no sibling group below; the
    second has a right and a wrong leaf. v = 1 and 1/2, mu = 3/4."""
    ids = torch.tensor([[[5, EOS, 0, 0], [5, EOS, 0, 0], [6, 7, 8, EOS], [6, 7, EOS, 0]]])
    mask = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]]).bool()
    correct = torch.tensor([[True, True, True, False]])
    groups = Groups(ids, mask, correct, torch.ones(1, 4).bool(), torch.zeros(4), *NO_PROMPTS, (EOS, 0), slice(0, 4))
    credit = TreeRPO(settings(2, 2, 2), None).credit(groups)
    a = 1 / math.sqrt(3)
    expected = torch.tensor([[a, a, 0, 0], [0, 0, 0, 0], [-a, -a, 1, 1], [0, 0, -1, 0]])
    torch.testing.assert_close(credit.values_BT, expected)
    assert TreeRPO.how == "replace"
    stats = {name: (total.item(), count.item()) for name, (total, count) in credit.sums.items()}
    assert stats == {
        "tree/signal_depth_1": (1, 1),
        "tree/signal_depth_2": (1, 1),
        "tree/ending_depth": (1 + 2 + 2, 3),
        "tree/generated_tokens": (7, 1),
        "tree/row_tokens": (4 + 4 + 3, 1),
        "tree/trained_share": (7, 7),
    }


def test_a_tree_that_ended_at_once():
    """Nobody has a second segment, and no token reaches it."""
    mask = torch.tensor([[[1], [0], [1], [0]]]).bool()
    correct = torch.tensor([[True, True, False, False]])
    groups = Groups(mask.int() * EOS, mask, correct, correct | True, torch.zeros(4), *NO_PROMPTS, (EOS, 0), slice(0, 4))
    credit = TreeRPO(settings(2, 2, 2), None).credit(groups)
    torch.testing.assert_close(credit.values_BT, torch.tensor([[1.0], [0.0], [-1.0], [0.0]]))
    assert [x.item() for x in credit.sums["tree/signal_depth_2"]] == [0, 0]
    assert [x.item() for x in credit.sums["tree/ending_depth"]] == [2, 2]


def test_siblings_that_are_near_are_left_alone():
    near = torch.tensor([0.49, 0.49, 0.51, 0.51])
    assert sibling_advantages(near, 0.1, "std").tolist() == [0, 0, 0, 0]
    scaled = sibling_advantages(near, 0.0, "bernoulli")  # and they are not blown up to those of {0, 0, 1, 1}
    torch.testing.assert_close(scaled, torch.tensor([-0.01, -0.01, 0.01, 0.01]) / 0.5)
    at_the_limit = torch.tensor([[3 / 10, 4 / 10], [7 / 10, 8 / 10]])  # .4 - .3 is less than .1 in float32
    assert (sibling_advantages(at_the_limit, 0.1, "none") != 0).all()
    assert (sibling_advantages(torch.tensor([0.3, 0.201]), 0.1, "none") == 0).all()


def test_the_measure_of_spread_by_hand():
    """{0, 0, 0, .125}: mean 1/32, range .125, squared deviations 3 (1/32)^2 + (3/32)^2 = 12/1024, so sigma is
    sqrt(12/1024 / 3) = 1/16. Without the last value but one it is sqrt(6/576 / 2) = .0722."""
    values = torch.tensor([0.0, 0.0, 0.0, 0.125])
    expected = [-1 / 32, -1 / 32, -1 / 32, 3 / 32]
    for spread, size in (("range", 0.125), ("std", 1 / 16)):
        assert sibling_advantages(values, size, "none", spread).tolist() == expected
        assert sibling_advantages(values, size - 1e-4, "none", spread).tolist() == expected
        assert sibling_advantages(values, size + 1e-4, "none", spread).tolist() == [0, 0, 0, 0]
    one_unknown = torch.tensor([0.0, 0.0, NAN, 0.125])
    assert sibling_advantages(one_unknown, 0.0721, "none", "std")[3] > 0
    assert (sibling_advantages(one_unknown, 0.0723, "none", "std") == 0).all()
    assert sibling_advantages(values, 0.1, "none").tolist() == expected  # the range is the default


def test_the_measure_of_spread_reaches_each_depth():
    """The pairs {1, 0} have range 1 and sigma .707; their parents {.5, 1} range .5 and sigma .354."""
    leaves = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    first, second = advantages_by_depth(leaves, 2, 0.4, "bernoulli", "std")
    assert (first == 0).all()
    assert second.tolist() == [[1, -1, 0, 0]]
    mask = torch.ones(1, 4, 4).bool()
    mask[:, 1, :2] = mask[:, 3, :2] = False
    flags = torch.ones(1, 4).bool()
    groups = Groups(mask.int(), mask, leaves.bool(), flags, torch.zeros(4), *NO_PROMPTS, (EOS, 0), slice(0, 4))
    for spread, signal in (("range", 1), ("std", 0)):
        credit = TreeRPO(settings(2, 2, 2, 0.4, spread=spread), None).credit(groups)
        assert credit.sums["tree/signal_depth_1"][0] == signal
        assert credit.sums["tree/signal_depth_2"][0] == 1


@pytest.mark.parametrize("spread", tree.SPREADS)
@pytest.mark.parametrize("normalizer", tree.NORMALIZERS)
@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [NAN, NAN], [NAN, 1.0]])
def test_equal_or_single_siblings_have_none(values, normalizer, spread):
    assert sibling_advantages(torch.tensor(values), 0.0, normalizer, spread).tolist() == [0, 0]


def test_unscorable_leaves_are_left_out():
    values = node_values(torch.tensor([[1.0, NAN, 0.0, 1.0], [NAN, NAN, 0.0, 1.0]]), 2)
    assert values[1].tolist()[0] == [1.0, 0.5]
    assert values[1].isnan().tolist()[1] == [True, False]
    assert values[0].tolist() == [[0.75], [0.5]]
    advantages = sibling_advantages(torch.tensor([1.0, NAN, 0.0]), 0.1, "bernoulli")
    assert advantages.tolist() == [1, 0, -1]


# The layout, against trees as nodes


def grow(N: int, D: int, L: int, rng: random.Random) -> Node:
    """Return a random tree: segments of up to L tokens, some of which end their text."""

    def below(depth: int) -> list[Node]:
        children = []
        for _ in range(N):
            ends = rng.random() < 0.35
            tokens = [rng.randrange(5) for _ in range(rng.randrange(L) if ends else L)] + [EOS] * ends
            child = Node(tokens, [] if ends or depth == D else below(depth + 1))
            if not child.children:
                child.reward = rng.choice([0.0, 1.0, 1.0, None])
            children.append(child)
        return children

    return Node([], below(1))


def written_out(root: Node, size: int) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Return the ids, the mask of what is trained and the advantages of each row."""
    ids = [[t for node, _ in row for t in node.tokens] for row in rows(root, size)]
    mask = [[int(own) for node, own in row for _ in node.tokens] for row in rows(root, size)]
    advantages = [[node.advantage * own for node, own in row for _ in node.tokens] for row in rows(root, size)]
    return ids, mask, advantages


def padded(x: list[list], T: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([row + [0] * (T - len(row)) for row in x], dtype=dtype)


SHAPES = [(2, 1, 3), (2, 3, 2), (3, 2, 4), (4, 2, 1), (2, 4, 3)]


@pytest.mark.parametrize("normalizer", tree.NORMALIZERS)
@pytest.mark.parametrize(("N", "D", "L"), SHAPES)
def test_credit_of_random_trees(N, D, L, normalizer):
    rng = random.Random(f"{N} {D} {L}")
    roots = [grow(N, D, L, rng) for _ in range(40)]
    for root in roots:
        compare(root, 0.3, normalizer)
    written = [written_out(root, N**D) for root in roots]
    T = max(len(row) for ids, _, _ in written for row in ids) + 2
    ids, mask, expected = (
        torch.stack([padded(parts[i], T, dtype) for parts in written])
        for i, dtype in enumerate((torch.int, torch.bool, torch.float32))
    )
    rewards = [[row[-1][0].reward for row in rows(root, N**D)] for root in roots]
    leaves = torch.tensor([[NAN if reward is None else reward for reward in row] for row in rewards])
    groups = Groups(
        ids, mask, leaves > 0, ~leaves.isnan(), torch.zeros(len(roots) * N**D), *NO_PROMPTS, (), slice(None)
    )
    credit = TreeRPO(settings(N, D, L, 0.3, normalizer), None).credit(groups)
    torch.testing.assert_close(credit.values_BT, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    assert (expected != 0).any()

    every = [(before, node) for root in roots for before, node in nodes(root)]
    stats = {name: (total.item(), count.item()) for name, (total, count) in credit.sums.items()}
    assert stats["tree/generated_tokens"] == (sum(len(node.tokens) for _, node in every), len(roots))
    assert stats["tree/row_tokens"] == (sum(len(row) for ids, _, _ in written for row in ids), len(roots))
    assert stats["tree/trained_share"][0] == sum(len(node.tokens) for _, node in every if node.advantage)
    parents = [node for root in roots for node in (root, *(node for _, node in nodes(root))) if node.children]
    groups = {depth: [] for depth in range(1, D + 1)}
    endings = []
    for root in roots:
        for depth, node in by_depth(root):
            if node.children:
                groups[depth + 1].append(any(child.advantage for child in node.children))
            else:
                endings.append(depth)
    assert sum(map(len, groups.values())) == len(parents)
    for depth, signal in groups.items():
        assert stats[f"tree/signal_depth_{depth}"] == (sum(signal), len(signal))
    assert stats["tree/ending_depth"] == (sum(endings), len(endings))


def by_depth(node: Node, depth: int = 0) -> list[tuple[int, Node]]:
    return [(depth, node), *(found for child in node.children for found in by_depth(child, depth + 1))]


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize(("N", "D", "L"), SHAPES)
def test_rows_of_random_trees(N, D, L, scores):
    """`sample` lays out what it is given as the recursion does, and asks for each segment once, in order."""
    rng = random.Random(f"{N} {D} {L}")
    roots = [grow(N, D, L, rng) for _ in range(6)]
    prompt_ids = [[1000 + i] for i in range(len(roots)) for _ in range(N**D)]
    levels = [list(roots)]
    asked = []

    def generate(prefixes, max_tokens):
        asked.append((prefixes, max_tokens))
        levels.append([child for node in levels[-1] for child in node.children])
        tokens = [list(node.tokens) for node in levels[-1]]
        return tokens, [[-0.5 - t for t in segment] for segment in tokens] if scores else None

    output = sample(prompt_ids, generate, Shape(N, D, L), {EOS})
    written = [written_out(root, N**D) for root in roots]
    assert output.completions == [row for ids, _, _ in written for row in ids]
    assert output.trained == [row for _, mask, _ in written for row in mask]
    expected = [[-0.5 - t for t in row] for row in output.completions] if scores else None
    assert output.logprobs == expected
    wanted = [(i, *pair) for i, root in enumerate(roots) for pair in nodes(root)]
    assert len(asked) == D
    assert {max_tokens for _, max_tokens in asked} == {L}
    assert sorted(prefix for prefixes, _ in asked for prefix in prefixes) == sorted(
        [1000 + i, *before] for i, before, _ in wanted
    )


def test_a_process_with_nothing_to_sample_still_asks():
    asked = []

    def generate(prefixes, max_tokens):
        asked.append(len(prefixes))
        return [[EOS] for _ in prefixes], None

    output = sample([[1]] * 8, generate, Shape(2, 3, 4), {EOS})
    assert asked == [2, 0, 0]
    assert output.completions == [[EOS]] * 8
    assert output.trained == [[1], [0], [0], [0]] * 2


def test_a_segment_that_fills_its_tokens_may_end_all_the_same():
    """And one that is cut short without an end-of-sequence id, as by a full context, has ended too."""
    answers = iter([[[5, EOS], [5, 5], [6], [7, EOS]], [[8, 8]] * 4])
    output = sample([[1]] * 16, lambda prefixes, max_tokens: (next(answers), None), Shape(4, 2, 2), {EOS})
    lengths = [len(ids) for ids in output.completions]
    assert lengths == [2] * 4 + [4] * 4 + [1] * 4 + [2] * 4


def test_the_shape_fills_the_completion():
    args = settings(2, 3, None)
    args.max_completion_length = 50
    assert Shape.of(args) == (2, 3, 16)


def test_a_process_must_hold_whole_trees():
    """24 rows on two processes are three trees, one of which would lie on both."""
    args = settings(2, 3, 4)
    vars(args).update(max_completion_length=12, num_generations=8, per_device_train_batch_size=4)
    args.steps_per_generation = 3
    with pytest.raises(
        ValueError, match=r"complete trees, but a process has 12 rows \(4 per_device_train_batch_size x 3 steps"
    ):
        TreeRPO.check_run(args)
