"""Datasets of problems with known answers, turned into TRL's `prompt` and `solution`."""

from ktae_trl.data.problems import DataArguments, keep_rows, load, load_prompts, to_prompts

__all__ = ["DataArguments", "keep_rows", "load", "load_prompts", "to_prompts"]
