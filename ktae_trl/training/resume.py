"""Exact resume: saves the state of each process in a checkpoint, checks it against a new run and restores it."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from transformers import TrainerState

from ktae_trl import trl_seam
from ktae_trl.files import checkpoints
from ktae_trl.files.checkpoints import ResumeError
from ktae_trl.training.changes import LAYOUT, ROWS, SETTINGS, Changes, fingerprint, own_settings
from ktae_trl.training.guard import require_finite

logger = logging.getLogger(__name__)
# With several processes on a CPU, transformers loads the optimizer state to "cpu:0", which torch does not accept.
torch.serialization.register_package(17, lambda _: None, lambda part, name: part if name.startswith("cpu:") else None)


class Resume:
    """Saves and restores checkpoints of a `KTAEGRPOTrainer` that make an exact resume possible.

    In addition to what TRL saves, a checkpoint contains, per process, the rollouts still to be trained on, and the
    settings that affect training. `ktae_trl.training.changes` defines the effect of each changed setting. Training
    resumes only from intact checkpoints (`ktae_trl.files.checkpoints`). All methods are collective.

    Attributes:
        sampler: sampler of the training prompts, if there is one.
        saved_last: the checkpoint that this training saved last or resumed from.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.sampler = None
        self.saved_last: Path | None = None
        self._fingerprint: dict | None = None

    # Saving

    @contextmanager
    def saving(self, folder: Path) -> Iterator[None]:
        """Wrap the code that writes a checkpoint. Older checkpoints are removed only after the new one is complete.

        Raises:
            NotFiniteError: some weights are not finite. All existing checkpoints are kept.
        """
        trainer, args = self.trainer, self.trainer.args
        require_finite(trainer.model, folder, trainer.state.global_step, together=True)
        if args.should_save:
            checkpoints.begin(folder)
        trainer.accelerator.wait_for_everyone()
        if not args.save_only_model:
            folder.mkdir(parents=True, exist_ok=True)  # if this is not the machine that created it
            torch.save(self.state(), _file(folder, trainer.accelerator.process_index))
        trainer.accelerator.wait_for_everyone()  # the first process may upload the complete checkpoint
        with trl_seam.older_checkpoints_stay():
            yield
        if args.should_save:
            checkpoints.seal(folder)
            checkpoints.keep_newest(folder.parent, args.save_total_limit, trainer.state.best_model_checkpoint)
        self.saved_last = folder

    def state(self) -> dict:
        """Return what a checkpoint stores for this process."""
        trainer, (step, rollouts) = self.trainer, trl_seam.place(self.trainer)
        inside = step % (trainer.args.steps_per_generation * trainer.num_iterations)
        return {
            "step": step,
            "settings": self._settings(trainer.state.max_steps),
            "rollouts": rollouts if inside else None,
            "how": trainer.token_credit.how,
            "credit": trainer.token_credit.state(),
            "prompts": trainer.dynamic_sampling and trainer.dynamic_sampling.state(),
            "kept": trainer.dynamic_sampling and trainer.dynamic_sampling.kept_groups(),
        }

    # Resuming: the methods are called in this order

    def find(self, asked) -> str | None:
        """Return the intact checkpoint that `resume_from_checkpoint` refers to. None if training starts from scratch.

        Raises:
            ResumeError: there is no such checkpoint, or it is not intact.
        """
        self.saved_last = None
        if not checkpoints.wants_to_resume(asked):
            return None
        found = [[], None]
        if self.trainer.accelerator.is_main_process:
            try:
                found = [checkpoints.candidates(asked, self.trainer.args.output_dir), None]
            except ResumeError as error:
                found = [[], str(error)]
        found, refused = broadcast_object_list(found)
        if refused:
            raise ResumeError(refused)
        self.saved_last, passed_over = self._first_whole(found)
        if passed_over and (str(asked).lower() != "true" or self.saved_last is None):
            raise ResumeError(checkpoints.not_whole(*passed_over[0], self.saved_last))
        for checkpoint, why in passed_over:
            self._warn(f"Skipped {checkpoint}: {why}. Training resumes from {self.saved_last}.")
        return str(self.saved_last)

    def _first_whole(self, candidates: list[Path]) -> tuple[Path | None, list[tuple[Path, str]]]:
        """Return the first intact checkpoint, and the ones before it with what is wrong with them.

        The first process of each machine checks the files, since machines may not share a disk.
        """
        passed_over = []
        for checkpoint in candidates:
            why = ""
            if self.trainer.accelerator.is_local_main_process:
                why = checkpoints.problem(checkpoint, allow_missing=self.trainer.args.allow_inexact_resume)
            if not (why := next(filter(None, gather_object([why])), "")):
                return checkpoint, passed_over
            passed_over.append((checkpoint, why))
        return None, passed_over

    def check(self, checkpoint: str) -> None:
        """Check that the checkpoint contains the training state, without which transformers starts at step 0.

        Raises:
            ResumeError: the state is missing, and `allow_inexact_resume` is not set.
        """
        deepspeed = self.trainer.is_deepspeed_enabled
        parts = {
            "optimizer and learning-rate schedule": ("optimizer*", "scheduler.pt"),
            "random states": ("rng_state*.pth",),
        }
        if deepspeed:
            parts["optimizer and learning-rate schedule"] = ("global_step*",)
        lacks = [part for part, names in parts.items() if not all(any(Path(checkpoint).glob(name)) for name in names)]
        lacks = list(dict.fromkeys(part for lacking in gather_object([lacks]) for part in lacking))
        if lacks and self.trainer.args.allow_inexact_resume and not deepspeed:
            self._warn(f"{checkpoint} lacks training state ({', '.join(lacks)}), which starts from scratch.")
        elif lacks:
            anew = "" if deepspeed else ". Or resume without the missing state: --allow_inexact_resume true"
            raise ResumeError(
                f"{checkpoint} contains a model, but lacks training state ({', '.join(lacks)}). It was saved with "
                "save_only_model or with another backend (DeepSpeed, FSDP), or it was not copied completely. Instead, "
                f"{_new_run(checkpoint)}{anew}"
            )

    def restore(self, checkpoint: str, max_steps: int) -> None:
        """Restore what the checkpoint stores for this process, or warn about what is missing.

        All processes make the same decision.

        Raises:
            ResumeError: the checkpoint does not match this run.
        """
        trainer, args, device = self.trainer, self.trainer.args, self.trainer.accelerator.device
        file = _file(checkpoint, trainer.accelerator.process_index)
        own = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
        saved = gather_object([_Saved.of(own, self._reads())])
        now = broadcast_object_list([self._settings(max_steps)])[0]
        first = next(filter(None, saved), None)
        if first is None:
            lacks = f"{checkpoint} has no {file.name}: it was not saved by KTAEGRPOTrainer, or the file was lost"
            effect = "training starts with a new generation, so it will not match the original run exactly"
            if not args.allow_inexact_resume:
                raise ResumeError(f"{lacks}. To resume anyway, add --allow_inexact_resume true: {effect}")
            self._warn(f"{lacks}. Therefore {effect}.")
            return
        changes = Changes(first.settings, now)
        _check_changes(checkpoint, changes, args.ignore_data_skip)
        inside = any(one and one.holds_rollouts for one in saved)
        incomplete = inside and None in saved and args.allow_inexact_resume
        if incomplete:
            self._warn(f"{checkpoint} lacks the rollouts of a process, so training starts with a new generation.")
        elif inside:
            _check_rollouts(checkpoint, changes, saved, first, trainer.token_credit.how)
        if notes := list(changes.notes()):
            self._warn("\n  ".join([f"Settings have changed since {checkpoint} was saved:", *notes]))
        if not changes.among(LAYOUT) and not incomplete:
            trl_seam.take_up(trainer, trl_seam.Place(first.step, send_to_device(own and own["rollouts"], device)))
        learned = next(filter(None, gather_object([own and own.get("credit")])), None)
        if learned and first.settings.get("credit") == args.credit:
            trainer.token_credit.method.restore(send_to_device(learned, device))
        elif trainer.token_credit.state():
            self._warn(f"{checkpoint} holds nothing that credit: {args.credit} learned, so it learns from scratch.")
        if trainer.dynamic_sampling and first.prompts and not args.ignore_data_skip:
            trainer.dynamic_sampling.restore(first.prompts)
            kept = own and own.get("kept")  # not in checkpoints of an earlier version
            if args.dynamic_sampling_reuse and None not in saved and not changes.refused("inside a generation cycle"):
                trainer.dynamic_sampling.restore_kept(send_to_device(kept, device))
            elif kept:
                self._warn(f"The {len(kept['indices'])} groups that {checkpoint} kept for the next batch are dropped.")

    def place(self, checkpoint: str, max_steps: int, epochs: int, epoch: int, batches: int) -> tuple[int, int]:
        """Return the position to resume the training prompts from: the epoch and its number of finished batches.

        Args:
            max_steps, epochs: number of steps and epochs of this run.
            epoch, batches: the position that transformers computes.
        """
        trainer = self.trainer
        if trainer.state.global_step >= max_steps:
            return epochs, 0  # transformers would train one more step
        if not isinstance(trainer.train_dataset, Dataset):
            # transformers treats all steps so far as one pass over the stream. Its `epoch` does count the passes, as if
            # each had `max_steps` steps.
            saved = TrainerState.load_from_json(Path(checkpoint, checkpoints.STATE))
            epoch, part = divmod(saved.epoch, 1)
            steps = 0 if trainer.args.ignore_data_skip else round(part * saved.max_steps)
            return int(epoch), steps * trainer.args.gradient_accumulation_steps
        for _ in range(epoch):  # each finished epoch drew a permutation
            next(iter(self.sampler), None)
        return epoch, batches

    def _reads(self) -> dict[str, str]:
        """Return the rollout fields that the loss reads only under certain settings, with a phrase for the setting."""
        trainer = self.trainer
        needs = {"ref_per_token_logps": f"beta is {trainer.beta}"} if trainer.beta else {}
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            needs["importance_sampling_ratio"] = "vllm_importance_sampling_correction is true"
        return needs

    def _settings(self, max_steps: int) -> dict:
        """Return this run's values of the settings that `ktae_trl.training.changes` compares."""
        trainer = self.trainer
        if self._fingerprint is None:
            self._fingerprint = fingerprint(trainer.train_dataset)
        recipe = {"overlong_buffer": trainer.recipe.get("overlong_buffer", "the default")} if trainer.recipe else {}
        known = vars(trainer.args) | recipe | self._fingerprint | own_settings(trainer.args)
        if not trainer.shuffle_dataset:
            known.pop("seed")  # has no effect: random states come from the checkpoint
        known |= {
            "max_steps": max_steps,
            "num_processes": trainer.accelerator.num_processes,
            "num_iterations": trainer.num_iterations,
            "num_generations": trainer.num_generations,
            "reward_funcs": trainer.reward_func_names,
            "shuffle_dataset": trainer.shuffle_dataset,
        }
        # As plain JSON values without enums and tuples, for `torch.load(weights_only=True)`.
        return json.loads(json.dumps({name: known[name] for name in SETTINGS if name in known}, default=str))

    def _warn(self, message: str) -> None:
        if self.trainer.accelerator.is_main_process:
            logger.warning(message)


