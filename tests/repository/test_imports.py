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


# Each room and file of the package; what a module loads as it is imported stands in its own room or before it.
ORDER = [
    "arguments", "grading", "files", "prompts", "data", "tiny", "credit", "rollouts", "report", "hub", "evaluation",
    "rewards", "config", "trl_seam", "training", "trainer", "cli", "__main__",
]  # fmt: skip


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path, lazily: bool = True) -> set[str]:
    """The modules that a file names in its imports, without `lazily` those outside of functions only."""
    found, nodes = set(), [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & FILES.keys() or {node.module}
        elif lazily or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


def room(name: str) -> str:
    return name.split(".")[1]


def test_every_room_has_its_place():
    assert {room(name) for name in FILES if name != "ktae_trl"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_downwards(name):
    above = ORDER[ORDER.index(name) + 1 :]
    for own in (own for own in FILES if own != "ktae_trl" and room(own) == name):
        loaded = {other for other in imported(FILES[own], lazily=False) if other.startswith("ktae_trl.")}
        assert not {other for other in loaded if room(other) in above}, own


def test_nothing_imports_the_trainer():
    """But the program that trains, once its arguments are known to be good."""
    those = {name for name, path in FILES.items() if "ktae_trl.trainer" in imported(path)}
    assert those == {"ktae_trl.training.run"}
    assert "ktae_trl.trainer" not in imported(FILES["ktae_trl.training.run"], lazily=False)


def test_credit_and_grading_do_not_know_trl():
    for own in (own for own in FILES if own.startswith(("ktae_trl.credit", "ktae_trl.grading"))):
        assert not [name for name in imported(FILES[own]) if name.split(".")[0] in ("trl", "transformers")], own
