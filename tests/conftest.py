"""What several tests share: the offline model, and the folder of reference material if it is there."""

import os
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ktae_trl import tiny

SHARED = Path(__file__).parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Sort and mark tests.

    Of a test with `slow_after(n)` the first n cases are in the fast lane, the others in the slow one. Tests that start
    processes in the same way follow each other, for one crew is there at a time.
    """
    cases = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases[test] += 1
        if (limit := item.get_closest_marker("slow_after")) and cases[test] > limit.args[0]:
            item.add_marker(pytest.mark.slow)

    def mode(item) -> str:
        settings = item.callspec.params if hasattr(item, "callspec") else {}
        return settings.get("mode", "ddp") if "crews" in item.fixturenames else ""

    items.sort(key=mode)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The digests of files that tests make are not left in the user's home. What DeepSpeed compiles in minutes is."""
    with pytest.MonkeyPatch.context() as patch:
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
            patch.setenv("TORCH_EXTENSIONS_DIR", str(caches / "torch_extensions"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def shared():
    """The folder of reference material beside the repository; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"the reference material is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def crews(tmp_path_factory):
    """Trains on several processes: see tests/distributed/launching.py."""
    from tests.distributed.launching import Crews

    crews = Crews(tmp_path_factory.mktemp("crews"))
    yield crews
    crews.end()


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.MODEL)
