"""The last lines of a training."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.integrations import TensorBoardCallback

from ktae_trl.arguments import pip_install
from ktae_trl.cli import CONFIGS
from ktae_trl.training import closing
from ktae_trl.training.held_out import Accuracy


def test_accuracies_before_and_after():
    before, after = Accuracy(0.371, 0.482, 4), Accuracy(1.0, 0.979, 4, unscored=3)
    assert closing.accuracies(before, after, 256).splitlines() == [
        "Held-out accuracy by math_accuracy (256 problems; sampled: 4 per problem at temperature 1)",
        "              before     after",
        "  greedy       37.1%    100.0%",
        "  sampled      48.2%     97.9%",
        "  after: completions excluded because they have no score: 3",
    ]


def test_accuracies_that_were_not_measured_or_are_no_shares():
    after = Accuracy(None, 2.5, 1, "mine", "auto", 4)
    assert closing.accuracies(None, after, 4).splitlines() == [
        "Held-out mean reward by mine (4 problems; sampled: 1 per problem at temperature 1)",
        "                  before       after",
        "  greedy    not measured  not scored",
        "  sampled   not measured       2.500",
        "  after: completions excluded because they have no score: 4",
    ]


def trainer_of(folder: Path, *callbacks, report_to=()):
    args = SimpleNamespace(output_dir=str(folder), report_to=list(report_to))
    return SimpleNamespace(args=args, callback_handler=SimpleNamespace(callbacks=callbacks))


def test_places(tmp_path):
    assert closing.places(trainer_of(tmp_path)) == f"Saved model, tokenizer and card in {tmp_path}"
    (tmp_path / "rollouts").mkdir()
    for name in ("key_tokens.html", "rollouts/metrics.jsonl"):
        (tmp_path / name).touch()
    tensorboard = TensorBoardCallback()
    tensorboard.logging_dir = "logs/here"
    said = closing.places(trainer_of(tmp_path, tensorboard, report_to=["tensorboard", "wandb"])).splitlines()
    assert said[1:] == [
        f"Key-token page: {tmp_path / 'key_tokens.html'}",
        f"Logs: logs/here, wandb, {tmp_path / 'rollouts/metrics.jsonl'}",
    ]


def commands(said: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in said.splitlines()[1:]]


@pytest.mark.parametrize(
    ("held_out", "evaluation"),
    [("tiny", "quickstart"), ("word_problems", "smollm2_135m"), (None, "math --prompt chat")],
)
def test_what_to_do_next_is_commands(tmp_path, monkeypatch, held_out, evaluation):
    monkeypatch.setattr(closing.shutil, "which", lambda name: name)
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "key_tokens.html").touch()
    evaluate, look, own_data = commands(closing.next_steps(str(folder), "tiny", held_out))
    assert evaluate == ["ktae", "eval", *evaluation.split(), "--model_name_or_path", str(folder)]
    assert (CONFIGS / "eval" / f"{evaluation.split()[0]}.yaml").exists()
    assert look == ["xdg-open", str(folder / "key_tokens.html")]
    assert own_data == ["ktae", "recipes", "own_data", ">", "my.yaml"]


def test_only_what_there_is_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(closing.shutil, "which", lambda name: name)
    own = tmp_path / "mine.jsonl"
    own.touch()
    (evaluate,) = commands(closing.next_steps(str(tmp_path), str(own), str(own)))
    assert evaluate[1] == "eval"


def test_evaluating_needs_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(closing, "find_spec", lambda name: None)
    assert pip_install("eval") in closing.next_steps(str(tmp_path), "tiny", "tiny")


def test_the_command_of_an_environment_that_is_not_activated(tmp_path, monkeypatch):
    monkeypatch.setattr(closing.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / ".venv" / "bin" / "ktae"
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    without_script = closing.next_steps("out", "tiny", "tiny")
    assert f"{sys.executable} -m ktae_trl eval quickstart" in without_script
    script.parent.mkdir(parents=True)
    script.touch()
    assert "  .venv/bin/ktae recipes own_data > my.yaml" in closing.next_steps("out", "tiny", "tiny")


def test_the_recipe_for_own_data_is_printed(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m ktae_trl recipes own_data > my.yaml  # comment"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment)
    assert "CHANGE" in (tmp_path / "my.yaml").read_text()
