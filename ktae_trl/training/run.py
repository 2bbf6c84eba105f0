"""Train from a recipe and the command line, for `train.py` and `ktae train`.

read the settings -> load data, rewards, tokenizer -> build the trainer -> measure, train, measure -> save, upload
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer
from trl import GRPOConfig, ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import get_callable_name

from ktae_trl.arguments import (
    UserError,
    first_line,
    loading,
    model_path,
    need,
    parse,
    pip_install,
    settings_help,
    user_errors,
)
from ktae_trl.config import KTAEGRPOConfig, config_class
from ktae_trl.credit import METHODS
from ktae_trl.data import DataArguments, load_prompts
from ktae_trl.files.checkpoints import ResumeError, candidates, wants_to_resume
from ktae_trl.files.lock import locked
from ktae_trl.hub.card import settings_of
from ktae_trl.hub.upload import HubError, create_repo, repo_name, upload_command
from ktae_trl.preflight import check_model
from ktae_trl.rewards import load_rewards
from ktae_trl.rollouts.verdicts import correctness_index
from ktae_trl.training import closing, plan
from ktae_trl.training.batches import check_processes
from ktae_trl.training.console import quieten_libraries, say
from ktae_trl.training.held_out import HeldOutAccuracy
from ktae_trl.training.stopping import Advice, advice_at_the_end, end_with_launcher

logger = logging.getLogger(__name__)


@dataclass
class RunArguments(DataArguments):
    """The settings of a recipe other than those of the trainer and the model."""

    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_accuracy"],
        metadata={"help": "Reward functions: math_accuracy, boxed_format, soft_overlong, or dotted paths of your own."},
    )
    overlong_buffer: int = field(
        default=512,
        metadata={"help": "The reward soft_overlong falls from 0 to -1 over the last N tokens."},
    )
    held_out_samples: int = field(
        default=4,
        metadata={"help": "Samples per problem to measure the held-out accuracy before and after training (0: never)."},
    )
    num_processes: int | None = field(
        default=None,
        metadata={"help": "Number of processes (GPUs) that the batch sizes assume. Another number gives a warning."},
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Show the first prompt, its rewards, and the batches, data, memory and settings of the run, "
            "without training."
        },
    )
    all: bool = field(
        default=False, metadata={"help": "In a dry run, show all settings, not only those that differ from defaults."}
    )


def load(run: RunArguments, args: KTAEGRPOConfig, model: ModelConfig):
    """Load the training prompts, the held-out prompts (or None) and the tokenizer of a recipe."""
    name = model.model_name_or_path
    check_model(name, model.model_revision, "model_name_or_path")
    with loading(f"The tokenizer of {name!r}", by="model_name_or_path"):
        tokenizer = AutoTokenizer.from_pretrained(
            model_path(name),
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
    """Load the reward functions of a recipe. `correctness_reward` may be a name as it stands in `reward_funcs`."""
    functions = load_rewards(
        run.reward_funcs, max_completion_length=args.max_completion_length, overlong_buffer=run.overlong_buffer
    )
    names = [get_callable_name(function) for function in functions]
    asked = [run.reward_funcs] if isinstance(run.reward_funcs, str) else run.reward_funcs
    args.correctness_reward = dict(zip(asked, names, strict=True)).get(args.correctness_reward, args.correctness_reward)
    correctness_index(names, args.correctness_reward)
    if args.reward_weights is not None and len(args.reward_weights) != len(names):
        raise UserError(
            f"reward_weights has length {len(args.reward_weights)}, but reward_funcs has length {len(names)} "
            f"({', '.join(names)}). Give one weight per function"
        )
    return functions


def build_trainer(run: RunArguments, args: KTAEGRPOConfig, model: ModelConfig):
    """Load data, rewards and model of a recipe, and build the trainer."""
    from ktae_trl.trainer import KTAEGRPOTrainer  # heavy: only once the settings are known to be good

    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    reward_funcs = load_reward_functions(run, args)
    train_dataset, eval_dataset, tokenizer = load(run, args, model)
    try:
        trainer = KTAEGRPOTrainer(
            model=model_path(model.model_name_or_path),
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
            quantization_config=get_quantization_config(model),
        )
    except (OSError, ImportError) as error:
        # Not bugs: the model's files, vLLM's server, a package that a setting needs. A failed import statement has the
        # name of a module, an ImportError that is raised to tell the user has none.
        if isinstance(error, UserError) or (isinstance(error, ImportError) and error.name):
            raise
        raise UserError(first_line(error)) from error
    trainer.recipe = {"dataset_name": run.dataset_name} | settings_of(run) | settings_of(model)
    return trainer


def train(run: RunArguments, args: KTAEGRPOConfig, model: ModelConfig, program: str = "train.py") -> None:
    """Train, or show the plan of a dry run. `program` is the command that the user typed, for messages."""
    with ExitStack() as folder:
        with user_errors(program):
            if run.dry_run:
                reward_funcs = load_reward_functions(run, args)
                loaded = load(run, args, model)  # collective
                if args.process_index == 0:
                    plan.show(run, args, model, reward_funcs, *loaded)
                return
            if args.process_index == 0:  # before anything is loaded
                if warning := check_processes(args, run.num_processes, program):
                    logger.warning(warning)
                if args.push_to_hub:
                    create_repo(repo_name(args), private=args.hub_private_repo, token=args.hub_token)
                folder.enter_context(locked(args.output_dir, program))  # creates the folder
            trainer = build_trainer(run, args, model)
        start(trainer, run, program)


def start(trainer, run: RunArguments, program: str = "train.py") -> None:
    """Train. Errors that explain themselves end the program with one line."""
    held_out = None
    if trainer.eval_dataset is not None and run.held_out_samples > 0:
        held_out = HeldOutAccuracy(trainer, run.held_out_samples)
        trainer.add_callback(held_out)
    try:
        with advice_at_the_end(trainer, program) as advice:
            train_and_save(trainer, run, held_out, advice)
    except ResumeError as error:  # of all processes
        trainer.accelerator.print(f"\n{program}: {error}", file=sys.stderr, flush=True)
        trainer.accelerator.wait_for_everyone()  # a launcher ends the others as soon as one has left
        sys.exit(1)
    except HubError as error:
        sys.exit(f"\n{program}: {error}")


def train_and_save(trainer, run: RunArguments, held_out: HeldOutAccuracy | None, advice: Advice) -> None:
    """Train, measure the accuracy after training, save, upload, and say what to do next. Collective."""
    args, is_first = trainer.args, trainer.accelerator.is_main_process
    trained = trainer.train(args.resume_from_checkpoint)
    minutes, seconds = divmod(round(trained.metrics["train_runtime"]), 60)
    if is_first:
        say(f"\nTrained to step {trainer.state.global_step} in {minutes} min {seconds:02d} s")

    if held_out is not None:
        before, after = held_out.before, held_out.measure("after")
        if is_first:
            say(f"\n{closing.accuracies(before, after, len(trainer.eval_dataset))}")
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
    if is_first:
        say(f"\n{closing.places(trainer)}")
    # A process that exits while the first one is still saving can abort (ZeRO-3), and the launcher would then end all.
    # A process that waits while the first one uploads a large model can time out.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if is_first:
        if args.push_to_hub:
            say(f"Uploaded to {trainer.upload().repo_url}")
        say(f"\n{closing.next_steps(args.output_dir, run.dataset_name, run.eval_dataset_name)}")


def read_arguments(words: Sequence[str], program: str = "train.py") -> tuple[RunArguments, KTAEGRPOConfig, ModelConfig]:
    """Parse the command line. A dry run needs no GPU, even of a recipe for GPUs."""
    if not torch.accelerator.is_available():
        (run,) = parse((RunArguments,), program, words, others=True)
        words = [*words, "--use_cpu", "true"] if run.dry_run else words
    run, args, model = parse((RunArguments, config_class(words, program), ModelConfig), program, words)
    if wants_to_resume(args.resume_from_checkpoint):  # before anything is loaded
        candidates(args.resume_from_checkpoint, args.output_dir)
    check_trackers(args)
    return run, args, model


def check_trackers(args: KTAEGRPOConfig) -> None:
    """Remove TensorBoard from `report_to` if it is not installed. Refuse other trackers that are not."""
    for tracker in {"wandb", "trackio"} & set(args.report_to):
        need(tracker, "trackers")
    if "tensorboard" in args.report_to and find_spec("tensorboard") is None:
        args.report_to = [tracker for tracker in args.report_to if tracker != "tensorboard"]
        if args.process_index == 0:
            logger.warning("No TensorBoard logs: tensorboard is not installed. Install it: %s", pip_install("trackers"))


def show_help(usage: str, words: Sequence[str] = ()) -> None:
    """Print the usage and all settings, in groups, with those of the credit method that the words choose."""
    config = config_class([word for word in words if word not in ("-h", "--help")], "train")
    own, trl = RunArguments.__annotations__, GRPOConfig.__annotations__
    groups: dict[str, list[dataclasses.Field]] = {
        "run": [setting for setting in dataclasses.fields(RunArguments) if setting.name in own],
        "data": list(dataclasses.fields(DataArguments)),
        "credit": [],
    }
    others = {"dynamic": "DAPO", "record": "records", "allow": "run", "console": "run"}
    of_methods: dict[type, list[str]] = {}
    for name, method in METHODS.items():
        of_methods.setdefault(method.Settings, []).append(name)
    for settings, names in of_methods.items():
        groups[f"credit: {', '.join(names)}"] = list(dataclasses.fields(settings))
    shown = {setting.name for group in groups.values() for setting in group} | set(GRPOConfig.__dataclass_fields__)
    for setting in dataclasses.fields(config):
        if setting.name not in shown:
            title = others.get(setting.name.partition("_")[0], "credit")
            if setting.name not in KTAEGRPOConfig.__dataclass_fields__:
                title = "credit: your own method"
            groups.setdefault(title, []).append(setting)
    groups["model"] = list(dataclasses.fields(ModelConfig))
    groups["TRL's GRPO"] = [setting for setting in dataclasses.fields(GRPOConfig) if setting.name in trl]
    groups["transformers' Trainer"] = [setting for setting in dataclasses.fields(GRPOConfig) if setting.name not in trl]
    print(settings_help(usage, groups))


def main(words: Sequence[str] | None = None, program: str = "train.py") -> None:
    """Train with the settings of a command line, by default that of this process."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        return show_help(f"{program} --config FILE.yaml [--field value ...]", words)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    quieten_libraries()
    end_with_launcher()
    with user_errors(program):
        arguments = read_arguments(words, program)
    train(*arguments, program)
