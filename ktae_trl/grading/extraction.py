r"""Find the final answer in a completion: `\boxed{5}`, `<answer>5</answer>`, `#### 5`, or the last number.

Thinking is skipped: only the text after the last `</think>` is read. A completion whose `<think>` is not closed has no
answer, even if it contains a box. `answered` covers prompts that end with an open `<think>`.
"""

import re
from typing import NamedTuple

from ktae_trl.arguments import UserError, nearest

# Longest text, in characters, that counts as an answer.
MAX_LENGTH = 10_000
_LONGEST_WORD = 500  # longest content of a box without braces
_WIDEST_GAP = 60  # most characters between two boxes of one answer

# For each answer format, the system prompt that asks for it.
INSTRUCTIONS = {
    "boxed": r"Please reason step by step, and put your final answer within \boxed{}.",
    "tag": "Please reason step by step, and put your final answer within <answer> and </answer>.",
    "hash": "Please reason step by step, and write your final answer in a last line of the form: #### ANSWER",
    "last_number": "Please reason step by step, and end with your final answer, which is a number.",
}
INSTRUCTIONS["auto"] = INSTRUCTIONS["boxed"]
ANSWER_FORMATS = tuple(INSTRUCTIONS)

_THOUGHT = re.compile(r".*</think>", re.DOTALL)
_TOKEN = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*+")
# `\boxed 5` and `\boxed\frac12`, but not `\boxed notation`: up to the end of the formula, or the first word.
_UNBRACED = re.compile(
    r"(?=[-+]?[\d.]|\\[A-Za-z]|[A-Za-z](?![A-Za-z]))(?:[^\n$]*?(?<!\s)(?=\s*+(?:\$|\\[)\]]))|[^\s$]+)"
)
# `\boxed{3}, \boxed{5} and \boxed{7}`, also between dollar signs and with names, as in `x=\boxed{3} or x=\boxed{5}`.
_FORMULA_ENDS = r"(?:[\s$]|\\[()\[\],;:! ]|\\q?quad)*+"
_BETWEEN = re.compile(
    rf"{_FORMULA_ENDS}(?:,|;|,?\s*+(?:\\text\s*+\{{)?\s*+\b(?:and|or)\b\s*+\}}?){_FORMULA_ENDS}"
    rf"(?:[A-Za-z](?:_\w|_\{{\w+\}})?\s*+={_FORMULA_ENDS})?"
)
_TAG = re.compile(r"<answer>(?:(?!<answer>).)*?</answer>", re.DOTALL)
_HASH = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)", re.MULTILINE)
_NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+|/\d+)?%?(?![\d/])|(?<![\w.])\.\d+%?")


class Answer(NamedTuple):
    """The final answer of a completion and its position, in characters."""

    text: str  # for several boxes, their contents joined by commas
    begin: int  # where the box, tag or mark begins; the text before it is reasoning
    spans: tuple[tuple[int, int], ...]  # begin and end of the answer itself, one pair per box


def find_answer(completion: str, answer_format: str = "boxed") -> Answer | None:
    r"""Return the final answer of a completion; None if it has none in this format.

    - `boxed`: the content of the last `\boxed{...}` (or `\fbox`). Boxes joined by a comma, a semicolon, "and" or "or"
      are one answer: `\boxed{1}, \boxed{2}` is `1, 2`, so a model cannot give two answers and have the correct one
      picked. If no box has braces: the text after the last `\boxed`, as in `\boxed 5`.
    - `tag`: the content of the last `<answer>...</answer>`; if it contains a box, the content of the box.
    - `hash`: the rest of the last line that begins with `####`, as at the end of GSM8K's solutions.
    - `last_number`: the last number.
    - `auto`: the first of these formats that the completion uses, in this order.

    If the last box or tag is cut off, the completion has no answer, even if an earlier one is complete. Text of more
    than 10,000 characters is not an answer.
    """
    thought = _THOUGHT.match(completion)
    begin = thought.end() if thought else 0
    if "<think>" in completion[begin:]:
        return None
    if answer_format == "auto":
        marks = (("boxed", _BOX), ("tag", re.compile("<answer>")), ("hash", _HASH))
        answer_format = next((name for name, mark in marks if mark.search(completion, begin)), "last_number")
    return _FINDERS[answer_format](completion, begin)


