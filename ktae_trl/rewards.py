r"""Reward functions in TRL's form, and how recipes name them."""

import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from trl.rewards import get_soft_overlong_punishment

from ktae_trl.arguments import nearest
from ktae_trl.grading import answered, find_answer, grade_many_full

# Names, as the trainer knows them, of functions here and in TRL that shape the reward but do not say what is right.
SHAPING = {"boxed_format", "soft_overlong_punishment_reward", "think_format_reward", "repetition_penalty_reward"}

_TROUBLE = {
    "unscorable": "unparsable gold",
    "unparsable": "unparsable answer",
    "timeouts": "timeout",
    "worker_deaths": "worker died",
}


def math_accuracy(
    completions: list,
    solution: list[str | list[str]],
    prompts: list | None = None,
    answer_format: str = "boxed",
    opened_think: bool = False,
    log_extra=None,
    log_metric=None,
    **kwargs,
) -> list[float | None]:
    r"""Reward 1 if the final answer is right, 0 if not, None if no accepted answer can be parsed.

    Args:
        completions: texts, or TRL's conversations of which the last message counts.
        solution: per completion the accepted answer or answers.
        prompts: texts, or conversations. Of texts, one that ends with an open `<think>` is seen.
        answer_format: where the answer stands (see `ktae_trl.grading.find_answer`). The trainer gives its own.
        opened_think: whether the chat template ends each prompt with an open `<think>`. The trainer knows.
        log_extra, log_metric: given by the trainer. The table of completions gets the columns `extracted` and
            `grading`, the metrics the shares of rollouts that could not be scored (`grading/unscorable`), or whose
            answer could not be parsed (`unparsable`), took too long (`timeouts`) or ended its worker
            (`worker_deaths`).
    """
    grades = grade_many_full(_texts(completions, prompts, opened_think), solution, answer_format=answer_format)
    if log_extra is not None:
        log_extra("extracted", [grade.extracted or "" for grade in grades])
        log_extra("grading", [grade.reason for grade in grades])
    if log_metric is not None:
        reasons = Counter(grade.reason for grade in grades)
        for name, reason in _TROUBLE.items():
            log_metric(f"grading/{name}", reasons[reason] / len(grades))
    return [None if grade.verdict is None else float(grade.verdict) for grade in grades]


def boxed_format(
    completions: list,
    prompts: list | None = None,
    answer_format: str = "boxed",
    opened_think: bool = False,
    **kwargs,
) -> list[float]:
    r"""Reward 1 for a completion that has an answer where `answer_format` reads it, whatever the answer is, else 0.

    By default a last `\boxed{...}` that is complete.
    """
    texts = _texts(completions, prompts, opened_think)
    return [float(find_answer(text, answer_format) is not None) for text in texts]


def bind(reward_func: Callable, **settings) -> Callable:
    """Give a reward function those of the run's settings that it has parameters for, such as `answer_format`."""
    if isinstance(reward_func, torch.nn.Module):
        return reward_func
    wanted = {name: settings[name] for name in inspect.signature(reward_func).parameters if name in settings}
    return functools.partial(reward_func, **wanted) if wanted else reward_func


def opens_think(tokenizer, chat_template: str | None, chat_template_kwargs: dict) -> bool:
    """Say whether a chat template ends prompts with an open `<think>` that the reward functions do not see.

    They do not see thinking at all where the tokenizer has a response template: TRL hands them what comes after it.
    """
    if not (chat_template or tokenizer.chat_template) or getattr(tokenizer, "response_template", None) is not None:
        return False
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1"}],
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=False,
        **chat_template_kwargs,
    )
    return prompt.rstrip().endswith("<think>")


def load_rewards(names: Sequence[str], *, max_completion_length: int, overlong_buffer: int) -> list[Callable]:
    """Return the reward functions that a recipe names.

    Args:
        names: `math_accuracy`, `boxed_format`, `soft_overlong` (DAPO's length penalty, from TRL: 0 up to
            `max_completion_length - overlong_buffer` tokens, falling to -1 at `max_completion_length`), or the dotted
            path of any function of this form, such as `my_package.rewards.brevity`.

    Raises:
        ValueError: an unknown name, or a buffer that `soft_overlong` cannot use.
        ImportError: a dotted path that leads to no function.
    """
    if "soft_overlong" in names and not 0 < overlong_buffer < max_completion_length:
        raise ValueError(
            f"overlong_buffer must lie between 0 and max_completion_length ({max_completion_length}) for soft_overlong "
            f"to leave some lengths unpunished, not {overlong_buffer}"
        )
    builtin = {
        "math_accuracy": math_accuracy,
        "boxed_format": boxed_format,
        "soft_overlong": get_soft_overlong_punishment(max_completion_length, overlong_buffer),
    }
    return [builtin[name] if name in builtin else _imported(name, builtin) for name in names]


def _imported(path: str, builtin: dict[str, Callable]) -> Callable:
    module, _, function = path.rpartition(".")
    if not module:
        raise ValueError(
            f"Unknown reward function {path!r}{nearest(path, builtin)}. "
            f"Choose from {', '.join(builtin)}, or give a dotted path such as my_package.rewards.brevity"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"The reward function {path!r} could not be imported: {error}") from error


def _texts(completions: list, prompts: list | None, opened_think: bool) -> list[str]:
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    starts = ["<think>" if opened_think else ""] * len(texts)
    if prompts and isinstance(prompts[0], str):
        starts = prompts
    return [answered(start, text) for start, text in zip(starts, texts, strict=True)]
