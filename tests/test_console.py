from types import SimpleNamespace

import pytest

from ktae_trl.console import MetricsTable

LOGS = {"reward": 0.25, "rewards/math_accuracy/mean": 0.5, "completions/mean_length": 17.25, "ktae/value_right": None}


@pytest.fixture
def table():
    def make(credit, dynamic_sampling=False):
        table = MetricsTable("math_accuracy", credit, dynamic_sampling)
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
    assert table("none")._columns["right"][0] == "rewards/math_accuracy/mean"


def test_other_processes_write_nothing():
    MetricsTable("math_accuracy", "ktae", False).on_log(None, SimpleNamespace(global_step=1), None, logs=LOGS)
