"""Records of two processes against those of one: nothing is lost, and groups that straddle processes are whole."""

import pytest

from ktae_trl.report import records
from tests.distributed.launching import TWO_PROCESSES
from tests.distributed.test_same_as_one import REPLAYED

pytestmark = TWO_PROCESSES

# 3 groups of 8: the second lies on both processes. One that is resumed has a checkpoint in the middle of a cycle.
SETTINGS = REPLAYED | {"record_steps": 1, "log_completions": True, "logging_steps": 1}


@pytest.mark.parametrize("groups", [2, 1])
def test_two_processes_record_what_one_does(crews, tmp_path, groups):
    """With one group a record, a process may have no rows of it."""
    settings = SETTINGS | {"record_groups": groups}
    crews.train(tmp_path / "one", settings | {"per_device_train_batch_size": 24}, None)
    for checkpoint in (None, tmp_path / "two" / "checkpoint-3"):
        crews.train(tmp_path / "two", settings | {"per_device_train_batch_size": 12}, "ddp", checkpoint)
    one, two = records.files(tmp_path / "one"), records.files(tmp_path / "two")
    assert [path.name for path in one] == [path.name for path in two] == [records.file_name(s) for s in (1, 3, 5)]
    found = set()
    for a, b in zip(map(records.read, one), map(records.read, two), strict=True):
        assert a.method == b.method
        for row, other in zip(a.rows, b.rows, strict=True):
            found.add(row["group"])
            numbers = {name: row.pop(name) for name in ("credit", "advantages")}
            assert row.pop("advantage") == pytest.approx(other.pop("advantage"), abs=1e-6)
            for name, values in numbers.items():
                assert values == pytest.approx(other.pop(name), abs=1e-6)
            arrays = row.pop("arrays")
            assert arrays.keys() == {"log_probability", "entropy", "ratio", "clipped"}
            for name, values in other.pop("arrays").items():
                assert values == pytest.approx(arrays[name], abs=1e-4)
            assert row == other
    # The second group lies on both processes, the others on one each.
    assert 1 in found if groups == 2 else found & {0, 2}
