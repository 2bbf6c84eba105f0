"""`KTAEGRPOTrainer`: TRL's `GRPOTrainer` with an advantage for each token. The mathematics is in `credit`."""

from pathlib import Path

from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer
from trl.import_utils import is_vllm_available

from ktae_trl import trl_seam
from ktae_trl.arguments import NotImportedError, pip_install
from ktae_trl.config import KTAEGRPOConfig
from ktae_trl.credit import find_method
from ktae_trl.credit.combine import combine
from ktae_trl.data.columns import with_free_names
from ktae_trl.files import checkpoints
from ktae_trl.hub import saving
from ktae_trl.rewards import for_run, opens_think, reads_answers
from ktae_trl.rollouts import dynamic
from ktae_trl.rollouts.credited import TokenCredit
from ktae_trl.rollouts.verdicts import Verdicts, correctness_index, verdicts
from ktae_trl.training.batches import Batches
from ktae_trl.training.console import print_sample, show_metrics
from ktae_trl.training.first_look import FirstLook
from ktae_trl.training.folder import own_folder, remove_leftovers
from ktae_trl.training.guard import Guard, check_rewards, or_nan, require_finite
from ktae_trl.training.recorder import RECORDED, Recorder
from ktae_trl.training.resume import Resume
from ktae_trl.training.trackers import send_sample


