"""One process of a crew: crew.py FOLDER. Does the jobs that launching.py puts into the folder, until it is ended."""

import gc
import json
import os
import pkgutil
import sys
import time
from itertools import count
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState


def main(folder: Path) -> None:
    for number in count():
        while not (order := folder / f"{number}.order").exists():
            time.sleep(0.02)
        function, arguments = json.loads(order.read_text())
        pkgutil.resolve_name(function)(*arguments)
        gc.collect()
        AcceleratorState._reset_state()
        GradientState._reset_state()
        (folder / f"{number}.done.{os.environ['RANK']}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
