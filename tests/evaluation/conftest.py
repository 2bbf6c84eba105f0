"""A whole run of `eval.py` with the offline model on its own task, which many tests read."""

import os
import shutil
from pathlib import Path

import pytest

from ktae_trl import tiny
from ktae_trl.evaluation.run import main
from tests.evaluation.running import QUICK, ROOT


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """The results of one whole run."""
    folder = tmp_path_factory.mktemp("eval") / "tiny"
    os.chdir(ROOT)
    main([*QUICK, "--output_dir", str(folder)])
    return folder


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(tiny.MODEL, tmp_path / "model"))
