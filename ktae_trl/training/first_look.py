"""Warns once if the first generations give the training no signal, with the cause and what to change."""

import logging
import math
from dataclasses import dataclass, field

from torch import Tensor

from ktae_trl.credit import find_method
from ktae_trl.grading import find_answer
from ktae_trl.rewards import texts_of
from ktae_trl.rollouts.verdicts import AUTO, Verdicts

logger = logging.getLogger(__name__)

GENERATIONS = 3  # that are examined
_SHOWN = 80  # characters of the end of a completion
_FORMS = {
    "boxed": r"a complete \boxed{}",
    "tag": "a complete <answer>...</answer>",
    "hash": "a line that begins with ####",
    "last_number": "any number",
    "auto": r"a complete \boxed{} or <answer>...</answer>, a line that begins with ####, or any number",
}
_MANY = 0.5  # from this share of cut-off completions on, max_completion_length is named as the cause


@dataclass
class Seen:
    """Counts over the first generations, on all processes."""

    generations: int = 0
    groups: int = 0
    informative: int = 0  # groups that training can learn from
    rollouts: int = 0
    right: int = 0  # correct rollouts
    judged: int = 0  # rollouts with a correctness reward
    lowest: float = math.inf  # correctness reward
    highest: float = -math.inf
    cut_off: float = 0.0  # rollouts that did not end within max_completion_length
    answered: int = 0  # completions with an answer in answer_format
    example: str = ""  # a completion without an answer
    stats: dict[str, float] = field(default_factory=dict)  # sums of the credit method's metrics


class FirstLook:
    """Examines the first generations of a training. The first process uses it, with the rollouts of all processes.

    Args:
        args: a `KTAEGRPOConfig`.
        correctness: the name of the correctness reward.
        reads_answers: whether this reward reads the answer in `answer_format`.
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
        """Add a generation to the counts. After the last of the first generations, warn if there is no signal.

        Args:
            reward_PG: the correctness rewards, NaN where there is none.
            verdicts: the verdicts made from them.
            prompts, completions: of the P * G rollouts, as texts or conversations.
            cut_off: the share of rollouts that did not end within `max_completion_length`.
            stats: the numerators and denominators of the credit method's metrics.
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
        """Warn before the first line of metrics if no completion has had an answer yet."""
        if self.seen.generations:
            self._tell(no_answer(self.seen, self.args, self.correctness, self.reads_answers))

    def _tell(self, message: str | None) -> None:
        if message and not self._told:
            self._told = True
            logger.warning("%s This warning is shown once.", message)


def no_answer(seen: Seen, args, correctness: str, reads_answers: bool) -> str | None:
    """Return a warning if no completion has an answer where rewards or credit read it, else None."""
    unread, answered = reads_answers and not seen.answered, find_method(args.credit).answered
    if not unread and not (answered and not seen.stats.get(answered)):
        return None
    reader = f"credit: {args.credit} needs, so all tokens of a completion get the same advantage"
    if unread:
        reader = f"{correctness} reads, so all rollouts are wrong"
    remedies = [
        "ask for it in system_prompt",
        "show examples (few_shot)",
        "or set answer_format to what the model writes",
    ]
    if seen.cut_off >= _MANY * seen.rollouts:
        remedies.insert(0, f"raise max_completion_length ({args.max_completion_length} tokens)")
    return (
        f"None of the first {seen.rollouts} completions has {_FORMS[args.answer_format]} "
        f"(answer_format: {args.answer_format}), which {reader}. "
        f"{_cut_off(seen)} One completion ends with {seen.example[-_SHOWN:]!r}. Remedies: {', '.join(remedies)}."
    )


def no_signal(seen: Seen, args, correctness: str) -> str | None:
    """Return a warning if training can learn from no group of the first generations, else None."""
    first = f"the first {seen.groups} groups ({seen.generations} generations)"
    if seen.informative:
        return find_method(args.credit).no_signal(seen.stats, args, first)
    right, wrong = seen.right, seen.judged - seen.right
    threshold, low, high = args.correctness_threshold, f"{seen.lowest:g}", f"{seen.highest:g}"
    more = "" if args.dynamic_sampling else ", or set dynamic_sampling: true"
    if seen.lowest > seen.highest:
        saw = f"{correctness} returned None for all {seen.rollouts} rollouts"
        remedy = "See what it returns for the first problem: --dry_run true."
    elif low == high and (threshold == AUTO or seen.lowest not in (0, 1)):
        saw = f"{correctness} returned {low} for all {seen.rollouts} rollouts"
        remedy = f"{_cut_off(seen)} Check the function, and read completions with log_completions: true."
    elif threshold == AUTO or not by_verdict(args):
        saw = f"{correctness} returned the same reward for all rollouts of each group, from {low} to {high}"
        remedy = f"Raise num_generations or temperature{more}."
    elif right and wrong:
        saw = f"the rollouts of each group are all correct or all wrong ({right} correct, {wrong} wrong)"
        remedy = f"Raise num_generations or temperature{more}."
    elif low != high:
        saw = f"{correctness} returned rewards from {low} to {high}, so all {seen.judged} rollouts are "
        saw += f"{'correct' if right else 'wrong'} by correctness_threshold ({threshold:g})"
        remedy = f"Set correctness_threshold to a value between these, or to {AUTO}, the mean of each group."
    elif right:
        saw = f"all {right} rollouts are correct"
        remedy = f"The problems are too easy for the model: choose harder ones (dataset_filter){more}."
    elif seen.cut_off >= _MANY * seen.rollouts:
        saw = f"all {wrong} rollouts are wrong"
        remedy = f"{_cut_off(seen)} Raise max_completion_length ({args.max_completion_length} tokens)."
    else:
        saw = f"all {wrong} rollouts are wrong"
        remedy = (
            "The problems are too hard for the model, or its answers are not recognized: read completions with "
            f"log_completions: true, choose easier problems (dataset_filter) or raise num_generations{more}."
        )
    lacks = "both correct and wrong rollouts" if by_verdict(args) else "rollouts with different rewards"
    return f"None of {first} has {lacks}, which credit: {args.credit} needs to learn: {saw}. {remedy}"


def by_verdict(args) -> bool:
    """Return whether a run needs both correct and wrong rollouts in a group, not only different rewards."""
    return args.dynamic_sampling or find_method(args.credit).needs_both_sides


def _cut_off(seen: Seen) -> str:
    return f"{seen.cut_off / seen.rollouts:.0%} of the completions were cut off."
