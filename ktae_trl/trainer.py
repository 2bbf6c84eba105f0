"""`KTAEGRPOTrainer`: TRL's `GRPOTrainer` with an advantage per token. Hooks only; the mathematics is in `credit`."""

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer
from trl.import_utils import is_vllm_available

from ktae_trl.arguments import NotImportedError, UserError
from ktae_trl.config import KTAEGRPOConfig
from ktae_trl.credit import find_method
from ktae_trl.credit.combine import combine
from ktae_trl.credit.method import Card
from ktae_trl.data.columns import free_names
from ktae_trl.files.checkpoints import remove_unfinished
from ktae_trl.files.lock import FolderInUseError, locked
from ktae_trl.files.model_files import HELD_OUT
from ktae_trl.hub import saving
from ktae_trl.rewards import SHAPING, bind, checked, opens_think, reads_answers, texts_of
from ktae_trl.rollouts import dynamic
from ktae_trl.rollouts.credited import TokenCredit
from ktae_trl.rollouts.verdicts import Verdicts, correctness_index, verdicts
from ktae_trl.training.batches import Batches
from ktae_trl.training.console import print_sample
from ktae_trl.training.first_look import FirstLook
from ktae_trl.training.guard import Guard, check_rewards, or_nan
from ktae_trl.training.recorder import Recorder
from ktae_trl.training.resume import ExactResume
from ktae_trl.training.trackers import send_sample
from ktae_trl.trl_seam import check_trl

check_trl(GRPOTrainer)
logger = logging.getLogger(__name__)


