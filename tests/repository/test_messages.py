"""What messages print: brackets as they are, and one statement of how to install the package."""

import ast
import configparser
import json
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ktae_trl import arguments
from ktae_trl.evaluation import summary

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "ktae_trl").rglob("*.py"))
TEXT_ONLY = {"training/console.py"}  # prints rich.text.Text, in which nothing is markup


def calls(path: Path, *names: str) -> list[ast.Call]:
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func).rpartition(".")[2] in names]


def extras() -> dict[str, str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return {"": config["options"]["install_requires"], **config["options.extras_require"]}


# Rich


def test_no_console_reads_text_as_markup():
    """Rich takes [deepspeed] for a tag and drops it. What a user named may hold brackets, too."""
    seen = 0
    for path in FILES:
        if str(path.relative_to(ROOT / "ktae_trl")) in TEXT_ONLY:
            continue
        for call in calls(path, "Console"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert (given.get("markup"), given.get("emoji")) == ("False", "False"), f"{path}, line {call.lineno}"
            seen += 1
        for call in calls(path, "status"):  # reads markup whatever the console does
            constant = [part for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
            assert not any("[" in str(part.value) for part in constant), f"{path}, line {call.lineno}"
        assert "rich.print" not in path.read_text()
    assert seen >= 4


def test_a_console_without_markup_prints_cells_and_headings_whole(capsys):
    table = Table("[head]")
    table.add_row("[cell] :smile:")
    console = Console(markup=False, emoji=False)
    console.print(table)
    console.rule("[rule]")
    out = capsys.readouterr().out
    assert all(text in out for text in ("[head]", "[cell] :smile:", "[rule]"))


def test_the_summary_names_benchmarks_with_brackets(tmp_path, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr(summary, "show", lambda figures, title, console: shown.append(console))
    summary.finish(tmp_path, {}, "title")
    shown[0].print("[math] of a file")
    assert "[math] of a file" in capsys.readouterr().out


# Installation


def test_one_function_says_how_to_install_the_package():
    assert arguments.pip_install("eval", "vllm") == f"pip install 'ktae-trl[eval,vllm]{arguments.SOURCE}'"
    for path in FILES:
        if path.name != "arguments.py":
            assert "pip install 'ktae-trl" not in path.read_text(), path
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert "pip install" not in path.read_text(), path


def test_the_extras_that_messages_name_are_there():
    named = {
        ast.literal_eval(call.args[1])
        for path in FILES
        for call in calls(path, "need")
        if len(call.args) == 2 and all(isinstance(word, ast.Constant) for word in call.args)
    }
    named |= {
        word.value
        for path in FILES
        for call in calls(path, "pip_install")
        for word in call.args
        if isinstance(word, ast.Constant)
    }
    assert {"eval", "report", "trackers", "vllm", "deepspeed"} <= named
    assert named <= extras().keys()


def test_the_notebook_needs_its_extra_only():
    notebook = json.loads((ROOT / "notebooks/ktae_quickstart.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    imported = (
        set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) - set(sys.stdlib_module_names) - {"ktae_trl"}
    )
    requirements = extras()[""] + extras()["notebook"]
    installed = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in requirements.split("\n") if line}
    assert imported <= installed
    assert {"ipykernel", "matplotlib", "latex2mathml"} <= installed
