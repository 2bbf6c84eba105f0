"""One prompt everywhere: what TRL trains on is what lengths, the dry run, the held-out measurement and eval.py ask."""

import json
import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from ktae_trl import data, tiny
from ktae_trl.arguments import parse
from ktae_trl.data.problems import drop_long
from ktae_trl.evaluation import tasks as benchmarks
from ktae_trl.evaluation.tasks import Problem
from ktae_trl.grading import INSTRUCTIONS
from ktae_trl.prompts import check_template, conversation, texts, token_ids
from ktae_trl.training import plan
from ktae_trl.training.held_out import held_out_accuracy
from tests.trainers import hook, make_trainer

SYSTEM = {"role": "system", "content": "Box it."}
ASKED = {"role": "user", "content": "1 + 1?"}

# What matters of Qwen3's: thinking is on unless it is switched off.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is string }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# ... of Gemma's: it refuses a system role.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# ... of some early ones: it says nothing of a system message.
FORGETFUL = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture
def tokenizer_with():
    def load(template):
        tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
        tokenizer.chat_template = template
        return tokenizer

    return load


@pytest.mark.parametrize("kwargs", [None, {"enable_thinking": False}])
def test_everything_asks_the_prompt_that_is_trained_on(tokenizer_with, tmp_path, monkeypatch, kwargs):
    tokenizer = tokenizer_with(THINKING)
    rows = [{"problem": "7 - 2 =", "answer": "5"}, {"problem": [SYSTEM, {"role": "user", "content": "3 + 3 + 4 ="}]}]
    rows = [{"problem": [{"role": "user", "content": "7 - 2 ="}], "answer": 5}, {**rows[1], "answer": 10}]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = data.DataArguments(str(file), eval_dataset_name=str(file))
    train, held_out = data.load_prompts(arguments, tokenizer, kwargs)
    settings = {"chat_template_kwargs": kwargs, "processing_class": tokenizer, "train_dataset": train}
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8, num_generations=8, **settings)
    rows = [row for row in train for _ in range(8)]
    batch = hook(trainer, "batch")(rows)
    trained_on = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    trained_on = trained_on[::8]
    closed = tokenizer("<think>\n\n</think>\n\n")["input_ids"]
    assert all((ids[-len(closed) :] == closed) == bool(kwargs) for ids in trained_on)

    assert token_ids(train["prompt"][:], tokenizer, kwargs) == trained_on
    assert tokenizer(texts(train["prompt"][:], tokenizer, kwargs))["input_ids"] == trained_on

    lengths = sorted(len(ids) for ids in trained_on)  # max_prompt_length and the dry run
    assert len(drop_long(train, tokenizer, lengths[1], kwargs)) == 2
    assert len(drop_long(train, tokenizer, lengths[1] - 1, kwargs)) == 1
    assert plan.data_statistics(train, tokenizer, kwargs).tokens[::3] == lengths

    seen, generate = [], trainer.model.generate

    def spy(input_ids, attention_mask, **options):
        seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True))
        return generate(input_ids=input_ids, attention_mask=attention_mask, **options)

    monkeypatch.setattr(trainer.model, "generate", spy)
    held_out_accuracy(trainer, held_out, samples=1, batch_size=2)
    assert sorted(seen) == sorted([*trained_on, *trained_on])  # greedy and sampled

    problems = benchmarks.load_problems(benchmarks.Benchmark("mine", str(file)))
    shown, ids = benchmarks.prompts(problems, "chat", INSTRUCTIONS["boxed"], tokenizer, kwargs)
    assert ids == trained_on
    assert tokenizer(shown)["input_ids"] == trained_on


def test_a_problem_as_text_or_as_messages():
    examples = [ASKED, {"role": "assistant", "content": r"\boxed{2}"}, {"role": "user", "content": "2 + 2?"}]
    assert conversation("1 + 1?") == conversation("1 + 1?", "") == [ASKED]
    assert conversation("1 + 1?", "Box it.") == conversation([ASKED], "Box it.") == [SYSTEM, ASKED]
    assert conversation(examples, "Box it.") == [SYSTEM, *examples]
    # A dataset's own system message stands.
    assert conversation([{"role": "system", "content": "Own."}, ASKED], "Box it.")[0]["content"] == "Own."
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?", "image": None}]
    assert conversation([{"role": "user", "content": parts, "name": None}]) == [ASKED]


def test_the_system_prompt_at_the_head_of_the_problem():
    head = {"role": "user", "content": "Box it.\n\n1 + 1?"}
    assert conversation("1 + 1?", "Box it.", in_user=True) == [head]
    assert conversation([SYSTEM, ASKED], "another", in_user=True) == [head]
    assert conversation("1 + 1?", None, in_user=True) == [ASKED]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (5, "not int: 5"),
        (None, "not null"),
        ([], "not an empty list"),
        ({"role": "user"}, "not dict"),
        (["1 + 1?"], "message 1 must be a dict with role and content, not str"),
        ([{"from": "human", "value": "?"}], "message 1 has neither role nor content. Its keys: from, value"),
        (
            [ASKED, {"role": "tool", "content": "x"}],
            "message 2 has the role 'tool'. Supported roles: system, user, assistant",
        ),
        ([{"role": "user", "content": None}], r"message 1 \(user\) has no content"),
        ([{"role": "user", "content": " "}], r"message 1 \(user\) has no content"),
        ([{"role": "user", "content": []}], r"message 1 \(user\) has no content"),
        ([{"role": "user", "content": 5}], "the content of message 1 must be text, not int: 5"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has a part that is not text: .*image"),
        ([{"role": "user", "content": [{"text": None}]}], "message 1 has a part that is not text"),
        ([ASKED, {"role": "assistant", "content": "2"}], "the last message must have the role 'user', not 'assistant'"),
        ([ASKED, SYSTEM, ASKED], "message 2 is a system message, but only the first message can be one"),
    ],
)
def test_what_is_no_problem(problem, words):
    with pytest.raises((TypeError, ValueError), match=words):
        conversation(problem)


