"""Problems as prompts: the conversation that a problem makes, and what a model reads of it.

Training renders prompts inside TRL. Everything else that asks a model (the limit on lengths, the dry run, the held-out
measurement, `eval.py`) renders them here, in the same way: a test compares the token ids.
"""

import inspect
import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ktae_trl.arguments import UserError
from ktae_trl.grading import INSTRUCTIONS

logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant")

Conversation = list[dict[str, str]]

AUTO = "auto"  # as a system prompt: the one that asks for the run's answer format
SYSTEM_PROMPT_HELP = (
    "System prompt of the problems that bring none of their own. Default: one that asks for the answer in "
    "answer_format; null for none."
)


def instruction(system_prompt: str | None, answer_format: str) -> str | None:
    """Return the system prompt that a setting means: `"auto"` asks for the answer in this format."""
    return INSTRUCTIONS[answer_format] if system_prompt == AUTO else system_prompt


def conversation(
    problem: str | list[dict],
    system_prompt: str | None = None,
    *,
    in_user: bool = False,
    examples: Sequence[dict[str, str]] = (),
) -> Conversation:
    """Return the chat messages that ask a problem, each with `role` and `content`, both texts.

    Args:
        problem: a text, or chat messages: worked examples may come before the question, which is the last message and
            the user's. A content may be a list of text parts, as `{"type": "text", "text": ...}`.
        system_prompt: comes first, unless the problem brings a system message of its own, which then stands.
        in_user: put either at the head of the first user message, for models whose chat template has no system role.
        examples: messages of worked examples (`few_shot.worked_examples`), which come after the system prompt.

    Raises:
        TypeError: a problem that is neither a text nor a list of messages, or a message that is no message.
        ValueError: messages in another order, of another role, or without content.
    """
    if isinstance(problem, str):
        messages = [{"role": "user", "content": problem}]
    elif isinstance(problem, list | tuple):
        messages = [_message(message, number) for number, message in enumerate(problem, 1)]
        if not messages:
            raise UserError("a problem must be a text or a list of chat messages, not an empty list")
        if messages[-1]["role"] != "user":
            raise UserError(
                f"the last message is the {messages[-1]['role']}'s, but the model is to answer the user's. "
                "Choose a column with the problem only"
            )
        if late := [number for number, message in enumerate(messages, 1) if message["role"] == "system" and number > 1]:
            raise UserError(f"message {late[0]} is a system message, which must be the first")
    else:
        shown = "null" if problem is None else f"{type(problem).__name__}: {str(problem)[:80]}"
        raise TypeError(f"a problem must be a text or a list of chat messages, not {shown}")
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    head = messages[:1] if messages[0]["role"] == "system" else []
    messages = [*head, *examples, *messages[len(head) :]]
    if in_user and messages[0]["role"] == "system":
        system, user, *others = messages
        if user["role"] != "user":
            raise UserError("the first message after the system prompt must be the user's (system_prompt_in_user)")
        messages = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *others]
    return messages


