"""Records of rollouts: what the trainer writes down is what it trained on, in files that others can read."""

import functools
import json
import logging
import math

import datasets
import numpy
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from trl import GRPOTrainer

from ktae_trl import KTAEGRPOConfig
from ktae_trl.credit.ktae.method import KTAE
from ktae_trl.credit.ktae.values import key_token_values
from ktae_trl.report import records
from tests.trainers import around, make_trainer, replay, watch_batches

RECORDING = {"rollout_func": replay, "record_steps": 1, "max_steps": 2, "per_device_train_batch_size": 32}


def spy(trainer) -> tuple[list[dict], list[list[float]]]:
    """Keep what TRL hands to the buffer, of which the records speak: each generation's batch; and its rewards."""
    batches, given = watch_batches(trainer), []
    (reward,) = trainer.reward_funcs

    @functools.wraps(reward)
    def keep(**arguments):
        given.append(reward(**arguments))
        return given[-1]

    trainer.reward_funcs = [keep]
    return batches, given


def spy_on_loss(monkeypatch) -> list[dict]:
    """Keep the advantages that TRL's loss gets, by prompt and completion: a dictionary for each step."""
    seen = []

    def loss(original, self, model, inputs):
        texts = zip(inputs["prompt_ids"].tolist(), inputs["completion_ids"].tolist(), strict=True)
        keys = [(tuple(prompt), tuple(completion)) for prompt, completion in texts]
        seen.append(dict(zip(keys, inputs["advantages"].clone(), strict=True)))
        return original(self, model, inputs)

    around(GRPOTrainer, "loss", loss, monkeypatch.setattr)
    return seen


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({}, "multiply"),
        ({"ktae_combine": "add", "ktae_leave_one_out": True}, "add"),
        ({"ktae_combine": "importance", "ktae_importance_beta": 4.0}, "scale"),
        ({"ktae_scale": 0.5}, "multiply"),
        ({"credit": "oar_g"}, "scale"),
        ({"credit": "tree", "rollout_func": None}, "replace"),
        ({"credit": "none"}, None),
    ],
    ids=str,
)
def test_a_record_holds_what_was_trained_on(tmp_path, monkeypatch, settings, how):
    trainer = make_trainer(tmp_path, **RECORDING | settings)
    (batches, rewards), losses = spy(trainer), spy_on_loss(monkeypatch)
    trainer.train()
    found = records.files(tmp_path)
    assert [path.name for path in found] == ["step_000001.parquet", "step_000002.parquet"]
    for path, batch, given, step in zip(found, batches, rewards, (1, 2), strict=True):
        method, rows, _ = records.read(path)
        assert (method.credit, method.how, method.generated_groups) == (settings.get("credit", "ktae"), how, 4)
        assert [(r["step"], r["group"], r["rollout"]) for r in rows] == [(step, *divmod(i, 8)) for i in range(32)]
        tokenizer = trainer.processing_class
        for i, row in enumerate(rows):
            n = int(batch["completion_mask"][i].sum())
            assert row["token_ids"] == batch["completion_ids"][i, :n].tolist()
            assert row["completion"] == tokenizer.decode(row["token_ids"], skip_special_tokens=True)
            assert row["prompt"] == tokenizer.decode(batch["prompt_ids"][i][batch["prompt_mask"][i].bool()])
            mask = batch["tool_mask"][i, :n].bool().tolist() if "tool_mask" in batch else [True] * n
            assert row["trained"] == mask
            assert row["rewards"] == {"math_accuracy": given[i]}
            assert row["correct"] is (given[i] > 0)
            assert row["advantage"] == batch["advantages"][i].item()
            assert row["credit"] == (None if how is None else batch["credit"][i, :n].tolist())
            if how != "replace":  # rows of a tree can have the same ids and other advantages
                text = (tuple(batch["prompt_ids"][i].tolist()), tuple(batch["completion_ids"][i].tolist()))
                final = losses[step - 1][text]
                final = final.expand(n) if final.dim() == 0 else final[:n]
                assert row["advantages"] == pytest.approx(final.tolist(), abs=1e-6)
            else:
                assert row["advantages"] == row["credit"]


