import io
import logging
import re
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.utils import tqdm as tqdm_of_hub
from rich.console import Console
from transformers import ProgressCallback
from transformers.utils import logging as logs_of_transformers

from ktae_trl.credit import METHODS, find_method
from ktae_trl.credit.method import Method
from ktae_trl.report import records
from ktae_trl.report.tokens import colour
from ktae_trl.training import console
from ktae_trl.training.console import MetricsTable
from tests.report.test_records import METHOD, row
from tests.trainers import make_trainer, replay
from tests.training.test_trackers import GROUP

LOGS = {"reward": 0.25, "correctness/right": 0.5, "completions/mean_length": 17.25, "ktae/value_right": None}


def make_args(**settings) -> SimpleNamespace:
    usual = {"eval_strategy": "no", "logging_steps": 1}
    usual |= {"steps_per_generation": 2, "num_iterations": 1, "gradient_accumulation_steps": 2}
    return SimpleNamespace(**usual | settings)


def log(table, step, logs, *, first=True, evaluates=False, max_steps=100) -> None:
    state = SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=first)
    args = make_args(eval_strategy="steps" if evaluates else "no")
    table.on_log(args, state, None, logs=logs)


def test_a_line_per_log(capsys):
    table = MetricsTable(find_method("ktae"), False)
    log(table, 10, LOGS)
    log(table, 10, {f"eval_{name}": value for name, value in LOGS.items()})
    log(table, 11, {"loss": 0.1, "entropy": 0.5, "step_time": 1.0})  # a step without a generation
    log(table, 100, {"train_runtime": 3.0})
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line.startswith("step ")]
    assert len(heads) == 2  # the legend stands between them
    assert heads[0] == heads[1]
    assert heads[0].startswith("step of 100 ")
    assert heads[0].endswith("  A'/A")
    first, held_out, third = (line for line in lines if line[:1].isdigit())
    assert first.split() == ["10", "0.250", "50.0%", "17.2"]
    assert held_out.split() == ["10", "eval", "0.250", "50.0%", "17.2"]
    assert third.split() == ["11", "0.500", "1.00"]
    for line, value, name in ((first, "0.250", "reward"), (held_out, "17.2", "length"), (third, "1.00", "s/step")):
        assert line.index(value) + len(value) == heads[0].index(name) + len(name)  # below its head


def test_a_long_table_repeats_its_head_and_not_its_legend(capsys):
    table = MetricsTable(find_method("none"), False)
    for step in range(1, 102):
        log(table, step, LOGS)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 3
    assert lines[-1].startswith("101 ")
    assert sum(line.startswith("  reward ") for line in lines) == 1


def test_an_evaluation_without_a_training_has_no_last_step(capsys):
    log(MetricsTable(find_method("none"), False), 0, {"eval_reward": 0.5}, max_steps=0)
    head, line = capsys.readouterr().out.splitlines()[:2]
    assert head.split()[:2] == ["step", "reward"]
    assert line.split() == ["0", "eval", "0.500"]


@pytest.mark.parametrize("credit", ["none", *METHODS])
def test_every_column_is_explained(credit):
    for dynamic_sampling in (False, True):
        table = MetricsTable(find_method(credit), dynamic_sampling)
        assert all(column.meaning for column in table.columns.values())
        lines = table.legend(evaluates=False).splitlines()[1:]
        assert [line.split("  ")[1] for line in lines] == list(table.columns)
        assert max(map(len, lines)) <= 120


def test_the_legend_says_what_is_counted():
    meanings = MetricsTable(find_method("ktae"), False).columns
    assert meanings["mixed"].meaning == "share of groups with both correct and wrong rollouts"
    assert meanings["length"].meaning == "mean number of tokens in a completion"
    assert "including replaced ones" in MetricsTable(find_method("ktae"), True).columns["mixed"].meaning
    assert "a shared token counts once" in MetricsTable(find_method("tree"), False).columns["length"].meaning
    assert (
        MetricsTable(find_method("ktae"), True)
        .legend(evaluates=False)
        .splitlines()[0]
        .endswith(", for the groups that were kept:")
    )
    assert re.search("N eval +the same after step N", MetricsTable(find_method("none"), False).legend(evaluates=True))


@pytest.mark.parametrize(
    ("logging_steps", "steps_per_generation", "num_iterations", "said"),
    [(1, 4, 1, True), (2, 4, 1, False), (1, 2, 1, False), (1, 2, 2, True)],
)
def test_the_legend_says_why_a_line_is_empty(capsys, logging_steps, steps_per_generation, num_iterations, said):
    args = make_args(
        logging_steps=logging_steps, steps_per_generation=steps_per_generation, num_iterations=num_iterations
    )
    state = SimpleNamespace(global_step=1, max_steps=9, is_world_process_zero=True)
    MetricsTable(find_method("none"), False).on_log(args, state, None, logs=LOGS)
    assert ("(empty)" in capsys.readouterr().out) == said


def test_a_method_of_a_user_may_leave_out_what_its_column_means():
    method = type("Mine", (Method,), {"columns": {"w max": ("entropy/largest_weight", "{:.1f}")}})
    assert "  w max    the metric entropy/largest_weight" in MetricsTable(method, False).legend(evaluates=False)


def test_columns_of_token_credit_come_with_it():
    def columns(credit, *settings):
        return {name: column.metric for name, column in MetricsTable(find_method(credit), *settings).columns.items()}

    assert "K correct" in columns("ktae", False)
    assert "K correct" not in columns("none", False)
    assert columns("ktae", False)["mixed"] == "ktae/informative_groups"
    assert columns("ktae", True)["mixed"] == "dynamic_sampling/informative_groups"
    assert columns("oar_g", False)["|w-1|"] == columns("oar_p", False)["|w-1|"] == "oar/mean_change"
    assert columns("tree", False)["tokens"] == "tree/generated_tokens"
    assert "batches" in columns("none", True)
    assert columns("none", False)["correct"] == "correctness/right"


