"""Training with vLLM, on a CPU: `make test-vllm`, which builds an environment with vLLM's CPU build.

An engine keeps state in its process, so each training is a process of its own (`vllm_run.py`). What a CPU cannot show
is the sync of weights to a server: it goes over NCCL.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from ktae_trl import tiny
from tests.credit.test_methods import EXAMPLES
from tests.processes import run, started
from tests.trainers import difference
from tests.vllm.test_vllm import ENVIRONMENT

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
# 4 groups a step, long enough for careful solutions: all three steps have something to learn.
COLOCATED = {"vllm_mode": "colocate", "per_device_train_batch_size": 32, "max_completion_length": 64}
# Both compute in float32. Gaps of correct weights were below 1e-5.
TINY = 1e-4


def environment(**more: str) -> dict[str, str]:
    return os.environ | ENVIRONMENT | {"PYTHONPATH": str(TESTS.parents[1])} | more


def train(folder: Path, settings: dict, processes: int = 1, seconds: float = 200) -> list[dict]:
    (folder / "settings.json").write_text(json.dumps(settings))
    command, more = [sys.executable], {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if processes > 1:
        # MULTI_GPU only makes accelerate call torchrun; ACCELERATE_USE_CPU keeps it on the CPU.
        accelerate = {"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": processes}
        (folder / "accelerate.yaml").write_text(yaml.dump(accelerate))
        command += ["-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
        command += ["--main_process_port", "0"]
        more["ACCELERATE_USE_CPU"] = "true"
    command += [str(TESTS / "vllm_run.py"), str(folder / "settings.json"), str(folder)]
    done = run(command, env=environment(**more), timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"process_{i}.pt", weights_only=True) for i in range(processes)]


def check(
    result: dict,
    *,
    steps: int,
    names: tuple[str, ...] = ("ktae/abs_value", "ktae/informative_groups"),
    moves: bool = True,
) -> None:
    """A training on rollouts whose log-probabilities are those of the model at that step; the named metrics say more
    than 0, and if it `moves` weights, so does the gradient."""
    assert result["moved"] > 1e-4 or not moves
    assert len(result["rollouts"]) == len(result["metrics"]) == steps
    for rollouts, metrics in zip(result["rollouts"], result["metrics"], strict=True):
        assert rollouts["gap"] < TINY
        assert rollouts["credit"].isfinite().all()
        assert all(metrics[name] > 0 for name in (("grad_norm", *names) if moves else names))
        assert all(map(math.isfinite, metrics.values()))


def check_sync(result: dict) -> None:
    """vLLM has other weights until they are synced, whether one step or a great change lies between."""
    assert result["a_step_behind"] > 100 * TINY
    assert result["stale"] > 100 * TINY
    assert result["fresh"] < TINY


def test_colocated(tmp_path):
    (result,) = train(tmp_path, COLOCATED)
    check(result, steps=3)
    check_sync(result)
    for metrics in result["metrics"]:  # the correction is TRL's default
        for which in ("min", "mean", "max"):
            assert metrics[f"sampling/importance_sampling_ratio/{which}"] == pytest.approx(1, abs=1e-3)


def test_colocated_without_the_importance_sampling_correction(tmp_path):
    (result,) = train(tmp_path, {**COLOCATED, "vllm_importance_sampling_correction": False})
    check(result, steps=3)
    check_sync(result)
    assert not any(name.startswith("sampling/") for metrics in result["metrics"] for name in metrics)


def test_colocated_with_lora(tmp_path):
    """TRL merges the adapter into the weights it sends, and takes it out again."""
    (result,) = train(tmp_path, {**COLOCATED, "lora": True, "learning_rate": 1e-2, "max_steps": 2})
    check(result, steps=2)
    check_sync(result)


def test_colocated_with_dynamic_sampling(tmp_path):
    """Log-probabilities stay with their rollouts, which come from one generation or several."""
    (result,) = train(tmp_path, {**COLOCATED, "dynamic_sampling": True})
    check(result, steps=3)
    check_sync(result)
    for metrics in result["metrics"]:
        assert metrics["dynamic_sampling/filled"] == 0
        assert metrics["ktae/informative_groups"] == 1
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert max(metrics["dynamic_sampling/generations"] for metrics in result["metrics"]) > 1


@pytest.mark.parametrize("credit", [name for name, settings in EXAMPLES.items() if settings])
def test_colocated_with_a_method_of_one_s_own(tmp_path, credit):
    """Continuations come from vLLM, entropies and a second model from the trainer."""
    settings = {**COLOCATED, **EXAMPLES[credit], "credit": credit, "max_steps": 2}
    (result,) = train(tmp_path, settings)
    check(result, steps=2, names=())
    check_sync(result)
    if "SecondOpinion" not in credit:  # the policy is the second model until it has moved
        assert result["rollouts"][0]["credit"].std() > 0.01
    assert result["rollouts"][1]["credit"].std() > 0


def test_colocated_in_each_of_two_processes(tmp_path):
    # 12 rows a process: the second of the three groups lies on both.
    results = train(tmp_path, {**COLOCATED, "per_device_train_batch_size": 12, "max_steps": 2}, processes=2)
    for result in results:
        assert result["processes"] == 2
        assert result["distributed_type"] == "MULTI_CPU"
        check(result, steps=2)
        check_sync(result)
        assert any((rollouts["credit"] != 0).any() for rollouts in result["rollouts"])
    first, second = (result["rollouts"][0]["prompts"] for result in results)
    assert first[0] != first[-1] == second[0] != second[-1]
    assert difference(results[0]["weights"], results[1]["weights"]) == 0


# Segments of 21 tokens at most, 8 leaves.
TREES = {**COLOCATED, "credit": "tree"}
TRAINED = ("tree/trained_share", "tree/signal_depth_1")


def check_trees(rollouts: dict) -> None:
    """Rows that share a node have the same tokens there, and one of them trains it."""
    for first in range(0, len(rollouts["completions"]), 4):
        rows, trained = rollouts["completions"][first : first + 4], rollouts["trained"][first : first + 4]
        assert len({tuple(row[:21]) for row in rows}) == 1
        assert trained[0, : len(rows[0][:21])].all()
        assert not trained[1:, :21].any()


def test_colocated_with_trees(tmp_path):
    """The log-probabilities of paths are the model's, those of shared segments too; and paths are in the cache."""
    (result,) = train(tmp_path, TREES)
    check(result, steps=3, names=TRAINED)
    check_sync(result)
    for rollouts, metrics in zip(result["rollouts"], result["metrics"], strict=True):
        check_trees(rollouts)
        assert metrics["tree/generated_tokens"] * 4 == rollouts["trained"].sum()
        for which in ("min", "mean", "max"):
            assert metrics[f"sampling/importance_sampling_ratio/{which}"] == pytest.approx(1, abs=1e-3)
    calls = result["calls"][:9]
    assert [requests for requests, _, _ in calls[::3]] == [8, 8, 8]
    for requests, known, cached in calls[1::3] + calls[2::3]:
        assert cached > 0.5 * known or requests == 1  # whole blocks of 32; the prompts alone have fewer tokens


