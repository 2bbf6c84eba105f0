"""Turn rows of problems and answers into TRL's columns `prompt` and `solution`, and leave out unusable rows."""

import logging
from collections.abc import Sequence

from datasets import Dataset

from ktae_trl.arguments import UserError
from ktae_trl.data.columns import IMAGES, RESERVED, column_values, free_names, has_image
from ktae_trl.data.few_shot import worked_examples
from ktae_trl.grading import gradable
from ktae_trl.grading.golds import gold_answers, is_prose
from ktae_trl.prompts import AUTO, Conversation, conversation, instruction, token_ids

logger = logging.getLogger(__name__)


def to_prompts(
    dataset: Dataset,
    *,
    problem_column: str = "problem",
    answer_column: str = "answer",
    system_prompt: str | None = AUTO,
    system_prompt_in_user: bool = False,
    few_shot: str | None = None,
    answer_format: str = "boxed",
    gradable_only: bool = True,
    rows: Sequence[int] | None = None,
) -> Dataset:
    """Turn problems and answers into TRL's columns `prompt` (a conversation) and `solution` (a list of strings).

    All other columns are kept for reward functions. Columns whose names are used by TRL or by this function are
    renamed, with a warning (`solution` becomes `data_solution`); image columns without images are removed. Rows without
    a problem or an answer, or with an answer that cannot be graded, are left out, with a warning that gives their
    number.

    Args:
        problem_column, answer_column: column names; a dotted path selects a field of a nested column. The accepted
            values are described at `prompts.conversation` and `grading.golds.gold_answers`.
        system_prompt, system_prompt_in_user: see `prompts.conversation`. "auto" asks for an answer in `answer_format`.
        few_shot: worked examples to put before each problem; see `few_shot.worked_examples`.
        answer_format: the answer format of the run (`KTAEGRPOConfig.answer_format`).
        gradable_only: leave out answers that `math_accuracy` cannot grade. Set it to False if your own reward function
            can grade them.
        rows: indices of the rows to use. Default: all.

    Raises:
        ValueError: a column does not exist, a value cannot be read as a problem or an answer (the message has its row),
            or no row is left.
    """
    taken = range(len(dataset)) if rows is None else rows
    system_prompt, examples = instruction(system_prompt, answer_format), worked_examples(few_shot, answer_format)
    try:
        problems, golds = column_values(dataset, problem_column), column_values(dataset, answer_column)
    except ValueError as error:
        raise UserError(f"{error}. Set problem_column and answer_column") from None
    prompts: dict[int, Conversation] = {}
    for row in taken:
        try:
            golds[row] = gold_answers(golds[row])
            if not isinstance(problems[row], str) or problems[row].strip():
                prompts[row] = conversation(
                    problems[row], system_prompt, in_user=system_prompt_in_user, examples=examples
                )
        except (TypeError, ValueError) as error:
            raise UserError(f"row {row + 1} ({problem_column}, {answer_column}): {error}") from None
    kept = _kept([row for row in prompts if golds[row]], len(taken), "no problem or answer")
    if gradable_only:
        kept = _gradable_rows(kept, golds)
    if system_prompt and (own := sum(_has_system(problems[row]) for row in kept)):
        logger.warning("%d of %d problems keep their own system message instead of system_prompt", own, len(kept))
    whole = _out_of_the_way(dataset, problem_column, answer_column)
    there = set(kept)
    whole = whole.add_column("prompt", [prompts.get(row) for row in range(len(dataset))])
    whole = whole.add_column("solution", [golds[row] if row in there else None for row in range(len(dataset))])
    return whole.select(kept)


def _gradable_rows(rows: list[int], golds: list[list[str]]) -> list[int]:
    def keep(wanted: list[bool], reason: str) -> list[int]:
        kept = [row for row, good in zip(rows, wanted, strict=True) if good]
        example = next((golds[row][0] for row, good in zip(rows, wanted, strict=True) if not good), "")
        return _kept(kept, len(rows), f"{reason}, such as {example!r:.100}")

    rows = keep(
        [not all(map(is_prose, golds[row])) for row in rows],
        "answers in prose that do not end with a line ####, a box or 'The answer is ...'",
    )
    return keep(gradable([golds[row] for row in rows]), "answers that cannot be graded")


def _has_system(problem: str | list[dict]) -> bool:
    return isinstance(problem, list) and problem[0]["role"] == "system"


def _out_of_the_way(dataset: Dataset, problem_column: str, answer_column: str) -> Dataset:
    """Free the names `prompt` and `solution`, and those of the arguments that TRL passes to reward functions."""
    if problem_column == "prompt":
        dataset = dataset.remove_columns("prompt")
    return free_names(dataset, {"prompt", "solution"} | RESERVED, silent={answer_column})


def drop_long(
    dataset: Dataset, tokenizer, max_prompt_length: int | None, template_kwargs: dict | None = None
) -> Dataset:
    """Leave out prompts of more than `max_prompt_length` tokens, with a warning that gives their number.

    Args:
        template_kwargs: see `prompts.token_ids`.

    Raises:
        ValueError: no prompt is left.
    """
    if max_prompt_length is None:
        return dataset
    lengths = [len(ids) for ids in token_ids(dataset["prompt"][:], tokenizer, template_kwargs)]
    kept = [row for row, length in enumerate(lengths) if length <= max_prompt_length]
    return dataset.select(_kept(kept, len(dataset), f"more than {max_prompt_length} tokens (max_prompt_length)"))


def without_images(dataset: Dataset) -> Dataset:
    """Leave out rows with an image, with a warning that gives their number.

    Raises:
        ValueError: no row is left.
    """
    for name in IMAGES:
        if name in dataset.column_names:
            kept = [row for row, image in enumerate(has_image(dataset, name)) if not image]
            kept = _kept(kept, len(dataset), f"they have an image (column {name!r}), but prompts are text only")
            dataset = dataset.remove_columns(name).select(kept)
    return dataset


def _kept(kept: list[int], total: int, reason: str) -> list[int]:
    """Return the kept rows, with a warning if some are left out; raise a ValueError if none is kept."""
    if len(kept) < total:
        logger.warning("Left out %d of %d rows: %s", total - len(kept), total, reason)
    if not kept:
        raise UserError(f"No rows are left. Left out {total} of {total} rows: {reason}")
    return kept
