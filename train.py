"""Train a language model with token-level credit.

accelerate launch train.py --config configs/quickstart.yaml [--field value ...]
"""

import logging
import sys
import time
from dataclasses import dataclass, field

from transformers import AutoTokenizer, PrinterCallback, ProgressCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from ktae_trl import KTAEGRPOConfig, KTAEGRPOTrainer
from ktae_trl.arguments import parse
from ktae_trl.console import MetricsTable
from ktae_trl.data import DataArguments, load_prompts
from ktae_trl.evaluation import held_out_accuracy
from ktae_trl.rewards import load_rewards


@dataclass
class RunArguments(DataArguments):
    """What a recipe says beside the trainer's and the model's own settings."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_accuracy"],
        metadata={"help": "math_accuracy, boxed_format, soft_overlong, or dotted paths. See reward_weights."},
    )
    overlong_buffer: int = field(
        default=512, metadata={"help": "Tokens before max_completion_length over which soft_overlong falls to -1."}
    )
    held_out_samples: int = field(
        default=4,
        metadata={"help": "Samples per held-out problem for the accuracy before and after; 0 for no such measurement."},
    )


def build_trainer(run: RunArguments, args: KTAEGRPOConfig, model: ModelConfig) -> KTAEGRPOTrainer:
    """Build what a recipe describes: data, rewards, model, trainer."""
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
    )
    with args.main_process_first(desc="preparing the data"):
        train_dataset, eval_dataset = load_prompts(run, tokenizer)
    trainer = KTAEGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=load_rewards(
            run.reward_funcs,
            max_completion_length=args.max_completion_length,
            overlong_buffer=run.overlong_buffer,
        ),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
    trainer.add_callback(MetricsTable(args.correctness_reward or trainer.reward_func_names[0]))
    return trainer


def main(run: RunArguments, args: KTAEGRPOConfig, model: ModelConfig) -> None:
    trainer = build_trainer(run, args, model)
    say = trainer.accelerator.print

    def measure():
        if trainer.eval_dataset is None or run.held_out_samples == 0:
            return None
        return held_out_accuracy(
            trainer,
            trainer.eval_dataset,
            samples=run.held_out_samples,
            batch_size=args.per_device_eval_batch_size,
        )

    before = measure()
    if before:
        say(f"\nHeld-out accuracy before: {before}  [{len(trainer.eval_dataset)} problems]\n")

    started = time.monotonic()
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume == "true" else resume)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"\nTrained to step {trainer.state.global_step} in {minutes} min {seconds:02d} s")

    after = measure()
    if before and after:
        say(f"\nHeld-out accuracy before: {before}\n                  after:  {after}")
        results = {
            f"{when}_{name}": getattr(x, name)
            for when, x in (("before", before), ("after", after))
            for name in ("greedy", "sampled")
        }
        trainer.save_metrics("held_out", results, combined=False)

    trainer.save_model()
    is_hub_id = "/" in run.dataset_name and not run.dataset_name.endswith((".jsonl", ".json", ".parquet", ".gz"))
    trainer.create_model_card(dataset_name=run.dataset_name if is_hub_id else None)
    say(f"\nSaved model, tokenizer and card in {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments = parse((RunArguments, KTAEGRPOConfig, ModelConfig), "train.py")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train.py: {error}")
    main(*arguments)
