"""Imports run one way, and the light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ktae_trl"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("ktae_trl", {"torch", "trl", "transformers"}),
        ("ktae_trl.grading", {"torch", "trl", "transformers", "sympy", "numpy"}),
        ("ktae_trl.grading.symbolic, ktae_trl.grading.worker", {"torch", "trl", "transformers", "numpy"}),
        ("ktae_trl.credit", {"trl", "transformers"}),
        ("ktae_trl.report.page, ktae_trl.report.rows", {"trl", "transformers"}),
        ("ktae_trl.hub.upload", {"torch", "trl", "transformers"}),
        ("ktae_trl.trainer", {"numba", "llvmlite"}),  # before vLLM's engine on a CPU starts: see credit/counting.py
    ],
)
def test_imports_stay_light(module, forbidden):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(module.split(", ")) <= set(loaded)
    assert not forbidden & set(loaded)


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module} | {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }


def test_nothing_imports_the_trainer():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "trainer.py"]
    assert len(files) > 10
    assert not [path for path in files if "ktae_trl.trainer" in imported(path)]
    assert "ktae_trl.credit.combine" in imported(PACKAGE / "trainer.py")  # the check sees imports at all


def test_credit_and_grading_do_not_know_trl():
    for path in [*(PACKAGE / "credit").glob("*.py"), *(PACKAGE / "grading").glob("*.py")]:
        assert not [name for name in imported(path) if name.split(".")[0] in ("trl", "transformers")]
