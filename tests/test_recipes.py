"""Every recipe parses; the published ones add up to the published batch and build with the offline model."""

from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from ktae_trl import KTAEGRPOConfig, tiny
from ktae_trl.arguments import parse
from train import RunArguments, build_trainer

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
PUBLISHED = [path for path in RECIPES if path.stem.startswith("qwen")]
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


def parse_recipe(path: Path, output: Path, **overrides):
    line = [word for key, value in {**overrides, "output_dir": str(output)}.items() for word in (f"--{key}", value)]
    return parse(TYPES, "train.py", ["--config", str(path), *line])


def test_there_are_recipes():
    assert {"quickstart", "qwen2.5_math_1.5b_grpo", "qwen2.5_math_1.5b_grpo_ktae"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_it_is_launched_and_where_it_writes(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# accelerate launch ")
    assert first.endswith(f"train.py --config configs/{path.name}")
    assert yaml.safe_load(path.read_text())["output_dir"] == f"runs/{path.stem}"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipe_builds_with_the_offline_model(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    run, args, model = parse_recipe(path, tmp_path, **HERE)
    trainer = build_trainer(run, args, model)
    reached = {**vars(model), **vars(args), **vars(run)}
    for key, value in recipe.items():
        if key not in HERE and key not in ("output_dir", "report_to", "dtype"):
            assert getattr(reached[key], "value", reached[key]) == value, key
    assert trainer.ref_model is not None  # beta is not 0
    assert trainer._correctness_index == 0


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipe_has_the_published_batch(path):
    """METHODS of the paper: 1,024 prompts x 16 rollouts a generation, 8 optimizer steps of 128 prompts each."""
    recipe, gpus = yaml.safe_load(path.read_text()), 8
    rollouts = recipe["per_device_train_batch_size"] * gpus * recipe["steps_per_generation"]
    assert f"--num_processes {gpus} " in path.read_text().splitlines()[0]
    assert rollouts == 1024 * recipe["num_generations"] == 1024 * 16
    assert recipe["steps_per_generation"] / recipe["gradient_accumulation_steps"] == 8
    published = {"epsilon": 0.2, "delta": 3.0, "beta": 0.001, "learning_rate": 1e-6, "max_completion_length": 3072}
    assert {key: recipe[key] for key in published} == published


def test_twins_differ_in_credit_only():
    plain, ktae = (
        yaml.safe_load((ROOT / f"configs/qwen2.5_math_1.5b_grpo{x}.yaml").read_text()) for x in ("", "_ktae")
    )
    different = {key for key in {*plain, *ktae} if plain.get(key) != ktae.get(key)}
    assert {key for key in different if not key.startswith("ktae_")} == {"credit", "output_dir"}


def test_the_command_line_wins_over_the_file(tmp_path):
    _, args, _ = parse_recipe(ROOT / "configs/quickstart.yaml", tmp_path, learning_rate="0.5", ktae_combine="add")
    assert (args.learning_rate, args.ktae_combine, args.num_generations) == (0.5, "add", 8)


# Bad input


def test_an_unknown_key_of_the_file_names_itself_and_the_nearest(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "configs/quickstart.yaml").read_text() + "\nktae_combin: add\nzzzz: 1\n")
    with pytest.raises(ValueError, match=r"^Unknown setting: 'ktae_combin' \(did you mean 'ktae_combine'\?\), 'zzzz'$"):
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
