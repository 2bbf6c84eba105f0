"""The wheel as a user gets it: in an environment without the checkout, from an empty folder. Asks the package index."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from ktae_trl.arguments import pip_install

ROOT = Path(__file__).parents[2]
SMALL = {
    "max_steps": 4,
    "save_steps": 4,
    "eval_steps": 4,
    "logging_steps": 1,
    "record_steps": 2,
    "eval_size": 8,
    "held_out_samples": 1,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 8,
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a copy of what is in git: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.rstrip("\0").split("\0"):
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, folder / "source"]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


class Environment:
    """A fresh environment, which has torch from that of the tests; all else is installed from the index."""

    def __init__(self, folder: Path):
        venv.create(folder / "venv", with_pip=True)
        self.bin, self.work = folder / "venv" / "bin", folder / "work"
        (site,) = (folder / "venv" / "lib").glob("*/site-packages")
        here = Path(sysconfig.get_path("purelib"))
        for path in (*here.glob("torch-*.dist-info"), here / "torch", here / "torchgen", here / "functorch"):
            (site / path.name).symlink_to(path)
        self.work.mkdir()

    def install(self, *what: str) -> None:
        pip = [self.bin / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, *what], check=True)

    def run(self, *words: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [self.bin / words[0], *words[1:]]
        return subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True, timeout=300)


def test_the_wheel_has_all_that_a_user_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    for path in (ROOT / "configs").rglob("*.yaml"):
        name = f"ktae_trl/{path.relative_to(ROOT).as_posix()}"
        assert archive.read(name) == path.read_bytes()
    files = [path for path in (ROOT / "ktae_trl").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    assert "ktae = ktae_trl.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Author"]
    assert "GRPO" in metadata["Keywords"]
    assert "https://github.com/ktae-trl/ktae-trl/issues" in " ".join(metadata.get_all("Project-URL"))


def test_a_user_without_the_checkout_trains_measures_and_looks(wheel, tmp_path):
    there = Environment(tmp_path)
    there.install(str(wheel))
    settings = [str(word) for name, value in SMALL.items() for word in (f"--{name}", value)]
    installed = there.run("python", "-m", "pip", "list").stdout.lower()
    heavy = ("latex2mathml", "matplotlib", "numba", "reasoning-gym", "reasoning_gym", "scipy", "tensorboard", "wandb")
    assert not [name for name in heavy if f"\n{name} " in installed]

    trained = there.run("ktae", "train", "quickstart", *settings)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "Trained to step 4" in trained.stdout
    assert f"No TensorBoard logs: tensorboard is not installed. Install it: {pip_install('trackers')}" in trained.stderr
    run = there.work / "runs" / "quickstart"
    assert (run / "model.safetensors").exists()
    assert "latex2mathml is not installed" in (run / "key_tokens.html").read_text()
    refused = there.run("ktae", "eval", "quickstart")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].endswith(f": scipy is not installed: {pip_install('eval')}")

    there.install(f"{wheel}[eval,report]")
    measured = there.run(
        *("ktae", "eval", "quickstart", "--model_name_or_path", "runs/quickstart"),
        *("--limit", "4", "--samples", "2", "--output_dir", "measured"),
    )
    assert measured.returncode == 0, measured.stderr[-3000:]
    assert (there.work / "measured" / "summary.json").exists()
    reported = there.run("ktae", "report", "runs/quickstart", "-o", "page.html")
    assert reported.returncode == 0, reported.stderr[-3000:]
    page = (there.work / "page.html").read_text()
    assert "is not installed" not in page
    assert 'id="rendered-0"' in page
    assert len(page) < 600_000
