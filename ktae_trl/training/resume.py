"""The part of `KTAEGRPOTrainer` that resumes exactly, or says before the first step what will not be as it was."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from transformers import TrainerState, trainer

from ktae_trl.files import checkpoints
from ktae_trl.files.checkpoints import ResumeError
from ktae_trl.training.changes import LAYOUT, ROWS, SETTINGS, Changes, fingerprint, own_settings
from ktae_trl.training.guard import NotFiniteError, check_weights

logger = logging.getLogger(__name__)
# With several processes on a CPU, transformers reads the optimizer's state back to "cpu:0", which torch does not know.
torch.serialization.register_package(17, lambda _: None, lambda part, name: part if name.startswith("cpu:") else None)


class ExactResume:
    """Checkpoints of a TRL trainer that also hold, per process, the rollouts still to be trained on.

    They hold the settings that shape training, too: `ktae_trl.training.changes` says what becomes of each that has
    changed. Only a whole one is resumed from (`ktae_trl.files.checkpoints`).
    """

    _data_fingerprint: dict | None = None
    _saved_last: Path | None = None  # by this training, or what it resumed from

    def checkpoint_to_resume(self, asked) -> str | None:
        """Return the whole checkpoint that `resume_from_checkpoint` means. All processes must call it.

        Raises:
            ResumeError: there is none, or the one that was named is not whole.
        """
        if not checkpoints.wants_to_resume(asked):
            return None
        found = [[], None]
        if self.accelerator.is_main_process:
            try:
                found = [checkpoints.candidates(asked, self.args.output_dir), None]
            except ResumeError as error:
                found = [[], str(error)]
        found, refused = broadcast_object_list(found)
        if refused:
            raise ResumeError(refused)
        whole, passed_over = self._first_whole(found)
        if passed_over and (str(asked).lower() != "true" or whole is None):
            raise ResumeError(checkpoints.not_whole(*passed_over[0], whole))
        for checkpoint, why in passed_over:
            self._warn(f"{checkpoint} is passed over, for it is not whole: {why}. Training resumes from {whole}.")
        return str(whole)

    def _first_whole(self, candidates: list[Path]) -> tuple[Path | None, list[tuple[Path, str]]]:
        """Return the first whole one, by the files that each machine sees, and those before it with the reasons."""
        passed_over = []
        for checkpoint in candidates:
            why = ""
            if self.accelerator.is_local_main_process:
                why = checkpoints.problem(checkpoint, allow_missing=self.args.allow_inexact_resume)
            if not (why := next(filter(None, gather_object([why])), "")):
                return checkpoint, passed_over
            passed_over.append((checkpoint, why))
        return None, passed_over

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if folder == self._saved_last:  # as when a scheduler asks for a checkpoint right after one
            return
        self._check_weights(folder, together=True)  # before anything that is there goes
        if self.args.should_save:
            checkpoints.begin(folder)
        self.accelerator.wait_for_everyone()
        with _older_ones_stay():
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            checkpoints.seal(folder)
            checkpoints.keep_newest(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
        self._saved_last = folder

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.args.should_save:  # so that it counts where it goes
            checkpoints.seal(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        torch.save(
            {
                "step": self._step,
                "settings": self._settings(self.state.max_steps),
                "rollouts": self._buffered_inputs if self._step % self._cycle() else None,
                "prompts": self._prompt_stream and self._prompt_stream.state(),
            },
            _rollouts_file(output_dir, self.accelerator.process_index),
        )
        # The first process goes on to write trainer_state.json: a checkpoint that has one has all its files.
        self.accelerator.wait_for_everyone()

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        if checkpoint is not None:
            self._check_training_state(checkpoint)
            saved_state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial
        )
        if checkpoint is None:
            return epoch, batches
        self._restore(checkpoint, max_steps)
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # transformers would train one step more
        if not isinstance(self.train_dataset, Dataset):
            # transformers takes all steps so far for one pass over the stream. It does count passes as epochs, though,
            # each as if it had `max_steps` steps.
            epoch, part = divmod(saved_state.epoch, 1)
            steps = 0 if self.args.ignore_data_skip else round(part * saved_state.max_steps)
            return int(epoch), steps * self.args.gradient_accumulation_steps
        if self._train_sampler.shuffle:
            for _ in range(epoch):  # each past epoch drew one permutation
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)
        return epoch, batches

    def _check_training_state(self, checkpoint: str) -> None:
        """Check that the checkpoint holds more than a model, which transformers takes for a training from step 0."""
        parts = {
            "optimizer and learning-rate schedule": ("optimizer*", "scheduler.pt"),
            "random numbers": ("rng_state*.pth",),
        }
        if self.is_deepspeed_enabled:
            parts["optimizer and learning-rate schedule"] = ("global_step*",)
        lacks = [part for part, names in parts.items() if not all(any(Path(checkpoint).glob(name)) for name in names)]
        lacks = list(dict.fromkeys(part for lacking in gather_object([lacks]) for part in lacking))
        if lacks and self.args.allow_inexact_resume and not self.is_deepspeed_enabled:
            self._warn(f"{checkpoint} does not hold the state of the {' or the '.join(lacks)}: these start anew.")
        elif lacks:
            raise ResumeError(
                f"{checkpoint} holds a model, but not the state of its training ({', '.join(lacks)}): it was saved "
                "with save_only_model, or with another back-end (DeepSpeed, FSDP), or was not copied whole. Instead of "
                f"resuming, {_new_run(checkpoint)}"
                + (
                    ""
                    if self.is_deepspeed_enabled
                    else ". Or let what is missing start anew: --allow_inexact_resume true"
                )
            )

    def _restore(self, checkpoint: str, max_steps: int) -> None:
        """Take up what the checkpoint holds for this process, or say why not. Collective: all decide by the same."""
        path = _rollouts_file(checkpoint, self.accelerator.process_index)
        own = torch.load(path, map_location="cpu", weights_only=True) if os.path.exists(path) else None
        saved = gather_object([_Saved.of(own, self._reads())])
        now = broadcast_object_list([self._settings(max_steps)])[0]
        first = next(filter(None, saved), None)
        if first is None:
            lacks = (
                f"{checkpoint} holds no {os.path.basename(path)}: KTAEGRPOTrainer did not save it, or it lost a file"
            )
            effect = "training starts with a new generation and will not repeat the original run exactly"
            if not self.args.allow_inexact_resume:
                raise ResumeError(f"{lacks}. With --allow_inexact_resume true {effect}")
            self._warn(f"{lacks}. So {effect}.")
            return
        changes = Changes(first.settings, now)
        self._check_changes(checkpoint, changes)
        inside = any(one and one.holds_rollouts for one in saved)
        incomplete = inside and None in saved and self.args.allow_inexact_resume
        if incomplete:
            self._warn(f"{checkpoint} lacks rollouts of a process: all start with a new generation.")
        elif inside:
            self._check_rollouts(checkpoint, changes, saved, first)
        if notes := list(changes.notes()):
            self._warn("\n  ".join([f"Settings have changed since {checkpoint} was saved:", *notes]))
        if not changes.among(LAYOUT) and not incomplete:
            self._step = first.step
            self._buffered_inputs = send_to_device(own and own["rollouts"], self.accelerator.device)
        if self._prompt_stream is not None and first.prompts and not self.args.ignore_data_skip:
            self._prompt_stream.restore(first.prompts)

    def _check_changes(self, checkpoint: str, changes: Changes) -> None:
        if problem := changes.refused("always"):
            raise ResumeError(
                f"{checkpoint} does not fit this run: {problem}. One optimizer cannot use the state of another. Set it "
                f"back, or {_new_run(checkpoint)}"
            )
        if (problem := changes.refused("unless ignore_data_skip")) and not self.args.ignore_data_skip:
            raise ResumeError(
                f"{checkpoint} stopped at a certain place in its training prompts, and this run has other prompts or "
                f"another order: {problem}. To resume at that place, set this back. To train on the new prompts from "
                f"the first one of the epoch, add --ignore_data_skip true. Or {_new_run(checkpoint)}"
            )

    def _check_rollouts(self, checkpoint: str, changes: Changes, saved: list, first: "_Saved") -> None:
        cycle = first.settings["steps_per_generation"] * first.settings["num_iterations"]
        other = (
            "resume from a checkpoint whose forward passes are a multiple of "
            f"{cycle} (optimizer steps x gradient_accumulation_steps)"
        )
        lacking = [f"{why}, for which they hold no {name}" for name, why in first.lacks.items()]
        if problem := changes.refused("inside a generation cycle") or ", ".join(lacking):
            raise ResumeError(
                f"{checkpoint} lies inside a generation cycle: {first.step} forward passes were done, and {first.step} "
                f"mod {cycle} (steps_per_generation x num_iterations) = {first.step % cycle}. Its rollouts, which are "
                f"still to be trained on, do not fit this run: {problem}. Resume with the same settings, or {other}"
            )
        if missing := [_rollouts_file(checkpoint, i) for i, one in enumerate(saved) if one is None]:
            raise ResumeError(
                f"{missing[0]} is missing: the rollouts that this process had still to train on. Copy the checkpoint "
                f"whole, or {other}"
            )

    def _reads(self) -> dict[str, str]:
        """Return what the loss reads of a rollout only if settings ask for it, and these settings in words."""
        needs = {"ref_per_token_logps": f"beta is {self.beta}"} if self.beta else {}
        if self.use_vllm and self.vllm_importance_sampling_correction:
            needs["importance_sampling_ratio"] = "vllm_importance_sampling_correction is true"
        return needs

    def _settings(self, max_steps: int) -> dict:
        """Return this run's values of the settings that `ktae_trl.training.changes` compares."""
        if self._data_fingerprint is None:
            self._data_fingerprint = fingerprint(self.train_dataset)
        recipe = {"overlong_buffer": self.recipe.get("overlong_buffer", "the default")} if self.recipe else {}
        known = vars(self.args) | recipe | self._data_fingerprint | own_settings(self.args)
        if not self.shuffle_dataset:
            known.pop("seed")  # random numbers come from the checkpoint, so it decides nothing
        known |= {
            "max_steps": max_steps,
            "num_processes": self.accelerator.num_processes,
            "num_iterations": self.num_iterations,
            "num_generations": self.num_generations,
            "reward_funcs": self.reward_func_names,
            "shuffle_dataset": self.shuffle_dataset,
        }
        # As plain values, which a checkpoint can hold: no enums, no tuples.
        return json.loads(json.dumps({name: known[name] for name in SETTINGS if name in known}, default=str))

    def _check_weights(self, what, together: bool = False) -> None:
        """Raise NotFiniteError instead of saving weights that are not finite.

        Args:
            together: all processes ask. They do anyway where each may hold a part of its own.
        """
        finite = check_weights(self.model, str(what))
        if together or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            finite = all(gather_object([finite]))
        if not finite:
            raise NotFiniteError(
                f"at step {self.state.global_step} some weights are not finite. Start a new run from the model of an "
                "earlier checkpoint (--model_name_or_path) with a lower learning_rate"
            )

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(message)

    def _cycle(self) -> int:
        """Return the forward passes from one generation to the next."""
        return self.args.steps_per_generation * self.num_iterations


