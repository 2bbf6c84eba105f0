r"""Reward functions with TRL's signature, and loading them by the names in a recipe."""

import functools
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from ktae_trl import prompts as rendering
from ktae_trl.arguments import NotImportedError, UserError, imported, nearest
from ktae_trl.grading import BUDGET, answered, find_answer, grade_many_full
from ktae_trl.training import reward_calls

logger = logging.getLogger(__name__)
# Functions here and in TRL that shape the reward but do not check the answer, by the names that the trainer uses.
SHAPING = {"boxed_format", "soft_overlong_punishment_reward", "think_format_reward", "repetition_penalty_reward"}

_TROUBLE = {
    "unscorable": "unparsable gold",
    "unparsable": "unparsable answer",
    "timeouts": "timeout",
    "worker_deaths": "worker died",
    "budget": "budget",
}


def math_accuracy(
    completions: list,
    solution: list[str | list[str]],
    prompts: list | None = None,
    answer_format: str = "boxed",
    opened_think: bool = False,
    grading_budget: float | None = BUDGET,
    log_extra=None,
    log_metric=None,
    **kwargs,
) -> list[float | None]:
    r"""Return 1 if the final answer is correct, 0 if it is wrong, and None if no accepted answer can be parsed.

    Args:
        completions: strings, or conversations as TRL passes them, of which the last message counts.
        solution: for each completion, the accepted answer or answers.
        prompts: strings or conversations. Strings are checked for an open `<think>` at their end.
        answer_format: where the answer is (see `ktae_trl.grading.find_answer`). Set by the trainer.
        opened_think: whether the chat template ends each prompt with an open `<think>`. Set by the trainer.
        grading_budget: seconds per 1,000 completions (see `ktae_trl.grading.grade_many`). Set by the trainer.
        log_extra, log_metric: passed by the trainer. They add the columns `extracted` and `grading` to the table of
            completions, and these metrics: the share of rollouts that could not be scored (`grading/unscorable`), and
            the shares whose answer could not be parsed (`unparsable`), timed out (`timeouts`), ended its worker
            (`worker_deaths`) or was not compared (`budget`).
    """
    texts = texts_of(completions, prompts, opened_think)
    grades = grade_many_full(texts, solution, answer_format=answer_format, budget=grading_budget)
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
    r"""Return 1 if the completion has an answer in `answer_format`, correct or not, else 0.

    By default, the answer is a complete last `\boxed{...}`.
    """
    texts = texts_of(completions, prompts, opened_think)
    return [float(find_answer(text, answer_format) is not None) for text in texts]


def for_run(functions: list[Callable], names: Sequence[str], args, opened_think: bool) -> list[Callable]:
    """Return the reward functions of a run, bound to its settings, with checks of their time and return values.

    Args:
        functions: functions with TRL's signature, or reward models.
        names: their names in metrics and messages.
        args: a `KTAEGRPOConfig`.
        opened_think: whether the chat template ends prompts with an open `<think>`.
    """
    if args.correctness_reward is None and names[0] in SHAPING:
        logger.warning(
            "%s decides which rollouts are correct because it is the first reward function, but it does not check "
            "answers. Set correctness_reward to the reward function that does",
            names[0],
        )
    settings = {
        "answer_format": args.answer_format,
        "opened_think": opened_think,
        "grading_budget": args.grading_budget,
    }
    return [
        function
        if isinstance(function, torch.nn.Module)
        else checked(bind(function, **settings), name, args.reward_timeout)
        for function, name in zip(functions, names, strict=True)
    ]


def bind(reward_func: Callable, **settings) -> Callable:
    """Bind the settings of the run that a reward function has parameters for, such as `answer_format`."""
    wanted = {name: settings[name] for name in inspect.signature(reward_func).parameters if name in settings}
    return functools.partial(reward_func, **wanted) if wanted else reward_func


def opens_think(tokenizer, chat_template: str | None, chat_template_kwargs: dict) -> bool:
    """Return whether the chat template ends prompts with an open `<think>` that the completions then lack.

    False if the tokenizer has a response template, because TRL then passes reward functions only the text after the
    thinking.
    """
    if not (chat_template or tokenizer.chat_template) or getattr(tokenizer, "response_template", None) is not None:
        return False
    template_kwargs = {**chat_template_kwargs, "chat_template": chat_template}
    (prompt,) = rendering.texts([rendering.conversation("1 + 1")], tokenizer, template_kwargs)
    return prompt.rstrip().endswith("<think>")