def _message(message: dict, number: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise TypeError(f"message {number} has no role and content, but is {type(message).__name__}: {message!r:.80}")
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list | tuple):
        others = [part for part in content if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
        if others:
            raise TypeError(f"message {number} has a part that is no text: {others[0]!r:.80}")
        content = "".join(part["text"] for part in content)
    if role is None and content is None:
        raise UserError(f"message {number} has no role and content. There are: {', '.join(map(str, message))}")
    if role not in _ROLES:
        raise UserError(f"message {number} has the role {role!r}, which is none of {', '.join(_ROLES)}")
    if not isinstance(content, str | None):
        raise TypeError(f"message {number} has no text as its content, but {type(content).__name__}: {content!r:.80}")
    if not content or not content.strip():
        raise UserError(f"message {number} ({role}) has no content")
    return {"role": role, "content": content}


def texts(
    prompts: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None
) -> list[str]:
    """Return each conversation as the text that the model reads, up to where it is to answer.

    Args:
        template_kwargs: for the chat template, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses a conversation.
    """
    return _render(prompts, tokenizer, template_kwargs, tokenize=False)


def token_ids(
    prompts: Sequence[Conversation | str], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None
) -> list[list[int]]:
    """Return each conversation as the token ids that the model reads: those on which TRL trains.

    A prompt that is a text, which `KTAEGRPOTrainer` takes too, is read as it is. The arguments and errors are those of
    `texts`.
    """
    if prompts and isinstance(prompts[0], str):
        return tokenizer(text=list(prompts))["input_ids"]
    rendered = _render(prompts, tokenizer, template_kwargs, tokenize=True, return_dict=True)
    return rendered["input_ids"] if rendered else []


def _render(prompts, tokenizer, template_kwargs, **how):
    if not prompts:
        return []
    if not (tokenizer.chat_template or (template_kwargs or {}).get("chat_template")):
        raise UserError(
            f"{tokenizer.name_or_path} has no chat template, which makes a prompt of a problem. Take the instruct "
            "version of the model, or put a chat_template.jinja into the model's folder"
        )
    try:
        return tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, **how, **(template_kwargs or {})
        )
    except TemplateError as error:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} refuses a conversation: {error}.{_remedy(prompts)}"
        ) from error


def check_template(
    prompts: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None
) -> None:
    """Try the chat template on one conversation of each form (which roles follow each other).

    Raises:
        ValueError: it is missing, refuses a conversation, or leaves a message out, as some do with system prompts.
    """
    forms = {tuple(message["role"] for message in prompt): prompt for prompt in reversed(prompts)}
    for prompt in forms.values():
        (whole,) = texts([prompt], tokenizer, template_kwargs)
        for number, message in enumerate(prompt):
            changed = list(prompt)
            changed[number] = {**message, "content": message["content"] + " and so on"}
            if texts([changed], tokenizer, template_kwargs) == [whole]:
                raise UserError(
                    f"The chat template of {tokenizer.name_or_path} leaves the {message['role']} message out of the "
                    f"prompt.{_remedy([prompt])}"
                )
    if forms:
        _warn_of_unknown(tokenizer, template_kwargs or {})


def _warn_of_unknown(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict) -> None:
    template = tokenizer.get_chat_template()
    known = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in template_kwargs:
        if name not in known and not re.search(rf"\b{re.escape(name)}\b", template):
            logger.warning(
                "chat_template_kwargs: the chat template of %s has no %r, so it changes nothing",
                tokenizer.name_or_path,
                name,
            )


def _remedy(prompts: Sequence[Conversation]) -> str:
    if any(message["role"] == "system" for prompt in prompts for message in prompt):
        return (
            " To put the system prompt at the head of the problem: --system_prompt_in_user true. "
            "Without a system prompt: --system_prompt null"
        )
    return ""


# Templates of evaluations, for base models and for comparison with others' figures


class Template(NamedTuple):
    """A prompt as text with `{system}` and `{problem}`; None stands for the model's own chat template."""

    text: str | None
    ends: tuple[str, ...] = ()  # tokens that end a turn, in addition to the model's end of sequence
    stop: tuple[str, ...] = ()  # strings that end a completion

    def fill(self, problem: str, system_prompt: str | None) -> str:
        # `replace`, not `format`: problems are full of braces.
        return self.text.replace("{system}", system_prompt or "").replace("{problem}", problem)


TEMPLATES = {
    "chat": Template(None),
    # Qwen2.5-Math's, as in the evaluation of KTAE and of Understanding R1-Zero (arXiv 2503.20783).
    "qwen": Template(
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n",
        ends=("<|im_end|>",),
    ),
    # DeepSeek-R1-Zero's (arXiv 2501.12948, table 1), with the system prompt's demand for a box after the problem.
    "r1": Template(
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User with the "
        "answer. The reasoning process is enclosed within <think> </think> and answer is enclosed within "
        "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
        "<answer> answer here </answer>.\n"
        "User: {problem}\n{system}\nAssistant: <think>",
        stop=("</answer>",),
    ),
    "none": Template("{problem}"),
}
