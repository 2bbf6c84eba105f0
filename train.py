"""Train a language model with token-level credit.

accelerate launch train.py --config configs/NAME.yaml [--field value ...]
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, ProgressCallback, TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import get_callable_name

from ktae_trl import KTAEGRPOConfig, KTAEGRPOTrainer
from ktae_trl.arguments import UserError, make_parser, parse
from ktae_trl.config import config_class
from ktae_trl.data.problems import DataArguments, load_prompts
from ktae_trl.files.checkpoints import ResumeError, candidates, wants_to_resume
from ktae_trl.files.writing import locked, replace_text
from ktae_trl.hub.card import PAGE, settings_of
from ktae_trl.hub.upload import HubError, create_repo, repo_name, upload_command
from ktae_trl.rewards import load_rewards
from ktae_trl.rollouts.verdicts import correctness_index
from ktae_trl.training import plan
from ktae_trl.training.batches import check_processes
from ktae_trl.training.console import MetricsTable
from ktae_trl.training.held_out import Accuracy, held_out_accuracy, measured
from ktae_trl.training.stopping import Advice, advice_at_the_end, end_with_launcher

HELD_OUT_BEFORE = "held_out_before.json"


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
    num_processes: int | None = field(
        default=None,
        metadata={"help": "Processes (GPUs) that the batch sizes are meant for; a run with another number warns."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Show the settings, the batches, the data and the memory of the run, and train nothing."},
    )


class HeldOutAccuracy(TrainerCallback):
    """Measures the accuracy before training, once the model is prepared; a resumed run keeps its first figure."""

    def __init__(self, trainer: KTAEGRPOTrainer, run: RunArguments):
        self.trainer, self.samples = trainer, run.held_out_samples
        self.before: Accuracy | None = None

    def measure(self) -> Accuracy:
        return held_out_accuracy(
            self.trainer,
            self.trainer.eval_dataset,
            samples=self.samples,
            batch_size=self.trainer.args.per_device_eval_batch_size,
        )

    def problems(self) -> str:
        """Return a mark of what is measured: the problems, their answers, and the samples of each."""
        rows = self.trainer.eval_dataset.select_columns(["prompt", "solution"]).to_list()
        return hashlib.sha256(
            json.dumps([rows, self.samples, self.trainer.args.answer_format], default=str).encode()
        ).hexdigest()[:16]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.before = self.measure()
        else:
            self.before = self.of_this_run(Path(self.trainer.resumed_from))
        if self.before and state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            kept = {"accuracy": self.before, "problems": self.problems()}
            replace_text(Path(args.output_dir, HELD_OUT_BEFORE), json.dumps(kept))
        what = measured(self.trainer.correctness_reward, args.correctness_threshold)
        self.trainer.accelerator.print(f"\nHeld-out {what}, before: {self.before or 'not measured'}\n")

    def of_this_run(self, checkpoint: Path) -> Accuracy | None:
        """Return what the run that left `checkpoint` measured before training, if it was on these problems."""
        file = checkpoint.parent / HELD_OUT_BEFORE
        if not file.exists():
            return None
        try:
            kept = json.loads(file.read_text())
        except ValueError:
            kept = None
        if not isinstance(kept, dict) or kept["problems"] != self.problems():
            self.trainer.accelerator.print(f"{file} is not of these held-out problems and samples: not used")
            return None
        before, args = Accuracy(*kept["accuracy"]), self.trainer.args
        if (before.reward, before.threshold) != (self.trainer.correctness_reward, args.correctness_threshold):
            self.trainer.accelerator.print(f"{file} has the {before.what}, which this run does not measure: not used")
            return None
        return before


def load(run: RunArguments, args: KTAEGRPOConfig, model: ModelConfig):
    """Load what a recipe names: the training prompts, the held-out ones (or None), the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path,
        revision=model.model_revision,
        padding_side="left",
        trust_remote_code=args.trust_remote_code,
    )
    with args.main_process_first(desc="preparing the data"):
        train_dataset, eval_dataset = load_prompts(
            run,
            tokenizer,
            args.chat_template_kwargs,
            answer_format=args.answer_format,
            gradable_only="math_accuracy" in run.reward_funcs,
        )
    return train_dataset, eval_dataset, tokenizer


def load_reward_functions(run: RunArguments, args: KTAEGRPOConfig) -> list[Callable]:
    """Load the reward functions that a recipe names. `correctness_reward` may name one as the recipe does, too."""
    functions = load_rewards(
        run.reward_funcs, max_completion_length=args.max_completion_length, overlong_buffer=run.overlong_buffer
    )
    names = [get_callable_name(function) for function in functions]
    asked = [run.reward_funcs] if isinstance(run.reward_funcs, str) else run.reward_funcs
    args.correctness_reward = dict(zip(asked, names, strict=True)).get(args.correctness_reward, args.correctness_reward)
    correctness_index(names, args.correctness_reward)
    if args.reward_weights is not None and len(args.reward_weights) != len(names):
        raise UserError(
            f"reward_weights has {len(args.reward_weights)} weights for {len(names)} reward functions "
            f"({', '.join(names)}): one is needed for each"
        )
    return functions