def load_rewards(names: str | Sequence[str], *, max_completion_length: int, overlong_buffer: int) -> list[Callable]:
    """Return the reward functions with the given names.

    Args:
        names: one or more of `math_accuracy`, `boxed_format` and `soft_overlong` (DAPO's length penalty, from TRL: 0 up
            to `max_completion_length - overlong_buffer` tokens, falling to -1 at `max_completion_length`), or the
            dotted path of any function with TRL's signature, such as `my_package.rewards.brevity`. Modules are also
            searched in the working directory.

    Raises:
        ValueError: a name is unknown, two functions have the same name, or `soft_overlong` cannot use the buffer.
        ImportError: a dotted path does not lead to a function, or its module fails to import.
    """
    names = [names] if isinstance(names, str) else names
    if "soft_overlong" in names and not 0 < overlong_buffer < max_completion_length:
        raise UserError(
            f"overlong_buffer must be above 0 and below max_completion_length ({max_completion_length}) for "
            f"soft_overlong, not {overlong_buffer}"
        )
    builtin = {
        "math_accuracy": lambda: math_accuracy,
        "boxed_format": lambda: boxed_format,
        "soft_overlong": lambda: _soft_overlong(max_completion_length, overlong_buffer),
    }
    functions = [builtin[name]() if name in builtin else _imported(name, builtin) for name in names]
    called: dict[str, str] = {}  # name in metrics -> name in the recipe
    for name, function in zip(names, functions, strict=True):
        own = get_callable_name(function)
        if own in called:
            raise UserError(
                f"reward_funcs: {called[own]} and {name} are both called {own!r}, so their metrics "
                f"(rewards/{own}/mean) would be mixed. Rename one of the functions, or list it only once"
            )
        called[own] = name
    return functions


def _soft_overlong(max_completion_length: int, overlong_buffer: int) -> Callable:
    from trl.rewards import get_soft_overlong_punishment  # imported here because only soft_overlong needs it

    return get_soft_overlong_punishment(max_completion_length, overlong_buffer)


def _imported(path: str, builtin: Iterable[str]) -> Callable:
    if "." not in path:
        raise UserError(
            f"Unknown reward function {path!r}{nearest(path, builtin)}. "
            f"Choose from {', '.join(builtin)}, or give a dotted path such as my_package.rewards.brevity"
        )
    function = imported(path, "The reward function")
    if not callable(function) or isinstance(function, type):
        kind = "a class. Give the path of an instance" if isinstance(function, type) else f"a {type(function).__name__}"
        raise NotImportedError(f"The reward function {path!r} could not be imported: it is not a function but {kind}")
    return function


def reads_answers(function: Callable) -> bool:
    """Return whether a reward function has the parameter `answer_format`, so that it reads answers."""
    return not isinstance(function, torch.nn.Module) and "answer_format" in inspect.signature(function).parameters


def checked(function: Callable, name: str, seconds: float | None = None) -> Callable:
    """Return the reward function (synchronous or asynchronous) with checks of its time and return values.

    Args:
        name: its name in metrics and messages.
        seconds: limit on the time of a call (`reward_timeout`); None for no limit. See `reward_calls.call`.
    """

    @functools.wraps(function)
    def call(**arguments):
        values = reward_calls.call(function, name, seconds, arguments)
        return check_values(values, name, len(arguments["completions"]))

    @functools.wraps(function)
    async def call_async(**arguments):
        values = await reward_calls.call_async(function, name, seconds, arguments)
        return check_values(values, name, len(arguments["completions"]))

    return call_async if is_async_callable(function) else call


def check_values(values, name: str, completions: int) -> list[float | None]:
    """Return the rewards as a list with a number or None per completion. NaN is allowed: TRL treats it as None.

    Raises:
        ValueError: there is not one number or None per completion, or a reward is infinite in the float32 that TRL
            computes with. The message names the function and the index of the completion.
    """
    wanted = f"must return a list with a number or None for each of the {completions} completions"
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise UserError(f"The reward function {name!r} {wanted}, not {type(values).__name__}: {str(values)[:80]}")
    values = list(values)
    if len(values) != completions:
        raise UserError(f"The reward function {name!r} {wanted}, but returned {len(values)}")
    numbers = []
    for i, value in enumerate(values):
        try:
            if value is not None and not hasattr(value, "__float__"):  # float() would accept strings
                raise TypeError
            numbers.append(None if value is None else float(value))
        except OverflowError:  # a large integer
            numbers.append(math.inf)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise UserError(
                f"The reward function {name!r} {wanted}, but the value at index {i} is of type {kind}: "
                f"{str(value)[:80]}"
            ) from None
        if value is not None and abs(numbers[i]) > torch.finfo(torch.float32).max:
            raise UserError(
                f"The reward function {name!r} must return finite numbers, but the value at index {i} (of "
                f"{completions}) is {numbers[i]:g}, which would turn the advantages of its group into NaN. Return None "
                "for a completion that has no reward"
            )
    return numbers


def texts_of(completions: list, prompts: list | None = None, opened_think: bool = False) -> list[str]:
    """Return the texts of completions as `find_answer` expects them.

    Args:
        completions: strings, or conversations of which the last message counts.
        prompts: strings, which are checked for an open `<think>` at their end, or conversations.
        opened_think: for conversations, whether the chat template ends prompts with an open `<think>`.
    """
    texts = [c if isinstance(c, str) else _content(c[-1]) for c in completions]
    starts = prompts if prompts and isinstance(prompts[0], str) else ["<think>" if opened_think else ""] * len(texts)
    return [answered(start, text) for start, text in zip(starts, texts, strict=True)]


def _content(message: dict) -> str:
    """Return the text of a message: joined if it is in parts, empty if the message only calls a tool."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
