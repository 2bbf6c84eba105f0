"""Several processes, in every way of spreading a model over them, against one."""

import functools
import itertools
import json
import socket
import subprocess

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from ktae_trl import tiny
from tests.distributed import training
from tests.distributed.launching import MODES, ROOT, TWO_PROCESSES, accelerate, environment, read
from tests.processes import started
from tests.trainers import difference, other_model

pytestmark = TWO_PROCESSES

# 3 groups of 8 a generation, each trained on twice. Replayed rollouts, a forward pass per generation, token-mean loss
# and SGD, so that the processes' own seeds and shuffles make no difference. With momentum, because torch cannot load
# the state of an optimizer that has none under FSDP2. In float32, and gradients are clipped.
REPLAYED = {
    "replay": True,
    "prompts": 9,
    "optim": "sgd",
    "optim_args": "momentum=0.5",
    "learning_rate": 0.1,
    "loss_type": "dapo",
    "steps_per_generation": 1,
    "num_iterations": 2,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,  # in the middle of a generation cycle
    "max_completion_length": 60,
    "max_grad_norm": 0.2,
}
SAMPLED = {
    "replay": False,
    "prompts": 8,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_completion_length": 12,
}
LORA = {
    "lora": {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "gradient_checkpointing": True,
    "save_strategy": "no",
}
# What is changed in REPLAYED.
KINDS = {
    "plain": {},
    "other credit": {"ktae_combine": "add", "ktae_leave_one_out": True},
    "memory": {"ktae_memory": 0.8},
    # accelerate puts DeepSpeed's own Adam in place of any optimizer whose states are off-loaded.
    "adam": {"optim": "adamw_torch", "optim_args": None, "learning_rate": 1e-3, "adam_epsilon": 1e-3},
    "lora": LORA,
    # OAR looks at the model between two training steps of each generation.
    "oar_g": {"credit": "oar_g", "save_strategy": "no", "oar_token_budget": 300},
    "oar_p": {"credit": "oar_p", "save_strategy": "no", "oar_token_budget": 600, "oar_span": 2},
    "oar_g lora": {"credit": "oar_g", "oar_token_budget": 300, **LORA},
    # Methods that compare the numbers of tokens in whole groups, which lie on both processes.
    "gtpo": {"credit": "gtpo", "save_strategy": "no"},
    "otb": {"credit": "otb", "save_strategy": "no"},
    "otb lora": {"credit": "otb", **LORA},
    # RLSD reads rollouts after other prompts, with another rollout of the group in them.
    "rlsd": {"credit": "rlsd", "save_strategy": "no", "rlsd_decay_steps": 12},
    # Methods of one's own, which ask for log-probabilities and entropies, continuations and grades, a second model.
    "entropy": {"credit": "tests.credit.examples.EntropyWeight", "save_strategy": "no"},
    "entropy lora": {"credit": "tests.credit.examples.EntropyWeight", **LORA},
    "segments": {
        "credit": "tests.credit.examples.SegmentValues",
        "segment_samples": 1,
        "generation_kwargs": {"do_sample": False},  # the processes' random numbers differ
        "save_strategy": "no",
    },
    "second": {"credit": "tests.credit.examples.SecondOpinion", "save_strategy": "no"},
}


@pytest.fixture(scope="session")
def trained(crews, tmp_path_factory):
    """A function that trains a kind in a mode, once, and returns the folder and the results of its processes."""

    @functools.cache
    def train(mode: str | None = None, processes: int = 2, kind: str = "plain"):
        folder = tmp_path_factory.mktemp("run")
        second = {"second_model": other_model(folder / "second")} if kind == "second" else {}
        settings = {**REPLAYED, **KINDS[kind], **second, "per_device_train_batch_size": 24 // processes if mode else 24}
        return folder, crews.train(folder, settings, mode, processes=processes)

    return train


def assert_same_as_one(
    results: list[dict], one: dict, credit: float = 1e-6, weights: float = 1e-6, padding: float = 0, first: int = 0
) -> None:
    """Compare trainings on several processes and on one.

    `credit` and `weights` are how far their values may be apart, `padding` is the credit of what is no token, and
    `first` is the first generation with credit.
    """
    rows = 24 // len(results)
    assert len(one["credits"]) == len(results[0]["credits"]) == 3
    for step, expected in enumerate(one["credits"]):
        assert (expected.std() > 0) == (step >= first)
        for rank, result in enumerate(results):
            values = result["credits"][step]
            mine = expected[rows * rank : rows * (rank + 1)]
            torch.testing.assert_close(values, mine[:, : values.shape[1]], atol=credit, rtol=0)
            assert (mine[:, values.shape[1] :] == padding).all()
    for result in results:
        assert difference(result["weights"], one["weights"]) < weights
        # 21 problems over 2 processes: 11 and 11, one of them twice.
        assert result["held_out"]["greedy"] == one["held_out"]["greedy"]
        assert result["held_out"] == results[0]["held_out"]
    for together, alone in zip(results[0]["metrics"], one["metrics"], strict=True):
        assert together.keys() == alone.keys()
        for name in (name for name in alone if name != "step_time" and not name.endswith("/seconds")):
            assert together[name] == pytest.approx(alone[name], abs=max(credit, 1e-5)), name


@pytest.mark.parametrize("mode", MODES)
def test_groups_spread_over_two_processes(trained, mode):
    kind = "adam" if "offload" in mode else "plain"
    _, (one,) = trained(kind=kind)
    # 12 rows a process: the second of the three groups lies on both.
    folder, two = trained(mode, kind=kind)
    assert_same_as_one(two, one)
    # What trainer.save_model() saved is the trained model, and any process can load it.
    saved = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    untrained = dict(AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).named_parameters())
    assert difference(saved, two[0]["weights"]) == 0
    assert difference(saved, untrained) > 1e-3


@pytest.mark.parametrize("mode", ["zero2", "zero3", "fsdp2"])
def test_resume_inside_a_generation_cycle(crews, trained, tmp_path, mode):
    folder, whole = trained(mode)
    # The learning rate of the checkpoint stays in effect, as a warning says.
    settings = {**REPLAYED, "per_device_train_batch_size": 12, "save_strategy": "no", "learning_rate": 0.2}
    resumed = crews.train(tmp_path, settings, mode, folder / "checkpoint-3")
    assert len(resumed[0]["credits"]) == 1  # steps 4, 5 and 6 needed one generation
    assert difference(resumed[0]["weights"], whole[0]["weights"]) < 1e-6


def test_whole_groups_on_each_of_three_processes(trained):
    assert_same_as_one(trained("ddp", processes=3)[1], trained()[1][0])


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_memory_of_all_processes(trained, mode):
    """The second of the three groups lies on both processes, and counts once."""
    _, (one,) = trained(kind="memory")
    assert_same_as_one(trained(mode, kind="memory")[1], one, first=1)


def test_memory_is_resumed_on_two_processes(crews, trained, tmp_path):
    folder, whole = trained("ddp", kind="memory")
    settings = {**REPLAYED, **KINDS["memory"], "per_device_train_batch_size": 12, "save_strategy": "no"}
    resumed = crews.train(tmp_path, settings, "ddp", folder / "checkpoint-3")
    assert difference(resumed[0]["weights"], whole[0]["weights"]) < 1e-6


def test_adding_and_leaving_one_out(trained):
    assert_same_as_one(trained("ddp", kind="other credit")[1], trained(kind="other credit")[1][0])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *itertools.product(["ddp", "zero2", "zero3", "fsdp2"], ["oar_g", "oar_p"]),
        ("zero3", "oar_g lora"),  # for which TRL takes reentrant checkpoints
        ("fsdp2", "oar_g lora"),
    ],
)
def test_the_model_is_read_by_several_processes(trained, mode, kind):
    """Processes have different numbers of forward passes to make; those of ZeRO-3 and FSDP2 wait for each other."""
    _, (one,) = trained(kind=kind)
    _, two = trained(mode, kind=kind)
    # The influence of a token is a small difference of rounded numbers, so that its weight is not exact.
    assert_same_as_one(two, one, credit=0.01, weights=1e-5, padding=1)


