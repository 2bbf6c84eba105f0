"""Tree sampling in training: what is generated, what the loss makes of it, and what is refused."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from ktae_trl import tiny, trl_seam
from ktae_trl.credit.tree import TreeRPO
from ktae_trl.rewards import math_accuracy
from ktae_trl.rollouts.credited import check_sampler
from ktae_trl.rollouts.tools import TrainerTools
from tests.reference.tree_loop import Node, compare, nodes
from tests.rollouts.test_dynamic_sampling import number, watch
from tests.trainers import HOOKS, around, difference, hook, logged, make_trainer, prompts, replay, weights

# 2 prompts a generation, segments of 20 tokens: guesses end in the first, careful solutions in the second or third.
TREE = {"credit": "tree", "max_completion_length": 60}


def recorded(trainer) -> list[tuple[list[list[int]], list[list[int]]]]:
    """Collect what TRL is asked to continue, and what it generates."""
    calls = []

    def spy(generate, prompt_ids, *rest, **more):
        output = generate(prompt_ids, *rest, **more)
        calls.append(([list(ids) for ids in prompt_ids], [list(ids) for ids in output[0]]))
        return output

    around(trainer, "sampling", spy)
    return calls


def grown(calls, prompts: int, N: int, L: int, eos: int) -> list[Node]:
    """Put the trees of a generation together: at each depth, the next N segments are those of the next node."""
    roots = [Node([]) for _ in range(prompts)]
    growing = roots
    for _, segments in calls:
        if not growing:  # nothing was wanted of this call
            break
        assert len(segments) == N * len(growing)
        for i, node in enumerate(growing):
            node.children = [Node(tokens) for tokens in segments[N * i : N * (i + 1)]]
        below = [child for node in growing for child in node.children]
        growing = [node for node in below if len(node.tokens) == L and node.tokens[-1] != eos]
    return roots


def generated(trainer, rows: int = 16):
    """Generate and score one batch, and return it with its trees, graded and compared by recursion."""
    calls, args = recorded(trainer), trainer.args
    trainer.model.train()
    inputs = [dict(trainer.train_dataset[i // args.num_generations]) for i in range(rows)]
    batch = hook(trainer, "batch")(inputs)
    segment_tokens = args.tree_segment_tokens or args.max_completion_length // args.tree_depth
    count = rows // args.num_generations
    roots = grown(calls, count, args.tree_branching, segment_tokens, trainer.processing_class.eos_token_id)
    first = [calls[0][0][i * args.tree_branching] for i in range(count)]
    for i, root in enumerate(roots):
        for before, node in nodes(root):
            if not node.children:
                text = trainer.processing_class.decode([*before, *node.tokens], skip_special_tokens=True)
                completion = [{"role": "assistant", "content": text}]
                (node.reward,) = math_accuracy(
                    completions=[completion],
                    solution=[trainer.train_dataset[i]["solution"]],
                    log_metric=lambda *_: None,
                )
        compare(root, args.tree_min_spread, args.tree_normalizer)
    return batch, list(zip(first, roots, strict=True))


# What is generated


def test_each_depth_is_one_call_and_the_limit_is_restored(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=prompts(2, tiny.HELD_OUT), tree_segment_tokens=15, **TREE)
    calls = recorded(trainer)
    trainer.train()
    assert len(calls) == 3 * 3
    for depth, (prefixes, segments) in enumerate(calls):
        assert max(map(len, segments)) <= 15
        if depth % 3 == 0:
            assert len(prefixes) == 2 * 2
    assert any(len(ids) > 15 for _, segments in calls for ids in segments) is False
    assert trainer.generation_config.max_new_tokens == 60
    assert trainer.rollout_func is None
    calls.clear()
    trainer.evaluate()  # flat samples of the whole length
    assert [len(segments) for _, segments in calls] == [8, 8]
    assert max(len(ids) for _, segments in calls for ids in segments) > 45
    assert not [key for entry in trainer.state.log_history for key in entry if key.startswith("eval_tree/")]


def test_the_limit_is_restored_after_a_failure(tmp_path):
    trainer = make_trainer(tmp_path, **TREE)
    limits = []

    def fail(*arguments, **more):
        limits.append(trainer.generation_config.max_new_tokens)
        raise RuntimeError("no memory")

    around(trainer, "sampling", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.train()
    assert limits == [20]
    assert trainer.generation_config.max_new_tokens == 60
    assert trainer.rollout_func is None


@pytest.mark.parametrize(
    ("vllm", "own", "elsewhere", "asked", "limit"),
    [
        ({}, 3, 7, 3, 20),
        ({}, 0, 7, 1, 1),  # each process generates alone, but as often as the others
        ({"vllm_mode": "colocate", "tensor_parallel": 1}, 0, 7, 1, 1),
        ({"vllm_mode": "server", "tensor_parallel": 1}, 3, 7, 7, 20),
        ({"vllm_mode": "server", "tensor_parallel": 1}, 0, 7, 7, 20),  # as many prompts and the same limit
        ({"vllm_mode": "server", "tensor_parallel": 1}, 0, 0, 1, 1),
        ({"vllm_mode": "colocate", "tensor_parallel": 2}, 3, 7, 7, 20),
    ],
)
def test_a_process_asks_for_what_the_backend_needs(monkeypatch, vllm, own, elsewhere, asked, limit):
    monkeypatch.setattr(trl_seam, "passed", {"sampling"})  # this trainer has nothing else
    seen = []
    backend = SimpleNamespace(max_completion_length=60, max_new_tokens=60)

    def generate(prompt_ids, images, fields, num_generations):
        assert (images, fields, num_generations) == (None, {}, 1)
        seen.append((len(prompt_ids), backend.max_completion_length if vllm else backend.max_new_tokens))
        return [[i] for i in range(len(prompt_ids))], [[-1.0] for _ in prompt_ids]

    told = iter([[min(own, 1), min(elsewhere, 1)], [own, elsewhere]])  # rounds, then texts
    text_config = SimpleNamespace(vocab_size=2, hidden_size=1)
    trainer = SimpleNamespace(
        use_vllm=bool(vllm),
        vllm_mode=vllm.get("vllm_mode"),
        args=SimpleNamespace(
            vllm_tensor_parallel_size=vllm.get("tensor_parallel"),
            per_device_train_batch_size=4,
            steps_per_generation=4,
        ),
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text_config)),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: torch.tensor(next(told))),
        _tokenizer=None,
        eos_token_ids=[0],
        **({"vllm_generation": backend} if vllm else {}),
        generation_config=backend,
        **{HOOKS["sampling"]: generate},
    )
    ids, logprobs = TrainerTools(trainer).generate([[5]] * own, 20)
    assert seen == [(asked, limit)]
    assert (ids, logprobs) == ([[i] for i in range(own)], [[-1.0]] * own)
    assert (backend.max_completion_length, backend.max_new_tokens) == (60, 60)


# What it trains


@pytest.mark.slow_after(3)
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"tree_branching": 8, "tree_depth": 1}])
def test_a_tree_of_depth_one_is_grpo(tmp_path, loss_type, settings):
    """Bit for bit, with GRPO's normaliser; of any depth it is not."""
    common = {"loss_type": loss_type, "max_completion_length": 24, "num_iterations": settings.get("num_iterations", 1)}
    flat = make_trainer(tmp_path / "flat", credit="none", **common)
    flat.train()
    shape = {"tree_branching": 8, "tree_depth": 1, "tree_normalizer": "std", "tree_min_spread": 0.0}
    tree = make_trainer(tmp_path / "tree", credit="tree", **shape, **common)
    start = weights(tree)
    tree.train()
    assert difference(weights(tree), weights(flat)) == 0
    assert difference(weights(tree), start) > 1e-4
    own = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
    for ours, theirs in zip(tree.state.log_history, flat.state.log_history, strict=True):
        assert {k: v for k, v in theirs.items() if k not in own} == {
            k: v for k, v in ours.items() if k not in own and not k.startswith("tree/")
        }


