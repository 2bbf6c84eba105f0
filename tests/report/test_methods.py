"""Several credit methods, and two models, on the same recorded rollouts."""

import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ktae_trl import tiny
from ktae_trl.arguments import UserError
from ktae_trl.credit import METHODS, find_method
from ktae_trl.report import compare, explain, log_probabilities, records
from ktae_trl.report.contents import collect
from ktae_trl.report.group_view import describe, split
from ktae_trl.report.methods import names
from ktae_trl.report.models import load, named
from ktae_trl.report.records import Record, method_of
from ktae_trl.report.run import main
from tests.reference import ktae_loop
from tests.reporting import Page, random_group
from tests.trainers import make_trainer, other_model, replay

RECORDING = {"rollout_func": replay, "record_steps": 1, "max_steps": 1, "per_device_train_batch_size": 32}
KTAE = method_of(find_method("ktae"), "multiply", {})


@pytest.fixture(scope="module")
def reader():
    return load("tiny")


def recorded(folder, **settings) -> Record:
    """The rollouts of a training's first step, which the tiny model valued before it changed."""
    make_trainer(folder, **RECORDING | settings).train()
    return records.read(records.files(folder)[0])


def values(record: Record, name: str) -> list[list[float]]:
    i = [method.title for method in record.compared].index(name)
    return [row["compared"][i] for row in record.rows]


def flat(some) -> list[float]:
    return [x for row in some for x in row]


# The values are those of the trainer


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ktae", {"ktae_ig_weight": 2.0}),
        ("ktae_loo", {"ktae_leave_one_out": True, "ktae_tf_weight": 0.5}),
        ("ktae_add", {"ktae_combine": "add", "ktae_scale": 0.5}),
        ("importance_loo", {"ktae_combine": "importance", "ktae_importance_beta": 3.0, "ktae_leave_one_out": True}),
    ],
)
def test_values_by_counting_are_those_of_the_training(tmp_path, name, settings):
    record = recorded(tmp_path, **settings)
    found = compare(record, ["importance", name])
    assert values(found, name) == [row["credit"] for row in record.rows]
    assert len(set(flat(values(found, name)))) > 5
    method = found.compared[1]
    assert method == record.method._replace(title=name, generated_groups=None)
    assert [{k: v for k, v in row.items() if k != "compared"} for row in found.rows] == record.rows


@pytest.mark.slow_after(1)
@pytest.mark.parametrize(
    "settings",
    [
        {"credit": "oar_g"},
        {"credit": "oar_p", "oar_span": 4},
        {"credit": "hicra", "hicra_ngrams": "tiny", "hicra_alpha": 0.5},
        {"credit": "oar_g", "oar_answer": "answer_joint", "answer_format": "last_number", "oar_beta": 2.0},
    ],
)
def test_influences_are_those_of_the_training(tmp_path, reader, settings):
    record = recorded(tmp_path, **settings)
    answer_format = settings.get("answer_format", "boxed")
    found = compare(record, [settings["credit"], "ktae"], reader, answer_format=answer_format)
    own = flat(values(found, settings["credit"]))
    assert sum(w != 1 for w in own) > 50
    assert own == pytest.approx(flat(row["credit"] for row in record.rows), abs=2e-3)
    assert found.compared[0].settings == record.method.settings
    assert values(compare(record, ["ktae"]), "ktae") == values(found, "ktae")


@pytest.mark.parametrize("credit", ["gtpo", "otb"])
def test_advantages_of_tokens_are_those_of_the_training(tmp_path, reader, credit):
    record = recorded(tmp_path, credit=credit)
    found = values(compare(record, [credit], reader), credit)
    assert flat(found) == pytest.approx(flat(row["credit"] for row in record.rows), abs=0.01)
    assert len({round(v, 3) for v in flat(found)}) > 10


def test_a_method_of_a_user_reads_the_model(tmp_path, reader):
    credit = "tests.credit.examples.EntropyWeight"
    record = recorded(tmp_path, credit=credit, entropy_floor=0.2)
    found = values(compare(record, [credit], reader), credit)
    assert flat(found) == pytest.approx(flat(row["credit"] for row in record.rows), rel=1e-3)
    assert max(flat(found)) > 1.5


# By counting