class KTAEGRPOTrainer(ExactResume, GRPOTrainer):
    """
    GRPO in which each token of a completion gets its own advantage.

    A drop-in for TRL's `GRPOTrainer`: the same arguments, with a `KTAEGRPOConfig` in place of the `GRPOConfig`. After
    each generation the credit method (`args.credit`) looks at the whole groups, right and wrong rollouts together, and
    values every token; the loss then combines the rollout advantages with these values. With `credit="none"` it is
    TRL's GRPO, bit for bit.

    A resumed run trains exactly as one that was not interrupted, at any optimizer step and in any epoch, also of a
    stream (stock TRL regenerates in the middle of a generation cycle and replays the first epoch's order). Each
    checkpoint therefore holds, per process, the rollouts that are still to be trained on, and the settings that shape
    training: a changed one is named, with what is in effect, or refused (`ktae_trl.training.changes`). Not restored:
    the state of a vLLM sampler, and a reference model changed by `sync_ref_model`.

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

    resumed_from: str | None = None  # the checkpoint that the last training resumed from

    def __init__(self, model, reward_funcs=None, args: KTAEGRPOConfig | None = None, *positional, **kwargs):
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = KTAEGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-KTAE")
        if not isinstance(args, KTAEGRPOConfig):
            raise TypeError(
                f"args must be a KTAEGRPOConfig, which takes the same arguments, not a {type(args).__name__}"
            )
        card = find_method(args.credit).card or Card(GRPOTrainer._name)
        self._tag_names, self._name = [*GRPOTrainer._tag_names, *card.tags], card.name
        self._paper, self._does = card.paper or GRPOTrainer._paper, card.does
        if args.use_vllm and not is_vllm_available():
            raise NotImportedError(
                "use_vllm is set, but vLLM is not installed. Install it, for GPUs: pip install 'ktae-trl[vllm]'. "
                "Or set use_vllm to false, to generate with transformers"
            )
        super().__init__(model, reward_funcs, args, *positional, **kwargs)
        self.train_dataset = _with_free_names(self.train_dataset)
        self.eval_dataset = _with_free_names(self.eval_dataset)
        if isinstance(self.train_dataset, Dataset):
            Batches.of(args, self.accelerator.num_processes).check_prompts(len(self.train_dataset))

        self._opened_think = opens_think(self._tokenizer, self.chat_template, self.chat_template_kwargs)
        settings = {
            "answer_format": args.answer_format,
            "opened_think": self._opened_think,
            "grading_budget": args.grading_budget,
        }
        self.reward_funcs = [bind(function, **settings) for function in self.reward_funcs]
        names = self.reward_func_names
        self._correctness_index = i = correctness_index(names, args.correctness_reward)
        if args.correctness_reward is None and names[0] in SHAPING:
            logger.warning(
                "%s decides which rollouts are right, because it comes first, but it only shapes the reward. Set "
                "correctness_reward to the function that says what is right",
                names[0],
            )
        self._first_look = FirstLook(args, names[i], reads_answers(self.reward_funcs[i]))
        self.reward_funcs = [
            function if isinstance(function, torch.nn.Module) else checked(function, name, args.reward_timeout)
            for function, name in zip(self.reward_funcs, names, strict=True)
        ]
        self.token_credit = TokenCredit(args, self)
        self._chosen_rewards: Tensor | None = None  # set while the parent runs on rollouts that dynamic sampling chose
        self._prompt_stream = self._make_prompt_stream() if args.dynamic_sampling else None
        self._warned_of_filling = False
        self._recorder = Recorder(args, names, self._tokenizer, self.token_credit.special_ids, self.accelerator)
        self.add_callback(self._recorder)
        if args.credit != "none" and args.num_completions_to_print is None:
            self.num_completions_to_print = 0  # `log_completions` shows key tokens instead of all completions

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        with self._own_folder():
            self.resumed_from = self.checkpoint_to_resume(resume_from_checkpoint)
            self._saved_last = self.resumed_from and Path(self.resumed_from)
            self._guard = Guard(says_so=self.is_world_process_zero())
            if self.is_world_process_zero():
                remove_unfinished(self.args.output_dir)
                Path(self.args.output_dir, HELD_OUT).unlink(missing_ok=True)  # of the model before
            return super().train(self.resumed_from, *args, **kwargs)

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """Hold `output_dir`; raise FolderInUseError on all processes if another training holds it."""
        with ExitStack() as stack:
            refused = [None]
            if self.accelerator.is_main_process:
                try:
                    stack.enter_context(locked(self.args.output_dir, "a training"))
                except (FolderInUseError, OSError) as error:
                    refused = [str(error)]
            if said := broadcast_object_list(refused)[0]:
                raise FolderInUseError(said)
            yield

    @property
    def correctness_reward(self) -> str:
        """Return the name of the reward function that says what is right."""
        return self.reward_func_names[self._correctness_index]

    def judge(self, rows: list[dict], completion_ids: list[list[int]]) -> Tensor:
        """Return the correctness reward of the completions of all processes: see `TrainerTools.rewards`."""
        return self.token_credit.tools.rewards(rows, completion_ids)

    # Credit: look at whole groups after each generation, combine in the loss.

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # (rollouts of all processes, reward functions); the advantages that TRL makes of them are a weighted sum, which
        # does not say which answers are right.
        rewards = self._chosen_rewards
        if rewards is None:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            check_rewards(rewards, self.reward_func_names)
        self._gathered_rewards, self._graded_rows = rewards, inputs
        return rewards

    def _generate_and_score_completions(self, inputs):
        if self._prompt_stream is not None and self.model.training:
            batch = self._sample_informative_groups()
        else:
            batch = super()._generate_and_score_completions(inputs)
        judged = self._verdicts()
        for name, value in judged.metrics().items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        stats = self.token_credit.add_to(batch, self._graded_rows, judged)
        if self.model.training:
            how = self.token_credit.how
            self._recorder.look(self.state.global_step + 1, batch, self._gathered_rewards, *judged, how)
            if self.is_world_process_zero():
                rewards = self._correctness_rewards()
                completions = list(self._logs["completion"])[-rewards.numel() :]  # TRL gathers them
                cut_off = self._metrics["train"]["completions/clipped_ratio"][-1]
                texts = texts_of(completions, list(self._logs["prompt"])[-rewards.numel() :], self._opened_think)
                self._first_look.look(rewards, judged, texts, cut_off, stats)
        return batch

    def _verdicts(self) -> Verdicts:
        """Return which rollouts are right, and which could be judged, for the groups of all processes."""
        return verdicts(self._correctness_rewards(), self.args.correctness_threshold)

    def _correctness_rewards(self) -> Tensor:
        return self._gathered_rewards[:, self._correctness_index].view(-1, self._group_size())

    def log(self, logs, start_time=None):
        self._first_look.before_log()
        super().log(logs, start_time)
        if sample := self._recorder.take_sample():
            print_sample(sample, self.state.global_step)
            send_sample(sample, self.state.global_step, self.callback_handler)

    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _compute_loss(self, model, inputs):
        if "credit" in inputs:
            advantages = combine(inputs["advantages"], inputs["credit"], self.token_credit.how)
            inputs = {**inputs, "advantages": advantages}  # a new dict: buffered batches are used again
        return or_nan(super()._compute_loss(model, inputs))

    # What is not finite: see `ktae_trl.training.guard`.

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # The loss scaler of fp16 skips steps itself, in the beginning many in a row.
        if self.accelerator.mixed_precision != "fp16" and not self._guard.allows(self.state.global_step + 1, grad_norm):
            # Weights without a gradient are left alone by optimizers. DeepSpeed has skipped the step already.
            self.optimizer.zero_grad(set_to_none=True)
            self._metrics["train"]["skipped_steps"] = [self._guard.skipped]
        return grad_norm

    def save_model(self, output_dir=None, _internal_call=False):
        self._check_weights(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _generate(self, prompts):
        with self.token_credit.sampling():
            return super()._generate(prompts)

    # Dynamic sampling: generate and grade until the batch is full, then let the parent run once on what was chosen.

    def _make_prompt_stream(self) -> dynamic.PromptStream:
        data = self.train_dataset
        if not isinstance(data, Dataset):
            raise UserError(
                f"dynamic_sampling draws prompts by their number, which a {type(data).__name__} does not have: "
                "load the dataset without streaming"
            )
        names, named = self.reward_func_names, self.args.correctness_reward
        if named is None and len(names) > 1:
            problem = f"There are several: {', '.join(names)}. Set correctness_reward"
        elif (named or names[0]) in SHAPING:
            problem = f"{named or names[0]!r} only shapes the reward. Add one such as math_accuracy, and name it"
        else:
            problem = None
        if problem:
            raise UserError(f"dynamic_sampling needs a reward function that says which rollouts are right. {problem}")
        if self.tools or self.environment_factories or {"image", "images"} & set(data.column_names):
            raise UserError("dynamic_sampling does not go with tools, environments or images")
        return dynamic.PromptStream(len(data), self.args.seed, self.shuffle_dataset)

    def _sample_informative_groups(self) -> dict[str, Tensor]:
        """Return the parent's batch for groups with right and wrong rollouts, whatever the dataloader has drawn."""
        stream, G = self._prompt_stream, self.num_generations
        begin, groups = stream.position, self.args.generation_batch_size // G
        chosen = dynamic.sample(self._roll_out, stream, groups, self.args.dynamic_sampling_max_batches)
        rollouts = chosen.rollouts(self.accelerator.process_index)
        self._log_sampling(chosen, rollouts, begin)
        first = self.accelerator.process_index * len(rollouts)
        inputs = self._rows([chosen.indices[row // G] for row in range(first, first + len(rollouts))])
        # TRL's own way to bring rollouts along; metrics, log-probabilities and the rest are the parent's as ever.
        original, self.rollout_func = self.rollout_func, lambda prompts, trainer: _as_rollout_output(rollouts)
        self._chosen_rewards = chosen.rewards
        for column in {name for rollout in rollouts for name in rollout["extra_logs"]}:
            self._pending_extra_logs[column] = [rollout["extra_logs"].get(column) for rollout in rollouts]
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.rollout_func, self._chosen_rewards = original, None

    def _roll_out(self, indices: list[int]) -> dynamic.Generation:
        """Generate and grade a group for each of these prompts. TRL's metrics and counters do not see it."""
        G, processes = self.num_generations, self.accelerator.num_processes
        B = len(indices) * G // processes
        begin = self.accelerator.process_index * B
        inputs = self._rows([indices[row // G] for row in range(begin, begin + B)])
        prompts = [row["prompt"] for row in inputs]
        metrics, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        tokens = self.state.num_input_tokens_seen
        try:
            prompt_ids, completion_ids, mask, completions, logprobs, extra_fields, images, _ = self._generate(prompts)
        finally:
            self._metrics["train"], self.state.num_input_tokens_seen = metrics, tokens
        if images is not None:
            raise UserError("dynamic_sampling does not go with images, which some prompts hold")
        for name, values in extra_fields.items():  # of a rollout_func, for the reward functions
            for i, row in enumerate(inputs):
                if not isinstance(values, list):
                    row[name] = values
                elif i < len(values):
                    row[name] = values[i]
        rewards = self._calculate_rewards(inputs, prompts, completions, completion_ids)
        # Columns that reward functions log go with their rollouts. What they log with `log_metric` is for the whole
        # generation: it stays, and the parent averages it over the generations.
        columns = {name: list(values) for name, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()
        for name, values in columns.items():
            if len(values) != B:
                raise UserError(f"A reward function logged {len(values)} values of {name!r} for {B} completions")
        return dynamic.Generation(
            indices=indices,
            rollouts=[
                {
                    "prompt_ids": prompt_ids[i],
                    "completion_ids": completion_ids[i],
                    "logprobs": None if logprobs is None else logprobs[i],
                    "env_mask": None if mask is None else mask[i],
                    "extra_logs": {name: values[i] for name, values in columns.items()},
                }
                for i in range(B)
            ],
            rewards=rewards,
            verdicts=self._verdicts(),
        )

    def _rows(self, indices: list[int]) -> list[dict]:
        once = {index: self.train_dataset[index] for index in dict.fromkeys(indices)}
        return [copy.deepcopy(once[index]) for index in indices]  # a reward function may change its row

    def _log_sampling(self, chosen: dynamic.Selection, rollouts: list[dict], begin: int) -> None:
        stream, metrics = self._prompt_stream, self._metrics["train"]
        for name, value in chosen.metrics().items():
            metrics[name].append(value)
        # Where the run is, so no mean over the steps of a log.
        metrics["dynamic_sampling/prompts"] = [stream.position]
        metrics["dynamic_sampling/epoch"] = [stream.position / stream.size]
        generated = [rollout for generation in chosen.generations for rollout in generation.rollouts]
        tokens = [sum(len(rollout["completion_ids"]) for rollout in some) for some in (rollouts, generated)]
        trained, all_of_them = self.accelerator.reduce(torch.tensor(tokens, device=self.accelerator.device)).tolist()
        metrics["dynamic_sampling/discarded_tokens"].append(1 - trained / all_of_them)
        if not self.accelerator.is_main_process:
            return
        if stream.position // stream.size > begin // stream.size:
            logger.warning(
                "Dynamic sampling has drawn all %d training prompts at optimizer step %d and begins anew: pass %d.",
                stream.size,
                self.state.global_step,
                stream.position // stream.size + 1,
            )
        if chosen.filled and not self._warned_of_filling:
            self._warned_of_filling = True
            logger.warning(
                "Dynamic sampling found %d informative groups of %d in %d generations (the most that "
                "dynamic_sampling_max_batches allows) and filled the batch with groups that are all right or all "
                "wrong, which teach nothing. The problems may be too easy or too hard for the model: see the metrics "
                "dynamic_sampling/filled, all_right and all_wrong. This is said once.",
                len(chosen.groups) - chosen.filled,
                len(chosen.groups),
                len(chosen.generations),
            )

    # Saving and the Hub: see `ktae_trl.hub.saving`.

    recipe: dict = {}  # a recipe's settings of data and model, for the model card
    save_whole_model = saving.save_whole_model
    save_all = saving.save_all
    upload = saving.upload
    push_to_hub = saving.push_to_hub
    init_hf_repo = saving.init_hf_repo

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if self.is_world_process_zero():
            card = Card(name=self._name, does=self._does, tags=self._tag_names, paper=self._paper)
            tags = [tags] if isinstance(tags, str) else tags or []
            saving.write_card(self, card, model_name, dataset_name, tags)

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
        with saving.own_uploads(self):
            super()._push_from_checkpoint(checkpoint_folder)


def _with_free_names(dataset):
    """Return a dataset, or several by name, without columns that TRL would stumble over; a stream stays as it is."""
    if isinstance(dataset, dict):
        return {name: _with_free_names(part) for name, part in dataset.items()}
    return free_names(dataset) if isinstance(dataset, Dataset) else dataset


def _as_rollout_output(rollouts: list[dict]) -> dict[str, list | None]:
    """Return what a `rollout_func` of TRL returns."""
    output = {name: [rollout[name] for rollout in rollouts] for name in ("prompt_ids", "completion_ids", "logprobs")}
    if output["logprobs"][0] is None:
        output["logprobs"] = None
    if rollouts[0]["env_mask"] is not None:
        output["env_mask"] = [rollout["env_mask"] for rollout in rollouts]
    return output
