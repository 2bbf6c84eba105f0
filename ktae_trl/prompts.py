"""Turn problems into prompts: the conversation for a problem, and the text and token ids that the model reads.

In training, TRL renders the prompts. Everything else that needs prompts (the limit on lengths, the dry run, the
held-out evaluation, `eval.py`) renders them here. A test checks that both give the same token ids.
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

AUTO = "auto"  # stands for the system prompt that asks for the answer format of the run
SYSTEM_PROMPT_HELP = (
    "System prompt for problems that have no system message. Default: a prompt that asks for the answer in "
    "answer_format; null for none."
)


def instruction(system_prompt: str | None, answer_format: str) -> str | None:
    """Return the system prompt for a setting: `"auto"` becomes the one that asks for `answer_format`."""
    return INSTRUCTIONS[answer_format] if system_prompt == AUTO else system_prompt


def conversation(
    problem: str | list[dict],
    system_prompt: str | None = None,
    *,
    in_user: bool = False,
    examples: Sequence[dict[str, str]] = (),
) -> Conversation:
    """Return the chat messages for a problem, each a dict with the strings `role` and `content`.

    Args:
        problem: text, or a list of chat messages that ends with a user message. Earlier messages may be worked
            examples. The content of a message may be a list of text parts, `{"type": "text", "text": ...}`.
        system_prompt: the first message, unless the problem has its own system message, which is then kept.
        in_user: put the system message at the beginning of the first user message, for models whose chat template has
            no system role.
        examples: messages of worked examples (`few_shot.worked_examples`), inserted after the system prompt.

    Raises:
        TypeError: the problem is neither text nor a list of messages, or a message is not a dict with text.
        ValueError: the messages have a wrong order, an unknown role, or no content.
    """
    if isinstance(problem, str):
        messages = [{"role": "user", "content": problem}]
    elif isinstance(problem, list | tuple):
        messages = [_message(message, number) for number, message in enumerate(problem, 1)]
        if not messages:
            raise UserError("a problem must be text or a list of chat messages, not an empty list")
        if messages[-1]["role"] != "user":
            raise UserError(
                f"the last message must have the role 'user', not {messages[-1]['role']!r}. "
                "Choose a column that has only the problem"
            )
        if late := [number for number, message in enumerate(messages, 1) if message["role"] == "system" and number > 1]:
            raise UserError(f"message {late[0]} is a system message, but only the first message can be one")
    else:
        shown = "null" if problem is None else f"{type(problem).__name__}: {str(problem)[:80]}"
        raise TypeError(f"a problem must be text or a list of chat messages, not {shown}")
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    head = messages[:1] if messages[0]["role"] == "system" else []
    messages = [*head, *examples, *messages[len(head) :]]
    if in_user and messages[0]["role"] == "system":
        system, user, *others = messages
        if user["role"] != "user":
            raise UserError(
                "with system_prompt_in_user, the first message after the system prompt must have the role 'user', not "
                f"{user['role']!r}"
            )
        messages = [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *others]
    return messages


def _message(message: dict, number: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise TypeError(
            f"message {number} must be a dict with role and content, not {type(message).__name__}: {message!r:.80}"
        )
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list | tuple):
        others = [part for part in content if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
        if others:
            raise TypeError(f"message {number} has a part that is not text: {others[0]!r:.80}")
        content = "".join(part["text"] for part in content)
    if role is None and content is None:
        raise UserError(f"message {number} has neither role nor content. Its keys: {', '.join(map(str, message))}")
    if role not in _ROLES:
        raise UserError(f"message {number} has the role {role!r}. Supported roles: {', '.join(_ROLES)}")
    if not isinstance(content, str | None):
        raise TypeError(f"the content of message {number} must be text, not {type(content).__name__}: {content!r:.80}")
    if not content or not content.strip():
        raise UserError(f"message {number} ({role}) has no content")
    return {"role": role, "content": content}


def texts(
    prompts: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None
) -> list[str]:
    """Return each conversation as the text that the model reads, including the start of its answer.

    Args:
        template_kwargs: variables for the chat template, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: the tokenizer has no chat template, or the template rejects a conversation.
    """
    return _render(prompts, tokenizer, template_kwargs, tokenize=False)


def token_ids(
    prompts: Sequence[Conversation | str], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None
) -> list[list[int]]:
    """Return each conversation as the token ids that the model reads, the same that TRL uses in training.

    Prompts that are strings, which `KTAEGRPOTrainer` accepts too, are tokenized without a template. For arguments and
    errors, see `texts`.
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
            f"{tokenizer.name_or_path} has no chat template, which is needed to turn a problem into a prompt. Use the "
            "instruct version of the model, or put a chat_template.jinja into the model's folder"
        )
    try:
        return tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, **how, **(template_kwargs or {})
        )
    except TemplateError as error:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} rejects a conversation: {error}.{_remedy(prompts)}"
        ) from error


def check_template(
    prompts: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict | None = None
) -> None:
    """Try the chat template on one conversation for each sequence of roles.

    Raises:
        ValueError: the template is missing, rejects a conversation, or omits a message, as some do with system prompts.
    """
    forms = {tuple(message["role"] for message in prompt): prompt for prompt in reversed(prompts)}
    for prompt in forms.values():
        (whole,) = texts([prompt], tokenizer, template_kwargs)
        for number, message in enumerate(prompt):
            changed = list(prompt)
            changed[number] = {**message, "content": message["content"] + " and so on"}
            if texts([changed], tokenizer, template_kwargs) == [whole]:
                raise UserError(
                    f"The chat template of {tokenizer.name_or_path} omits the {message['role']} message from the "
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
                "chat_template_kwargs: the chat template of %s does not use %r, so it has no effect",
                tokenizer.name_or_path,
                name,
            )


def _remedy(prompts: Sequence[Conversation]) -> str:
    if any(message["role"] == "system" for prompt in prompts for message in prompt):
        return (
            " Put the system prompt before the problem, in the user message (--system_prompt_in_user true), or use no "
            "system prompt (--system_prompt null)"
        )
    return ""


# Templates for evaluations of base models, and for comparisons with published results


class Template(NamedTuple):
    """A prompt template with `{system}` and `{problem}`; `text` is None for the model's own chat template."""

    text: str | None
    ends: tuple[str, ...] = ()  # tokens that end a turn, in addition to the model's end of sequence
    stop: tuple[str, ...] = ()  # strings that end a completion

    def fill(self, problem: str, system_prompt: str | None) -> str:
        # `replace` instead of `format`, because problems contain braces.
        return self.text.replace("{system}", system_prompt or "").replace("{problem}", problem)


TEMPLATES = {
    "chat": Template(None),
    # The template of Qwen2.5-Math, as in the evaluations of KTAE and of Understanding R1-Zero (arXiv 2503.20783).
    "qwen": Template(
        "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n",
        ends=("<|im_end|>",),
    ),
    # The template of DeepSeek-R1-Zero (arXiv 2501.12948, table 1), with the system prompt, which asks for a box, after
    # the problem.
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
