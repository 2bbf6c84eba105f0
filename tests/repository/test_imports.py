"""Imports run one way, and the light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from ktae_trl import _HOMES as HOMES

PACKAGE = Path(__file__).parents[2] / "ktae_trl"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("ktae_trl", {"torch", "trl", "transformers"}),
        ("ktae_trl.preflight, ktae_trl.cli", {"torch", "trl", "transformers", "datasets", "huggingface_hub", "yaml"}),
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


# The rooms, and files with a place of their own. What a module loads as it is imported stands in its own room or above.
ORDER = [
    "arguments", "preflight", "trl_seam", "tiny", "grading", "files", "prompts", "data", "credit", "policy",
    "training.reward_calls", "rewards", "rollouts", "report", "hub", "evaluation", "config", "training", "trainer",
    "training.run", "tiny.warm_start", "tiny.__main__", "cli", "__main__",
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
            names = {HOMES.get(alias.name, f"{node.module}.{alias.name}") for alias in node.names}
            found |= names & FILES.keys() or {node.module}
        elif lazily or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


def room(name: str) -> str:
    _, *parts = name.split(".")
    whole = ".".join(parts)
    return whole if whole in ORDER else parts[0]


@pytest.mark.parametrize("place", ORDER)
def test_imports_run_downwards(place):
    own = {name for name in FILES if name != "ktae_trl" and room(name) == place}
    assert own
    for name in own:
        loaded = {room(other) for other in imported(FILES[name], lazily=False) if other.startswith("ktae_trl.")}
        assert loaded <= set(ORDER[: ORDER.index(place) + 1]), name


def test_every_file_has_its_place():
    assert {room(name) for name in FILES if name != "ktae_trl"} == set(ORDER)


def test_only_the_program_that_trains_imports_the_trainer():
    trainer = HOMES["KTAEGRPOTrainer"]
    assert {name for name, path in FILES.items() if trainer in imported(path)} == {"ktae_trl.training.run"}


def test_credit_and_grading_do_not_know_trl():
    for own in (own for own in FILES if own.startswith(("ktae_trl.credit", "ktae_trl.grading"))):
        assert not [name for name in imported(FILES[own]) if name.split(".")[0] in ("trl", "transformers")], own
