"""Records of two processes against those of one: nothing is lost, and groups that straddle processes are whole."""

import pytest

from ktae_trl.report import records
from tests.distributed.launching import TWO_PROCESSES
from tests.distributed.test_same_as_one import REPLAYED

pytestmark = TWO_PROCESSES

# 3 groups of 8: the second lies on both processes. One that is resumed has a checkpoint in the middle of a cycle.
SETTINGS = REPLAYED | {"record_steps": 1, "record_groups": 2, "log_completions": True, "logging_steps": 1}


def test_two_processes_record_what_one_does(crews, tmp_path):
    crews.train(tmp_path / "one", SETTINGS | {"per_device_train_batch_size": 24}, None)
    for checkpoint in (None, tmp_path / "two" / "checkpoint-3"):
        crews.train(tmp_path / "two", SETTINGS | {"per_device_train_batch_size": 12}, "ddp", checkpoint)
    one, two = records.files(tmp_path / "one"), records.files(tmp_path / "two")
    assert [path.name for path in one] == [path.name for path in two] == [records.file_name(s) for s in (1, 3, 5)]
    straddling = 0
    for a, b in zip(map(records.read, one), map(records.read, two), strict=True):
        assert a.method == b.method
        for row, other in zip(a.rows, b.rows, strict=True):
            straddling += row["group"] == 1
            numbers = {name: row.pop(name) for name in ("credit", "advantages")}
            assert row.pop("advantage") == pytest.approx(other.pop("advantage"), abs=1e-6)
            for name, values in numbers.items():
                assert values == pytest.approx(other.pop(name), abs=1e-6)
            assert row == other
    assert straddling