def build_trainer(run: RunArguments, args: KTAEGRPOConfig, model: ModelConfig) -> KTAEGRPOTrainer:
    """Build what a recipe describes: data, rewards, model, trainer."""
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    reward_funcs = load_reward_functions(run, args)
    train_dataset, eval_dataset, tokenizer = load(run, args, model)
    trainer = KTAEGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.recipe = {"dataset_name": run.dataset_name} | settings_of(run) | settings_of(model)
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(MetricsTable(args.credit, args.dynamic_sampling))
    return trainer


def main(run: RunArguments, args: KTAEGRPOConfig, model: ModelConfig) -> None:
    end_with_launcher()
    with ExitStack() as folder:
        try:
            if run.dry_run:
                reward_funcs = load_reward_functions(run, args)
                loaded = load(run, args, model)  # by all processes: they wait for each other in there
                if args.process_index == 0:
                    plan.show(run, args, model, reward_funcs, *loaded)
                return
            if args.process_index == 0:  # before anything is loaded
                if warning := check_processes(args, run.num_processes):
                    logging.warning(warning)
                if args.push_to_hub:
                    create_repo(repo_name(args), private=args.hub_private_repo, token=args.hub_token)
                folder.enter_context(locked(args.output_dir, "train.py"))  # it makes the folder
            trainer = build_trainer(run, args, model)
        except (ValueError, OSError, ImportError) as error:  # settings, data, a name on the Hub, what is not installed
            sys.exit(f"train.py: {error}")
        start(trainer, run)


def start(trainer: KTAEGRPOTrainer, run: RunArguments) -> None:
    """Train, and end with one line where that says all."""
    held_out = None
    if trainer.eval_dataset is not None and run.held_out_samples > 0:
        held_out = HeldOutAccuracy(trainer, run)
        trainer.add_callback(held_out)
    try:
        with advice_at_the_end(trainer) as advice:
            train_and_save(trainer, held_out, advice)
    except ResumeError as error:  # of all processes
        trainer.accelerator.print(f"\ntrain.py: {error}", file=sys.stderr, flush=True)
        trainer.accelerator.wait_for_everyone()  # a launcher ends the others when one has left
        sys.exit(1)
    except HubError as error:
        sys.exit(f"\ntrain.py: {error}")


def train_and_save(trainer: KTAEGRPOTrainer, held_out: HeldOutAccuracy | None, advice: Advice) -> None:
    args, say = trainer.args, trainer.accelerator.print
    trained = trainer.train(args.resume_from_checkpoint)
    minutes, seconds = divmod(round(trained.metrics["train_runtime"]), 60)
    say(f"\nTrained to step {trainer.state.global_step} in {minutes} min {seconds:02d} s")

    if held_out is not None:
        before, after = held_out.before, held_out.measure()
        problems = f"{len(trainer.eval_dataset)} problems"
        say(f"\nHeld-out {after.what} ({problems})\n  before: {before or 'not measured'}\n  after:  {after}")
        results = {f"after_{name}": value for name, value in after._asdict().items()}
        results |= {f"before_{name}": value for name, value in before._asdict().items()} if before else {}
        results |= {"what": after.what, "problems": len(trainer.eval_dataset)}
        results["train_seconds"] = trained.metrics["train_runtime"]
        trainer.save_metrics("held_out", results, combined=False)

    trainer.save_all(push=args.push_to_hub)
    advice.saved = f"It is in {args.output_dir}"
    if args.push_to_hub:
        folder, name = Path(args.output_dir), trainer.hub_model_id or repo_name(args)
        advice.saved += f". Upload it: {upload_command(folder, name, args.hub_private_repo, args.hub_revision)}"
    say(f"\nSaved model, tokenizer and card in {args.output_dir}")
    if (page := Path(args.output_dir, PAGE)).exists():
        say(f"The key tokens of the run, for a browser: {page}")
    # A process that leaves while the first still saves can abort (ZeRO-3), and the launcher would then end them all.
    # One that waits while the first uploads a large model can run into the limit of its wait.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if args.push_to_hub and args.process_index == 0:
        print(f"\nUploaded to {trainer.upload().repo_url}")


def read_arguments(words: list[str]) -> tuple[RunArguments, KTAEGRPOConfig, ModelConfig]:
    """Parse the command line. A dry run asks for no GPU, whatever the recipe is for."""
    if not torch.accelerator.is_available():
        run, *_ = make_parser((RunArguments,)).parse_args_and_config(words, return_remaining_strings=True)
        words = [*words, "--use_cpu", "true"] if run.dry_run else words
    run, args, model = parse((RunArguments, config_class(words), ModelConfig), "train.py", words)
    if wants_to_resume(args.resume_from_checkpoint):  # before anything is loaded
        candidates(args.resume_from_checkpoint, args.output_dir)
    return run, args, model


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        arguments = read_arguments(sys.argv[1:])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train.py: {error}")
    main(*arguments)
