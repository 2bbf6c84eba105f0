"""A small training that was stopped, and what it came to: made by the code of version 0.1, for `test_resume.py`.

    git worktree add /tmp/version_0_1 fef1d56
    PYTHONPATH=/tmp/version_0_1 python tests/samples/version_0_1/make.py

The checkpoint is of step 6 of 10: inside a cycle of four steps, in the first of two epochs.
"""

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from ktae_trl import KTAEGRPOConfig, KTAEGRPOTrainer, tiny

FOLDER = Path(__file__).parent
CHECKPOINT, WEIGHTS = FOLDER / "checkpoint-6", FOLDER / "weights_of_step_10.safetensors"


def odd(completion_ids, **kwargs) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def make_trainer(output_dir, tokenizer) -> KTAEGRPOTrainer:
    """Build the trainer, which any version of the package can."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    args = KTAEGRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=8,
        steps_per_generation=2,
        num_iterations=2,
        num_generations=4,
        max_completion_length=8,
        max_steps=10,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    return KTAEGRPOTrainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=odd,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i} + 1"}]} for i in range(8)]),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    out = Path("/tmp/version_0_1_run")
    make_trainer(out, AutoTokenizer.from_pretrained(tiny.MODEL)).train()
    shutil.copytree(out / "checkpoint-6", CHECKPOINT, dirs_exist_ok=True)
    for name in ("training_args.bin", "README.md"):
        (CHECKPOINT / name).unlink(missing_ok=True)
    shutil.copy(out / "checkpoint-10" / "model.safetensors", WEIGHTS)