@contextmanager
def _older_ones_stay() -> Iterator[None]:
    """In here, transformers removes no older checkpoints: the new one is not sealed yet."""
    theirs, trainer.rotate_checkpoints = trainer.rotate_checkpoints, lambda **_: None
    try:
        yield
    finally:
        trainer.rotate_checkpoints = theirs


class _Saved(NamedTuple):
    """What a process's file in a checkpoint says, without its rollouts."""

    step: int
    prompts: dict | None
    settings: dict
    holds_rollouts: bool
    lacks: dict[str, str]  # of what this run reads

    @classmethod
    def of(cls, file: dict | None, reads: dict[str, str]) -> "_Saved | None":
        if file is None:
            return None
        rollouts = file["rollouts"]
        lacks = {name: why for name, why in reads.items() if rollouts and name not in rollouts[0]}
        settings = file["settings"] if "settings" in file else _settings_of_0_1(file)
        return cls(file["step"], file["prompts"], settings, rollouts is not None, lacks)


def _settings_of_0_1(file: dict) -> dict:
    stream = file["prompts"]
    settings = {**file["layout"], "dynamic_sampling": stream is not None}
    if stream is not None:
        settings |= {ROWS: stream["size"], "seed": stream["seed"], "shuffle_dataset": stream["shuffle"]}
    return settings


def _new_run(checkpoint: str) -> str:
    if any(Path(checkpoint).glob("model*.safetensors")):
        how = f"--model_name_or_path {checkpoint}"
    else:  # an adapter, or the shards of DeepSpeed and FSDP
        how = f"ktae merge {checkpoint} -o FOLDER, then --model_name_or_path FOLDER"
    return f"start a new run from the checkpoint's model ({how}, no resume_from_checkpoint)"


def _rollouts_file(checkpoint: str, process_index: int) -> str:
    return os.path.join(checkpoint, f"rollouts_{process_index}.pt")
