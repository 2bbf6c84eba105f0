"""What a user did wrong is one line; what is wrong with the program keeps its traceback."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config

from ktae_trl import tiny
from ktae_trl.arguments import UserError, loading, need, pip_install
from ktae_trl.training import run as training

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder, with files that are not as they should be."""
    monkeypatch.chdir(tmp_path)
    Path("colon.yaml").write_text("seed: 1\nmodel: a: b\n")
    Path("list.yaml").write_text("- seed\n")
    Path("empty.yaml").write_text("")
    Path("lines.jsonl").write_text('{"problem": "1 + 1", "answer": 2}\nno json\n')
    Path("my_rewards.py").write_text("import no_such_module\n")
    Qwen2Config(architectures=["Qwen2ForCausalLM"]).save_pretrained("without_weights")
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained("without_weights")
    Path("damaged").mkdir()
    Path("damaged/config.json").write_text("{")
    return tmp_path


def refusal(*words: str) -> str:
    quickstart = [] if "--config" in words else ["--config", str(ROOT / "configs/quickstart.yaml")]
    with pytest.raises(SystemExit) as ended:
        training.main([*quickstart, *words])
    assert isinstance(ended.value.code, str)  # printed, and the exit code is 1
    assert "\n" not in ended.value.code
    return ended.value.code


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config"], "--config needs a file"),
        (["--config", "nowhere.yaml"], "There is no file nowhere.yaml (looked in "),
        (["--config", "colon.yaml"], "colon.yaml, line 2, column 9 is not YAML: mapping values are not allowed"),
        (["--config", "list.yaml"], "list.yaml holds a list, not settings"),
        (["--config", "empty.yaml"], "empty.yaml is empty"),
        (["--learning_rat", "1"], "Unknown setting: 'learning_rat' (did you mean 'learning_rate'?)"),
        (["--credit", "ktea"], "credit='ktea' is unknown (did you mean 'ktae'?)"),
        (["--loss_type", "grop"], "Unknown loss type: grop (TRL "),
        (["--loss_type", "grop", "--credit", "none"], "Unknown loss type: grop (TRL "),
        (["--num_generations", "1"], "GRPO requires at least 2 generations per prompt"),  # TRL's own check
        (["--dataset_name", "nowhere.jsonl"], "There is no data file nowhere.jsonl"),
        (["--dataset_name", "lines.jsonl"], "lines.jsonl, line 2: not JSON"),
        (["--dataset_name", "nobody/nothing"], "The dataset 'nobody/nothing' is neither in "),
        (["--num_generations", "eight"], "argument --num_generations: invalid int value: 'eight'"),
        (["--dataset_split", "training"], "tiny has no split 'training'. There are: train, test"),
        (["--problem_column", "question"], "question"),
        (["--model_name_or_path", "./nowhere"], "There is no model ./nowhere (model_name_or_path; looked in "),
        (["--model_name_or_path", "damaged"], "The tokenizer of 'damaged' (model_name_or_path) could not be loaded: "),
        (["--model_name_or_path", "without_weights"], "Error no file named model.safetensors"),
        (["--reward_funcs", "math_acuracy"], "Unknown reward function 'math_acuracy' (did you mean 'math_accuracy'?)"),
        (["--reward_funcs", "my_rewards.mine"], "my_rewards fails with ModuleNotFoundError: No module named"),
        (["--use_vllm", "true"], "use_vllm is true, but vLLM is not installed"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--output_dir", "lines.jsonl"], "lines.jsonl"),
    ],
)
def test_a_mistake_is_one_line(folder, words, said):
    if "--use_vllm" in words and importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed")
    line = refusal(*words)
    assert line.startswith("train.py: ")
    assert said in line


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_bf16_without_a_gpu_names_the_settings(folder):
    line = refusal("--use_cpu", "false", "--bf16", "true")
    assert line == (
        "train.py: bf16 is on (the default), but torch finds no GPU that supports it. Set use_cpu=true to train on the "
        "CPU, or bf16=false for a GPU without bf16"
    )


def test_a_bug_keeps_its_traceback(folder, monkeypatch):
    def broken(*arguments, **kwargs):
        raise ValueError("not enough values to unpack (expected 2, got 1)")

    words = ["--config", str(ROOT / "configs/quickstart.yaml")]
    for name in ("ktae_trl.training.run.get_peft_config", "trl.trainer.grpo_trainer.create_model_from_path"):
        with monkeypatch.context() as patch:
            patch.setattr(name, broken)
            with pytest.raises(ValueError, match="not enough values to unpack") as bug:
                training.main(words)
            assert not isinstance(bug.value, UserError)


def test_loading_names_what_and_why_and_passes_bugs():
    wanted = r"^The thing 'x' \(thing_name\) could not be loaded: no such thing$"
    with pytest.raises(UserError, match=wanted) as told, loading("The thing 'x'", by="thing_name"):
        raise OSError("\nno such thing\nand more")
    assert isinstance(told.value.__cause__, OSError)
    with pytest.raises(UserError, match=r"^The thing could not be loaded: KeyError$"), loading("The thing"):
        raise KeyError
    with pytest.raises(TypeError), loading("The thing"):
        raise TypeError


# Optional packages


def without(monkeypatch, *packages: str) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, package=None: None if name in packages else find(name, package)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.setattr(training, "find_spec", hidden)


def test_a_package_of_an_extra_that_is_missing_names_the_command(monkeypatch):
    need("torch", "vllm")
    without(monkeypatch, "latex2mathml")
    with pytest.raises(ImportError, match=r"^latex2mathml is not installed: pip install 'ktae-trl\[report\].*'$"):
        need("latex2mathml", "report")


def test_recipes_report_to_tensorboard_if_it_is_there(folder, monkeypatch, caplog):
    words = ["--config", str(ROOT / "configs/quickstart.yaml")]
    assert training.read_arguments(words)[1].report_to == ["tensorboard"]
    without(monkeypatch, "tensorboard")
    assert training.read_arguments(words)[1].report_to == []
    assert [record.message for record in caplog.records] == [
        f"No TensorBoard logs: tensorboard is not installed. Install it: {pip_install('trackers')}"
    ]


def test_a_tracker_that_is_asked_for_must_be_there(folder, monkeypatch):
    without(monkeypatch, "wandb")
    assert f"wandb is not installed: {pip_install('trackers')}" in refusal("--report_to", "wandb")