def check_format(answer_format: str) -> None:
    """Raise a ValueError for an unknown answer format."""
    if answer_format not in ANSWER_FORMATS:
        choices = ", ".join(ANSWER_FORMATS)
        close = nearest(answer_format, ANSWER_FORMATS)
        raise UserError(f"answer_format={answer_format!r} is unknown{close}. Choose from: {choices}")


def answered(prompt: str, completion: str) -> str:
    """Return a completion as `find_answer` expects it: with a leading `<think>` if its prompt ends with one."""
    return f"<think>{completion}" if prompt.rstrip().endswith("<think>") else completion


def write_answer(answer: str, answer_format: str = "boxed") -> str:
    """Return text that ends a completion with this answer in the given format."""
    pattern = {"tag": "<answer>{}</answer>", "hash": "#### {}", "last_number": "The answer is {}"}.get(answer_format)
    return pattern.replace("{}", answer) if pattern else rf"\boxed{{{answer}}}"


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` only, or None if there is none."""
    answer = _boxed(text, 0)
    return answer and text[slice(*answer.spans[-1])]


def _boxed(text: str, begin: int) -> Answer | None:
    boxes = list(_BOX.finditer(text, begin))
    braced = [box for box in boxes if box.end() == len(text) or text[box.end()] == "{"]
    if not braced:
        return _unbraced(text, boxes[-1]) if boxes else None
    chain: list[tuple[re.Match, int]] = []  # boxes and the ends of their contents, last box first
    for box in reversed(braced):
        end = _closing_brace(text, box.end())
        if chain and (end is None or not _joined(text, end + 1, chain[-1][0].start())):
            break
        if end is None:
            return None  # cut off
        chain.append((box, end))
    spans = tuple(_stripped(text, box.end() + 1, end) for box, end in reversed(chain))
    contents = [text[first:last] for first, last in spans]
    if len(set(contents)) == 1:
        contents = contents[:1]  # the same answer, repeated
    return Answer(", ".join(contents), chain[-1][0].start(), spans)


def _closing_brace(text: str, start: int) -> int | None:
    depth = 0
    for token in _TOKEN.finditer(text, start, start + MAX_LENGTH + 2):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0 and token.group() == "}":
            return token.start()
    return None


def _joined(text: str, first: int, last: int) -> bool:
    return last - first <= _WIDEST_GAP and _BETWEEN.fullmatch(text, first, last) is not None


def _unbraced(text: str, box: re.Match) -> Answer | None:
    word = _UNBRACED.match(text, box.end(), box.end() + _LONGEST_WORD)
    if word is None:
        return None
    return _single(text, box.start(), word.start(), word.start() + len(word.group().rstrip(".,;:!? ")))


def _tag(text: str, begin: int) -> Answer | None:
    opened = text.rfind("<answer>")
    match = _TAG.match(text, opened) if opened >= begin else None
    if match is None:
        return None
    first, last = opened + len("<answer>"), match.end() - len("</answer>")
    inside = _boxed(text[:last], first)
    return inside._replace(begin=opened) if inside else _single(text, opened, first, last)


def _hash(text: str, begin: int) -> Answer | None:
    lines = list(_HASH.finditer(text, begin))
    return _single(text, lines[-1].start(), *lines[-1].span(1)) if lines else None


def _last_number(text: str, begin: int) -> Answer | None:
    numbers = list(_NUMBER.finditer(text, begin))
    return _single(text, numbers[-1].start(), *numbers[-1].span()) if numbers else None


def _single(text: str, begin: int, first: int, last: int) -> Answer | None:
    first, last = _stripped(text, first, last)
    return Answer(text[first:last], begin, ((first, last),)) if last - first <= MAX_LENGTH else None


def _stripped(text: str, first: int, last: int) -> tuple[int, int]:
    content = text[first:last]
    return first + len(content) - len(content.lstrip()), last - (len(content) - len(content.rstrip()))


_FINDERS = {"boxed": _boxed, "tag": _tag, "hash": _hash, "last_number": _last_number}
