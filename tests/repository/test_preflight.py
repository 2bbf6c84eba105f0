"""Mistakes that a command reports in one line before it imports torch, and the Hub that does not answer."""

import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from ktae_trl import preflight, tiny
from ktae_trl.arguments import NotFoundError, UserError

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
RECIPE = "model_name_or_path: tiny\ndataset_name: tiny\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("colon.yaml").write_text("seed: 1\nmodel: a: b\n")
    Path("tab.yaml").write_text("seed: 1\n\tmodel: a\n")
    Path("open.yaml").write_text("seed: 1\nmodel: [a, b\n")
    Path("latin.yaml").write_bytes(b"seed: 1\n# caf\xe9\n")
    Path("good.yaml").write_text(RECIPE)
    Path("my_problems.csv").write_text("problem,answer\n1 + 1,2\n")
    Path("runs/quick/checkpoint-50").mkdir(parents=True)
    Path("runs/quick/checkpoint-100").mkdir()
    return tmp_path


@pytest.fixture
def online(monkeypatch):
    """The Hub may be asked. No answer of another test is remembered."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(preflight, "_unreachable", "")
    monkeypatch.setattr(preflight, "_in_command", False)
    monkeypatch.setattr(preflight, "_found", set())
    return monkeypatch


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config"], "--config needs a file"),
        (["--config", "colon.yaml"], "colon.yaml, line 2, column 9 is not YAML: mapping values are not allowed here"),
        (["--config", "tab.yaml"], "tab.yaml, line 2, column 1 is not YAML"),
        (["--config", "tab.yaml"], "Indent with spaces, not with tabs"),
        (["--config", "open.yaml"], "open.yaml, line 3, column 1 is not YAML"),
        (["--config", "latin.yaml"], "latin.yaml is not UTF-8"),
        (["--config", "gold.yaml"], "There is no file gold.yaml (looked in "),
        (["--config", "gold.yaml"], "Did you mean good.yaml?"),
        (["--dataset_name", "my_problem.csv"], "There is no data file my_problem.csv (dataset_name; looked in "),
        (["--dataset_name", "my_problem.csv"], "Did you mean my_problems.csv?"),
        (["--eval-dataset-name=no.jsonl.gz"], "There is no data file no.jsonl.gz (eval_dataset_name; looked in "),
        (["--dataset_name", "problems.xlsx"], "problems.xlsx (dataset_name) has an unsupported format"),
        (["--dataset_name", "./nowhere"], "./nowhere (dataset_name; looked in "),
        (["--model_name_or_path", "./runs/quik"], "There is no model ./runs/quik (model_name_or_path; looked in "),
        (["--model_name_or_path", "./runs/quik"], "Did you mean runs/quick?"),
        (["--model_name_or_path", "~/no/such"], "There is no model ~/no/such"),
        (["--model_name_or_path", "good.yaml"], "good.yaml (model_name_or_path) is a file"),
        (["--model_name_or_path", "runs/quick"], "Use its last checkpoint, runs/quick/checkpoint-100"),
        (["--model_name_or_path", "not a name"], "nor a valid name on the Hub (USER/NAME)"),
    ],
)
def test_a_mistake_names_the_offender_and_the_remedy(folder, words, said):
    with pytest.raises(UserError) as told:
        preflight.check_command(words if "--config" in words else ["--config", "good.yaml", *words])
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_what_is_there_passes(folder):
    for words in (
        [],
        ["--dataset_name", "my_problems.csv"],
        ["--eval_dataset_name", "null"],
        ["--model_name_or_path", str(tiny.MODEL)],
    ):
        preflight.check_command(["--config", "good.yaml", *words])


def test_benchmarks_are_checked_unless_they_are_not_used(folder):
    Path("eval.yaml").write_text("benchmarks:\n- {name: a, dataset: tiny}\n- {name: ab, dataset: no.csv}\n")
    words = ["--config", "eval.yaml", "--model_name_or_path", "tiny"]
    with pytest.raises(NotFoundError, match=r"There is no data file no\.csv \(benchmark ab; looked in "):
        preflight.check_command(words)
    preflight.check_command([*words, "--only", "a"])
    preflight.check_command([*words, "--benchmark_folder", "elsewhere"])
    with pytest.raises(NotFoundError, match="benchmark ab"):
        preflight.check_command([*words, "--only", "a", "ab"])


def test_only_the_first_process_of_a_machine_complains(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    preflight.check_command(["--config", "good.yaml", "--dataset_name", "no.csv"])


# Whole commands


PROGRAMS = {
    "ktae train": "from ktae_trl import cli; cli.main(['train', *sys.argv[1:]])",
    "train.py": "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')",
    "ktae eval": "from ktae_trl import cli; cli.main(['eval', *sys.argv[1:]])",
    "eval.py": "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')",
}


def ended(program: str, *words: str, **environment: str) -> tuple[subprocess.CompletedProcess, float]:
    """Run a command as a user does, in a process that prints which heavy modules it has imported when it ends."""
    script = str(ROOT / program) if program.endswith(".py") else program
    heavy = "print(*{'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules))"
    start = f"import sys; sys.argv[0] = {script!r}; sys.path.insert(0, {str(ROOT)!r})"
    code = f"{start}\ntry:\n    {PROGRAMS[program]}\nfinally:\n    {heavy}"
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "LOCAL_RANK")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=kept | {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done, time.monotonic() - began


def test_a_folder_with_a_name_like_one_on_the_hub_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    Path("runs/quickstart").mkdir(parents=True)
    with pytest.raises(
        NotFoundError, match=r"^The model 'runs/quickstar' is neither in .*\. Did you mean runs/quickstart\?"
    ):
        preflight.check_model("runs/quickstar")
    with pytest.raises(NotFoundError, match=r"^The model 'quickstar' is neither in .* a copy$"):
        preflight.check_model("quickstar")


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_network_is_one_line_before_torch_is_imported(folder, program):
    config = "good.yaml"
    if "eval" in program:
        config = "eval.yaml"
        Path(config).write_text("benchmarks:\n- {name: a, dataset: tiny}\n")
    words = ["--config", config, "--model_name_or_path", "nobody/nothing"]
    done, seconds = ended(program, *words, HF_ENDPOINT=NOWHERE, HF_HOME=str(folder / "home"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{program}: The model 'nobody/nothing' (model_name_or_path) is neither in {folder} nor in ")
    assert f"the Hub ({NOWHERE}) cannot be reached: " in line
    assert done.stdout.strip() == ""  # nothing heavy
    assert seconds < 20  # 3 on a machine that does nothing else


def cache(folder: Path) -> Path:
    """Make a Hub cache that holds the offline model as nobody/tiny."""
    repo, commit = folder / "models--nobody--tiny", "0" * 40
    shutil.copytree(tiny.MODEL, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return folder


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": NOWHERE}, {"HF_HUB_OFFLINE": "1"}])
def test_a_cached_model_is_used_without_the_hub(folder, environment):
    words = ["--config", str(ROOT / "configs/quickstart.yaml"), "--model_name_or_path", "nobody/tiny", "--dry_run"]
    done, _ = ended("ktae train", *words, HF_HUB_CACHE=str(cache(folder / "cache")), **environment)
    assert done.returncode == 0, done.stderr
    assert "nobody/tiny: 831,616 parameters" in done.stdout
    assert "Retry" not in done.stderr
    warned = [line for line in done.stderr.splitlines() if "Cached files are used, as with HF_HUB_OFFLINE=1" in line]
    assert len(warned) == ("HF_ENDPOINT" in environment)


# What the Hub answers


@pytest.fixture
def hub(online):
    """A Hub that gives every request the same answer: `answer(status, body, **headers)` sets it."""
    given = {"status": 200, "body": b"{}", "headers": {}, "wait": 0.0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(given["wait"])
            self.send_response(given["status"])
            for name, value in given["headers"].items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(given["body"])))
            self.end_headers()
            self.wfile.write(given["body"])

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    online.setattr(constants, "HF_HUB_CACHE", "no_such_folder")
    yield lambda status, body=b"{}", wait=0.0, **headers: given.update(
        status=status, body=body, wait=wait, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    server.shutdown()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            (404, b"{}", {"X_Error_Code": "RepoNotFound"}),
            r"The model 'a/b' is neither in .* nor on the Hub\. Check the",
        ),
        (
            (401, b"{}", {"X_Error_Code": "RepoNotFound"}),
            r"nor on the Hub\. Check the name\. If it is private, log in with hf auth login",
        ),
        ((404, b"{}", {"X_Error_Code": "RevisionNotFound"}), "The model 'a/b' has no revision 'v2' on the Hub"),
        ((403, b"{}", {"X_Error_Code": "GatedRepo"}), "The model 'a/b' is gated: accept its terms on "),
        ((200, b'{"id": "a/b", "gated": "manual"}', {}), "The model 'a/b' is gated: accept its terms on .*/a/b, then"),
    ],
)
def test_what_the_hub_refuses(hub, monkeypatch, answer, said):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    status, body, headers = answer
    hub(status, body, **headers)
    with pytest.raises(NotFoundError, match=said):
        preflight.check_model("a/b", "v2")


@pytest.mark.parametrize("answer", [(200, b'{"id": "a/b"}'), (503,), (429,), (200, b"a mirror's page")])
def test_what_the_library_that_loads_can_tell_better_passes(hub, answer):
    hub(*answer)
    preflight.check_model("a/b")


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.3")
    hub(200, wait=2.0)
    began = time.monotonic()
    with pytest.raises(
        NotFoundError, match=r"cannot be reached: no answer in 0\.3 s \(HF_HUB_ETAG_TIMEOUT\)\. Check the"
    ):
        preflight.check_dataset("a/b")
    assert time.monotonic() - began < 2


def test_a_command_asks_an_unreachable_hub_once(folder, online, caplog):
    asked = []

    def silent(ask):
        asked.append(ask)
        raise TimeoutError("no answer")

    online.setattr(preflight, "_asked", silent)
    online.setattr(constants, "HF_HUB_CACHE", str(cache(folder / "cache")))
    words = ["--model_name_or_path", "nobody/tiny", "--dataset_name", "a/b"]
    with pytest.raises(NotFoundError, match=r"The dataset 'a/b' \(dataset_name\) is neither in .* be reached: no"):
        preflight.check_command(words)
    preflight.check_command([*words, "--dataset_name", "tiny"])
    assert len(asked) == 1
    assert "Cached files are used" in caplog.text
    assert constants.HF_HUB_OFFLINE


def test_what_is_there_is_remembered_and_a_refusal_is_not(hub):
    hub(404, X_Error_Code="RepoNotFound")
    with pytest.raises(NotFoundError, match="The dataset 'a/b'"):
        preflight.check_dataset("a/b")
    hub(200, b'{"id": "a/b"}')
    preflight.check_dataset("a/b")
    preflight.check_model("a/b", "main")
    hub(404, X_Error_Code="RepoNotFound")
    preflight.check_dataset("a/b", "dataset_name")
    preflight.check_model("a/b")
