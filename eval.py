"""Measure, compare and grade models: see `ktae_trl/evaluation/run.py`."""

import sys

from ktae_trl.evaluation.run import main

if __name__ == "__main__":
    main(sys.argv[1:])
