"""What a model thinks is no answer, whoever reads the completion: rewards, held-out measurement, eval.py, OAR."""

from pathlib import Path

import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import add_response_schema

from ktae_trl import tiny
from ktae_trl.credit import oar
from ktae_trl.evaluation.samples import graded
from ktae_trl.rewards import math_accuracy
from ktae_trl.training import held_out
from tests.trainers import logged, make_trainer, prompts

TEMPLATE = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
OPENED = TEMPLATE + "{% if add_generation_prompt %}<think>\n{% endif %}"

# What stands in the completion, and whether it has the answer.
COMPLETIONS = {
    "box after the thinking": ("<think>\nhm\n</think>\n\nso \\boxed{ANSWER}", True),
    "box in the thinking only": ("<think>\n\\boxed{ANSWER}\n</think>\n\nso.", False),
    "cut off in the thinking": ("<think>\n\\boxed{ANSWER}", False),
    "another box in the thinking": ("<think>\n\\boxed{7777}\n</think>\n\n\\boxed{ANSWER}", True),
    "no thinking": ("so \\boxed{ANSWER}", True),
}
# The prompt has opened the thinking.
OPENED_COMPLETIONS = {
    "box after": ("hm\n</think>\n\nso \\boxed{ANSWER}", True),
    "box in it only": ("\\boxed{ANSWER}\n</think>\n\nso.", False),
    "cut off": ("\\boxed{ANSWER}", False),
}
CASES = [
    pytest.param(template, with_response, *case, id=f"{name}, {how}{', response template' * with_response}")
    for how, template, cases in (("qwen3", TEMPLATE, COMPLETIONS), ("opened by the prompt", OPENED, OPENED_COMPLETIONS))
    for with_response in (False, True)
    for name, case in cases.items()
]


def make_tokenizer(template: str, with_response: bool):
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    if with_response:
        add_response_schema(tokenizer)  # TRL knows templates by their text
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("template", "with_response", "completion", "right"), CASES)
def test_all_read_a_completion_alike(tmp_path, monkeypatch, template, with_response, completion, right):
    tokenizer = make_tokenizer(template, with_response)
    assert (getattr(tokenizer, "response_template", None) is not None) == with_response
    dataset = prompts(2)
    ids_of = {
        row["prompt"][-1]["content"]: [
            *tokenizer(completion.replace("ANSWER", row["solution"][0]))["input_ids"],
            tokenizer.eos_token_id,
        ]
        for row in dataset
    }

    def rollouts(asked, trainer):
        rendered = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        completion_ids = [ids_of[prompt[-1]["content"]] for prompt in asked]
        return {"prompt_ids": rendered, "completion_ids": completion_ids, "logprobs": None}

    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    settings = {"model": model, "processing_class": tokenizer, "train_dataset": dataset, "rollout_func": rollouts}
    trainer = make_trainer(tmp_path, **settings, credit="oar_g", max_steps=1, max_completion_length=64)
    trainer.train()
    assert logged(trainer, "rewards/math_accuracy/mean") == [right]
    assert logged(trainer, "oar/answered") == [right]

    def generate(model, tokenizer, asked, **how):
        return [ids_of[prompt[-1]["content"]] for prompt in asked]

    monkeypatch.setattr(held_out, "generate", generate)
    measured = held_out.held_out_accuracy(trainer, dataset, samples=2, batch_size=2)
    assert (measured.greedy, measured.sampled) == (right, right)

    (text,) = tokenizer.apply_chat_template([dataset[0]["prompt"]], add_generation_prompt=True, tokenize=False)
    row = {"prompt": text, "completion": completion.replace("ANSWER", dataset[0]["solution"][0])}
    assert graded([row], [dataset[0]["solution"]])[0]["verdict"] is right


def test_prompts_that_are_texts_can_open_the_thinking():
    given = {"completions": [r"\boxed{4}", r"\boxed{4}"], "solution": ["4", "4"]}
    assert math_accuracy(**given, prompts=["Think: <think>\n", "1 + 3 ="]) == [0.0, 1.0]


def test_where_oar_finds_the_answer():
    tokenizer = make_tokenizer(TEMPLATE, True)
    text = "<think>\n\\boxed{12}\n</think>\n\nso \\boxed{34}"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    answer = oar.find_answer(ids, tokenizer, "boxed", tokenizer("<|im_start|>assistant\n")["input_ids"])
    assert tokenizer.decode(ids[answer.tokens[0] : answer.tokens[-1] + 1]) == "34"
    assert tokenizer.decode(ids[: answer.box]).rstrip().endswith("so")
