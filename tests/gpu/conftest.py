"""What a GPU shows: `make test-gpu`. Prints a table and, on a GPU, writes benchmarks/results/gpu_NAME.json.

A test notes what it measured in the fixture `figures`. Without a GPU the tests are skipped.
"""

import os
import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from ktae_trl.files.writing import replace_json

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks/results"
PACKAGES = ("torch", "trl", "transformers", "accelerate", "deepspeed", "vllm", "peft", "bitsandbytes")
ROWS: list[dict] = []
# TRL refuses a single process that sees several GPUs. Those that are to use more get ALL_GPUS in their environment.
ALL_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
if ALL_GPUS:
    os.environ["CUDA_VISIBLE_DEVICES"] = ALL_GPUS.partition(",")[0]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums each time; it is read once


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(2400))


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda")


@pytest.fixture
def all_gpus(gpu) -> list[str]:
    """The names of the GPUs that are there, for CUDA_VISIBLE_DEVICES."""
    return ALL_GPUS.split(",")


@pytest.fixture
def figures(request) -> dict:
    """What a test measured, by name."""
    request.node.figures = {}
    return request.node.figures


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if HERE in item.path.parents and (report.when == "call" or report.outcome != "passed"):
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


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not ROWS:
        return
    terminalreporter.section("what was tested")
    for row in ROWS:
        told = ", ".join([row["reason"]] * bool(row["reason"]) + [f"{k} {v}" for k, v in row["figures"].items()])
        terminalreporter.write_line(f"{row['outcome']:8}{row['test']:58}{told}")
    whole = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not config.option.keyword
    if torch.cuda.is_available() and whole and [Path(word).resolve() for word in config.args] == [HERE]:
        properties, gpus = torch.cuda.get_device_properties(0), len(ALL_GPUS.split(","))
        found = {
            "gpu": properties.name,
            "gpus": gpus,
            "gib": round(properties.total_memory / 2**30, 1),
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "packages": {package: installed(package) for package in PACKAGES},
            "tests": ROWS,
        }
        name = re.sub(r"[^a-z0-9]+", "_", f"{gpus}_{properties.name}".lower()).strip("_")
        file = RESULTS / f"gpu_{name}.json"
        replace_json(file, found, indent=2)
        terminalreporter.write_line(f"\nWritten: {file}. Please send it: see CONTRIBUTING.md")