def _check_changes(checkpoint: str, changes: Changes, ignore_data_skip: bool) -> None:
    if problem := changes.refused("always"):
        raise ResumeError(
            f"{checkpoint} does not match this run: {problem}. An optimizer cannot use the state of another one. Undo "
            f"the change, or {_new_run(checkpoint)}"
        )
    if (problem := changes.refused("unless ignore_data_skip")) and not ignore_data_skip:
        raise ResumeError(
            f"The training prompts or their order have changed since {checkpoint} was saved: {problem}. To resume at "
            "the same position, undo the change. To train on the new prompts from the first one of the epoch, add "
            f"--ignore_data_skip true. Or {_new_run(checkpoint)}"
        )


def _check_rollouts(checkpoint: str, changes: Changes, saved: list, first: "_Saved", how: str | None) -> None:
    cycle = first.settings["steps_per_generation"] * first.settings["num_iterations"]
    other = (
        "resume from a checkpoint whose number of forward passes (optimizer steps x gradient_accumulation_steps) is a "
        f"multiple of {cycle}"
    )
    lacking = [f"{why}, but they have no {name}" for name, why in first.lacks.items()]
    if first.how not in (how, UNKNOWN):
        lacking.append(f"their credit is combined with the advantages by {first.how!r}, but this run uses {how!r}")
    if problem := changes.refused("inside a generation cycle") or ", ".join(lacking):
        raise ResumeError(
            f"{checkpoint} was saved inside a generation cycle, after {first.step} forward passes: {first.step} mod "
            f"{cycle} (steps_per_generation x num_iterations) = {first.step % cycle}. It contains rollouts still to be "
            f"trained on, which do not match this run: {problem}. Resume with the same settings, or {other}"
        )
    if missing := [_file(checkpoint, i) for i, one in enumerate(saved) if one is None]:
        raise ResumeError(
            f"{missing[0]} is missing. It contains the rollouts that this process still has to train on. Copy the "
            f"complete checkpoint, or {other}"
        )