@pytest.mark.parametrize(
    ("mode", "kind"), [*itertools.product(["ddp", "zero3", "fsdp2"], ["gtpo", "otb"]), ("zero3", "otb lora")]
)
def test_numbers_of_tokens_of_spread_groups(trained, mode, kind):
    _, (one,) = trained(kind=kind)
    _, two = trained(mode, kind=kind)
    # GTPO divides by entropies near 0, which are rounded.
    assert_same_as_one(two, one, credit=0.02 if kind == "gtpo" else 1e-4, weights=1e-4)


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_a_reference_from_another_process(trained, mode):
    """The next correct rollout of the group may be on the other process, and prompts are padded to other lengths."""
    _, (one,) = trained(kind="rlsd")
    _, two = trained(mode, kind="rlsd")
    assert_same_as_one(two, one, credit=1e-3, weights=1e-5, padding=1)


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
@pytest.mark.parametrize(("kind", "padding"), [("entropy", 1), ("entropy lora", 1), ("segments", 0), ("second", 1)])
def test_a_method_of_one_s_own(trained, mode, kind, padding):
    """What it asks of the tools is the same on two processes, whose rollouts are of different lengths."""
    _, (one,) = trained(kind=kind)
    _, two = trained(mode, kind=kind)
    assert_same_as_one(two, one, credit=1e-3, weights=1e-5, padding=padding)