class KTAEGRPOTrainer(GRPOTrainer):
    """
    GRPO with an advantage for each token of a completion.

    It replaces TRL's `GRPOTrainer` and takes the same arguments, with a `KTAEGRPOConfig` instead of a `GRPOConfig`.
    After each generation, the credit method (`args.credit`) computes a value for every token from whole groups of
    correct and wrong rollouts. The loss combines these values with the rollout advantages. With `credit="none"`, the
    trainer is identical to TRL's, bit for bit.

    A resumed run trains exactly like an uninterrupted one, from any optimizer step and epoch, with streamed datasets
    too. (When TRL's trainer resumes within a generation cycle, it generates new rollouts, and it repeats the prompt
    order of the first epoch.) For this, each checkpoint stores the rollouts of each process that are still to be
    trained on, and the settings that affect training. When a run resumes with a changed setting, the setting is
    reported with the value in effect, or refused (`ktae_trl.training.changes`). The state of a vLLM sampler and a
    reference model updated by `sync_ref_model` are not restored.

    Example:

    ```python
    from datasets import load_dataset
    from ktae_trl import KTAEGRPOConfig, KTAEGRPOTrainer
    from ktae_trl.data import to_prompts
    from ktae_trl.rewards import math_accuracy

    trainer = KTAEGRPOTrainer(
        model="Qwen/Qwen2.5-Math-1.5B",
        reward_funcs=math_accuracy,
        args=KTAEGRPOConfig(output_dir="qwen-ktae"),
        train_dataset=to_prompts(load_dataset("agentica-org/DeepScaleR-Preview-Dataset", split="train")),
    )
    trainer.train()
    ```
    """

    resumed_from: str | None = None  # the checkpoint from which the last call of `train` resumed

    def __init__(self, model, reward_funcs=None, args: KTAEGRPOConfig | None = None, *positional, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else trl_seam.model_name(model)
            args = KTAEGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-KTAE")
        if not isinstance(args, KTAEGRPOConfig):
            raise TypeError(
                f"args must be a KTAEGRPOConfig, not a {type(args).__name__}. KTAEGRPOConfig takes the same arguments"
            )
        self._tag_names = [*GRPOTrainer._tag_names, *find_method(args.credit).card.tags]  # tags of the model card
        if args.use_vllm and not is_vllm_available():
            raise NotImportedError(
                f"use_vllm is true, but vLLM is not installed. Install it (GPU only): {pip_install('vllm')}. "
                "Or set use_vllm to false to generate with transformers"
            )
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        trl_seam.check_loss_type(self)
        trl_seam.need("training", self)
        if args.push_to_hub:
            trl_seam.need("push_to_hub", self)
        self.train_dataset, self.eval_dataset = map(with_free_names, (self.train_dataset, self.eval_dataset))
        if isinstance(self.train_dataset, Dataset):
            Batches.of(args, self.accelerator.num_processes).check_prompts(len(self.train_dataset))

        names, tokenizer = self.reward_func_names, trl_seam.tokenizer_of(self)
        self._correctness_index = i = correctness_index(names, args.correctness_reward)
        opened_think = opens_think(tokenizer, self.chat_template, self.chat_template_kwargs)
        self.reward_funcs = for_run(self.reward_funcs, names, args, opened_think)
        self._first_look = FirstLook(args, names[i], reads_answers(self.reward_funcs[i]), opened_think)
        self.token_credit = TokenCredit(args, self)
        self.dynamic_sampling = dynamic.in_trainer(self, self._judged) if args.dynamic_sampling else None
        self._chosen_rewards: Tensor | None = None  # rewards of the rollouts chosen by dynamic sampling
        self._resume = Resume(self)
        self._recorder = Recorder(self, names)
        self.add_callback(self._recorder)
        if args.console:
            show_metrics(self)
        if args.credit != "none" and args.num_completions_to_print is None:
            self.num_completions_to_print = 0  # `log_completions` shows token values instead

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        with own_folder(self.args.output_dir, self.accelerator):
            if self.args.save_strategy != "no" or checkpoints.wants_to_resume(resume_from_checkpoint):
                trl_seam.need("checkpoints", self)
            self.resumed_from = self._resume.find(resume_from_checkpoint)
            if self.is_world_process_zero():
                remove_leftovers(self.args.output_dir)
            self._guard = Guard(says_so=self.is_world_process_zero())
            return super().train(self.resumed_from, *args, **kwargs)

    @property
    def correctness_reward(self) -> str:
        """Return the name of the reward function that decides which rollouts are correct."""
        return self.reward_func_names[self._correctness_index]

    def judge(self, rows: list[dict], completion_ids: list[list[int]]) -> Tensor:
        """Return the correctness reward of the completions of all processes: see `TrainerTools.rewards`."""
        return self.token_credit.tools.rewards(rows, completion_ids)

    # Credit: computed from whole groups after each generation, combined with the advantages in the loss.

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # (rollouts of all processes, reward functions). Correctness comes from one of the functions, whereas TRL's
        # advantages come from the weighted sum of all.
        rewards = self._chosen_rewards
        if rewards is None:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            check_rewards(rewards, self.reward_func_names)
        self._gathered_rewards, self._graded_rows = rewards, inputs
        return rewards

    def _generate_and_score_completions(self, inputs):
        if self.dynamic_sampling and self.model.training:
            chosen = self.dynamic_sampling.batch(self.state.global_step)
            trl_seam.log_metrics(self, chosen.metrics)
            trl_seam.log_state(self, chosen.state)
            with (
                trl_seam.rollouts_given(self, chosen.rollouts),
                trl_seam.changed(self, _chosen_rewards=chosen.rewards),
            ):
                batch = super()._generate_and_score_completions(chosen.rows)
            batch |= dynamic.older_logps(chosen.rollouts, batch["completion_ids"])
        else:
            batch = super()._generate_and_score_completions(inputs)
        rewards, judged = self._gathered_rewards, self._judged(self._gathered_rewards)
        trl_seam.log_metrics(self, judged.metrics())
        sums = self.token_credit.add_to(batch, self._graded_rows, judged)
        if self.model.training:
            self._recorder.look(self.state.global_step + 1, batch, rewards, *judged, self.token_credit.how)
            if self.is_world_process_zero():
                texts = trl_seam.last_texts(self, len(rewards))
                cut_off = trl_seam.last_metric(self, "completions/clipped_ratio")
                self._first_look.look(self._correctness(rewards), judged, *texts, cut_off, sums)
        return batch

    def _correctness(self, rewards: Tensor) -> Tensor:
        G = self.num_generations if self.model.training else self.num_generations_eval
        return rewards[:, self._correctness_index].view(-1, G)

    def _judged(self, rewards: Tensor) -> Verdicts:
        """Return the verdicts for the groups of all processes."""
        return verdicts(self._correctness(rewards), self.args.correctness_threshold)

    def _generate(self, prompts):
        with self.token_credit.sampling():
            return super()._generate(prompts)

    def log(self, logs, start_time=None):
        self._first_look.before_log()
        super().log(logs, start_time)
        if sample := self._recorder.take_sample():
            print_sample(sample, self.state.global_step)
            send_sample(sample, self.state.global_step, self.callback_handler)

    def _compute_loss(self, model, inputs):
        recorded_B3 = inputs.pop(RECORDED, None)  # from the buffered batch: only the first pass over it is recorded
        if "credit" in inputs:
            advantages = combine(inputs["advantages"], inputs["credit"], self.token_credit.how)
            inputs = {**inputs, "advantages": advantages}  # a copy: the batch is buffered and reused
        older_BT = inputs.get(dynamic.OLDER)
        if older_BT is not None:
            inputs = {**inputs}
        with self._recorder.watching(inputs, recorded_B3), trl_seam.older_policy(self, inputs, older_BT):
            return or_nan(super()._compute_loss(model, inputs))

    # Non-finite gradients and weights: see `ktae_trl.training.guard`.

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # With fp16 the loss scaler skips such steps itself, often many in a row at first.
        if self.accelerator.mixed_precision != "fp16" and not self._guard.allows(self.state.global_step + 1, grad_norm):
            # Optimizers skip parameters without a gradient. DeepSpeed has already skipped the step.
            self.optimizer.zero_grad(set_to_none=True)
            trl_seam.log_state(self, {"skipped_steps": self._guard.skipped})
        return grad_norm

    def save_model(self, output_dir=None, _internal_call=False):
        together = self.is_deepspeed_enabled or self.is_fsdp_enabled
        require_finite(self.model, output_dir or self.args.output_dir, self.state.global_step, together=together)
        super().save_model(output_dir, _internal_call)

    # Checkpoints: see `ktae_trl.training.resume`.

    def _save_checkpoint(self, model, trial):
        folder = trl_seam.checkpoint_folder(self, trial)
        if folder != self._resume.saved_last:  # not already saved at this step
            with self._resume.saving(folder):
                super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, dataset=None):
        self._resume.sampler = super()._get_train_sampler(dataset)
        return self._resume.sampler

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial):
        if checkpoint is not None:
            self._resume.check(checkpoint)
        place = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, checkpoint, trial)
        if checkpoint is None:
            return place
        self._resume.restore(checkpoint, max_steps)
        return self._resume.place(checkpoint, max_steps, num_train_epochs, *place)

    # Saving and the Hub: see `ktae_trl.hub.saving`.

    recipe: dict = {}  # data and model settings of a recipe, for the model card
    save_whole_model = saving.save_whole_model
    save_all = saving.save_all
    upload = saving.upload
    push_to_hub = saving.push_to_hub
    init_hf_repo = saving.init_hf_repo

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            saving.write_card(self, model_name, dataset_name, tags)

    def _save(self, output_dir=None, state_dict=None):
        with saving.own_files(self, output_dir):
            super()._save(output_dir, state_dict)

    def save_metrics(self, split, metrics, combined=True):
        with saving.own_files(self):
            super().save_metrics(split, metrics, combined)

    def save_state(self):
        with saving.own_files(self):
            super().save_state()

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.args.should_save:  # so that the uploaded copy counts as complete
            checkpoints.seal(Path(checkpoint_folder))
        with saving.own_uploads(self):
            super()._push_from_checkpoint(checkpoint_folder)
