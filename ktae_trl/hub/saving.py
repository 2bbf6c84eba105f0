"""What a trainer saves and publishes: what is on disk comes first, then the network.

Each function is given the trainer; they are its methods, or called by its overrides of TRL's.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo
from transformers import is_wandb_available
from trl import GRPOTrainer

from ktae_trl.credit import find_method
from ktae_trl.files.model_files import CARD, without_links
from ktae_trl.hub import card as model_card
from ktae_trl.hub import upload as hub
from ktae_trl.trl_seam import gather_when_saving, introduced_in, model_name, uploading_by, wait_for_upload


@contextmanager
def own_files(trainer: GRPOTrainer, folder: str | None = None) -> Iterator[None]:
    """In here, what is saved in a folder (`output_dir`) is not written through links.

    Such as those of the Hub's cache, copied into `output_dir` with the model that training began with.
    """
    if not trainer.args.should_save:  # the others would take the links away from under the one that saves
        yield
        return
    place = Path(folder or trainer.args.output_dir)
    with without_links(place), without_links(place / "ref"):  # TRL's second adapter: the reference of one trained again
        yield


def write_card(trainer: GRPOTrainer, name: str | None, data: str | None, tags: str | list[str] | None) -> None:
    """Write the model card to `output_dir`, with results once the training has ended.

    Args:
        name: the model's; default: that of its repository or folder.
        data: the training data; default: those of the recipe.
    """
    args, model, output = trainer.args, trainer.model, Path(trainer.args.output_dir)
    known = {"credit": args.credit, "reward_funcs": trainer.reward_func_names}
    method = find_method(args.credit)
    known |= method.settings_of(args)
    known |= {"num_generations": trainer.num_generations, "num_processes": trainer.accelerator.num_processes}
    runs = _runs()
    tags = [tags] if isinstance(tags, str) else tags or []
    tags = [*tags, *(getattr(model, "model_tags", None) or []), *(["hf_jobs"] if "JOB_ID" in os.environ else [])]
    if "Trackio" in runs:  # its own tag does not say which run it was
        tags = [*(tag for tag in tags if not tag.startswith("trackio:")), f"trackio:{runs['Trackio']}"]
    model_card.write(
        output / CARD,
        method=method.card if method.card.paper else method.card._replace(**introduced_in(trainer)),
        model_name=name or (args.hub_model_id or output.name).split("/")[-1],
        place=trainer.hub_model_id or str(output),
        base=model_name(model),
        data=data or trainer.recipe.get("dataset_name"),
        tags=tags,
        adapter=is_peft_model(model),
        settings=known | trainer.recipe | model_card.settings_of(args),
        runs=runs,
    )
    if not trainer.is_in_train:  # results that lie there then may be of an earlier run
        model_card.update(output)


def _runs() -> dict[str, str]:
    """Return where trackers show the run, if they do."""
    from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url  # for cards only

    urls = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        urls["Weights & Biases"] = wandb.run and wandb.run.url
    return {name: url for name, url in urls.items() if url}


def save_whole_model(trainer: GRPOTrainer) -> None:
    """Save a model that `from_pretrained` loads, also where checkpoints are in shards (accelerate's default)."""
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        sharded = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(_internal_call=True)
        plugin.set_state_dict_type(sharded)
        return
    if trainer.is_deepspeed_enabled:  # ZeRO-3 without `zero3_save_16bit_model`
        gather_when_saving(trainer)
    trainer.save_model(_internal_call=True)


def save_all(trainer: GRPOTrainer, *, push: bool, **card) -> None:
    """Write to `output_dir`: whole model, tokenizer, the key-token page of a recorded run, card. For all processes.

    Args:
        push: it is to be uploaded; trackers are told, which may have something for the card.
        card: arguments of `create_model_card`.
    """
    if push:
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    save_whole_model(trainer)
    if trainer.is_world_process_zero():
        hub.write_page(Path(trainer.args.output_dir))
        trainer.create_model_card(**card)


def upload(
    trainer: GRPOTrainer,
    message: str = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo | Future:
    """Upload what `save_all` wrote. For the first process; the others need not be there any more."""
    args = trainer.args
    wait_for_upload(trainer)
    return hub.send(
        Path(args.output_dir),
        trainer.hub_model_id or hub.repo_name(args),
        args.hub_private_repo,
        token=token or args.hub_token,
        revision=revision or args.hub_revision,
        message=message,
        wait=blocking,
    )


def push_to_hub(
    trainer: GRPOTrainer,
    commit_message: str = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    **card,
) -> CommitInfo | Future | None:
    """Save model (or adapter), tokenizer, card and key-token page, then upload them. For all processes.

    All else in `output_dir` stays there, such as checkpoints, recorded rollouts, logs, and training_args.bin, which
    holds `hub_token`; a warning lists it. `ktae push FOLDER --include FILE` adds files.

    Args:
        blocking: False returns a `Future` of the commit at once.
        card: `model_name`, `dataset_name` and `tags` of the card.

    Raises:
        HubError: the upload failed. All is on disk; the message has the command that tries again.
    """
    trainer.save_all(push=True, **card)
    if trainer.is_world_process_zero():
        return trainer.upload(commit_message, blocking, token, revision)


def init_hf_repo(trainer: GRPOTrainer, token: str | None = None) -> None:
    """Create the repository: as TRL's, whose errors say little, and which takes a public one for a private one."""
    if trainer.is_world_process_zero():
        args = trainer.args
        token = token or args.hub_token
        trainer.hub_model_id = hub.create_repo(hub.repo_name(args), private=args.hub_private_repo, token=token)
        trainer.push_in_progress = None


@contextmanager
def own_uploads(trainer: GRPOTrainer) -> Iterator[None]:
    """In here, transformers copies a checkpoint's model to `output_dir` through no links, and uploads by `hub.api`."""
    with own_files(trainer), uploading_by(hub.api):
        yield