def test_other_processes_write_nothing(capsys):
    log(MetricsTable(find_method("ktae"), False), 1, LOGS, first=False)
    assert capsys.readouterr().out == ""


def test_what_an_output_cannot_encode_ends_no_training(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(console.sys, "stdout", narrow)
    console.say("A≠0")
    assert narrow.buffer.getvalue() == b"A?0\n"  # written at once


# Where the table is shown


def train(folder, capfd, **settings):
    """Train, and return what the training printed and the trainer."""
    trainer = make_trainer(folder, rollout_func=replay, max_steps=2, per_device_train_batch_size=32, **settings)
    capfd.readouterr()  # of loading the model
    trainer.train()
    return capfd.readouterr(), trainer


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_a_trainer_in_python_shows_the_table(tmp_path, capfd, disable_tqdm):
    said, _ = train(tmp_path, capfd, credit="ktae", disable_tqdm=disable_tqdm)
    assert [line.split()[0] for line in said.out.splitlines() if line[:1].isdigit()] == ["1", "2"]
    assert said.out.count("  K correct  mean key-token value K") == 1
    assert "'loss'" not in said.out
    assert "\r" not in said.out + said.err  # it is no terminal: nothing is redrawn


def test_the_table_can_be_switched_off(tmp_path, capfd):
    said, trainer = train(tmp_path, capfd, console=False)
    assert said.out.count("'loss'") == 2
    assert "step of 2" not in said.out
    assert not any(isinstance(callback, MetricsTable) for callback in trainer.callback_handler.callbacks)


def test_a_terminal_has_one_bar_as_well(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(console, "shows_bars", lambda: True)
    said, _ = train(tmp_path, capfd, disable_tqdm=False)
    assert "| 2/2 [" in said.err
    assert "step of 2" in said.out
    assert "'loss'" not in said.out + said.err


def test_a_callback_of_the_user_stays(tmp_path):
    class Mine(ProgressCallback):
        pass

    mine = Mine()
    trainer = make_trainer(tmp_path, callbacks=[mine], disable_tqdm=False)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert mine in trainer.callback_handler.callbacks
    assert ProgressCallback not in kinds
    assert kinds.count(MetricsTable) == 1


# Other libraries


@pytest.fixture
def loud():
    """Bars as they are without us, before and after the test."""

    def reset():
        datasets.enable_progress_bars()
        logs_of_transformers.enable_progress_bar()
        logs_of_transformers.set_tqdm_hook(None)

    reset()
    yield
    reset()


def test_no_bar_is_drawn_where_it_cannot_be_redrawn(loud, capfd):
    console.quieten_libraries()
    Dataset.from_list([{"a": 1}]).map(lambda row: row)
    for bar in (logs_of_transformers.tqdm(range(2), desc="Loading weights"), tqdm_of_hub(range(2))):
        list(bar)
    assert capfd.readouterr().err == ""


def test_in_a_terminal_bars_of_data_are_quiet_and_others_leave_nothing(loud, capfd, monkeypatch):
    monkeypatch.setattr(console, "shows_bars", lambda: True)
    console.quieten_libraries()
    Dataset.from_list([{"a": 1}]).map(lambda row: row)
    assert capfd.readouterr().err == ""
    list(logs_of_transformers.tqdm(range(2), desc="Loading weights"))
    drawn = capfd.readouterr().err
    assert "Loading weights" in drawn
    assert drawn.endswith("\r")
    assert drawn.split("\r")[-2].strip() == ""  # wiped out


def test_what_the_environment_asks_for_stays(loud, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_DISABLE_PROGRESS_BARS", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    console.quieten_libraries()
    assert not datasets.are_progress_bars_disabled()
    assert logs_of_transformers.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("logger", "notice"),
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
        (
            "transformers.tokenization_utils_tokenizers",
            "Ignoring clean_up_tokenization_spaces=True for BPE tokenizer X",
        ),
    ],
)
def test_a_notice_that_says_nothing_is_dropped_and_no_other(loud, logger, notice):
    kept = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())
    found = logging.getLogger(logger)
    found.addHandler(handler)
    try:
        console.quieten_libraries()
        found.warning(notice)
        found.warning("Setting %s to %d", "x", 1)
    finally:
        found.removeHandler(handler)
    assert kept == ["Setting x to 1"]


# Samples


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
    assert "correct, A = +0.50, 2 tokens" in text
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
    for verdict, name in ((False, "wrong, A"), (None, "not graded, A")):
        rows = [row(correct=verdict, credit=[0.0]) for _ in range(2)]
        console.print_sample(records.Record(METHOD, rows), 1)
        text = capsys.readouterr().out
        assert name in text
        assert text.count(", A = ") == 1


def test_a_terminal_that_cannot_show_it_ends_no_training(monkeypatch, caplog):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(console, "Console", lambda: Console(file=narrow))
    console.print_sample(GROUP, 3)
    assert "Could not print the sample of step 3" in caplog.text


def test_a_training_prints_its_samples(tmp_path, capsys):
    def all_wrong(completions, **_):
        return [0.0] * len(completions)

    make_trainer(
        tmp_path / "a", rollout_func=replay, log_completions=True, max_steps=1, per_device_train_batch_size=32
    ).train()
    text = capsys.readouterr().out
    assert text.count("correct, A = +") == text.count("wrong, A = -") == 1
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
