import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from ktae_trl.report import records
from ktae_trl.report.tokens import colour
from ktae_trl.training import console
from ktae_trl.training.console import MetricsTable
from tests.report.test_records import METHOD, row
from tests.trainers import make_trainer, replay
from tests.training.test_trackers import GROUP

LOGS = {"reward": 0.25, "correctness/right": 0.5, "completions/mean_length": 17.25, "ktae/value_right": None}


@pytest.fixture
def table():
    def make(credit, dynamic_sampling=False):
        table = MetricsTable(credit, dynamic_sampling)
        table.training_bar = SimpleNamespace(lines=[], write=lambda line: table.training_bar.lines.append(line))
        return table

    return make


def test_a_line_per_log(table):
    table = table("ktae")
    table.on_log(None, SimpleNamespace(global_step=10), None, logs=LOGS)
    table.on_log(None, SimpleNamespace(global_step=10), None, logs={f"eval_{k}": v for k, v in LOGS.items()})
    table.on_log(None, SimpleNamespace(global_step=10), None, logs={"train_runtime": 3.0})
    first, held_out = table.training_bar.lines
    assert first.split() == ["10", "0.250", "50.0%", "17.2"]
    assert held_out.split() == ["10", "eval", "0.250", "50.0%", "17.2"]
    assert len(first) == len(held_out)


def test_columns_of_token_credit_come_with_it(table):
    assert "K right" in table("ktae")._columns
    assert "K right" not in table("none")._columns
    assert table("ktae")._columns["mixed"][0] == "ktae/informative_groups"
    assert table("ktae", True)._columns["mixed"][0] == "dynamic_sampling/informative_groups"
    assert table("oar_g")._columns["|w-1|"][0] == table("oar_p")._columns["|w-1|"][0] == "oar/mean_change"
    assert table("tree")._columns["tokens"][0] == "tree/generated_tokens"
    assert "batches" in table("none", True)._columns
    assert table("none")._columns["right"][0] == "correctness/right"


def test_other_processes_write_nothing():
    MetricsTable("ktae", False).on_log(None, SimpleNamespace(global_step=1), None, logs=LOGS)


def test_sample_shows_each_token_on_the_colour_of_its_credit(monkeypatch):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, color_system="truecolor", width=120)
    monkeypatch.setattr(console, "Console", lambda: terminal)
    console.print_sample(GROUP, 3)
    text = out.getvalue()
    for token, value in (("7", 1.0), ("|`↵", -1.0)):
        red, green, blue = colour(value, dark=True)
        assert f"\x1b[38;2;255;255;255;48;2;{red};{green};{blue}m{token}\x1b[0m" in text
    assert "\x1b[0m 9" in text  # no credit, no colour
    assert "right, A = +0.50, 2 tokens" in text
    assert "wrong, A = +0.50, 2 tokens" in text


def test_sample_of_a_long_and_hostile_group(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "Console", lambda: Console(file=out, width=100))
    hostile = "[red]\x1b[2J\x00\u202e" + "a" * 10_000
    rows = [
        row(correct=i == 0, prompt=hostile, tokens=[hostile] * 500, credit=[0.5] * 500, token_ids=[5] * 500)
        for i in range(2)
    ]
    console.print_sample(records.Record(METHOD, rows), 1)
    text = out.getvalue()
    assert "\x1b" not in text
    assert "\x00" not in text
    assert "\u202e" not in text
    assert "[red]⟨ESC⟩[2J" in text  # neither markup nor control
    assert "100 more tokens" in text


def test_sample_of_a_group_that_is_all_wrong_or_not_judged(capsys):
    for verdict, name in ((False, "wrong, A"), (None, "not judged, A")):
        rows = [row(correct=verdict, credit=[0.0]) for _ in range(2)]
        console.print_sample(records.Record(METHOD, rows), 1)
        text = capsys.readouterr().out
        assert name in text
        assert text.count(", A = ") == 1


def test_a_terminal_that_cannot_show_it_ends_no_training(monkeypatch, caplog):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(console, "Console", lambda: Console(file=narrow))
    console.print_sample(GROUP, 3)
    assert "The sample of step 3 could not be printed" in caplog.text


def test_a_training_prints_its_samples(tmp_path, capsys):
    def all_wrong(completions, **_):
        return [0.0] * len(completions)

    make_trainer(
        tmp_path / "a", rollout_func=replay, log_completions=True, max_steps=1, per_device_train_batch_size=32
    ).train()
    text = capsys.readouterr().out
    assert text.count("right, A = +") == text.count("wrong, A = -") == 1
    assert "Completion" not in text  # TRL's table of all completions, unless a number of them is asked for
    make_trainer(
        tmp_path / "b",
        rollout_func=replay,
        log_completions=True,
        max_steps=1,
        per_device_train_batch_size=32,
        reward_funcs=all_wrong,
    ).train()
    assert "wrong, A = +0.00" in capsys.readouterr().out
    settings = {"log_completions": True, "max_steps": 1, "num_completions_to_print": 1}
    make_trainer(tmp_path / "c", rollout_func=replay, **settings).train()
    assert "Completion" in capsys.readouterr().out
