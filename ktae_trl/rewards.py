r"""Reward functions in TRL's form, and how recipes name them."""

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
# Names, as the trainer knows them, of functions here and in TRL that shape the reward but do not say what is right.
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
    r"""Reward 1 if the final answer is right, 0 if not, None if no accepted answer can be parsed.

    Args:
        completions: texts, or TRL's conversations of which the last message counts.
        solution: per completion the accepted answer or answers.
        prompts: texts, or conversations. Of texts, one that ends with an open `<think>` is seen.
        answer_format: where the answer stands (see `ktae_trl.grading.find_answer`). The trainer gives its own.
        opened_think: whether the chat template ends each prompt with an open `<think>`. The trainer knows.
        grading_budget: seconds that 1,000 completions may take (see `ktae_trl.grading.grade_many`). The trainer gives
            its own.
        log_extra, log_metric: given by the trainer. The table of completions gets the columns `extracted` and
            `grading`, the metrics the shares of rollouts that could not be scored (`grading/unscorable`), or whose
            answer could not be parsed (`unparsable`), took too long (`timeouts`), ended its worker
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
    r"""Reward 1 for a completion that has an answer where `answer_format` reads it, whatever the answer is, else 0.

    By default a last `\boxed{...}` that is complete.
    """
    texts = texts_of(completions, prompts, opened_think)
    return [float(find_answer(text, answer_format) is not None) for text in texts]


def for_run(functions: list[Callable], names: Sequence[str], args, opened_think: bool) -> list[Callable]:
    """Return the reward functions of a run: with its settings, and with their time and what they return checked.

    Args:
        functions: of TRL's form, or models.
        names: of them, as metrics and messages have them.
        args: a `KTAEGRPOConfig`.
        opened_think: whether the chat template ends prompts with an open `<think>`.
    """
    if args.correctness_reward is None and names[0] in SHAPING:
        logger.warning(
            "%s decides which rollouts are right, because it comes first, but it only shapes the reward. Set "
            "correctness_reward to the function that says what is right",
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
    """Give a reward function those of the run's settings that it has parameters for, such as `answer_format`."""
    wanted = {name: settings[name] for name in inspect.signature(reward_func).parameters if name in settings}
    return functools.partial(reward_func, **wanted) if wanted else reward_func


def opens_think(tokenizer, chat_template: str | None, chat_template_kwargs: dict) -> bool:
    """Say whether a chat template ends prompts with an open `<think>` that the reward functions do not see.

    They do not see thinking at all where the tokenizer has a response template: TRL hands them what comes after it.
    """
    if not (chat_template or tokenizer.chat_template) or getattr(tokenizer, "response_template", None) is not None:
        return False
    template_kwargs = {**chat_template_kwargs, "chat_template": chat_template}
    (prompt,) = rendering.texts([rendering.conversation("1 + 1")], tokenizer, template_kwargs)
    return prompt.rstrip().endswith("<think>")


def load_rewards(names: str | Sequence[str], *, max_completion_length: int, overlong_buffer: int) -> list[Callable]:
    """Return the reward functions that a recipe names.

    Args:
        names: one or more of `math_accuracy`, `boxed_format`, `soft_overlong` (DAPO's length penalty, from TRL: 0 up to
            `max_completion_length - overlong_buffer` tokens, falling to -1 at `max_completion_length`), or the dotted
            path of any function of this form, such as `my_package.rewards.brevity`, found from the working directory.

    Raises:
        ValueError: an unknown name, two functions of one name, or a buffer that `soft_overlong` cannot use.
        ImportError: a dotted path that leads to no function, or whose module fails when it is imported.
    """
    names = [names] if isinstance(names, str) else names
    if "soft_overlong" in names and not 0 < overlong_buffer < max_completion_length:
        raise UserError(
            f"overlong_buffer must lie between 0 and max_completion_length ({max_completion_length}) for soft_overlong "
            f"to leave some lengths unpunished, not {overlong_buffer}"
        )
    builtin = {
        "math_accuracy": lambda: math_accuracy,
        "boxed_format": lambda: boxed_format,
        "soft_overlong": lambda: _soft_overlong(max_completion_length, overlong_buffer),
    }
    functions = [builtin[name]() if name in builtin else _imported(name, builtin) for name in names]
    called: dict[str, str] = {}  # by its name in metrics: its name in the recipe
    for name, function in zip(names, functions, strict=True):
        own = get_callable_name(function)
        if own in called:
            raise UserError(
                f"reward_funcs: {called[own]} and {name} are both called {own!r}, so that their metrics "
                f"(rewards/{own}/mean) would be mixed. Rename one of the functions, or name it once"
            )
        called[own] = name
    return functions