@pytest.mark.parametrize("normalizer", ["bernoulli", "none"])
def test_other_normalisers_scale_the_advantages_of_a_group(tmp_path, normalizer):
    shape = {"tree_branching": 8, "tree_depth": 1, "tree_normalizer": normalizer, "max_completion_length": 24}
    trainer = make_trainer(tmp_path, credit="tree", **shape)
    batch, trees = generated(trainer)
    informative = 0
    leaves = [[child.reward for child in root.children] for _, root in trees]
    for rewards, of_group, values in zip(
        torch.tensor(leaves),
        batch["advantages"].view(-1, 8),
        batch["credit"][:, 0].view(-1, 8),
        strict=True,
    ):
        scale = {"none": 1.0, "bernoulli": (rewards.mean() * (1 - rewards.mean())).sqrt()}[normalizer]
        if rewards.std() > 0:
            informative += 1
            torch.testing.assert_close(values * scale, of_group * (rewards.std() + 1e-4))
    assert informative


@pytest.mark.slow_after(3)
@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("dapo", {}),
        ("bnpo", {}),
        ("dr_grpo", {}),
        ("dapo", {"tree_branching": 3, "tree_depth": 2, "num_generations": 9, "tree_segment_tokens": 7}),
        ("dapo", {"tree_normalizer": "std", "tree_min_spread": 0.0}),
        ("dapo", {"beta": 0.5}),
        ("dapo", {"entropy_coef": 0.1}),
        ("dapo", {"beta": 0.5, "entropy_coef": 0.1, "use_bias_correction_kl": False, "steps_per_generation": 2}),
    ],
)
def test_every_segment_is_in_the_loss_once(tmp_path, loss_type, settings):
    """The gradient of a batch is that of a loss written segment by segment, each after its own path."""
    G = settings.get("num_generations", 8)
    rows = 4 * G
    half = settings.get("steps_per_generation", 1)
    trainer = make_trainer(
        tmp_path, **TREE | {"loss_type": loss_type, "per_device_train_batch_size": rows // half} | settings
    )
    if "beta" in settings:  # away from the reference
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    batch, trees = generated(trainer, rows)
    trainer.current_gradient_accumulation_steps = 1
    segments = [(prompt, before, node) for prompt, root in trees for before, node in nodes(root)]
    tokens = sum(len(node.tokens) for _, _, node in segments)
    lengths = {len(node.tokens) for _, _, node in segments}
    assert len(lengths) >= 3
    assert {node.advantage > 0 for _, _, node in segments if node.advantage} == {True, False}
    assert any(node.children and node.advantage for _, _, node in segments)
    assert batch["num_items_in_batch"] == (batch["completion_mask"] * batch["tool_mask"]).sum() == tokens

    model = trainer.model
    loss = hook(trainer, "loss")(model, batch)
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    policy = kl = entropy = 0.0
    sampled = []
    for prompt, before, node in segments:
        logits = scores(model, prompt, before, node)
        chosen = logits[range(len(node.tokens)), node.tokens]
        sampled += chosen.tolist()
        ratio = (chosen - chosen.detach()).exp()
        policy = policy - (ratio * node.advantage).sum()
        entropy = entropy - (logits.exp() * logits).sum()
        if "beta" in settings:
            with torch.no_grad():
                reference = scores(trainer.ref_model, prompt, before, node)[range(len(node.tokens)), node.tokens]
            estimate = (reference - chosen).exp() - (reference - chosen) - 1
            kl = kl + (estimate * ratio if trainer.args.use_bias_correction_kl else estimate).sum()
    count = {"dapo": tokens / half, "bnpo": tokens, "dr_grpo": rows * 60}[loss_type]
    expected = (policy + settings.get("beta", 0) * kl) / count - settings.get("entropy_coef", 0) * entropy / tokens
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert max(grad.abs().max() for grad in gradient.values()) > 1e-3
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, atol=2e-6, rtol=1e-4)

    if half > 1:  # the old log-probabilities, of which the ratios are made
        old, mask = batch["old_per_token_logps"], (batch["completion_mask"] * batch["tool_mask"]).bool()
        torch.testing.assert_close(torch.tensor(sorted(sampled)), old[mask].sort().values, atol=1e-5, rtol=0)