def test_variants_against_the_slow_loop():
    rows = [row for group in range(2) for row in random_group(seed=group, G=6 + group, group=group)]
    found = compare(Record(KTAE, rows), ["ktae", "ktae_loo", "importance", "importance_loo", "ktae"])
    assert [method.title for method in found.compared] == ["ktae", "ktae_loo", "importance", "importance_loo"]
    assert [(method.how, method.symbol) for method in found.compared] == [("multiply", "K")] * 2 + [("scale", "w")] * 2
    assert [row["group"] for row in found.rows] == [row["group"] for row in rows]
    for group in split(found):
        T = max(len(row["token_ids"]) for row in group)
        ids, mask = ([[*row[name], *[0] * (T - len(row[name]))] for row in group] for name in ("token_ids", "trained"))
        correct = [row["correct"] for row in group]
        for i, loop in enumerate((ktae_loop.key_token_values, ktae_loop.importance_weights)):
            for loo in (False, True):
                expected = loop([ids], [mask], [correct], leave_one_out=loo)[0]
                for row, own in zip(group, expected, strict=True):
                    assert row["compared"][2 * i + loo] == pytest.approx(own[: len(row["token_ids"])], abs=1e-5)


def test_rollouts_of_any_source_are_compared_and_shown(tokenizer):
    texts = {True: "It is \\boxed{4}", False: "Then it is \\boxed{5}"}
    rows = [{"prompt": "2 + 2", "completion": texts[right], "correct": right} for right in (True, False, True)]
    record = compare(explain(rows, tokenizer).record, ["ktae", "importance"])
    (group,) = [describe(record.method, rows) for rows in split(record)]
    assert [len(rollout["compared"]) for rollout in group["rollouts"]] == [2, 2, 2]
    assert collect([record]).blocks


def test_every_method_without_a_sampler_has_a_name():
    assert set(METHODS) - set(names()) == {"tree"}
    for credit, settings in names().values():
        find_method(credit).Settings(**settings).check()


def test_settings_are_those_given_then_those_of_the_record_then_defaults():
    record = Record(KTAE._replace(settings={"ktae_ig_weight": 2.0, "ktae_fisher_weight": 3.0}), random_group(seed=1))
    given = {"ktae_ig_weight": 0.0, "ktae_importance_beta": 4.0, "ktae_leave_one_out": True}
    (method,) = compare(record, ["importance"], settings=given).compared
    assert {name.removeprefix("ktae_"): value for name, value in method.settings.items()} == {
        "combine": "importance",
        "scale": 1.0,
        "importance_beta": 4.0,
        "fisher_weight": 3.0,
        "ig_weight": 0.0,
        "tf_weight": 1.0,
        "leave_one_out": False,
        "memory": 0.0,
    }
    with pytest.raises(UserError, match=r"importance have no setting 'ktae_scal' \(did you mean 'ktae_scale'\?\)"):
        compare(record, ["importance"], settings={"ktae_scal": 1.0})
    with pytest.raises(UserError, match="ktae_scale must be between 0 and 1, not 2"):
        compare(record, ["importance"], settings={"ktae_scale": 2.0})


def test_rollouts_of_a_run_with_memory_are_valued_by_their_own_groups():
    """What the run had learned from earlier generations is not recorded."""
    rows = random_group(seed=1)
    remembered = Record(KTAE._replace(settings=KTAE.settings | {"ktae_memory": 0.9}), rows)
    chosen = ["ktae", "ktae_loo", "ktae_add", "importance", "importance_loo"]
    for name in chosen:
        expected = values(compare(Record(KTAE, rows), [name]), name)
        assert values(compare(remembered, [name]), name) == expected
        assert any(flat(expected))


# Two models


def by_one_pass(path, prompt: str, ids: list[int]) -> list[float]:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    return [logps[len(prompt_ids) + t - 1, i].item() for t, i in enumerate(ids)]