def _soft_overlong(max_completion_length: int, overlong_buffer: int) -> Callable:
    from trl.rewards import get_soft_overlong_punishment  # a run without it needs no such function in TRL

    return get_soft_overlong_punishment(max_completion_length, overlong_buffer)


def _imported(path: str, builtin: Iterable[str]) -> Callable:
    if "." not in path:
        raise UserError(
            f"Unknown reward function {path!r}{nearest(path, builtin)}. "
            f"Choose from {', '.join(builtin)}, or give a dotted path such as my_package.rewards.brevity"
        )
    function = imported(path, "The reward function")
    if not callable(function) or isinstance(function, type):
        kind = "a class: name an object of it" if isinstance(function, type) else f"a {type(function).__name__}"
        raise NotImportedError(f"The reward function {path!r} could not be imported: it is no function but {kind}")
    return function


def reads_answers(function: Callable) -> bool:
    """Return whether a reward function looks for the answer in the form that the run asks for."""
    return not isinstance(function, torch.nn.Module) and "answer_format" in inspect.signature(function).parameters


def checked(function: Callable, name: str, seconds: float | None = None) -> Callable:
    """Return the reward function (asynchronous or not) with its time and what it returns checked.

    Args:
        name: as metrics and messages have it.
        seconds: that a call may take (`reward_timeout`), None for any time. See `reward_calls.call`.
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
    """Return the rewards as a list of numbers, None where there is none. NaN passes: TRL takes it for None.

    Raises:
        ValueError: they are not one number or None per completion, or one is infinite, if only in the single precision
            that TRL computes with. The message names the function and the completion.
    """
    wanted = f"must return a list with a number or None for each of the {completions} completions"
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise UserError(f"The reward function {name!r} {wanted}, not {type(values).__name__}: {str(values)[:80]}")
    values = list(values)
    if len(values) != completions:
        raise UserError(f"The reward function {name!r} {wanted}, not {len(values)} values")
    numbers = []
    for i, value in enumerate(values):
        try:
            if value is not None and not hasattr(value, "__float__"):  # float() would read texts
                raise TypeError
            numbers.append(None if value is None else float(value))
        except OverflowError:  # of an integer
            numbers.append(math.inf)
        except (TypeError, ValueError, RuntimeError):
            kind = type(value).__name__
            raise UserError(
                f"The reward function {name!r} {wanted}, but value {i} is of type {kind}: {str(value)[:80]}"
            ) from None
        if value is not None and abs(numbers[i]) > torch.finfo(torch.float32).max:
            raise UserError(
                f"The reward function {name!r} must return finite numbers, but value {i} of the {completions} is "
                f"{numbers[i]:g}: one such reward turns the advantages of its group into NaN. Return None where there "
                "is no reward"
            )
    return numbers


def texts_of(completions: list, prompts: list | None = None, opened_think: bool = False) -> list[str]:
    """Return the texts of completions as `find_answer` must read them.

    Args:
        completions: texts, or conversations of which the last message counts.
        prompts: texts, of which one that ends with an open `<think>` is seen, or conversations.
        opened_think: whether the chat template ends prompts so.
    """
    texts = [c if isinstance(c, str) else _content(c[-1]) for c in completions]
    starts = prompts if prompts and isinstance(prompts[0], str) else ["<think>" if opened_think else ""] * len(texts)
    return [answered(start, text) for start, text in zip(starts, texts, strict=True)]


def _content(message: dict) -> str:
    """Return the text of a message; one that only calls a tool has none, and one may hold text in parts."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
