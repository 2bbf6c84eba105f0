"""Turn datasets of problems with known answers into TRL's columns `prompt` and `solution`.

    loading (Hub, file, folder) -> columns -> problems (prompt and gold answers of each row)

`recipe` combines these steps.
"""

from ktae_trl.data.columns import keep_rows
from ktae_trl.data.loading import load
from ktae_trl.data.problems import to_prompts
from ktae_trl.data.recipe import DataArguments, load_prompts

__all__ = ["DataArguments", "keep_rows", "load", "load_prompts", "to_prompts"]