def test_values_can_be_computed_again_from_a_record(tmp_path):
    trainer = make_trainer(tmp_path, **RECORDING, ktae_leave_one_out=True, ktae_ig_weight=2.0, ktae_tf_weight=0.5)
    trainer.train()
    method, rows, _ = records.read(records.files(tmp_path)[0])
    assert (method.title, method.symbol) == ("KTAE (key tokens)", "K")
    assert method.settings == {
        "ktae_combine": "multiply",
        "ktae_scale": 1.0,
        "ktae_importance_beta": 1.0,
        "ktae_fisher_weight": 1.0,
        "ktae_ig_weight": 2.0,
        "ktae_tf_weight": 0.5,
        "ktae_leave_one_out": True,
        "ktae_memory": 0.0,
    }
    T = max(len(row["token_ids"]) for row in rows)
    ids = torch.tensor([row["token_ids"] + [0] * (T - len(row["token_ids"])) for row in rows])
    mask = torch.tensor([row["trained"] + [False] * (T - len(row["trained"])) for row in rows])
    values = key_token_values(
        ids.view(-1, 8, T),
        mask.view(-1, 8, T),
        torch.tensor([row["correct"] for row in rows]).view(-1, 8),
        fisher_weight=1.0,
        ig_weight=2.0,
        tf_weight=0.5,
        leave_one_out=True,
        ignore_ids=method.special_ids,
    ).view(-1, T)
    recorded = torch.tensor([row["credit"] + [0.0] * (T - len(row["credit"])) for row in rows])
    assert recorded.abs().max() > 0.1
    torch.testing.assert_close(values, recorded, atol=1e-6, rtol=0)


def test_pandas_and_datasets_read_a_record(tmp_path):
    make_trainer(tmp_path, **RECORDING).train()
    files = [str(path) for path in records.files(tmp_path)]
    frame = pd.concat(map(pd.read_parquet, files))
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(frame) == len(loaded) == 64
    assert set(frame["schema_version"]) == set(loaded["schema_version"]) == {records.SCHEMA_VERSION}
    assert frame["rewards"].iloc[0] == loaded[0]["rewards"]
    assert frame["tokens"].iloc[5].tolist() == loaded[5]["tokens"]
    assert frame["correct"].mean() == sum(loaded["correct"]) / 64


def test_without_credit_there_are_advantages_but_no_values(tmp_path):
    make_trainer(tmp_path, **RECORDING, credit="none").train()
    method, rows, _ = records.read(records.files(tmp_path)[0])
    assert (method.credit, method.how) == ("none", None)
    for row in rows:
        assert row["credit"] is None
        assert row["advantages"] == [row["advantage"]] * len(row["token_ids"])


def test_what_could_not_be_judged_is_null(tmp_path):
    def second_unknown(completions, **_):
        return [None if i % 8 == 1 else float(i % 2) for i in range(len(completions))]

    def other(completions, **_):
        return [0.5] * len(completions)

    make_trainer(tmp_path, **RECORDING, reward_funcs=[second_unknown, other]).train()
    _, rows, _ = records.read(records.files(tmp_path)[0])
    assert [row["correct"] for row in rows[:4]] == [False, None, False, True]
    assert rows[1]["rewards"] == {"second_unknown": None, "other": 0.5}


def test_a_masked_rollout_keeps_its_tokens(tmp_path):
    make_trainer(tmp_path, **RECORDING, mask_truncated_completions=True, max_completion_length=16).train()
    _, rows, _ = records.read(records.files(tmp_path)[0])
    cut = [row for row in rows if not any(row["trained"])]
    assert cut
    assert all(len(row["token_ids"]) == len(row["trained"]) == 16 for row in cut)
    assert any(all(row["trained"]) for row in rows)


