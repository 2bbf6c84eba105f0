"""Datasets of problems with known answers, turned into TRL's `prompt` and `solution`.

loading (Hub, file, folder) -> columns -> problems and gold answers of each row, as prompts; a recipe does all of it
"""

from ktae_trl.data.columns import keep_rows
from ktae_trl.data.loading import load
from ktae_trl.data.problems import to_prompts
from ktae_trl.data.recipe import DataArguments, load_prompts

__all__ = ["DataArguments", "keep_rows", "load", "load_prompts", "to_prompts"]
