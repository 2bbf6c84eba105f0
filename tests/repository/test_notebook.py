"""The quickstart notebook is stored clean, runs from the first cell to the last, and shows what its words say."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATH = ROOT / "notebooks" / "ktae_quickstart.ipynb"


@pytest.fixture
def notebook() -> dict:
    return json.loads(PATH.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_of(notebook: dict) -> dict[str, str]:
    return {cell["id"]: source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"}


# As it is stored


def test_it_holds_nothing_of_a_machine(notebook):
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_its_text_is_tidy(notebook):
    assert PATH.read_text(encoding="utf-8") == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    assert max(source(cell).count("\n") for cell in notebook["cells"]) < 40


def test_it_is_a_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(PATH, as_version=4))


def test_the_first_cell_installs_on_colab_only(notebook, monkeypatch):
    first = next(iter(code_of(notebook).values())).replace('%pip install -q "{SOURCE}"', "installed.append(SOURCE)")
    for module, wanted in (
        ("nothing", []),
        ("google.colab", ["ktae-trl[notebook] @ git+https://github.com/ktae-trl/ktae-trl"]),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        installed = []
        exec(first, {"installed": installed})
        assert installed == wanted


def test_its_links_lead_somewhere(notebook):
    links = re.findall(r"\]\((\.\./[^)#]+)\)", "".join(map(source, notebook["cells"])))
    assert len(links) >= 4
    for link in links:
        assert (PATH.parent / link).exists(), link


# As it runs


def run(folder: Path, changes: dict[str, str] | None = None):
    """Execute the cells, in which `changes` were made, by a kernel of this interpreter; return them by name."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    text = PATH.read_text(encoding="utf-8")
    for old, new in (changes or {}).items():
        old, new = json.dumps(old)[1:-1], json.dumps(new)[1:-1]  # as the file has them
        assert old in text, old
        text = text.replace(old, new)
    executed = nbformat.reads(text, as_version=4)
    # jupyter_client starts "python3" with the running interpreter. No token of the user's is seen.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_TOKEN", "HUGGING_"))}
    environment |= {
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    client = nbclient.NotebookClient(
        executed, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment)  # raises for a cell that does
    return {cell["id"]: cell for cell in executed.cells if cell["cell_type"] == "code"}


def printed(cell) -> str:
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


def shown(cell, kind: str) -> str:
    (found,) = (output["data"][kind] for output in cell["outputs"] if kind in output.get("data", {}))
    return found


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path):
    cells = run(tmp_path)
    before, after = (float(x) for x in re.findall(r"([\d.]+)%", printed(cells["compare"])))
    assert printed(cells["sample"]).startswith(f"{before}%")
    assert after > before + 30

    for name in ("key-tokens", "key-tokens-after"):
        html = shown(cells[name], "text/html")
        tokens = re.findall(
            r'<span title="[^"]*  K ([-\d.e]+)[^"]*" style="[^"]*background:rgb\((\d+), (\d+), (\d+)\)', html
        )
        assert len(tokens) > 20
        blue = [float(K) for K, red, _, b in tokens if int(b) > int(red)]
        orange = [float(K) for K, red, _, b in tokens if int(red) > int(b)]
        assert blue
        assert min(blue) > 0
        assert max(orange, default=-1) < 0
        assert re.search(r"Correct \(\d\)", html)
        assert re.search(r"Wrong \(\d\)", html)
        assert re.search(r"<td[^>]*>\d of \d</td>", html)
    assert ">That</span>" in shown(cells["key-tokens"], "text/html")  # the careless habit

    assert re.search(r"^step of 40 +reward +correct ", printed(cells["train"]), re.MULTILINE)
    assert re.search(r"^40 +0\.\d{3} ", printed(cells["train"]), re.MULTILINE)
    assert len(shown(cells["curves"], "image/png")) > 10_000
    assert "Not pushed: there is no Hub token" in printed(cells["hub"])
    page = (tmp_path / "key_tokens.html").read_text(encoding="utf-8")
    assert "ktae-quickstart" in page
    assert (tmp_path / "ktae-quickstart" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_cells_of_a_real_model_run(tmp_path):
    """The other side of the switch, with a small model and problems in the form of GSM8K in the place of the Hub's."""
    from ktae_trl import tiny

    rows = [json.loads(line) for line in tiny.TRAIN.read_text().splitlines()[:80]]
    data = tmp_path / "gsm8k.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": row["problem"], "answer": f"Some steps.\n#### {row['answer']}"}) + "\n"
            for row in rows
        )
    )
    cells = run(
        tmp_path,
        {
            'MODEL = "tiny"': f'MODEL = "{tiny.MODEL}"',
            'load("openai/gsm8k", "main", split)': f'load("{data}")',
            '"max_steps": 30': '"max_steps": 1',
            'credit="ktae"': 'credit="none"',  # as its last words propose
        },
    )
    assert f"answer: {rows[0]['answer']}" in re.sub(r" +", " ", printed(cells["data"]))
    assert "% of 512 answers are correct" in printed(cells["sample"])
    assert re.search(r"before +[\d.]+%\nafter +[\d.]+%", printed(cells["compare"]))
    assert "Not pushed" in printed(cells["hub"])