def test_log_probabilities_are_those_of_plain_passes(tmp_path, monkeypatch):
    monkeypatch.setattr("ktae_trl.report.models._TOKENS", 300)  # several batches, of rows of several lengths
    record = recorded(tmp_path / "run")
    other = other_model(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(other)
    record.rows[3]["arrays"] = {"entropy": [0.5] * len(record.rows[3]["token_ids"])}
    found = log_probabilities(record, {"before": "tiny", "after": other})
    assert list(found.rows[3]["arrays"]) == ["entropy", "log-probability (before)", "log-probability (after)"]
    assert list(record.rows[3]["arrays"]) == ["entropy"]
    for row in found.rows[:3]:  # those that the training recorded, at temperature 1
        assert row["arrays"]["log-probability (before)"] == pytest.approx(row["arrays"]["log_probability"], abs=1e-4)
    for name, path in (("before", tiny.MODEL), ("after", other)):
        for row in found.rows[::5]:
            expected = by_one_pass(path, row["prompt"], row["token_ids"])
            assert row["arrays"][f"log-probability ({name})"] == pytest.approx(expected, abs=1e-4)
    before, after = (
        flat(row["arrays"][f"log-probability ({name})"] for row in found.rows) for name in ("before", "after")
    )
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.5
    path = tmp_path / "step_000001.parquet"
    records.write(path, found)
    assert records.read(path).rows[3]["arrays"]["log-probability (after)"] == pytest.approx(
        found.rows[3]["arrays"]["log-probability (after)"]
    )


def test_without_a_prompt_the_first_token_has_no_log_probability(tokenizer, reader):
    rows = [
        {"prompt": "", "completion": text, "correct": right}
        for text, right in (("12", True), ("", False), ("7", False))
    ]
    found = log_probabilities(explain(rows, tokenizer).record, {"a": reader})
    first, empty, single = (row["arrays"]["log-probability (a)"] for row in found.rows)
    ids = tokenizer("12")["input_ids"]
    with torch.no_grad():
        expected = reader.model(torch.tensor([ids])).logits[0, 0].log_softmax(-1)[ids[1]].item()
    assert first == [None, pytest.approx(expected, abs=1e-5)]
    assert (empty, single) == ([], [None])


def test_no_logits_of_all_positions_are_kept(reader, monkeypatch):
    sizes = []
    monkeypatch.setattr(reader.model.get_output_embeddings(), "forward", lambda *a: sizes.append(a) or 1 / 0)
    (stats,) = reader.read([[1, 2, 3]], [[4, 5]])
    assert stats.shape == (2, 3)
    assert not sizes


def test_prompts_of_messages_go_through_the_chat_template(tokenizer, reader):
    """The model reads what it read in training, not the readable form of the page."""
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]
    rows = [{"prompt": messages, "completion": text, "correct": text == "2"} for text in "23"]
    record = explain(rows, tokenizer).record
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert record.rows[0]["prompt"] == "system: Add.\n\nuser: 1 + 1" != expected
    assert reader.prompts(record.rows) == [tokenizer(expected, add_special_tokens=False)["input_ids"]] * 2
    found = log_probabilities(record, {"a": reader})
    for row in found.rows:
        assert row["arrays"]["log-probability (a)"] == pytest.approx(
            by_one_pass(tiny.MODEL, expected, row["token_ids"])
        )
    plain = AutoTokenizer.from_pretrained(tiny.MODEL)
    plain.chat_template = None
    with pytest.raises(UserError, match="prompts are chat messages, which the chat template of 'tiny' cannot"):
        compare(record, ["oar_g"], "tiny", plain)


# The command


def test_the_command_shows_methods_and_checkpoints(tmp_path):
    recorded(tmp_path / "run")
    page, run = tmp_path / "page.html", str(tmp_path / "run")
    main(["explain", run, "--methods", "ktae,ktae_loo,importance,oar_g", "--model", "tiny", "-o", str(page)])
    shown = Page(page.read_text())
    (method,) = shown.data("index")["methods"]
    assert [other["title"] for other in method["compared"]] == ["ktae_loo", "importance", "oar_g"]  # ktae is the page's
    rollout = shown.data("block-0")["rollouts"][0]
    assert [len(own) for own in rollout["compared"]] == [len(rollout["at"])] * 3
    assert not any(name.startswith("log-probability") for name in rollout["arrays"])
    other = other_model(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny.MODEL).save_pretrained(other)
    main(["explain", run, "--model", "before=tiny", "--model", f"after={other}", "-o", str(page)])
    rollout = Page(page.read_text()).data("block-0")["rollouts"][0]
    assert {"log-probability (before)", "log-probability (after)"} <= set(rollout["arrays"])
    assert rollout["compared"] == []