def test_a_tree_marks_what_other_rows_train(tmp_path):
    trainer = make_trainer(tmp_path, credit="tree", record_steps=1, max_steps=1, max_completion_length=24)
    batches, _ = spy(trainer)
    trainer.train()
    method, rows, _ = records.read(records.files(tmp_path)[0])
    assert method.how == "replace"
    for i, row in enumerate(rows):
        assert row["trained"] == batches[0]["tool_mask"][i, : len(row["tokens"])].bool().tolist()
    assert not all(all(row["trained"]) for row in rows)


def test_functions_of_one_name_have_a_column_each(tmp_path):
    rewards = [lambda completions, value=value, **_: [value] * len(completions) for value in (1.0, 0.25)]
    make_trainer(tmp_path, **RECORDING, reward_funcs=rewards).train()
    _, rows, _ = records.read(records.files(tmp_path)[0])
    assert rows[0]["rewards"] == {"<lambda>": 1.0, "<lambda> (2)": 0.25}


def test_informative_groups_come_first(tmp_path):
    def last_groups_are_mixed(completions, **_):
        rewards = [float(i >= 16 and i % 2) for i in range(len(completions))]
        # The second group: right ones and such as cannot be judged.
        return [*rewards[:8], *([1.0, None] * 4), *rewards[16:]]

    make_trainer(tmp_path, **RECORDING, reward_funcs=last_groups_are_mixed, record_groups=3).train()
    method, rows, _ = records.read(records.files(tmp_path)[0])
    assert method.generated_groups == 4
    assert [row["group"] for row in rows] == [g for g in (0, 2, 3) for _ in range(8)]


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"record_steps": 3}, [1, 4, 7]),
        ({"record_steps": 1}, [1, 3, 5, 7]),  # 7 steps, at most 4 records: every second one
        ({"record_steps": 2, "steps_per_generation": 3, "gradient_accumulation_steps": 1}, [1, 4, 7]),
        ({"record_steps": 0}, []),
    ],
)
def test_how_often(tmp_path, monkeypatch, settings, steps):
    monkeypatch.setattr("ktae_trl.training.recorder.MOST", 4)
    make_trainer(tmp_path, **RECORDING | {"max_steps": 7} | settings).train()
    assert [records.step_of(path) for path in records.files(tmp_path)] == steps


