"""Every recipe parses; the published ones add up to the published batch and build with the offline model."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import ModelConfig

from ktae_trl import KTAEGRPOConfig, tiny
from ktae_trl.arguments import UserError, parse
from ktae_trl.prompts import instruction
from ktae_trl.training.run import RunArguments, build_trainer

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
PUBLISHED = [path for path in RECIPES if path.stem.startswith("qwen")]
LAUNCHERS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))
TYPES = (RunArguments, KTAEGRPOConfig, ModelConfig)
# What a CPU without network and GPU cannot do as the recipe says.
HERE = {
    "model_name_or_path": str(tiny.MODEL),
    "dataset_name": str(tiny.TRAIN),
    "eval_dataset_name": str(tiny.HELD_OUT),
    "use_vllm": "false",
    "use_cpu": "true",
    "bf16": "false",
}
# METHODS of the paper and its repository's scripts; on both sizes a generation has 1,024 prompts x 16 rollouts, and an
# optimizer step 128 prompts.
PAPER = {
    "num_generations": 16,
    "max_prompt_length": 1024,
    "max_completion_length": 3072,
    "temperature": 1.0,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "entropy_coef": 0.0,
    "loss_type": "dapo",  # token mean
    "epsilon": 0.2,
    "reward_funcs": ["math_accuracy"],
}
GRPO = PAPER | {"epsilon_high": 0.2, "delta": 3.0, "num_train_epochs": 20}
DAPO = PAPER | {
    "delta": 10.0,
    "beta": 0.0,
    "dynamic_sampling": True,
    "dynamic_sampling_max_batches": 10,
    "reward_funcs": ["math_accuracy", "soft_overlong"],
    "reward_weights": [1.0, 1.0],
    "correctness_reward": "math_accuracy",
    "overlong_buffer": 512,
}
OTHERS = ("oar_g", "oar_p", "tree", "gtpo", "otb", "rlsd", "hicra")  # methods with recipes of their own
LEVELS = {"dataset_filter": {"level": [3, 4, 5]}}
RUNS = {
    "1.5b_grpo": GRPO | {"model_name_or_path": "Qwen/Qwen2.5-Math-1.5B", "beta": 0.001},
    "7b_grpo": GRPO | {"model_name_or_path": "Qwen/Qwen2.5-Math-7B", "beta": 0.0} | LEVELS,
    "1.5b_dapo": DAPO | {"model_name_or_path": "Qwen/Qwen2.5-Math-1.5B", "epsilon_high": 0.28},
    "7b_dapo": DAPO | {"model_name_or_path": "Qwen/Qwen2.5-Math-7B", "epsilon_high": 0.24} | LEVELS,
}
EXPECTED = {
    f"qwen2.5_math_{run}{suffix}": settings | credit
    for run, settings in RUNS.items()
    for suffix, credit in (("", {"credit": "none"}), ("_ktae", {"credit": "ktae", "ktae_combine": "add"}))
}


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def parse_recipe(path: Path, output: Path, **overrides):
    line = [
        word for key, value in {**overrides, "output_dir": str(output)}.items() for word in (f"--{key}", str(value))
    ]
    return parse(TYPES, "train.py", ["--config", str(path), *line])


def test_there_are_recipes():
    others = {f"{twin}_{credit}" for twin in ("quickstart", "qwen2.5_math_1.5b") for credit in OTHERS}
    assert {path.stem for path in RECIPES} == {
        "quickstart",
        "lora_24gb",
        "own_data",
        "smollm2_135m",
        "smollm2_135m_lora",
        *EXPECTED,
        *others,
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_it_is_launched_and_where_it_writes(path):
    first, recipe = path.read_text().splitlines()[0], read(path)
    assert first.startswith("# accelerate launch ")
    assert first.endswith(f"train.py --config configs/{path.name}")
    assert recipe["output_dir"] == f"runs/{path.stem}"
    file = re.search(r"--config_file (\S+)", first)
    assert recipe.get("use_cpu", False) == file[1].endswith("/cpu.yaml")
    assert read(ROOT / file[1])["num_processes"] == recipe.get("num_processes", 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_asks_for_what_its_answer_format_reads(path, tmp_path):
    run, args, _ = parse_recipe(path, tmp_path, use_cpu="true", bf16="false", use_vllm="false")
    asked = instruction(run.system_prompt, args.answer_format)
    mark = {"boxed": r"\boxed", "auto": r"\boxed", "tag": "<answer>", "hash": "####", "last_number": "number"}
    assert mark[args.answer_format] in asked


def offline(path: Path, tmp_path: Path) -> dict[str, str]:
    """Return what to override to build a recipe here; `level` is a column that the offline problems do not have."""
    if "dataset_filter" not in read(path):
        return HERE
    rows = [json.loads(line) for line in tiny.TRAIN.read_text().splitlines()]
    data = tmp_path / "levels.jsonl"
    data.write_text("".join(json.dumps(row | {"level": 1 + i % 5}) + "\n" for i, row in enumerate(rows)))
    return HERE | {"dataset_name": str(data)}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipe_builds_with_the_offline_model(path, tmp_path):
    recipe, here = read(path), offline(path, tmp_path)
    # A process here makes half a generation of the data that there is.
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 32, "steps_per_generation": 256}
    run, args, model = parse_recipe(path, tmp_path, **here, **batch)
    trainer = build_trainer(run, args, model)
    reached = {**vars(model), **vars(args), **vars(run)}
    for key, value in recipe.items():
        if key not in here and key not in ("output_dir", "report_to", "dtype", *batch):
            assert getattr(reached[key], "value", reached[key]) == value, key
    assert (trainer.ref_model is not None) == (recipe["beta"] > 0)
    assert trainer.correctness_reward == "math_accuracy"
    assert (trainer.dynamic_sampling is not None) == recipe.get("dynamic_sampling", False)
    if "dataset_filter" in recipe:
        assert set(trainer.train_dataset["level"]) == {3, 4, 5}


@pytest.mark.parametrize("name", EXPECTED)
def test_published_recipe_has_the_published_settings(name):
    recipe = read(ROOT / f"configs/{name}.yaml")
    expected = EXPECTED[name]
    assert {key: recipe[key] for key in expected} == expected
    gpus = recipe["num_processes"]
    rollouts = recipe["per_device_train_batch_size"] * gpus * recipe["steps_per_generation"]
    step = recipe["per_device_train_batch_size"] * gpus * recipe["gradient_accumulation_steps"]
    assert rollouts / recipe["num_generations"] == 1024
    assert step / recipe["num_generations"] == 128
    assert rollouts / step == 8


@pytest.mark.parametrize("run", RUNS)
def test_twins_differ_in_credit_only(run):
    plain, ktae = (read(ROOT / f"configs/qwen2.5_math_{run}{suffix}.yaml") for suffix in ("", "_ktae"))
    different = {key for key in {*plain, *ktae} if plain.get(key) != ktae.get(key)}
    assert {key for key in different if not key.startswith("ktae_")} == {"credit", "output_dir"}


@pytest.mark.parametrize("credit", OTHERS)
@pytest.mark.parametrize("twin", ["quickstart", "qwen2.5_math_1.5b"])
def test_other_methods_differ_in_credit_only(twin, credit):
    plain = read(ROOT / f"configs/{twin if twin == 'quickstart' else twin + '_grpo'}.yaml")
    other = read(ROOT / f"configs/{twin}_{credit}.yaml")
    different = {key for key in {*plain, *other} if plain.get(key) != other.get(key)}
    own = credit.partition("_")[0]
    assert {key for key in different if not key.startswith(("ktae_", f"{own}_"))} == {"credit", "output_dir"}
    assert other["credit"] == credit


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("credit", OTHERS)
def test_the_quickstart_with_another_method_trains(tmp_path, credit):
    small = {"max_steps": 1, "per_device_train_batch_size": 16, "report_to": "none", "eval_strategy": "no"}
    trainer = build_trainer(*parse_recipe(ROOT / f"configs/quickstart_{credit}.yaml", tmp_path, **small))
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_lora_recipe_trains_an_adapter(tmp_path):
    batch = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    batch |= {"steps_per_generation": 1, "max_completion_length": 16, "dtype": "float32", "report_to": "none"}
    run, args, model = parse_recipe(ROOT / "configs/lora_24gb.yaml", tmp_path, **HERE, **batch)
    trainer = build_trainer(run, args, model)
    trainer.train()
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_the_recipe_for_own_data_reads_rows_as_it_shows_them(tmp_path):
    path = ROOT / "configs/own_data.yaml"
    shown = re.search(r'\{"question".*?\}', path.read_text())[0]
    data = tmp_path / "mine.jsonl"
    data.write_text((shown + "\n") * 40)
    here = HERE | {"dataset_name": str(data), "eval_dataset_name": str(data), "report_to": "none"}
    batch = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    run, args, model = parse_recipe(path, tmp_path, **here, **batch, steps_per_generation=1, max_completion_length=8)
    trainer = build_trainer(run, args, model)
    trainer.train()
    assert trainer.train_dataset["solution"][0] == ["5"]
    assert trainer.train_dataset["result"][0] == "5"


# Accelerate files


def test_there_are_accelerate_files():
    names = {"cpu", "one_gpu", "ddp", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2", "two_nodes"}
    assert {path.stem for path in LAUNCHERS} == names


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_its_file(path):
    """Accelerate refuses keys that it does not know."""
    config = load_config_from_file(str(path))
    assert f"--config_file configs/accelerate/{path.name}" in path.read_text()
    assert config.num_processes == (16 if path.stem == "two_nodes" else 1 if path.stem in ("cpu", "one_gpu") else 8)
    stage = re.search(r"zero(\d)", path.stem)
    if stage:
        assert config.distributed_type == "DEEPSPEED"
        assert config.deepspeed_config["zero_stage"] == int(stage[1])
        offload = "cpu" if "offload" in path.stem else "none"
        assert config.deepspeed_config["offload_optimizer_device"] == offload


def test_the_command_line_wins_over_the_file(tmp_path):
    _, args, _ = parse_recipe(ROOT / "configs/quickstart.yaml", tmp_path, learning_rate="0.5", ktae_combine="add")
    assert (args.learning_rate, args.ktae_combine, args.num_generations) == (0.5, "add", 8)


# Bad input


def test_an_unknown_key_of_the_file_names_itself_and_the_nearest(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "configs/quickstart.yaml").read_text() + "\nktae_combin: add\nzzzz: 1\n")
    with pytest.raises(ValueError, match=r"^Unknown setting: 'ktae_combin' \(did you mean 'ktae_combine'\?\), 'zzzz'$"):
        parse_recipe(recipe, tmp_path)


def test_a_retired_setting_says_what_to_do(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "configs/quickstart.yaml").read_text() + "\nrecord_files: 50\n")
    with pytest.raises(UserError, match=r"^record_files is no longer a setting: remove it\. .*at most 100 records"):
        parse_recipe(recipe, tmp_path)


def test_an_unknown_option_names_itself_and_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"'learning_rat' \(did you mean 'learning_rate'\?\)"):
        parse_recipe(ROOT / "configs/quickstart.yaml", tmp_path, learning_rat="1")


def test_a_missing_recipe():
    with pytest.raises(FileNotFoundError, match=r"nowhere.yaml"):
        parse(TYPES, "train.py", ["--config", "nowhere.yaml"])


def test_a_missing_data_file_of_a_recipe(tmp_path):
    run, args, model = parse_recipe(ROOT / "configs/quickstart.yaml", tmp_path, dataset_name="nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"There is no data file nowhere.jsonl"):
        build_trainer(run, args, model)
