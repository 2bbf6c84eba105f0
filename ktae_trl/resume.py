"""The part of `KTAEGRPOTrainer` that resumes exactly: a process's place in the generation cycle and in the prompts."""

import os
import warnings

import torch
from accelerate.utils import broadcast_object_list, send_to_device


class ExactResume:
    """Checkpoints of a TRL trainer that also hold, per process, the rollouts still to be trained on."""

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        torch.save(
            {
                "step": self._step,
                "layout": self._layout(),
                "how": self._credit_how,
                "rollouts": self._buffered_inputs if self._step % self._cycle() else None,
                "prompts": self._prompt_stream and self._prompt_stream.state(),
            },
            self._rollouts_file(output_dir, self.accelerator.process_index),
        )
        # The first process goes on to write trainer_state.json: a checkpoint that has one has all its files.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restore_sampler()
            self._restore_stream(checkpoint)
            self._restore_rollouts(checkpoint)

    def _restore_sampler(self) -> None:
        sampler = getattr(self, "_train_sampler", None)  # an iterable dataset has none
        if sampler is not None and sampler.shuffle:
            for _ in range(int(self.state.epoch)):  # each past epoch drew one permutation
                torch.randperm(sampler.num_samples, generator=sampler.generator)

    def _restore_stream(self, checkpoint: str) -> None:
        if self._prompt_stream is None:
            return
        # The first process says where it is: all must draw the same prompts, also where files were lost.
        path, state = self._rollouts_file(checkpoint, 0), [None]
        if self.accelerator.is_main_process and os.path.exists(path):
            state = [torch.load(path, map_location="cpu", weights_only=True)["prompts"]]
        self._prompt_stream.restore(broadcast_object_list(state)[0])

    def _restore_rollouts(self, checkpoint: str) -> None:
        path = self._rollouts_file(checkpoint, self.accelerator.process_index)
        first = self._rollouts_file(checkpoint, 0)  # to compare with, if this process has none of its own
        if not os.path.exists(first) and not os.path.exists(path):
            warnings.warn(
                f"{checkpoint} holds no {os.path.basename(path)}, so it was not saved by KTAEGRPOTrainer: this run "
                "starts a new generation cycle and will not repeat the original one exactly.",
                stacklevel=2,
            )
            return
        own = os.path.exists(path)
        saved = torch.load(path if own else first, map_location="cpu", weights_only=True)
        layout, here = saved["layout"], self._layout()
        cycle = layout["steps_per_generation"] * layout["num_iterations"]
        if layout == here and (own or saved["rollouts"] is None):
            self._step = saved["step"]
            self._buffered_inputs = send_to_device(saved["rollouts"], self.accelerator.device)
            self._credit_how = saved["how"]
        elif layout == here:
            raise FileNotFoundError(
                f"{path} is missing: the rollouts that this process had still to train on. Copy the checkpoint whole, "
                f"or resume from one whose forward passes are a multiple of {cycle}."
            )
        elif saved["rollouts"] is not None:
            raise ValueError(
                f"{checkpoint} lies inside a generation cycle: {saved['step']} forward passes were done, and "
                f"{saved['step']} mod {cycle} (steps_per_generation x num_iterations) = {saved['step'] % cycle}. Its "
                f"rollouts were made for {layout}, but this run has {here}. Resume with the same settings, or from a "
                f"checkpoint whose forward passes are a multiple of {cycle} (optimizer steps x "
                "gradient_accumulation_steps)."
            )
        else:
            warnings.warn(
                f"{checkpoint} was made with {layout}, this run has {here}: it starts with a new generation and will "
                "not repeat the original one exactly.",
                stacklevel=2,
            )

    def _layout(self) -> dict[str, int | str]:
        """Return the settings that decide what a buffered batch holds and when it is used up."""
        return {
            "num_processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
            "num_generations": self.num_generations,
            "credit": self.args.credit,
        }

    def _cycle(self) -> int:
        """Return the forward passes from one generation to the next."""
        return self.args.steps_per_generation * self.num_iterations

    @staticmethod
    def _rollouts_file(checkpoint: str, process_index: int) -> str:
        return os.path.join(checkpoint, f"rollouts_{process_index}.pt")