@pytest.mark.slow
def test_a_resumed_run_has_the_records_of_one_that_was_not_interrupted(tmp_path, caplog):
    settings = RECORDING | {"record_steps": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "whole", **settings).train()
    make_trainer(tmp_path / "parts", **settings).train()  # to its end: records after the checkpoint are outdated
    metrics = (tmp_path / "parts" / "rollouts" / records.METRICS).read_text()
    for stale in (tmp_path / "parts" / "rollouts").glob("step_00000[5]*"):
        stale.write_bytes(b"of a run that is now another")
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path / "parts", **settings).train(str(tmp_path / "parts" / "checkpoint-3"))
    assert "Removed records of an earlier run (number: 1; steps after 3)" in caplog.text
    whole, parts = (records.files(tmp_path / name) for name in ("whole", "parts"))
    assert [path.name for path in whole] == [path.name for path in parts] == [records.file_name(s) for s in (1, 3, 5)]
    for a, b in zip(whole, parts, strict=True):
        assert pq.read_table(a).equals(pq.read_table(b))
    assert [e["step"] for e in records.read_metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    assert len((tmp_path / "parts" / "rollouts" / records.METRICS).read_text().splitlines()) == len(
        metrics.splitlines()
    )


def test_a_run_that_begins_anew_is_not_mixed_with_the_one_before(tmp_path):
    make_trainer(tmp_path, **RECORDING).train()
    (tmp_path / "key_tokens.html").write_text("of the first run")
    make_trainer(tmp_path, **RECORDING | {"record_steps": 0}).train()
    assert records.files(tmp_path) == records.read_metrics(tmp_path) == []
    assert not (tmp_path / "key_tokens.html").exists()


def test_metrics_are_those_that_were_logged(tmp_path):
    trainer = make_trainer(tmp_path, **RECORDING)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    found = [entry for entry in records.read_metrics(tmp_path) if "reward" in entry]
    assert [entry["ktae/saturated"] for entry in found] == [entry["ktae/saturated"] for entry in logged]
    assert [entry["step"] for entry in found] == [1, 2]


def test_a_full_disk_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    def full(path, what):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write", full)
    monkeypatch.setattr(records, "append_metrics", full)
    trainer = make_trainer(tmp_path, **RECORDING)
    trainer.train()
    assert trainer.state.global_step == 2
    assert caplog.text.count("Could not write a record: [Errno 28] No space left on device") == 2 + 3  # files, lines


def row(**changes) -> dict:
    return {
        "step": 1,
        "group": 0,
        "rollout": 0,
        "prompt": "p",
        "completion": "c",
        "token_ids": [5],
        "tokens": ["c"],
        "trained": [True],
        "rewards": {"r": 1.0},
        "correct": True,
        "advantage": 0.5,
        "credit": [0.25],
        "advantages": [0.625],
        **changes,
    }


METHOD = records.method_of(KTAE, "multiply", {}, special_ids=(0, 2))


def test_hostile_text_and_odd_numbers_survive(tmp_path):
    hostile = "</script>\x00\u202eabc\n\U0001f600" + "a" * 100_000
    odd = row(completion=hostile, tokens=[hostile], advantage=math.inf, credit=[math.nan], correct=None)
    records.write(tmp_path / "step_000001.parquet", records.Record(METHOD, [odd]))
    method, (back,), _ = records.read(tmp_path / "step_000001.parquet")
    assert method == METHOD
    assert (back["completion"], back["tokens"], back["correct"]) == (hostile, [hostile], None)
    assert back["advantage"] == math.inf
    assert math.isnan(back["credit"][0])


def test_further_numbers_of_tokens_survive(tmp_path):
    """Rows may have different arrays or none: a file from before there were arrays has no such column."""
    path = tmp_path / "step_000001.parquet"
    rows = [row(arrays={"entropy": [0.5]}), row(rollout=1, arrays={"ratio": [None]})]
    records.write(path, records.Record(METHOD, rows))
    assert [back["arrays"] for back in records.read(path).rows] == [{"entropy": [0.5]}, {"ratio": [None]}]
    records.write(path, records.Record(METHOD, [row()]))
    assert "arrays" not in pq.read_table(path).column_names
    assert records.read(path).rows[0]["arrays"] == {}


def test_numbers_are_added_to_some_rows(tmp_path):
    path = tmp_path / "step_000001.parquet"
    rows = [row(rollout=i, token_ids=[5, 6], tokens=["c", "d"]) for i in range(3)]
    records.write(path, records.Record(METHOD, rows))
    before = pq.read_table(path)
    records.add_arrays(path, {(1, 0): {"entropy": [0.5, 1.0]}})
    assert pq.read_table(path).equals(before)  # it has no such row
    records.add_arrays(path, {(0, 1): {"entropy": numpy.array([0.5, math.nan, 7.0], numpy.float32)}})
    assert [back["arrays"] for back in records.read(path).rows] == [{}, {"entropy": [0.5, None]}, {}]
    records.add_arrays(path, {(0, 0): {"entropy": [0.25, math.inf], "ratio": [1.0, 2.0]}})
    first, second, third = records.read(path).rows
    assert first["arrays"] == {"entropy": [0.25, math.inf], "ratio": [1.0, 2.0]}
    assert (second["arrays"], third["arrays"]) == ({"entropy": [0.5, None]}, {})
    after = pq.read_table(path)
    assert after.drop_columns("arrays").equals(before)
    assert after.schema.metadata == before.schema.metadata
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_is_no_record_is_refused(tmp_path):
    path = tmp_path / "step_000001.parquet"
    path.write_text("not Parquet")
    with pytest.raises(ValueError, match=r"step_000001.parquet is not a Parquet file"):
        records.read(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match="is not a record of ktae_trl"):
        records.read(path)
    records.write(path, records.Record(METHOD, [row()]))
    table = pq.read_table(path)
    metadata = {b"ktae_trl": b'{"credit": "ktae", "how": "add", "new": 1}'}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match=r"was written by another version of ktae_trl\. .*'new'"):
        records.read(path)
    newer = table.set_column(0, table.schema.field(0), pa.array([99], pa.int8()))
    pq.write_table(newer, path)
    with pytest.raises(ValueError, match="has schema version 99, but this ktae_trl reads versions 1 and 2"):
        records.read(path)


