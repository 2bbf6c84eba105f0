"""The data settings of a recipe, and the prompts that they name."""

import json
from dataclasses import dataclass, field

from datasets import Dataset

from ktae_trl.arguments import UserError
from ktae_trl.data.columns import matching_rows
from ktae_trl.data.few_shot import FEW_SHOT_HELP
from ktae_trl.data.loading import load
from ktae_trl.data.problems import drop_long, to_prompts, without_images
from ktae_trl.prompts import AUTO, SYSTEM_PROMPT_HELP, check_template


@dataclass
class DataArguments:
    """Which problems to train and evaluate on, and how to ask them."""

    dataset_name: str = field(
        metadata={
            "help": "Hub dataset id, a local .jsonl, .json, .csv or .parquet file, a save_to_disk folder, or the "
            "package's own: tiny, word_problems."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(
        default="train", metadata={"help": "Split of a Hub dataset or folder; a part of any as 'train[:1000]'."}
    )
    dataset_filter: dict | str | None = field(
        default=None,
        metadata={
            "help": "Train on the rows whose columns have one of these values only, such as '{\"level\": [3, 4, 5]}'; "
            "null for all rows."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out problems, in the same forms. Default: no evaluation."}
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "Their configuration. Default: dataset_config, if it is the same dataset."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of the held-out problems."})
    eval_size: int | None = field(
        default=None, metadata={"help": "Number of held-out problems, from the first. Default: all."}
    )
    problem_column: str = field(
        default="problem",
        metadata={"help": "Column with the problem, a text or a list of chat messages. Nested: 'extra_info.problem'."},
    )
    answer_column: str = field(
        default="answer",
        metadata={
            "help": "Column with the answer, a list of accepted answers, or a solution that ends with the answer; "
            "nested as 'reward_model.ground_truth'."
        },
    )
    eval_problem_column: str | None = field(
        default=None, metadata={"help": "problem_column of the held-out problems. Default: the same."}
    )
    eval_answer_column: str | None = field(
        default=None, metadata={"help": "answer_column of the held-out problems. Default: the same."}
    )
    system_prompt: str | None = field(default=AUTO, metadata={"help": SYSTEM_PROMPT_HELP})
    system_prompt_in_user: bool = field(
        default=False,
        metadata={"help": "Put it at the head of the problem: for models without a system role, such as Gemma."},
    )
    few_shot: str | None = field(default=None, metadata={"help": FEW_SHOT_HELP})
    max_prompt_length: int | None = field(
        default=1024, metadata={"help": "Leave out prompts of more tokens. Default 1024; null for no limit."}
    )

    def __post_init__(self):
        if isinstance(self.dataset_filter, str):  # from the command line
            try:
                self.dataset_filter = json.loads(self.dataset_filter)
            except json.JSONDecodeError as error:
                raise UserError(f"dataset_filter is not JSON: {error}: {self.dataset_filter}") from None
        chosen = self.dataset_filter
        if chosen is not None and not (isinstance(chosen, dict) and all(isinstance(v, list) for v in chosen.values())):
            raise UserError(f"dataset_filter maps columns to lists of values, as in {{level: [3, 4, 5]}}, not {chosen}")
        self.system_prompt = self.system_prompt or None


def load_prompts(
    arguments: DataArguments,
    tokenizer,
    template_kwargs: dict | None = None,
    *,
    answer_format: str = "boxed",
    gradable_only: bool = True,
) -> tuple[Dataset, Dataset | None]:
    """Return the training prompts and the held-out ones (None if the arguments name none).

    Args:
        tokenizer: of the model, which reads text: rows with images are left out.
        template_kwargs: for its chat template, as in training (`chat_template_kwargs`).
        answer_format: what the system prompt asks for, unless the arguments have one.
        gradable_only: see `to_prompts`.

    Raises:
        ValueError: what `load`, `to_prompts`, `check_template` and `drop_long` refuse, with the name of the dataset.
    """

    def prepare(name: str, config: str | None, split: str, problem: str, answer: str, values: dict) -> Dataset:
        dataset = load(name, config, split)
        try:
            prompts = to_prompts(
                dataset,
                problem_column=problem,
                answer_column=answer,
                system_prompt=arguments.system_prompt,
                answer_format=answer_format,
                system_prompt_in_user=arguments.system_prompt_in_user,
                few_shot=arguments.few_shot,
                gradable_only=gradable_only,
                rows=matching_rows(dataset, values),
            )
            prompts = without_images(prompts)
            check_template(prompts["prompt"][:], tokenizer, template_kwargs)
            return drop_long(prompts, tokenizer, arguments.max_prompt_length, template_kwargs)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    name, held_out_name = arguments.dataset_name, arguments.eval_dataset_name
    config, split = arguments.dataset_config, arguments.dataset_split
    columns = arguments.problem_column, arguments.answer_column
    train = prepare(name, config, split, *columns, arguments.dataset_filter or {})
    if held_out_name is None:
        return train, None
    config = arguments.eval_dataset_config or (config if held_out_name == name else None)
    columns = arguments.eval_problem_column or columns[0], arguments.eval_answer_column or columns[1]
    held_out = prepare(held_out_name, config, arguments.eval_dataset_split, *columns, {})
    return train, held_out.select(range(min(arguments.eval_size or len(held_out), len(held_out))))
