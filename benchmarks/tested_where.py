"""Print the table of GPUs on which `make test-gpu` was run, from the result files that it writes.

python benchmarks/tested_where.py
"""

import json
from collections import Counter
from pathlib import Path

from ktae_trl.report import markdown

RESULTS = Path(__file__).parent / "results"
BLOB = "https://github.com/ktae-trl/ktae-trl/blob/main/benchmarks/results/"


def table(folder: Path = RESULTS) -> str:
    rows = []
    for file in sorted(folder.glob("gpu_*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        count = Counter(test["outcome"] for test in found["tests"])
        packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
        told = ", ".join(f"{count[outcome]} {outcome}" for outcome in ("passed", "skipped", "failed"))
        rows.append([
            f"{found['gpus']} x {found['gpu']}, {found['gib']:.0f} GiB",
            f"python {found['python']}, {', '.join(packages)}",
            f"[{told}]({BLOB}{file.name})",
        ])  # fmt: skip
    if not rows:
        rows = [["none yet", "", "not run: nothing here was run on a GPU"]]
    return markdown.table(["GPU", "versions", "`make test-gpu`"], rows)


if __name__ == "__main__":
    print(table())