def test_a_method_is_left_out_of_a_page_only_if_its_values_are_there_already(tokenizer):
    texts = {True: "It is \\boxed{4}", False: "Then it is \\boxed{5}"}
    rows = [{"prompt": "2 + 2", "completion": texts[right], "correct": right} for right in (True, False, True)]
    record = compare(explain(rows, tokenizer).record, ["ktae", "ktae_add"])
    assert [other["title"] for other in collect([record]).methods[0]["compared"]] == ["ktae_add"]
    only = compare(record, ["ktae"])
    assert collect([only]).methods[0]["compared"] == []
    only.rows[0]["compared"][0][0] += 0.5  # the same settings, but another model, say
    assert [other["title"] for other in collect([only]).methods[0]["compared"]] == ["ktae"]


def test_mistakes_of_the_command_show_before_the_files_are_read(tmp_path):
    for words, told in (
        (["--methods", "ktae,oar_g"], "The method 'oar_g' needs the model that generated the rollouts: --model PATH"),
        (["--methods", "kta"], "Unknown method 'kta' (did you mean 'ktae'?)"),
        (["--methods", "ktae", "--model", str(tmp_path / "none")], "--model) could not be loaded"),
    ):
        with pytest.raises(SystemExit, match=re.escape(told)):
            main(["explain", str(tmp_path / "missing.jsonl"), *words])


# Mistakes


@pytest.fixture
def record():
    return Record(KTAE, random_group(seed=0))


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (["oar_g"], "The method 'oar_g' needs the model that generated the rollouts: --model PATH"),
        (["ktae", "oar_p"], "The method 'oar_p' needs the model"),
        (["tests.credit.examples.EntropyWeight"], "EntropyWeight' needs the model"),
        (["imprtance"], "Unknown method 'imprtance' (did you mean 'importance'?). Choose from: ktae, "),
        (["none"], "Unknown method 'none'"),
        (["tree"], "The method 'tree' samples its own rollouts, so it cannot value others. Choose from: ktae, "),
        ([], "No methods to compare. Choose from: ktae, "),
    ],
)
def test_methods_that_cannot_be_compared(record, chosen, words):
    with pytest.raises(UserError, match=re.escape(words)):
        compare(record, chosen)


def test_an_unknown_answer_format(record):
    with pytest.raises(UserError, match="'boxes'"):
        compare(record, ["ktae"], answer_format="boxes")


def test_what_exists_only_in_training(reader, tokenizer):
    rows = [{"prompt": "1", "completion": text, "correct": text == "2"} for text in "23"]
    with pytest.raises(UserError, match="reads the setting 'max_completion_length' of a training run"):
        compare(explain(rows, tokenizer).record, ["tests.credit.examples.SegmentValues"], reader)
    with pytest.raises(UserError, match="uses generate, which exists only in training"):
        reader.generate([[1]], 1)
    with pytest.raises(AttributeError, match="has no attribute 'generat'"):
        reader.generat([[1]], 1)


def test_a_model_that_does_not_fit(record, reader, tokenizer, tmp_path):
    with pytest.raises(
        UserError, match=r"The tokenizer of 'tiny' does not fit the rollouts: \d+ of their \d+ token ids"
    ):
        compare(record, ["ktae"], reader)
    size = reader.model.get_input_embeddings().num_embeddings
    beyond = record._replace(rows=[{**row, "token_ids": [size for _ in row["token_ids"]]} for row in record.rows])
    with pytest.raises(UserError, match=f"have the token id {size}, but the model 'tiny' has only {size} token ids"):
        log_probabilities(beyond, {"a": reader})
    fits = explain([{"prompt": "1", "completion": "It is 2", "correct": True}], tokenizer).record
    reader.check(fits.rows)
    words = Tokenizer(models.WordLevel({"It": 0, "is": 1, "2": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    with pytest.raises(UserError, match="does not fit the rollouts"):
        compare(fits, ["oar_g"], "tiny", other)
    with pytest.raises(UserError, match=r"The model '.*none' \(--model\) could not be loaded"):
        compare(fits, ["oar_g"], tmp_path / "none")


def test_names_of_models():
    assert named(["runs/a/checkpoint-10"]) == {"checkpoint-10": "runs/a/checkpoint-10"}
    assert named(["before=a/b", "after=c"]) == {"before": "a/b", "after": "c"}
    for words, told in (
        (["a/final", "b/final"], "--model: a/final and b/final have the same name 'final'"),
        (["=a"], "--model '=a' must be NAME=PATH or PATH"),
        (["a="], "--model 'a=' must be"),
        ([""], "--model '' must be"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            named(words)
