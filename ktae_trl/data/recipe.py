"""The data settings of a recipe, and the prompts built from them."""

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
    """Which problems to train and evaluate on, and how to turn them into prompts."""

    dataset_name: str = field(
        metadata={
            "help": "Hub dataset id, a local .jsonl, .json, .csv or .parquet file, a save_to_disk folder, or a dataset "
            "included in the package: tiny, word_problems."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(
        default="train",
        metadata={"help": "Split of a Hub dataset or folder. 'train[:1000]' takes a part of any dataset."},
    )
    dataset_filter: dict | str | None = field(
        default=None,
        metadata={
            "help": "Train only on rows whose columns have one of these values, such as '{\"level\": [3, 4, 5]}'. "
            "Default: null, all rows."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of held-out problems (see dataset_name). Default: no evaluation."}
    )
    eval_dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of the held-out dataset. Default: dataset_config if it is the same dataset."},
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of the held-out problems."})
    eval_size: int | None = field(
        default=None, metadata={"help": "Use only the first N held-out problems. Default: all."}
    )
    problem_column: str = field(
        default="problem",
        metadata={"help": "Column with the problem: text or a list of chat messages. Nested: 'extra_info.problem'."},
    )
    answer_column: str = field(
        default="answer",
        metadata={
            "help": "Column with the answer, a list of accepted answers, or a solution that ends with the answer. "
            "Nested: 'reward_model.ground_truth'."
        },
    )
    eval_problem_column: str | None = field(
        default=None, metadata={"help": "problem_column of the held-out problems. Default: problem_column."}
    )
    eval_answer_column: str | None = field(
        default=None, metadata={"help": "answer_column of the held-out problems. Default: answer_column."}
    )
    system_prompt: str | None = field(default=AUTO, metadata={"help": SYSTEM_PROMPT_HELP})
    system_prompt_in_user: bool = field(
        default=False,
        metadata={
            "help": "Put the system prompt before the problem, in the user message. For models without a system "
            "role, such as Gemma."
        },
    )
    few_shot: str | None = field(default=None, metadata={"help": FEW_SHOT_HELP})
    max_prompt_length: int | None = field(
        default=1024,
        metadata={"help": "Leave out prompts with more tokens than this. Default: 1024; null for no limit."},
    )

    def __post_init__(self):
        if isinstance(self.dataset_filter, str):  # from the command line
            try:
                self.dataset_filter = json.loads(self.dataset_filter)
            except json.JSONDecodeError as error:
                raise UserError(f"dataset_filter is not JSON: {error}: {self.dataset_filter}") from None
        chosen = self.dataset_filter
        if chosen is not None and not (isinstance(chosen, dict) and all(isinstance(v, list) for v in chosen.values())):
            raise UserError(
                f"dataset_filter must map columns to lists of values, such as {{level: [3, 4, 5]}}, not {chosen}"
            )
        self.system_prompt = self.system_prompt or None


def load_prompts(
    arguments: DataArguments,
    tokenizer,
    template_kwargs: dict | None = None,
    *,
    answer_format: str = "boxed",
    gradable_only: bool = True,
) -> tuple[Dataset, Dataset | None]:
    """Return the training prompts and the held-out prompts (None without `eval_dataset_name`).

    Rows with images are left out, because prompts are text only.

    Args:
        tokenizer: tokenizer of the model.
        template_kwargs: variables for its chat template, as in training (`chat_template_kwargs`).
        answer_format: the format that the default system prompt asks for.
        gradable_only: see `to_prompts`.

    Raises:
        ValueError: `load`, `to_prompts`, `check_template` or `drop_long` refuses the data; the message has the name of
            the dataset.
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
