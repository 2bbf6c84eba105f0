"""Worked examples, which come before a problem as earlier turns of the conversation."""

from pathlib import Path

from ktae_trl.arguments import WORD_PROBLEMS, UserError, nearest
from ktae_trl.data.columns import column_values
from ktae_trl.data.files import read
from ktae_trl.grading.extraction import find_answer
from ktae_trl.preflight import ENDINGS, ending
from ktae_trl.prompts import Conversation

_EXAMPLES = {WORD_PROBLEMS: Path(__file__).parent / WORD_PROBLEMS / "examples.jsonl"}  # of the package
FEW_SHOT_HELP = (
    "Worked examples that come before each problem, as earlier turns: a .jsonl, .json, .csv or .parquet file with the "
    f"columns problem and solution, or the package's own: {', '.join(sorted(_EXAMPLES))}."
)


def worked_examples(name: str | None, answer_format: str = "boxed") -> Conversation:
    """Return the examples that a setting `few_shot` names, a user's and an assistant's message each.

    Args:
        name: the package's own `word_problems` (three problems of one and two steps with their answers in a box), or
            a file with the columns `problem` and `solution`; None for no examples.
        answer_format: of the run. A model repeats what it is shown, so each solution must have its answer in it.

    Raises:
        ValueError: no such examples, a file without these columns, or a row without a problem or with a solution whose
            answer the format does not find.
    """
    if name is None:
        return []
    if name not in _EXAMPLES and ending(Path(name)) not in ENDINGS:
        raise UserError(
            f"few_shot must be a file ({', '.join(ENDINGS)}) or one of {', '.join(_EXAMPLES)}, not {name!r}"
            f"{nearest(name, _EXAMPLES)}"
        )
    try:
        rows = read(_EXAMPLES.get(name, Path(name)))
        pairs = list(zip(column_values(rows, "problem"), column_values(rows, "solution"), strict=True))
    except UserError as error:
        raise UserError(f"few_shot {name}: {error}") from None
    messages = []
    for number, (problem, solution) in enumerate(pairs, 1):
        for column, value in (("problem", problem), ("solution", solution)):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"few_shot {name}, row {number}: the {column} must be a text, not {value!r:.80}")
        if find_answer(solution, answer_format) is None:
            raise UserError(
                f"few_shot {name}, row {number}: the solution has no answer in the format of the run, "
                f"answer_format: {answer_format}. Write it so, or set answer_format: auto"
            )
        messages += [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return messages