@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3", "fsdp2"])
def test_lora_with_gradient_checkpointing(trained, mode):
    _, (one,) = trained(kind="lora")
    folder, two = trained(mode, kind="lora")
    assert_same_as_one(two, one)
    assert all(result["gradient_checkpointing"] for result in two)
    # B of an adapter starts at 0; the model's own weights stay.
    assert {name.split(".")[-3] for name in two[0]["weights"] if "lora_" in name} == {"lora_A", "lora_B"}
    untrained = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    for name, value in two[0]["weights"].items():
        if "lora_B" in name:
            assert (value != 0).any()
        elif "lora_" not in name:
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, untrained.get_parameter(own))
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "model")
    saved = {name: value for name, value in adapted.named_parameters() if "lora_B" in name}
    assert difference(saved, {name: two[0]["weights"][name] for name in saved}) == 0


@pytest.mark.parametrize("mode", ["ddp", "two_nodes"])
def test_two_nodes(trained, tmp_path, mode):
    """Two `accelerate launch` with a process each, as on two machines, that meet over the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "settings.json").write_text(
        json.dumps({**REPLAYED, "per_device_train_batch_size": 12, "save_strategy": "no"})
    )
    script = [training.__file__, str(tmp_path / "settings.json"), str(tmp_path)]

    def node(rank: int):
        where = {"num_machines": 2, "machine_rank": rank, "main_process_ip": "127.0.0.1", "main_process_port": port}
        words = [*accelerate(tmp_path / f"node_{rank}", mode, **where), *script]
        return started(words, cwd=ROOT, env=environment(mode), stderr=subprocess.PIPE)

    with node(0) as first, node(1) as second:
        nodes = (first, second)
        errors = [each.communicate(timeout=200)[1] for each in nodes]
    assert [each.returncode for each in nodes] == [0, 0], errors
    assert_same_as_one(read(tmp_path, mode), trained()[1][0])


@pytest.mark.parametrize("stream", [False, True])
def test_sampled_rollouts_resume_exactly(crews, tmp_path, stream):
    settings = {**SAMPLED, "stream": stream}
    whole = crews.train(tmp_path / "whole", settings, "ddp")
    # 4 forward passes a generation of 4 prompts, 8 steps an epoch: inside a cycle, and one of the second epoch.
    for step in (3, 10):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = crews.train(tmp_path / f"from-{step}", settings, "ddp", checkpoint)
        assert difference(resumed[0]["weights"], whole[0]["weights"]) == 0
