"""The part of `KTAEGRPOTrainer` that saves and publishes: what is on disk comes first, then the network."""

import os
from contextlib import ExitStack
from pathlib import Path

from accelerate.utils import is_peft_model

from ktae_trl.credit import find_method
from ktae_trl.files.model_files import without_links
from ktae_trl.hub import card as model_card
from ktae_trl.hub import upload as hub


class Publishing:
    """Cards, saving and uploads of a TRL trainer, by `ktae_trl.hub.card` and `ktae_trl.hub.upload`."""

    recipe: dict = {}  # what the model card says of the run beside `args`: train.py's settings of data and model

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write TRL's model card to `output_dir`, completed: see `ktae_trl.hub.card`."""
        output = Path(self.args.output_dir)
        data = dataset_name or self.recipe.get("dataset_name")
        on_hub = model_card.is_hub_id(data)
        tags = [*([tags] if isinstance(tags, str) else tags or []), *(getattr(self.model, "model_tags", None) or [])]
        name = " ".join((model_name or (self.args.hub_model_id or output.name).split("/")[-1]).split())
        if not self.is_world_process_zero():
            return
        with without_links(output):
            super().create_model_card(name, data if on_hub else None, tags)
        base = self.model.config._name_or_path
        known = {"credit": self.args.credit, "reward_funcs": self.reward_func_names}
        known |= find_method(self.args.credit).settings_of(self.args)
        known |= {"num_generations": self.num_generations, "num_processes": self.accelerator.num_processes}
        model_card.complete(
            output / model_card.CARD,
            does=self._does,
            settings=known | self.recipe | model_card.settings_of(self.args),
            local_base=Path(base).name if os.path.isdir(base) or not base else None,
            local_data=Path(data).name if data and not on_hub else None,
            adapter=is_peft_model(self.model),
            name=self.hub_model_id or str(output),
        )
        if not self.is_in_train:  # what lies there then may be of an earlier run
            model_card.update(output)

    def _save(self, output_dir=None, state_dict=None):
        # The final model and that of each checkpoint. The libraries write through links: such as those of the Hub's
        # cache, copied into `output_dir` with the model that training began with.
        folder = Path(output_dir or self.args.output_dir)
        with ExitStack() as saving:
            for place in (folder, folder / "ref"):  # TRL's second adapter, the reference of one that is trained again
                saving.enter_context(without_links(place))
            super()._save(output_dir, state_dict)

    def save_metrics(self, split, metrics, combined=True):
        if self.is_world_process_zero():  # as the parent; the others would take the links away from under it
            with without_links(Path(self.args.output_dir)):
                super().save_metrics(split, metrics, combined)

    def save_state(self):
        if self.is_world_process_zero():
            with without_links(Path(self.args.output_dir)):
                super().save_state()

    def save_whole_model(self) -> None:
        """Save a model that `from_pretrained` loads, also where checkpoints are in shards (accelerate's default)."""
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            sharded = plugin.state_dict_type
            plugin.set_state_dict_type("FULL_STATE_DICT")
            self.save_model(_internal_call=True)
            plugin.set_state_dict_type(sharded)
            return
        if self.is_deepspeed_enabled:  # ZeRO-3 without `zero3_save_16bit_model`
            self.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = True
        self.save_model(_internal_call=True)

    def save_all(self, *, push: bool, **card) -> None:
        """Write to `output_dir`: whole model, tokenizer, the key-token page of a recorded run, card. For all processes.

        Args:
            push: it is to be uploaded; trackers are told, which may have something for the card.
            card: `model_name`, `dataset_name` and `tags`.
        """
        if push:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_whole_model()
        if self.is_world_process_zero():
            hub.write_page(Path(self.args.output_dir))
            self.create_model_card(**card)

    def upload(self, message="End of training", blocking=True, token=None, revision=None):
        """Upload what `save_all` wrote. For the first process; the others need not be there any more."""
        folder, args = Path(self.args.output_dir), self.args
        token, revision = token or args.hub_token, revision or args.hub_revision
        self._finish_current_push()
        name = self.hub_model_id or hub.repo_name(args)
        private = args.hub_private_repo
        return hub.send(folder, name, private, token=token, revision=revision, message=message, wait=blocking)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Save model (or adapter), tokenizer, card and key-token page, then upload them.

        All else in `output_dir` stays there, such as checkpoints, recorded rollouts, logs, and training_args.bin, which
        holds `hub_token`; a warning lists it. `python -m ktae_trl.hub.upload FOLDER --include FILE` adds files.

        Args:
            blocking: False returns a `Future` of the commit at once.
            kwargs: `model_name`, `dataset_name` and `tags` of the card.

        Raises:
            HubError: the upload failed. All is on disk; the message has the command that tries again.
        """
        self.save_all(push=True, **kwargs)
        if self.is_world_process_zero():
            return self.upload(commit_message, blocking, token, revision)

    def init_hf_repo(self, token=None):
        # As the parent, whose errors say little, and which takes a public repository for a private one.
        if self.is_world_process_zero():
            args, token = self.args, token or self.args.hub_token
            self.hub_model_id = hub.create_repo(hub.repo_name(args), private=args.hub_private_repo, token=token)
            self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero():
            return
        with hub.our_uploads(), without_links(Path(self.args.output_dir)):  # the checkpoint's model is copied there
            super()._push_from_checkpoint(checkpoint_folder)
