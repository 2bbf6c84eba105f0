"""Make the word problems of the recipe `smollm2_135m`: arithmetic with small numbers in one or two steps.

python benchmarks/word_problems.py [ktae_trl/data/word_problems]

They are for models of 100 to 500 million parameters, for which GSM8K is too difficult: SmolLM2-135M-Instruct failed in
all of 96 attempts at GSM8K problems of at most two steps. Training and held-out problems have the same forms, but no
form has the same numbers in both.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ktae_trl.files.writing import replace_json_lines

NAMES = (
    *("Ana", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jack"),
    *("Kira", "Leo", "Maya", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)
THINGS = (
    *("apples", "balls", "books", "buttons", "cards", "coins", "cookies", "cups"),
    *("marbles", "oranges", "pencils", "plums", "shells", "stamps", "toys"),
)
SIZES = {"train": 1024, "test": 256}


class Form(NamedTuple):
    steps: int
    text: str
    answer: Callable[..., int]
    largest: tuple[int, ...]  # largest values of a, b, c; the smallest is 2
    holds: Callable[..., bool] = lambda *numbers: True


def positive(difference: Callable[..., int]) -> Callable[..., bool]:
    return lambda *numbers: difference(*numbers) > 0


FORMS = (
    Form(1, "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
         lambda a, b: a + b, (20, 10)),
    Form(1, "{name} has {a} {things} and gives {b} of them away. How many {things} does {name} have left?",
         lambda a, b: a - b, (20, 10), positive(lambda a, b: a - b)),
    Form(1, "There are {a} boxes with {b} {things} in each. How many {things} are there in all?",
         lambda a, b: a * b, (9, 9)),
    Form(1, "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
         lambda a, b: a // b, (40, 6), lambda a, b: a % b == 0 and a > b),
    Form(1, "{name} is {a} years old. {other} is {b} years older. How old is {other}?",
         lambda a, b: a + b, (20, 10)),
    Form(1, "A ticket costs ${a}. How much do {b} tickets cost?",
         lambda a, b: a * b, (9, 9)),
    Form(1, "{name} needs {a} {things} and has {b}. How many more {things} does {name} need?",
         lambda a, b: a - b, (20, 10), positive(lambda a, b: a - b)),
    Form(1, "{name} reads {a} pages every day. How many pages does {name} read in {b} days?",
         lambda a, b: a * b, (9, 9)),
    Form(2, "{name} has {a} {things}, buys {b} more and gives {c} away. How many {things} does {name} have left?",
         lambda a, b, c: a + b - c, (20, 10, 10), positive(lambda a, b, c: a + b - c)),
    Form(2, "{name} buys {a} bags with {b} {things} in each and loses {c} of them. How many {things} are left?",
         lambda a, b, c: a * b - c, (6, 6, 10), positive(lambda a, b, c: a * b - c)),
    Form(2, "A pen costs ${a} and a book costs ${b}. How much do {c} pens and 1 book cost?",
         lambda a, b, c: a * c + b, (6, 10, 6)),
    Form(2, "{name} saves ${a} a week for {b} weeks and then spends ${c}. How much money is left?",
         lambda a, b, c: a * b - c, (9, 6, 10), positive(lambda a, b, c: a * b - c)),
    Form(2, "{name} has {a} {things}. {other} has {b} times as many. How many {things} do they have together?",
         lambda a, b: a + a * b, (10, 4)),
    Form(2, "There are {a} boys and {b} girls in each of {c} classes. How many children are there in all?",
         lambda a, b, c: (a + b) * c, (8, 8, 4)),
)  # fmt: skip


def problem(rng: random.Random) -> tuple[tuple, dict[str, str | int]]:
    """Draw a problem and return its form with its numbers, and the row `{"problem", "answer", "steps"}`.

    One in five problems has two steps, which a small model rarely solves.
    """
    steps = 1 + (rng.random() < 0.2)
    form = rng.choice([form for form in FORMS if form.steps == steps])
    while True:
        numbers = [rng.randint(2, most) for most in form.largest]
        if form.holds(*numbers):
            break
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS), **dict(zip("abc", numbers, strict=False))}
    row = {"problem": form.text.format(**words), "answer": str(form.answer(*numbers)), "steps": form.steps}
    return (form.text, *numbers), row


def problems() -> dict[str, list[dict[str, str | int]]]:
    """Return the problems of each split. None is repeated, and the splits share no form with the same numbers."""
    rng, test, train = random.Random(0), {}, {}
    while len(test) < SIZES["test"]:
        numbers, row = problem(rng)
        test[numbers] = row
    while len(train) < SIZES["train"]:
        numbers, row = problem(rng)
        if numbers not in test:
            train[row["problem"]] = row
    return {"test": list(test.values()), "train": list(train.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("ktae_trl/data/word_problems"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in problems().items():
        replace_json_lines(output / f"{split}.jsonl", rows)


if __name__ == "__main__":
    main()
