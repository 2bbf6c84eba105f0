"""Recreate the package's offline data and model.

python -m ktae_trl.tiny data     # one second
python -m ktae_trl.tiny model    # about 8 minutes on two cores
"""

import argparse
from pathlib import Path

from ktae_trl import tiny
from ktae_trl.files.writing import replace_json_lines
from ktae_trl.tiny import task

# The warm start, quickstart training and quickstart evaluation share no problems.
_SEEDS = {"warm start": 1, "train": 2, "held_out": 3}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ktae_trl.tiny", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write the problems of the quickstart")
    data.add_argument("--output", type=Path, default=tiny.TRAIN.parent)
    model = commands.add_parser("model", help="train the tokenizer and the model (supervised fine-tuning)")
    model.add_argument("--output", type=Path, default=tiny.MODEL)
    arguments = parser.parse_args()

    held_out = task.problems(512, seed=_SEEDS["held_out"])
    taken = {item["problem"] for item in held_out}
    train = task.problems(2048, seed=_SEEDS["train"], exclude=taken)
    taken |= {item["problem"] for item in train}
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.command == "data":
        for name, items in (("train", train), ("held_out", held_out)):
            replace_json_lines(arguments.output / f"{name}.jsonl", items)
    else:
        from ktae_trl.files.model_files import without_links
        from ktae_trl.tiny.warm_start import warm_start

        with without_links(arguments.output):
            warm_start(arguments.output, task.problems(40_000, seed=_SEEDS["warm start"], exclude=taken))


if __name__ == "__main__":
    main()