def scores(model, prompt: list[int], before: tuple[int, ...], node: Node) -> torch.Tensor:
    """Return the log-probabilities of all tokens at each position of a segment, without padding or batching."""
    ids = torch.tensor([[*prompt, *before, *node.tokens]])
    return model(ids).logits[0, -len(node.tokens) - 1 : -1].log_softmax(-1)


def test_tokens_of_other_rows_are_context(tmp_path):
    """Rows that share a node read the same tokens there, and one of them trains it."""
    trainer = make_trainer(tmp_path, **TREE)
    batch, trees = generated(trainer)
    ids, mask = batch["completion_ids"], batch["completion_mask"] * batch["tool_mask"]
    for first, (_, root) in zip((0, 8), trees, strict=True):
        for i, child in enumerate(root.children):
            block = slice(first + 4 * i, first + 4 * i + 4)
            n = len(child.tokens)
            assert ids[block, :n].tolist() == [child.tokens] * 4
            assert mask[block, :n].tolist() == [[1] * n] + [[0] * n] * 3
            assert (batch["credit"][block, :n] == torch.tensor([[child.advantage], [0], [0], [0]])).all()


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "dr_grpo"])
def test_it_trains_and_logs_every_metric(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, loss_type=loss_type, num_iterations=2, steps_per_generation=2, max_steps=4, **TREE)
    start = weights(trainer)
    trainer.train()
    assert difference(weights(trainer), start) > 1e-4
    for name, low, high in (
        ("signal_depth_1", 0, 1),
        ("signal_depth_2", 0, 1),
        ("signal_depth_3", 0, 1),
        ("ending_depth", 1, 3),
        ("generated_tokens", 1, 14 * 20),
        ("row_tokens", 1, 8 * 60),
        ("trained_share", 0, 1),
        ("seconds", 0, 60),
    ):
        found = logged(trainer, f"tree/{name}")
        assert found
        assert all(low <= value <= high for value in found)
    lengths = logged(trainer, "completions/mean_length")
    assert logged(trainer, "tree/generated_tokens") == pytest.approx([8 * length for length in lengths])
    assert max(logged(trainer, "tree/trained_share")) > 0


