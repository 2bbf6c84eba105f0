"""Do the first generations hold anything to learn from? If not, one warning says what was seen and what to change."""

import logging
import math
from dataclasses import dataclass, field

from torch import Tensor

from ktae_trl.credit import find_method
from ktae_trl.grading import find_answer
from ktae_trl.rewards import texts_of
from ktae_trl.rollouts.verdicts import AUTO, Verdicts

logger = logging.getLogger(__name__)

GENERATIONS = 3  # that are looked at
_SHOWN = 80  # characters of a completion's end
_FORMS = {
    "boxed": r"a complete \boxed{}",
    "tag": "a complete <answer>...</answer>",
    "hash": "a line that begins with ####",
    "last_number": "any number",
    "auto": r"a complete \boxed{} or <answer>...</answer>, a line that begins with ####, or any number",
}
_MANY = 0.5  # share of cut off completions from which they are named as the cause


@dataclass
class Seen:
    """What the first generations held, on all processes."""

    generations: int = 0
    groups: int = 0
    informative: int = 0  # groups that credit can learn from
    rollouts: int = 0
    right: int = 0
    judged: int = 0
    lowest: float = math.inf  # value of the correctness reward
    highest: float = -math.inf
    cut_off: float = 0.0  # rollouts
    answered: int = 0  # completions with an answer in the form that is read
    example: str = ""  # a completion without one
    stats: dict[str, float] = field(default_factory=dict)  # numerators of the credit method's metrics


class FirstLook:
    """Looks at the first generations of a training. For the first process: it sees the rollouts of all.

    Args:
        args: a `KTAEGRPOConfig`.
        correctness: name of the correctness reward.
        reads_answers: whether that reward looks for an answer in the form that the run asks for.
        opened_think: whether the chat template ends prompts with an open `<think>`.
    """

    def __init__(self, args, correctness: str, reads_answers: bool, opened_think: bool):
        self.args, self.correctness, self.reads_answers = args, correctness, reads_answers
        self.opened_think = opened_think
        self.seen = Seen()
        self._told = False

    def look(
        self,
        reward_PG: Tensor,
        verdicts: Verdicts,
        prompts: list,
        completions: list,
        cut_off: float,
        stats: dict[str, tuple[float, float]],
    ) -> None:
        """Count what a generation holds; after the last of the first ones, warn if it was nothing.

        Args:
            reward_PG: the correctness reward, NaN where there is none.
            verdicts: made of it.
            prompts, completions: of the P G rollouts, texts or conversations.
            cut_off: the share of them that did not end within `max_completion_length`.
            stats: the credit method's metrics, numerators and denominators.
        """
        seen = self.seen
        if seen.generations == GENERATIONS:
            return
        given = reward_PG[~reward_PG.isnan()]
        spread_P = reward_PG.nan_to_num(-math.inf).amax(1) > reward_PG.nan_to_num(math.inf).amin(1)
        texts = texts_of(completions, prompts, self.opened_think)
        without = [text for text in texts if find_answer(text, self.args.answer_format) is None]
        seen.generations += 1
        seen.groups += len(reward_PG)
        seen.informative += int((verdicts.informative if by_verdict(self.args) else spread_P).sum())
        seen.rollouts += reward_PG.numel()
        seen.right += int((verdicts.correct_PG & verdicts.scored_PG).sum())
        seen.judged += int(verdicts.scored_PG.sum())
        if len(given):
            seen.lowest, seen.highest = min(seen.lowest, given.min().item()), max(seen.highest, given.max().item())
        seen.cut_off += cut_off * len(completions)
        seen.answered += len(completions) - len(without)
        seen.example = seen.example or next(iter(without), "")
        for name, (total, _) in stats.items():
            seen.stats[name] = seen.stats.get(name, 0.0) + total
        if seen.generations == GENERATIONS:
            self._tell(no_answer(seen, self.args, self.correctness, self.reads_answers))
            self._tell(no_signal(seen, self.args, self.correctness))

    def before_log(self) -> None:
        """Warn before the first line of metrics if no completion had an answer so far."""
        if self.seen.generations:
            self._tell(no_answer(self.seen, self.args, self.correctness, self.reads_answers))

    def _tell(self, message: str | None) -> None:
        if message and not self._told:
            self._told = True
            logger.warning("%s This is said once.", message)


