"""What a dry run says, against what training then does; and settings that do not go together."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, Qwen2Config
from trl import ModelConfig

from ktae_trl import KTAEGRPOConfig, tiny
from ktae_trl.arguments import UserError, pip_install
from ktae_trl.training import plan
from ktae_trl.training import run as training
from ktae_trl.training.batches import Batches, check_processes
from tests.trainers import SETTINGS, around, logged, make_trainer, prompts

GIB = 2**30


def config(folder, **settings) -> KTAEGRPOConfig:
    return KTAEGRPOConfig(output_dir=str(folder), **{**SETTINGS, "max_steps": -1, **settings})


# Arithmetic


def test_the_paper_s_batches_by_hand():
    batches = Batches(8, per_device=8, accumulated=32, steps_per_generation=256, num_iterations=1, num_generations=16)
    assert (batches.rollouts, batches.prompts, batches.rollouts_per_step, batches.steps) == (16384, 1024, 2048, 8)
    assert batches.steps_per_epoch(12000) == 88  # 11 whole generations
    assert str(batches) == (
        "8 rollouts x 8 processes x 256 steps_per_generation = 16,384 rollouts per generation (1,024 prompts x 16), "
        "2,048 per optimizer step"
    )


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 2, "steps_per_generation": 2, "num_iterations": 2},
        {"num_train_epochs": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
        {"num_train_epochs": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 3},
    ],
)
def test_training_makes_the_steps_that_are_announced(tmp_path, settings):
    n = 14
    trainer = make_trainer(
        tmp_path,
        train_dataset=prompts(n),
        max_steps=-1,
        max_completion_length=4,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        **settings,
    )
    batches = Batches.of(trainer.args, 1)
    seen = []
    around(trainer, "generation", lambda generate, prompts: seen.append(prompts) or generate(prompts))
    trainer.train()
    assert trainer.state.global_step == settings["num_train_epochs"] * batches.steps_per_epoch(n)
    assert {len(asked) for asked in seen} == {batches.rollouts}
    assert {len({str(p) for p in asked}) for asked in seen} == {batches.prompts}
    assert len(logged(trainer, "loss")) == trainer.state.global_step


def test_another_number_of_processes_is_explained(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=4, steps_per_generation=8)
    assert check_processes(args, None) is None
    assert check_processes(args, 1) is None
    warning = check_processes(args, 4)
    assert "written for 4 processes (num_processes), but 1 was started" in warning
    assert "8 rollouts x 4 processes x 8 steps_per_generation = 256 rollouts per generation (32 prompts x 8)" in warning
    assert "8 rollouts x 1 process x 8 steps_per_generation = 64 rollouts per generation (8 prompts x 8)" in warning
    assert (
        "add to the train.py command: --num_processes 1 --gradient_accumulation_steps 16 --steps_per_generation 32"
        in warning
    )


def test_the_flags_that_the_warning_gives_keep_the_batches_and_silence_it(tmp_path):
    words = ["--config", "configs/own_data.yaml", "--use_cpu", "true", "--bf16", "false", "--use_vllm", "false"]
    words += ["--output_dir", str(tmp_path), "--num_processes", "4"]
    run, args, _ = training.read_arguments(words)
    warning = check_processes(args, run.num_processes)
    flags = re.search(r"add to the train.py command: (.*)", warning)[1].split()
    run, kept, _ = training.read_arguments([*words, *flags])
    assert check_processes(kept, run.num_processes) is None
    wanted, found = Batches.of(args, 4), Batches.of(kept, 1)
    assert (wanted.rollouts, wanted.rollouts_per_step) == (found.rollouts, found.rollouts_per_step)


def test_a_generation_batch_that_is_given_stays_what_it_is(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=4, generation_batch_size=256, gradient_accumulation_steps=2)
    assert Batches.of(args, 1).rollouts == Batches.of(args, 8).rollouts == 256
    assert Batches.of(args, 8).steps == 4
    warning = check_processes(args, 8)
    assert warning.count("256 rollouts per generation") == 2
    assert warning.endswith("add to the train.py command: --num_processes 1 --gradient_accumulation_steps 16")


def test_one_process_on_several_gpus_is_refused(tmp_path):
    args = config(tmp_path)
    args._n_gpu = 4
    with pytest.raises(
        UserError, match=r"One process sees 4 GPUs, which TRL does not support .* launch --num_processes 4"
    ):
        check_processes(args, 1)


# Data and memory


def test_data_statistics_by_hand(tokenizer):
    rows = [("1 + 1 =", "2"), ("1 + 1 =", "2"), ("1 + 1 + 1 =", ["3", "3.0"]), ("2 =", r"\frac{")]
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": text}], "solution": [a] if isinstance(a, str) else a}
            for text, a in rows
        ]
    )
    lengths = sorted(
        len(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"])
        for text, _ in rows
    )
    measured = plan.data_statistics(data, tokenizer)
    assert measured.prompts == 4
    assert (measured.tokens[0], measured.tokens[-1]) == (lengths[0], lengths[-1])
    assert lengths[1] <= measured.tokens[1] <= lengths[2] <= measured.tokens[2] <= lengths[3]
    assert (measured.repeated, measured.unscorable) == (1, 1)


def test_parameters_are_counted_without_weights():
    size = plan.model_size(str(tiny.MODEL))
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL)
    assert size.total == model.num_parameters()
    assert size.largest_layer == max(p.numel() for p in model.parameters())  # no biases in the largest


@pytest.mark.parametrize(
    ("shape", "total"),
    [
        # Qwen2.5-Math-1.5B and 7B: the counts that their model cards' weights have.
        ((1536, 28, 12, 2, 8960, 151936, True), 1_543_714_304),
        ((3584, 28, 28, 4, 18944, 152064, False), 7_615_616_512),
    ],
)
def test_memory_by_hand(tmp_path, shape, total):
    pytest.importorskip("deepspeed", reason="the estimate is DeepSpeed's")
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    settings = dict(zip((*names, "vocab_size", "tie_word_embeddings"), shape, strict=True))
    Qwen2Config(**settings).save_pretrained(tmp_path)
    size = plan.model_size(str(tmp_path))
    assert size.total == total
    assert size.largest_layer == shape[0] * shape[5]
    table = {name: gpu * GIB for name, gpu, _ in plan.memory_table(size, 8)}
    # In bytes a parameter: 2 of a bf16 copy, 2 of bf16 gradients, 16 of float32 weights, gradients and Adam's moments.
    assert table["DDP"] == pytest.approx(20 * total)
    assert table["ZeRO-2"] == pytest.approx((2 + 18 / 8) * total)
    assert table["ZeRO-2, optimizer off-loaded"] == pytest.approx(2 * total)
    assert table["ZeRO-3, FSDP2"] == pytest.approx(18 / 8 * total + 4 * size.largest_layer)
    assert table["ZeRO-3, all off-loaded"] == pytest.approx(4 * size.largest_layer)


# The dry run


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])  # recipes name their files from there


def dry_run(capsys, *words: str) -> str:
    training.train(*training.read_arguments([*words, "--dry_run", "true"]))
    return " ".join(capsys.readouterr().out.split())


def test_a_dry_run_needs_no_gpu_and_trains_nothing(tmp_path, capsys):
    offline = ["--model_name_or_path", str(tiny.MODEL), "--dataset_name", str(tiny.TRAIN)]
    offline += ["--eval_dataset_name", str(tiny.HELD_OUT), "--output_dir", str(tmp_path / "out")]
    said = dry_run(capsys, "--config", "configs/qwen2.5_math_1.5b_dapo_ktae.yaml", *offline)
    assert "For 8 processes (num_processes in the recipe). This command started 1." in said
    assert "a generation │ 1,024 │ 16,384 │ 50,331,648 │ 8" in said
    assert "an optimizer step │ 128 │ 2,048 │ 6,291,456 │ 1" in said
    assert "an epoch │ 2,048 │ 32,768 │ 100,663,296 │ 16" in said
    assert "the run │ 102,400 │ 1,638,400 │ 5,033,164,800 │ 800" in said
    assert "a batch takes at most 10 times these rollouts" in said
    assert "ktae_combine: add" in said
    assert "delta: 10.0" in said
    assert "overlong_buffer" not in said.partition("Settings")[2]  # it has its default value
    assert "training │ 2,048 │" in said
    assert "831,616 parameters" in said
    assert "vLLM: 40% of the GPU" in said
    assert not (tmp_path / "out").exists()


def test_the_dry_run_prints_brackets_as_they_are(tmp_path, capsys, monkeypatch):
    """Rich reads [deepspeed] as markup and :smile: as an emoji, unless it is told not to."""
    find = importlib.util.find_spec
    hidden = lambda name, package=None: None if name == "deepspeed" else find(name, package)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    rows = [{"problem": "[bold]1[/bold] + [red]1 :smile:", "answer": "[1, 2]"}] * 16
    (tmp_path / "[data].jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--dataset_name", str(tmp_path / "[data].jsonl"), "--eval_dataset_name", "null"]
    said = dry_run(capsys, "--config", "configs/quickstart.yaml", "--output_dir", str(tmp_path / "out"), *data)
    assert f"The memory estimate needs DeepSpeed: {pip_install('deepspeed')}" in said
    assert "[bold]1[/bold] + [red]1 :smile:<|im_end|>" in said
    assert "Gold answer: [1, 2] (the value in the column answer)" in said
    assert f"dataset_name: {tmp_path / '[data].jsonl'}" in said


def test_a_dry_run_of_an_adapter_and_of_a_reference_model(tmp_path, capsys):
    offline = ["--config", "configs/quickstart.yaml", "--output_dir", str(tmp_path), "--eval_size", "8"]
    assert "Frozen weights: 0.0 GiB per GPU" in dry_run(capsys, *offline, "--use_peft", "true")
    assert "reference model (beta > 0)" in dry_run(capsys, *offline, "--beta", "0.1")


@pytest.mark.parametrize(("words", "dry"), [(["--dry_run=true"], True), (["--dry_run", "false"], False), ([], False)])
def test_only_a_dry_run_goes_to_the_cpu_by_itself(tmp_path, monkeypatch, words, dry):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    words += ["--output_dir", str(tmp_path), "--config", "configs/quickstart.yaml", "--use_cpu", "false"]
    run, args, _ = training.read_arguments(words)
    assert run.dry_run == dry
    assert args.use_cpu == dry


def test_a_dry_run_by_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(Path("configs/own_data.yaml").read_text() + "\ndry_run: true\n")
    run, args, _ = training.read_arguments(["--config", str(recipe)])
    assert run.dry_run
    assert args.use_cpu


def test_bad_data_and_settings_are_one_line(tmp_path, capsys):
    offline = ["--config", "configs/quickstart.yaml", "--output_dir", str(tmp_path / "out")]
    for words, said in (
        (["--dataset_name", "nowhere.jsonl"], "There is no data file nowhere.jsonl"),
        (["--dataset_filter", '{"level": [3]}'], r"has no column 'level'.*To use all rows: --dataset_filter null"),
        (["--model_name_or_path", str(tmp_path / "no_model")], "no_model"),
    ):
        with pytest.raises(SystemExit, match=f"^train.py: .*{said}"):
            dry_run(capsys, *offline, *words)
    run, args, model = training.read_arguments([*offline, "--correctness_reward", "nothing"])
    with pytest.raises(SystemExit, match=r"^train.py: .*nothing"):
        training.train(run, args, model)


def test_the_settings_that_differ_from_their_defaults_or_all(tmp_path):
    words = ["--config", "configs/quickstart.yaml", "--output_dir", str(tmp_path), "--report_to", "none"]
    run, args, model = training.read_arguments([*words, "--hub_token", "hf_secret"])
    assert isinstance(model, ModelConfig)
    differing = plan.resolved(run, args, model)
    recipe = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    defaults = {"reward_funcs", "credit", "ktae_combine", "num_generations", "held_out_samples", "temperature"}
    defaults |= {"loss_type", "logging_steps", "report_to"}
    derived = {"activation_checkpointing"}  # by newer versions of transformers, from gradient_checkpointing
    assert differing.keys() - derived == recipe.keys() - defaults | {"hub_token"}
    shown = plan.resolved(run, args, model, everything=True)
    assert differing.items() <= shown.items()
    assert {"credit", "num_generations", "temperature", "weight_decay", "lora_r"} <= shown.keys()
    assert shown.pop("hub_token") == "(not shown)"
    for name, value in shown.items():
        owners = [part for part in (run, args, model) if hasattr(part, name)]
        assert any(getattr(getattr(part, name), "value", getattr(part, name)) == value for part in owners), name


# Bad input


def test_a_generation_of_broken_groups_is_refused_with_the_arithmetic(tmp_path, monkeypatch):
    words = r"complete groups of 8 rollouts.* 4 .*x 1 \(processes\) x 3 \(steps_per_generation\) = 12 rollouts. Set "
    with pytest.raises(ValueError, match=words + "steps_per_generation=6$"):
        config(tmp_path, per_device_train_batch_size=4, steps_per_generation=3)
    assert config(tmp_path, per_device_train_batch_size=4, steps_per_generation=6).generation_batch_size == 24
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"1 .*x 3 \(processes\) x 4 \(gradient_accumulation_steps\) = 12 rollouts"):
        config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)


def test_fewer_prompts_than_a_generation_takes_are_refused(tmp_path):
    words = r"has 3 prompts, fewer than one generation needs: 16 rollouts x 1 process x 2 .*\(4 prompts x 8\)"
    for dynamic in (False, True):
        with pytest.raises(ValueError, match=words):
            make_trainer(tmp_path, train_dataset=prompts(3), steps_per_generation=2, dynamic_sampling=dynamic)


def test_vllm_that_is_not_installed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("ktae_trl.trainer.is_vllm_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"use_vllm is true, but vLLM is not installed.*pip install 'ktae-trl\[vllm\]"
    ):
        make_trainer(tmp_path, use_vllm=True)


def test_resuming_from_what_is_no_checkpoint_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_steps=1)
    (tmp_path / "model").mkdir()
    trainer.save_model(tmp_path / "model")  # weights, but no state of a run
    for folder, why in (("model", "it has no trainer_state.json"), ("nowhere", "the folder does not exist")):
        with pytest.raises(ValueError, match=rf"Cannot resume from .*{folder}: {why}\. There is no complete"):
            trainer.train(resume_from_checkpoint=str(tmp_path / folder))
    with pytest.raises(ValueError, match="run contains no checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)


def test_precision_of_the_frozen_weights():
    assert plan._width("bfloat16", None) == 2
    assert plan._width("auto", torch.float32) == 4
    assert plan._width(None, None) == 4
