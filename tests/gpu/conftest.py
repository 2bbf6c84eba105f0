"""What a GPU shows: `make test-gpu`. Prints a table and, on a GPU, writes benchmarks/results/gpu_NAME.json.

A test notes what it measured in the fixture `figures`. Without a GPU the tests are skipped.
"""

import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from ktae_trl.files.writing import replace_json

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
PACKAGES = ("torch", "trl", "transformers", "accelerate", "deepspeed", "vllm", "peft", "bitsandbytes")
ROWS: list[dict] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")


@pytest.fixture
def two_gpus(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU, and this takes two")


@pytest.fixture
def figures(request) -> dict:
    """What a test measured, by name."""
    request.node.figures = {}
    return request.node.figures


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            reason = str(call.excinfo.value).strip().partition("\n")[0][:200]
        row = {"test": item.name.removeprefix("test_").replace("_", " "), "outcome": report.outcome, "reason": reason}
        ROWS.append({**row, "seconds": round(report.duration, 1), "figures": getattr(item, "figures", {})})
    return report


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("what was tested")
    for row in ROWS:
        told = ", ".join(f"{name} {value}" for name, value in row["figures"].items()) or row["reason"]
        terminalreporter.write_line(f"{row['outcome']:8}{row['test']:58}{told}")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gib": round(properties.total_memory / 2**30, 1),
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "packages": {package: installed(package) for package in PACKAGES},
            "tests": ROWS,
        }
        file = RESULTS / f"gpu_{re.sub(r'[^a-z0-9]+', '_', properties.name.lower()).strip('_')}.json"
        replace_json(file, found, indent=2)
        terminalreporter.write_line(f"\nWritten: {file}. Please send it: see CONTRIBUTING.md")
