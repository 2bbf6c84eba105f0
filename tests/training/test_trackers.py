"""With `log_completions` the key tokens of a group reach the trackers, read back from what they keep on disk."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback

from ktae_trl.report import records
from ktae_trl.training import trackers
from tests.distributed.launching import environment
from tests.processes import run
from tests.report.test_records import METHOD, row

# 2 right, 2 wrong: token 7 in both right ones, 8 in both wrong ones, 9 in all of them.
GROUP = records.Record(
    METHOD,
    [
        row(rollout=i, correct=i < 2, token_ids=[7 if i < 2 else 8, 9], tokens=["7" if i < 2 else "|`\n", " 9"])
        | {"trained": [True, True], "credit": [1.0 if i < 2 else -1.0, 0.0], "advantages": [1.5, 0.5]}
        for i in range(4)
    ],
)


def test_table_of_key_tokens():
    head, _, *lines = trackers.table(GROUP).splitlines()
    assert head == "| token | in correct | in wrong | p | K |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(cell) == 5 for cell in cells)  # no token ends a cell
    # Fisher's p of [[2, 0], [0, 2]] is 2 / C(4, 2) = 1/3, of a token in all of them 1.
    assert [cell[1:4] for cell in cells[:2]] == [["2 of 2", "0 of 2", "0.333"], ["0 of 2", "2 of 2", "0.333"]]
    assert [cell[0] for cell in cells] == ["`7`", "`¦'↵`", "`␣9`"]
    assert cells[2][1:] == ["2 of 2", "2 of 2", "1", "+0.00"]


TRAINING = """
import sys
from tests.trainers import make_trainer, replay
make_trainer(
    sys.argv[1],
    rollout_func=replay,
    log_completions=True,
    max_steps=1,
    per_device_train_batch_size=32,
    report_to=["tensorboard", "wandb", "trackio"],
).train()
"""


@pytest.mark.slow
def test_every_tracker_gets_the_sample(tmp_path):
    for name in ("wandb", "trackio"):
        pytest.importorskip(name)
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
    }
    words = [sys.executable, "-c", TRAINING, str(tmp_path / "run")]
    done = run(words, env=environment() | variables, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "did not accept" not in done.stderr
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("key_tokens/text_summary")
    assert event.step == 1
    assert event.tensor_proto.string_val[0].decode().startswith("| token | in correct |")
    for pattern in ("wandb/offline-run-*/files/media/html/key_tokens_*.html", "trackio/media/*/*/*/*.html"):
        (html,) = tmp_path.glob(pattern)
        assert "</table>" in html.read_text(encoding="utf-8")


def test_a_tracker_that_fails_is_a_warning(caplog):
    class Broken:
        def add_text(self, *_):
            raise ConnectionError("no route to host")

    callback = TensorBoardCallback(Broken())
    trackers.send_sample(GROUP, 7, SimpleNamespace(callbacks=[callback]))
    assert "TensorBoardCallback did not accept the key tokens of step 7: no route to host" in caplog.text
