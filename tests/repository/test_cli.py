"""The command `ktae`: what it lists, how it names configs, and how it starts a training."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from ktae_trl import KTAEGRPOConfig, cli
from ktae_trl.credit import METHODS
from ktae_trl.data import DataArguments
from ktae_trl.training.run import RunArguments

ROOT = Path(__file__).parents[2]


def said(capsys, *words: str) -> str:
    cli.main(words)
    return capsys.readouterr().out


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert "\n" not in ended.value.code
    return ended.value.code


def test_help_lists_every_command_and_loads_nothing_heavy(capsys):
    code = "import sys; from ktae_trl import cli; cli.main([]); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.findall(r"^  ([\w-]+) ", done.stdout, re.MULTILINE) == list(cli.COMMANDS)
    assert not {"torch", "trl", "transformers", "numpy", "yaml", "rich"} & set(done.stderr.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with suppress(SystemExit):
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert "usage: " in out
    assert "(default: None)" not in out  # does not say what happens


def test_the_help_of_train_has_every_setting_once_in_its_group(capsys):
    out = said(capsys, "train", "--help")
    parts = re.split(r"^(\S.*):$", out[out.index("\nrun:\n") :], flags=re.MULTILINE)
    groups = dict(zip(parts[1::2], parts[2::2], strict=True))
    names = {title: set(re.findall(r"^  --(\w+)", text, re.MULTILINE)) for title, text in groups.items()}
    ours = {f.name for cls in (RunArguments, KTAEGRPOConfig, ModelConfig) for f in fields(cls)}
    assert sum(map(len, names.values())) == len(ours)
    assert set.union(*names.values()) == ours
    assert names["data"] == {f.name for f in fields(DataArguments)}
    assert {"credit", "answer_format", "correctness_reward"} <= names["credit"]
    assert "ktae_combine" in names["credit: ktae"]
    assert "tree_depth" in names["credit: tree"]
    assert names["DAPO"] == {f.name for f in fields(KTAEGRPOConfig) if f.name.startswith("dynamic_sampling")}
    assert "learning_rate" in names["TRL's GRPO"] | names["transformers' Trainer"]


def test_help_shows_how_each_command_is_called(capsys):
    out = said(capsys, "--help")
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name}\s+[A-Z].*\n\s+ktae {name}\b", out, re.MULTILINE), name
    assert max(map(len, out.splitlines())) <= 120


def test_an_unknown_command_names_the_nearest():
    assert refusal("trian").startswith(
        "ktae: unknown command 'trian' (did you mean 'train'?). Choose from train, eval,"
    )


def test_methods_are_listed(capsys):
    out = said(capsys, "methods")
    assert re.findall(r"^  (\w+): ", out, re.MULTILINE) == ["none", *METHODS]
    assert re.findall(r"^  (\w+): .*, the default$", out, re.MULTILINE) == [KTAEGRPOConfig.credit]


# Configs by name


def test_recipes_are_listed_with_hardware_and_time_and_printed_as_they_are(capsys):
    out = said(capsys, "recipes")
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert re.search(rf"^  {re.escape(path.stem)}$", out, re.MULTILINE)
        name = path.relative_to(ROOT / "configs").with_suffix("").as_posix()
        assert said(capsys, "recipes", name) == path.read_text()
    quickstart = cli.head(ROOT / "configs/quickstart.yaml")
    assert f"  quickstart\n      {quickstart.what}\n      {quickstart.hardware}\n" in out
    assert re.search(r"^  ddp\n      8 GPUs, ", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 100


def test_a_list_is_cut_off_by_who_reads_it():
    code = "import time; from ktae_trl import cli; time.sleep(1); cli.main(['recipes'])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as listing:
        listing.stdout.close()
        assert listing.stderr.read() == b""


def test_a_config_is_a_file_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.with_config(["quickstart", "--seed", "2"])[1:] == [str(cli.CONFIGS / "quickstart.yaml"), "--seed", "2"]
    assert cli.with_config(["math"], "eval") == ["--config", str(cli.CONFIGS / "eval" / "math.yaml")]
    Path("quickstart").write_text("seed: 3\n")  # a file wins: it can be seen
    assert cli.with_config(["quickstart"]) == ["--config", "quickstart"]
    words = ["--config", "mine.yaml", "--seed", "2"]
    assert cli.with_config(words) == words
    unknown = refusal("train", "own-data")
    assert unknown.startswith("ktae train: There is no config 'own-data' (did you mean 'own_data'?), neither as a file")
    assert "no config 'maths' (did you mean 'math'?)" in refusal("eval", "maths")


def test_a_recipe_is_found_and_understood_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "quickstart", "--eval_size", "4", "--dry_run", "true"])
    out = " ".join(capsys.readouterr().out.split())
    assert "training │ 2,048 │" in out
    assert "tiny: 831,616 parameters" in out
    assert not list(tmp_path.iterdir())


# Launching


@pytest.fixture
def launched(monkeypatch):
    """The command that the process would become."""
    commands = []
    monkeypatch.setattr(os, "execv", lambda program, words: commands.append(words))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return commands


def test_train_starts_accelerate_with_its_file(launched, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cli.main(["train", "quickstart", "--accelerate", "zero3", "--seed", "2"])
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"num_processes": 2, "distributed_type": "MULTI_CPU", "use_cpu": True}))
    cli.main(["train", "quickstart", f"--accelerate={own}"])
    recipe = str(cli.CONFIGS / "quickstart.yaml")
    for command, file, more in zip(
        launched, (cli.CONFIGS / "accelerate/zero3.yaml", own), (["--seed", "2"], []), strict=True
    ):
        launcher, of_child = command[: command.index("-m", 2)], command[command.index("-m", 2) :]
        assert launcher[launcher.index("--config_file") + 1] == str(file)
        assert of_child == ["-m", "ktae_trl", "train", "--config", recipe, *more]
    # accelerate warns on a CPU if it has to choose this itself.
    assert ["--num_cpu_threads_per_process" in command for command in launched] == [False, True]


def test_an_accelerate_file_that_is_none_is_one_line(launched, tmp_path, monkeypatch):
    assert "no config 'zero-3' (did you mean 'zero3'?)" in refusal("train", "quickstart", "--accelerate", "zero-3")
    bad = tmp_path / "bad.yaml"
    settings = ["compute_environment: LOCAL_MACHINE", "distributed_type: 'NO'", "num_process: 8"]
    bad.write_text("\n".join(settings))
    said = refusal("train", "quickstart", "--accelerate", str(bad))
    assert said.startswith(f"ktae train: The accelerate file {bad} (--accelerate) could not be loaded: ")
    assert "num_process" in said
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "a launcher has already started this one" in refusal("train", "quickstart", "--accelerate", "zero3")
    assert not launched
