"""Creates the offline model: a small tokenizer and a 0.8M-parameter Qwen2 model, trained on `task` by SFT."""

from pathlib import Path

import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from ktae_trl.grading import INSTRUCTIONS
from ktae_trl.prompts import conversation
from ktae_trl.tiny import task

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: list[str], phrases: list[str], vocab_size: int = 400) -> Qwen2Tokenizer:
    """Train a small Qwen2 tokenizer (byte-level BPE, one token per digit) on `texts`.

    `AutoTokenizer` splits text in Qwen2's way for every Qwen2 model, so the tokenizer must be of that kind. The system
    prompt and the `phrases` that occur in every prompt are one token each, which halves the length of the input.
    """
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [*texts, *["system\nuser\nassistant\n"] * len(texts)],
        vocab_size=vocab_size,
        new_special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.add_tokens([INSTRUCTIONS["boxed"], *phrases])
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, layers: int = 4, width: int = 128) -> Qwen2ForCausalLM:
    """Return the untrained model. `width` must be a multiple of 64."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 64,
            intermediate_size=3 * width,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            initializer_range=0.08 * (128 / width) ** 0.5,  # with the usual 0.02, learning is several times slower
        )
    )


# For each stage: share of each habit, steps, learning rate. The first stage teaches the arithmetic, which takes several
# times as long with careless solutions in the mix. Batches must not be grouped by length: that would group them by
# habit, and training becomes unstable.
_STAGES = (({"careful": 1.0}, 600, 2e-3), (task.HABITS, 400, 1e-3))


def warm_start(output: Path, items: list[dict[str, str]], seed: int = 0) -> None:
    """Train on one solution per item, first careful ones, then a mixture. Save model and tokenizer to `output`."""
    set_seed(seed)
    texts = [f"{item['problem']}\n{text}" for item, text in zip(items, task.draw_solutions(items, seed), strict=True)]
    opening = items[0]["problem"].partition(":")[0] + ":"
    tokenizer = build_tokenizer(texts[:5000], [opening])
    model = build_model(tokenizer)
    for stage, (habits, steps, learning_rate) in enumerate(_STAGES):
        solutions = task.draw_solutions(items, seed + stage, habits)
        teach(model, tokenizer, items, solutions, output, steps=steps, learning_rate=learning_rate, seed=seed)
    save(model, tokenizer, output)


def teach(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    items: list[dict[str, str]],
    solutions: list[str],
    output: Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train the model on one solution per item with TRL's `SFTTrainer`."""
    dataset = Dataset.from_dict(
        {
            "prompt": [conversation(item["problem"], INSTRUCTIONS["boxed"]) for item in items],
            "completion": [[{"role": "assistant", "content": text}] for text in solutions],
        }
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=128,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            adam_beta2=0.98,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, output: Path) -> None:
    """Save model and tokenizer to `output`. bfloat16 halves the model file without loss of accuracy."""
    model.config.use_cache = True  # was disabled for training
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