def test_a_record_of_version_1_is_read(tmp_path):
    """Its metadata had KTAE's settings beside the names, whatever the credit was."""
    path = tmp_path / "step_000001.parquet"
    records.write(path, records.Record(METHOD, [row()]))
    table = pq.read_table(path)
    of_1 = {"fisher_weight": 1.0, "ig_weight": 2.0, "tf_weight": 0.5, "leave_one_out": True}
    of_1 |= {"special_ids": [0, 2], "generated_groups": 4}
    version = pa.array([1], pa.int8())
    for credit, how, title, settings in (
        (
            "ktae",
            "add",
            "KTAE (key tokens)",
            {f"ktae_{k}": v for k, v in list(of_1.items())[:4]}
            | {"ktae_combine": "add", "ktae_scale": 1.0, "ktae_importance_beta": 1.0, "ktae_memory": 0.0},
        ),
        ("tree", "replace", "TreeRPO (sampled trees)", {}),
        ("none", None, "GRPO (one advantage for all tokens)", {}),
        ("no_such.module", "scale", "", {}),
    ):
        metadata = {b"ktae_trl": json.dumps({"credit": credit, "how": how, **of_1}).encode()}
        old = table.set_column(0, table.schema.field(0), version).replace_schema_metadata(metadata)
        pq.write_table(old, path)
        method, (back,), _ = records.read(path)
        assert (method.credit, method.how, method.title, method.settings) == (credit, how, title, settings)
        assert (method.special_ids, method.generated_groups) == ((0, 2), 4)
        assert method.shares_tokens == (credit == "tree")
        assert back == {**row(), "arrays": {}}


def test_files_that_are_no_records_are_passed_over(tmp_path):
    records.write(tmp_path / "step_000001.parquet", records.Record(METHOD, [row()]))
    for name in ("step_000001 (1).parquet", "step_x.parquet", ".step_000002.parquet.part"):
        (tmp_path / name).write_text("a copy")
    assert records.files(tmp_path) == [tmp_path / "step_000001.parquet"]


def test_metrics_outlive_a_full_disk(tmp_path, monkeypatch):
    for step in range(1, 5):
        records.append_metrics(tmp_path, {"step": step, "reward": 0.5})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        records.forget(tmp_path, 2)
    assert len(records.read_metrics(tmp_path)) == 4
    monkeypatch.undo()
    records.forget(tmp_path, 2)
    assert [entry["step"] for entry in records.read_metrics(tmp_path)] == [1, 2]


def test_a_broken_line_of_metrics_is_left_out(tmp_path, caplog):
    records.append_metrics(tmp_path, {"step": 1, "reward": 0.5, "loss": math.nan, "note": "text"})
    with (tmp_path / records.METRICS).open("a") as lines:
        lines.write('{"step": 2, "rew\n3\n{"reward": 1}\n{"step": "2"}\n{"step": Infinity}\n' + "[" * 100_000 + "\n")
    records.append_metrics(tmp_path, {"step": 1, "reward": 0.75})
    records.append_metrics(tmp_path, {"step": 1, "eval_reward": 0.25})
    assert records.read_metrics(tmp_path) == [
        {"step": 1, "reward": 0.75, "loss": None, "note": None},
        {"step": 1, "eval_reward": 0.25},
    ]
    assert caplog.text.count("metrics.jsonl, line ") == len(caplog.records) == 6
    assert json.loads((tmp_path / records.METRICS).read_text().splitlines()[0])["loss"] is None


@pytest.mark.parametrize(("field", "value"), [("record_steps", -1), ("record_groups", 0)])
def test_settings_are_checked(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        KTAEGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{field: value})