def test_a_template_without_a_system_role(tokenizer_with):
    tokenizer = tokenizer_with(GEMMA)
    remedy = r"Put the system prompt before .* \(--system_prompt_in_user true\), or use .* \(--system_prompt null\)"
    with pytest.raises(ValueError, match=f"rejects a conversation: System role not supported. {remedy}") as caught:
        check_template([[SYSTEM, ASKED]], tokenizer)
    assert "\n" not in str(caught.value)
    prompt = conversation("1 + 1?", "Box it.", in_user=True)
    check_template([prompt], tokenizer)
    assert "user\nBox it.\n\n1 + 1?<" in texts([prompt], tokenizer)[0]


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_template_that_leaves_a_message_out_in_silence(tokenizer_with, role):
    with pytest.raises(ValueError, match=f"omits the {role} message from the prompt. Put the system prompt"):
        check_template([[ASKED], [SYSTEM, ASKED]], tokenizer_with(FORGETFUL.replace("'system'", f"'{role}'")))


def test_every_form_of_conversation_is_tried(tokenizer_with):
    with pytest.raises(ValueError, match="System role not supported"):
        check_template([[ASKED]] * 3 + [[SYSTEM, ASKED]], tokenizer_with(GEMMA))


def test_a_model_without_a_template(tokenizer_with):
    with pytest.raises(ValueError, match="has no chat template, which is needed to turn a problem into a prompt"):
        texts([[ASKED]], tokenizer_with(None))
    assert token_ids(["1 + 1?"], tokenizer_with(None)) == [tokenizer_with(None)("1 + 1?")["input_ids"]]  # as TRL does
    assert token_ids([], tokenizer_with(None)) == []


def test_an_argument_that_the_template_does_not_have(tokenizer_with, caplog):
    with caplog.at_level(logging.WARNING):
        check_template([[ASKED]], tokenizer_with(THINKING), {"enable_thinking": False, "padding": False})
        assert not caplog.text
        check_template([[ASKED]], tokenizer_with(THINKING), {"enable_thinkin": False})
    assert "does not use 'enable_thinkin', so it has no effect" in caplog.text


def test_prompts_that_are_no_chat_take_no_settings_of_a_chat(tokenizer):
    problem = Problem("m", "1", "1 + 1?", ("2",))
    for options in ({"template_kwargs": {"enable_thinking": False}}, {"system_in_user": True}):
        with pytest.raises(ValueError, match=r"need the model's own chat template \(prompt: chat\)"):
            benchmarks.prompts([problem], "qwen", "Box it.", tokenizer, **options)
    several = problem._replace(messages=[SYSTEM, ASKED])
    with pytest.raises(ValueError, match="problem '1' has several chat messages, which prompt: r1 does not support"):
        benchmarks.prompts([several], "r1", "Box it.", tokenizer)


def test_the_data_of_a_recipe_for_gemma(tokenizer_with, tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"problems\.jsonl: The chat template of .* rejects .*--system_prompt null"):
        data.load_prompts(data.DataArguments(str(file), max_prompt_length=None), tokenizer_with(GEMMA))
    arguments = data.DataArguments(str(file), system_prompt_in_user=True)
    (prompt,) = data.load_prompts(arguments, tokenizer_with(GEMMA))[0]["prompt"]
    assert prompt == [{"role": "user", "content": f"{INSTRUCTIONS['boxed']}\n\n1 + 1?"}]


def test_null_on_the_command_line_is_none(tmp_path):
    words = ["--dataset_name", "x", "--max_prompt_length", "null", "--dataset_filter", "null", "--system_prompt"]
    for none in ("null", ""):
        (arguments,) = parse((data.DataArguments,), "train.py", [*words, none])
        assert (arguments.system_prompt, arguments.max_prompt_length, arguments.dataset_filter) == (None, None, None)
    config = tmp_path / "config.yaml"
    for none in ("null", '""'):
        config.write_text(f"dataset_name: x\nsystem_prompt: {none}\n")
        assert parse((data.DataArguments,), "train.py", ["--config", str(config)])[0].system_prompt is None


def test_problems_with_their_own_system_prompt_are_counted(caplog):
    rows = [{"problem": [ASKED], "answer": "2"}, {"problem": [SYSTEM, ASKED], "answer": "2"}]
    with caplog.at_level(logging.WARNING):
        prompts = data.to_prompts(Dataset.from_list(rows), system_prompt="Think.")
    assert [prompt[0]["content"] for prompt in prompts["prompt"]] == ["Think.", "Box it."]
    assert "1 of 2 problems keep their own system message" in caplog.text