def no_answer(seen: Seen, args, correctness: str, reads_answers: bool) -> str | None:
    """Return what to say if no completion has an answer in the form that rewards or credit read, else None."""
    unread, answered = reads_answers and not seen.answered, find_method(args.credit).answered
    if not unread and not (answered and not seen.stats.get(answered)):
        return None
    who = f"credit: {args.credit} looks for, so that all tokens count the same"
    if unread:
        who = f"{correctness} reads, so that all are wrong"
    remedies = [
        "ask for this form in system_prompt",
        "show it by few_shot",
        "or set answer_format to the form that the model writes",
    ]
    if seen.cut_off >= _MANY * seen.rollouts:
        remedies.insert(0, f"raise max_completion_length ({args.max_completion_length} tokens)")
    return (
        f"None of the first {seen.rollouts} completions has its answer in {_FORMS[args.answer_format]} "
        f"(answer_format: {args.answer_format}), which {who}. "
        f"{_cut_off(seen)} One ends with {seen.example[-_SHOWN:]!r}. What to do: {', '.join(remedies)}."
    )


def no_signal(seen: Seen, args, correctness: str) -> str | None:
    """Return what to say if no group of the first generations has anything to learn from, else None."""
    first = f"the first {seen.groups} groups ({seen.generations} generations)"
    if seen.informative:
        return find_method(args.credit).no_signal(seen.stats, args, first)
    right, wrong = seen.right, seen.judged - seen.right
    threshold, low, high = args.correctness_threshold, f"{seen.lowest:g}", f"{seen.highest:g}"
    more = "" if args.dynamic_sampling else ", or set dynamic_sampling: true"
    if seen.lowest > seen.highest:
        saw = f"{correctness} returned None for all {seen.rollouts} rollouts"
        remedy = "See what it returns for the first rows of the data: --dry_run true."
    elif low == high and (threshold == AUTO or seen.lowest not in (0, 1)):
        saw = f"{correctness} gave {low} to all {seen.rollouts} rollouts"
        remedy = f"{_cut_off(seen)} Is this the function that you mean? Read completions with log_completions: true."
    elif threshold == AUTO or not by_verdict(args):
        saw = f"{correctness} gave the same reward to all rollouts of a group, from {low} to {high}"
        remedy = f"Take more num_generations or a higher temperature{more}."
    elif right and wrong:
        saw = f"the rollouts of a group are all right or all wrong ({right} right, {wrong} wrong)"
        remedy = f"Take more num_generations or a higher temperature{more}."
    elif low != high:
        saw = f"{correctness} gave rewards from {low} to {high}, so that all {seen.judged} rollouts are "
        saw += f"{'right' if right else 'wrong'} by correctness_threshold ({threshold:g})"
        remedy = f"Set correctness_threshold to a value between these, or to {AUTO}: the mean of each group."
    elif right:
        saw = f"all {right} rollouts are right"
        remedy = f"The problems are too easy for the model: choose harder ones (dataset_filter){more}."
    elif seen.cut_off >= _MANY * seen.rollouts:
        saw = f"all {wrong} rollouts are wrong"
        remedy = f"{_cut_off(seen)} Raise max_completion_length ({args.max_completion_length} tokens)."
    else:
        saw = f"all {wrong} rollouts are wrong"
        remedy = (
            "The problems are too hard for the model, or its answers are not understood: read completions with "
            f"log_completions: true, choose easier problems (dataset_filter) or more num_generations{more}."
        )
    lacks = "has both right and wrong rollouts" if by_verdict(args) else "has rollouts of different rewards"
    return f"None of {first} {lacks}, which credit: {args.credit} learns from: {saw}. {remedy}"


def by_verdict(args) -> bool:
    """Return whether a run learns from right against wrong rollouts, and not from different rewards only."""
    return args.dynamic_sampling or find_method(args.credit).needs_both_sides


def _cut_off(seen: Seen) -> str:
    return f"{seen.cut_off / seen.rollouts:.0%} of the completions were cut off."
