"""The offline task: chains of one-digit sums from reasoning-gym, and three habits of writing their solutions.

The warm start mixes a careful habit, which adds a term a line and is nearly always right, with two careless ones,
which are mostly wrong. The model learns the arithmetic well and the carelessness too, so that reinforcement learning
has something to select. (Random slips in the arithmetic itself leave it nothing: every habit is then equally bad.)
"""

import random
import re
from collections.abc import Collection

import reasoning_gym

# How often each habit is drawn for the warm start.
HABITS = {"careful": 0.3, "forgetful": 0.2, "guessing": 0.5}

_TERM = re.compile(r"([+-]?) ?(\d+)")


def problems(size: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, str]]:
    """Return `size` different problems `{"problem", "answer"}` with four to seven terms, none of them in `exclude`.

    reasoning-gym draws item `i` of a data set from `Random(seed + i)`: data sets of neighbouring seeds overlap. Seeds
    are spread far apart here, and what still comes twice is left out.
    """
    source = reasoning_gym.create_dataset(
        "chain_sum", size=2 * size + 100, seed=seed * 10_000_019, min_terms=4, max_terms=7, min_digits=1, max_digits=1
    )
    seen, found = set(exclude), []
    for item in source:
        if item["question"] not in seen and len(found) < size:
            seen.add(item["question"])
            found.append({"problem": item["question"], "answer": item["answer"]})
    if len(found) < size:
        raise ValueError(f"chain_sum gave only {len(found)} new problems with seed {seed}, {size} were asked for")
    return found


def solution(problem: str, habit: str, rng: random.Random) -> str:
    """Write a solution of `problem` in one of the `HABITS`.

    `careful` is right. `forgetful` leaves out one of the terms, so it is right only if that term is 0. `guessing`
    gives a number within 3 of the answer, right one time in seven.
    """
    (_, first), *terms = _TERM.findall(problem.rpartition(":")[2])
    if habit == "guessing":
        total = int(first) + sum(int(sign + term) for sign, term in terms)
        return rf"That is about \boxed{{{total + rng.randint(-3, 3)}}}."
    if habit == "forgetful":
        terms.pop(rng.randrange(len(terms)))
    elif habit != "careful":
        raise ValueError(f"habit must be one of {', '.join(HABITS)}, not {habit!r}")
    total, lines = int(first), []
    for sign, term in terms:
        before, total = total, total + int(sign + term)
        lines.append(f"{before}{sign}{term}={total}")
    return "\n".join([*lines, rf"The answer is \boxed{{{total}}}."])


def draw_solutions(items: list[dict[str, str]], seed: int, habits: dict[str, float] = HABITS) -> list[str]:
    """Write one solution of each item, its habit drawn with the given odds."""
    rng = random.Random(seed)
    drawn = rng.choices(list(habits), weights=list(habits.values()), k=len(items))
    return [solution(item["problem"], habit, rng) for item, habit in zip(items, drawn, strict=True)]
