"""The offline task: chains of one-digit sums from reasoning-gym, with solutions in three styles ("habits").

The warm start mixes a careful habit, which adds one term per step and is always correct, with two careless habits,
which are mostly wrong. The model learns both the arithmetic and the carelessness, so reinforcement learning can improve
it by favouring the careful habit. Random arithmetic errors would not work: then no habit is better than another.
"""

import random
import re
from collections.abc import Collection
from itertools import accumulate

import reasoning_gym

# Share of each habit in the warm start.
HABITS = {"careful": 0.38, "skipping": 0.12, "guessing": 0.5}


def problems(size: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """Return `size` distinct problems `{"problem", "answer"}` with three to five terms, none of them in `exclude`.

    The running total of a problem never drops below 0, which halves the time that a small model needs to learn.

    reasoning-gym draws item `i` of a dataset from `Random(seed + i)`, so datasets with neighbouring seeds overlap. The
    seeds here are far apart, and remaining duplicates are removed.

    Raises:
        ValueError: there are not enough new problems.
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
    raise ValueError(f"chain_sum returned only {len(found)} new problems for seed {seed}, but {size} were requested")


def solution(problem: str, habit: str, rng: random.Random) -> str:
    """Write a solution of `problem` in one of the `HABITS`.

    `careful` numbers its steps and is correct. `skipping` omits one step, so it is correct only if the term of that
    step is 0. `guessing` states a number within 3 of the answer, which is correct one time in seven.
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
    """Write one solution of each item, in a habit drawn with the given weights."""
    rng = random.Random(seed)
    drawn = rng.choices(list(habits), weights=list(habits.values()), k=len(items))
    return [solution(item["problem"], habit, rng) for item, habit in zip(items, drawn, strict=True)]


def _numbers(problem: str) -> list[int]:
    """Return the signed terms of a problem. For `... problem: 7 - 9 + 0 =` these are 7, -9, 0."""
    return [int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", problem.rpartition(":")[2])]
