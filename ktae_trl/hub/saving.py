"""Saves and publishes the model of a trainer. Everything is written to disk before anything is uploaded.

Each function takes the trainer. It is a method of the trainer or is called by one of its overrides of TRL's methods.
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

from ktae_trl.files.model_files import CARD, without_links
from ktae_trl.hub import card as model_card
from ktae_trl.hub import upload as hub
from ktae_trl.trl_seam import gather_when_saving, introduced_in, model_name, uploading_by, wait_for_upload


@contextmanager
def own_files(trainer: GRPOTrainer, folder: str | None = None) -> Iterator[None]:
    """Do not write through links while saving to a folder (default: `output_dir`).

    The folder may contain links into the Hub's cache, for example if the base model was copied there.
    """
    if not trainer.args.should_save:  # only the process that saves may remove links
        yield
        return
    place = Path(folder or trainer.args.output_dir)
    with without_links(place), without_links(place / "ref"):  # `ref`: TRL's reference adapter
        yield


def write_card(trainer: GRPOTrainer, name: str | None, data: str | None, tags: str | list[str] | None) -> None:
    """Write the model card to `output_dir`, including results once training has ended.

    Args:
        name: name of the model. Default: the name of its repository or folder.
        data: the training data. Default: the dataset of the recipe.
        tags: additional tags.
    """
    args, model, output = trainer.args, trainer.model, Path(trainer.args.output_dir)
    known = {"credit": args.credit, "reward_funcs": trainer.reward_func_names}
    method = trainer.token_credit.shown
    known |= method.settings_of(args)
    known |= {"num_generations": trainer.num_generations, "num_processes": trainer.accelerator.num_processes}
    runs = _runs()
    tags = [tags] if isinstance(tags, str) else tags or []
    tags = [*tags, *(getattr(model, "model_tags", None) or []), *(["hf_jobs"] if "JOB_ID" in os.environ else [])]
    if "Trackio" in runs:  # replaces Trackio's tag, which does not name the run
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
    if not trainer.is_in_train:  # during training, the folder may contain results of an earlier run
        model_card.update(output)


def _runs() -> dict[str, str]:
    """Return the URLs of the run in the active trackers, by tracker."""
    from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url  # needed only here

    urls = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        urls["Weights & Biases"] = wandb.run and wandb.run.url
    return {name: url for name, url in urls.items() if url}


def save_whole_model(trainer: GRPOTrainer) -> None:
    """Save a model for `from_pretrained`, even if checkpoints are sharded (accelerate's default)."""
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
    """Save the full model, the tokenizer, the key-token page (if rollouts were recorded) and the card. Collective.

    Args:
        push: whether an upload follows. Trackers are notified before the card is written.
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
    """Upload what `save_all` wrote. Call this on the first process only."""
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
    """Save the model (or adapter), tokenizer, card and key-token page, then upload them. Collective.

    Other files in `output_dir` are not uploaded: checkpoints, recorded rollouts, logs, and `training_args.bin`, which
    contains `hub_token`. A warning lists them. To add files, use `ktae push FOLDER --include FILE`.

    Args:
        blocking: if False, return a `Future` of the commit immediately.
        card: `model_name`, `dataset_name` and `tags` of the card.

    Raises:
        HubError: the upload failed. Everything is on disk, and the message contains the command to try again.
    """
    trainer.save_all(push=True, **card)
    if trainer.is_world_process_zero():
        return trainer.upload(commit_message, blocking, token, revision)


def init_hf_repo(trainer: GRPOTrainer, token: str | None = None) -> None:
    """Create the repository on the Hub.

    Unlike TRL's method, this raises errors with a remedy, and does not accept a public repository as a private one.
    """
    if trainer.is_world_process_zero():
        args = trainer.args
        token = token or args.hub_token
        trainer.hub_model_id = hub.create_repo(hub.repo_name(args), private=args.hub_private_repo, token=token)
        trainer.push_in_progress = None


@contextmanager
def own_uploads(trainer: GRPOTrainer) -> Iterator[None]:
    """Make transformers copy checkpoints to `output_dir` without following links, and upload them by `hub.api`."""
    with own_files(trainer), uploading_by(hub.api):
        yield