UNKNOWN = "unknown"


class _Saved(NamedTuple):
    """The content of a process's file in a checkpoint, without the rollouts themselves."""

    step: int  # forward passes so far
    prompts: dict | None  # state of dynamic sampling
    settings: dict
    holds_rollouts: bool
    lacks: dict[str, str]  # rollout fields that this run reads and the file lacks: see `Resume._reads`
    how: str | None  # how credit is combined with the advantages; or UNKNOWN

    @classmethod
    def of(cls, file: dict | None, reads: dict[str, str]) -> "_Saved | None":
        if file is None:
            return None
        rollouts = file["rollouts"]
        lacks = {name: why for name, why in reads.items() if rollouts and name not in rollouts[0]}
        settings = file["settings"] if "settings" in file else _settings_of_0_1(file)
        return cls(file["step"], file["prompts"], settings, rollouts is not None, lacks, file.get("how", UNKNOWN))


def _settings_of_0_1(file: dict) -> dict:
    stream = file["prompts"]
    settings = {**file["layout"], "dynamic_sampling": stream is not None}
    if stream is not None:
        settings |= {ROWS: stream["size"], "seed": stream["seed"], "shuffle_dataset": stream["shuffle"]}
    return settings


def _new_run(checkpoint: str) -> str:
    if any(Path(checkpoint).glob("model*.safetensors")):
        how = f"--model_name_or_path {checkpoint}"
    else:  # an adapter, or shards (DeepSpeed, FSDP)
        how = f"ktae merge {checkpoint} -o FOLDER, then --model_name_or_path FOLDER"
    return f"start a new run from the checkpoint's model ({how}, without resume_from_checkpoint)"


def _file(checkpoint: str | Path, process_index: int) -> Path:
    return Path(checkpoint, f"rollouts_{process_index}.pt")