def test_colocated_with_trees_and_dynamic_sampling(tmp_path):
    (result,) = train(tmp_path, {**TREES, "dynamic_sampling": True, "vllm_importance_sampling_mode": "token_truncate"})
    check(result, steps=3, names=TRAINED[:1])
    check_sync(result)
    for rollouts, metrics in zip(result["rollouts"], result["metrics"], strict=True):
        check_trees(rollouts)
        assert metrics["dynamic_sampling/filled"] == 0
        assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)


@pytest.fixture
def server(tmp_path):
    """TRL's server on a free port, stopped with everything it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(TESTS / "vllm_serve.py"), str(tiny.MODEL), str(port)]
    log = tmp_path / "server.log"
    with log.open("w") as said, started(command, env=environment(), stdout=said, stderr=said) as process:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 150
        while True:
            waiting = process.poll() is None and time.monotonic() < until
            assert waiting, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield address
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)


def test_rollouts_of_a_server(tmp_path, server):
    """TRL's server and client, and a step of KTAE on what they generate.

    Not the sync of weights, which needs NCCL, so a GPU: `init_communicator` and `sync_weights` are patched away, and
    the server keeps the weights it started with. So there is one step only.
    """
    settings = {**COLOCATED, "vllm_mode": "server", "vllm_server_base_url": server, "max_steps": 1}
    (result,) = train(tmp_path, settings)
    check(result, steps=1)
    assert result["metrics"][0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    answers = result["server"]
    # Rounding may turn a tie between two tokens, but hardly among 8 short answers.
    assert answers["greedy"] == answers["expected"]
    # The log-probabilities of a completion are those after its own prompt, and not those after another: nothing is out
    # of order. Which samples come varies with the timing of requests, and a few may fit two problems much alike.
    assert answers["prompts"]
    assert max(answers["gaps"]) < TINY
    assert sum(gap > 10 * TINY for gap in answers["gaps_of_wrong_prompts"]) >= 28
    # 4 prompts, 8 rollouts of each, side by side.
    groups = [result["rollouts"][0]["prompts"][i : i + 8] for i in range(0, 32, 8)]
    assert all(prompt == group[0] for group in groups for prompt in group)
    assert len({tuple(group[0]) for group in groups}) == 4


def test_trees_of_a_server(tmp_path, server):
    """Two processes with other numbers of texts that go on: each gets its own segments."""
    settings = {**TREES, "vllm_mode": "server", "vllm_server_base_url": server, "max_steps": 1}
    results = train(tmp_path, {**settings, "per_device_train_batch_size": 16}, processes=2)
    for result in results:
        # The server's samples vary with the timing of requests: so few trees may hold no signal.
        check(result, steps=1, names=(), moves=False)
        check_trees(result["rollouts"][0])
    assert results[0]["metrics"][0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-3)
    assert difference(results[0]["weights"], results[1]["weights"]) == 0