def test_only_right_answers_count(tmp_path):
    """A length penalty changes TRL's advantages, and not those of the segments."""

    def penalty(completions, **kwargs):
        return [-0.1 * (i % 5) for i in range(len(completions))]

    trainer = make_trainer(tmp_path, reward_funcs=[math_accuracy, penalty], **TREE)
    batch, trees = generated(trainer)
    mask = batch["completion_mask"] * batch["tool_mask"]
    advantages = [node.advantage for _, root in trees for _, node in nodes(root) for _ in node.tokens]
    assert sorted(batch["credit"][mask.bool()].tolist()) == pytest.approx(sorted(advantages), abs=1e-5)
    assert batch["advantages"].unique().numel() > 5


# With what else there is


@pytest.mark.slow
def test_dynamic_sampling_keeps_trees_whole(tmp_path):
    def some(prompts, completions, **kwargs):
        """Two of three problems have right and wrong answers, by their texts; the third has wrong ones only."""
        sums = [sum(map(ord, completion[0]["content"])) for completion in completions]
        return [float(n % 2 and number(prompt) % 3 > 0) for prompt, n in zip(prompts, sums, strict=True)]

    trainer = make_trainer(tmp_path, dynamic_sampling=True, reward_funcs=some, **TREE)
    batches, calls = watch(trainer), recorded(trainer)
    start = weights(trainer)
    trainer.train()
    assert difference(weights(trainer), start) > 1e-4
    generations = logged(trainer, "dynamic_sampling/generations")
    assert max(generations) > 1
    assert len(calls) == 3 * sum(generations)  # what is chosen is trained on, and nothing generated in its place
    assert logged(trainer, "dynamic_sampling/filled") == [0, 0, 0]
    assert min(logged(trainer, "tree/trained_share")) > 0
    assert trainer.rollout_func is None
    for batch in batches:
        assert all(n % 3 > 0 for n in batch["numbers"])
        ids, mask = batch["completion_ids"], batch["tool_mask"]
        assert batch["num_items_in_batch"] == (mask * batch["completion_mask"]).sum()
        for rows in (slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 16)):
            assert (ids[rows, :20] == ids[rows][:1, :20]).all()
            assert (mask[rows][1:, :20] * batch["completion_mask"][rows][1:, :20] == 0).all()


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("dynamic", [False, True])
def test_resume_is_exact(tmp_path, dynamic):
    settings = {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 1,
        "dynamic_sampling": dynamic,
        **TREE,
    }
    whole = make_trainer(tmp_path / "whole", train_dataset=prompts(12), **settings)
    whole.train()
    for step in (4, 6):  # between two generations, and inside a cycle
        shutil.copytree(tmp_path / f"whole/checkpoint-{step}", tmp_path / f"{step}/checkpoint-{step}")
        resumed = make_trainer(tmp_path / str(step), train_dataset=prompts(12), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"{step}/checkpoint-{step}"))
        assert difference(weights(resumed), weights(whole)) == 0
        assert logged(resumed, "tree/generated_tokens") == logged(whole, "tree/generated_tokens")


# Bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tree_branching": 1}, "tree_branching must be at least 2, not 1"),
        ({"tree_depth": 0}, "tree_depth must be at least 1, not 0"),
        ({"tree_normalizer": "var"}, "tree_normalizer must be one of bernoulli, std, none, not 'var'"),
        ({"tree_min_spread": -0.1}, "tree_min_spread must be between 0 and 1, not -0.1"),
        ({"tree_spread": "variance"}, "tree_spread must be one of range, std, not 'variance'"),
        ({"tree_min_spread": 1.5}, "tree_min_spread must be between 0 and 1, not 1.5"),
        (
            {"num_generations": 12, "per_device_train_batch_size": 12},
            r"2 \*\* 3 = 8 leaves, but num_generations=12. .* nearest are 8 \(tree_depth=3\) or 16 \(tree_depth=4\)",
        ),
        ({"tree_depth": 2}, r"= 4 leaves, but num_generations=8. .* 8 \(tree_depth=3\) or 16 \(tree_depth=4\)"),
        ({"tree_branching": 10, "tree_depth": 1}, r"are 10 \(tree_depth=1\) or 100 \(tree_depth=2\)"),
        ({"tree_segment_tokens": 61}, "= 3 x 61 tokens do not fit in max_completion_length=60. .* and at most 20"),
        ({"tree_segment_tokens": 21}, "= 3 x 21 tokens do not fit in max_completion_length=60. .* and at most 20"),
        ({"tree_segment_tokens": 0}, "= 3 x 0 tokens do not fit .* at least 1 and at most 20"),
        *(
            (
                {"loss_type": loss},
                f"a token-level loss, not loss_type='{loss}': .* Set loss_type to one of dapo, bnpo, dr_grpo",
            )
            for loss in ("grpo", "luspo", "cispo", "sapo", "vespo")
        ),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='token', not 'sequence': a row trains"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions is not supported with tree sampling"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, "would apply to each segment instead of the completion"),
        ({"vllm_structured_outputs_regex": "[0-9]+"}, "would apply to each segment instead of the completion"),
    ],
)
def test_bad_settings(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, **TREE | settings)


@pytest.mark.parametrize(
    "arguments", [{"rollout_func": replay}, {"train_dataset": prompts(8).add_column("image", ["a picture"] * 8)}]
)
def test_rollouts_of_another_kind_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="credit='tree' samples its own rollouts from text, so a rollout_func"):
        make_trainer(tmp_path, **arguments, **TREE)


@pytest.mark.parametrize("what", ["tools", "environment_factories"])
def test_tools_and_environments_are_refused(what):
    """The offline model's chat template has no tools, so TRL would not come so far."""
    trainer = SimpleNamespace(rollout_func=None, tools=[], environment_factories=None, train_dataset=prompts(8))
    check_sampler(TreeRPO, trainer)
    setattr(trainer, what, [print])
    with pytest.raises(ValueError, match="a rollout_func, tools, environments and images are not supported"):
        check_sampler(TreeRPO, trainer)
