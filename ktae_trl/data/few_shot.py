"""Worked examples that precede each problem as earlier turns of the conversation."""

from pathlib import Path

from ktae_trl.arguments import WORD_PROBLEMS, UserError, nearest
from ktae_trl.data.columns import column_values
from ktae_trl.data.files import read
from ktae_trl.grading.extraction import find_answer
from ktae_trl.preflight import ENDINGS, ending
from ktae_trl.prompts import Conversation

_EXAMPLES = {WORD_PROBLEMS: Path(__file__).parent / WORD_PROBLEMS / "examples.jsonl"}  # included in the package
FEW_SHOT_HELP = (
    "Worked examples to put before each problem, as earlier turns: a .jsonl, .json, .csv or .parquet file with the "
    f"columns problem and solution, or examples included in the package: {', '.join(sorted(_EXAMPLES))}."
)


def worked_examples(name: str | None, answer_format: str = "boxed") -> Conversation:
    """Return the examples selected by `few_shot`, each as a user message and an assistant message.

    Args:
        name: `word_problems` (three problems with one or two steps and boxed answers, included in the package), or a
            file with the columns `problem` and `solution`; None for no examples.
        answer_format: the answer format of the run. Models imitate the examples, so each solution must have its answer
            in this format.

    Raises:
        ValueError: the examples do not exist, the file lacks a column, or a row has no problem or a solution without an
            answer in this format.
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
                raise UserError(f"few_shot {name}, row {number}: the {column} must be text, not {value!r:.80}")
        if find_answer(solution, answer_format) is None:
            raise UserError(
                f"few_shot {name}, row {number}: the solution has no answer in the format of this run "
                f"(answer_format: {answer_format}). Add one, or set answer_format: auto"
            )
        messages += [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return messages
