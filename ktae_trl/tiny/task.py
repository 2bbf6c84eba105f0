"""The offline task: chains of one-digit sums from reasoning-gym, and three habits of writing their solutions.

The warm start mixes a careful habit, which takes a term a step and is nearly always right, with two careless
ones, which are mostly wrong. The model learns the arithmetic well and the carelessness too, so that reinforcement
learning has something to select. (Random slips in the arithmetic leave it nothing: every habit is then equally bad.)
"""

import random
import re
from collections.abc import Collection
from itertools import accumulate

import reasoning_gym

# How often each habit is drawn for the warm start.
HABITS = {"careful": 0.38, "skipping": 0.12, "guessing": 0.5}


def problems(size: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """Return `size` different problems `{"problem", "answer"}` of three to five terms, none of them in `exclude`.

    The running total of each stays at 0 or above, which a small model learns in half the time.

    reasoning-gym draws item `i` of a data set from `Random(seed + i)`: data sets of neighbouring seeds overlap. Seeds
    are spread far apart here, and what still comes twice is left out.
    """
    source = reasoning_gym.create_dataset(
        "chain_sum", size=6 * size + 200, seed=seed * 10_000_019, min_terms=3, max_terms=5, min_digits=1, max_digits=1
    )
    seen, found = set(exclude), []
    for item in source:
        problem = item["question"]
        if problem not in seen and min(accumulate(_numbers(problem))) >= 0:
            seen.add(problem)
            found.append({"problem": problem, "answer": item["answer"]})
            if len(found) == size:
                return found
    raise ValueError(f"chain_sum gave only {len(found)} new problems with seed {seed}, {size} were asked for")


def solution(problem: str, habit: str, rng: random.Random) -> str:
    """Write a solution of `problem` in one of the `HABITS`.

    `careful` numbers its steps and is right. `skipping` leaves one of the steps out, so it is right only if the term
    of that step is 0. `guessing` gives a number within 3 of the answer, right one time in seven.
    """
    total, *terms = _numbers(problem)
    if habit == "guessing":
        return rf"That is about \boxed{{{total + sum(terms) + rng.randint(-3, 3)}}}."
    steps = list(enumerate(terms, 1))
    if habit == "skipping":
        steps.pop(rng.randrange(len(steps)))
    elif habit != "careful":
        raise ValueError(f"habit must be one of {', '.join(HABITS)}, not {habit!r}")
    lines = []
    for number, term in steps:
        lines.append(f"{number}: {total}{term:+}={total + term}")
        total += term
    return "\n".join([*lines, rf"The answer is \boxed{{{total}}}."])


def draw_solutions(items: list[dict[str, str]], seed: int, habits: dict[str, float] = HABITS) -> list[str]:
    """Write one solution of each item, its habit drawn with the given odds."""
    rng = random.Random(seed)
    drawn = rng.choices(list(habits), weights=list(habits.values()), k=len(items))
    return [solution(item["problem"], habit, rng) for item, habit in zip(items, drawn, strict=True)]


def _numbers(problem: str) -> list[int]:
    """Return the signed terms of `... problem: 7 - 9 + 0 =`: 7, -9, 0."""
    return [int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", problem.rpartition(":")[2])]
