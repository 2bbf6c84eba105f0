"""Collects rollouts during training: for the records on disk and for the sample that `log_completions` shows."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from transformers import TrainerCallback

from ktae_trl import trl_seam
from ktae_trl.arguments import NotImportedError, UserError
from ktae_trl.credit.combine import combine
from ktae_trl.files.model_files import PAGE
from ktae_trl.report import records
from ktae_trl.report.tokens import token_strings

MOST = 100  # maximum number of records of a run
# Field of a batch, (B, 3): the step, group and rollout of each recorded row, and -1 for rows that are not recorded. It
# is shuffled, split and saved in checkpoints like the rest of the batch.
RECORDED = "recorded"
logger = logging.getLogger(__name__)


class Recorder(TrainerCallback):
    """
    Records the first generation in every `record_steps` optimizer steps, and every line of metrics.

    A run has at most `MOST` records; longer runs are recorded less often. A record has at most `record_groups` groups.
    Groups with a more even split of correct and wrong rollouts are chosen first. With `log_completions`, the first
    process also keeps the most evenly split group of the newest generation to show it.

    A record is written after the generation. When the loss passes over its rows for the first time, the numbers that
    TRL computes for each token (`trl_seam.numbers_in_loss`) are kept, and added to the record after the optimizer step.
    """

    def __init__(self, trainer, reward_names: list[str]):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.tokenizer, credit = trl_seam.tokenizer_of(trainer), trainer.token_credit
        self.method, self.special_ids = credit.shown, credit.special_ids
        # Functions with the same name, such as lambdas, get a column each.
        self.reward_names = [
            f"{name} ({reward_names[:i].count(name) + 1})" if name in reward_names[:i] else name
            for i, name in enumerate(reward_names)
        ]
        self.folder = Path(self.args.output_dir) / records.FOLDER
        for folder in (self.folder, self.folder.with_name("completions")):  # the second is TRL's, of `log_completions`
            if folder.is_symlink():
                raise UserError(
                    f"{folder} is a symbolic link to {folder.readlink()}, perhaps the folder of another run. This run "
                    "would write and remove files there. Remove the link, or choose another output_dir (which may "
                    "itself be a link)"
                )
        self._sample: records.Record | None = None
        self._every = 0  # optimizer steps; 0 before training begins
        self._last_step = 0  # step of the newest record
        self._adds_numbers = bool(self.args.record_steps) and self._can_add_numbers()
        # What the loss computed for recorded rows of this process since the last optimizer step: step, group, rollout
        # and numbers. None on all processes if no batch had recorded rows.
        self._numbers: list[tuple[int, int, int, dict]] | None = None

    def _can_add_numbers(self) -> bool:
        try:
            trl_seam.need("token_numbers", self.trainer)
        except NotImportedError as error:
            if self.accelerator.is_main_process:
                logger.warning("Rollouts are recorded without the numbers that the loss computes. %s", error)
            return False
        return True

    def on_train_begin(self, args, state, control, **kwargs):
        """Set how often to record, and remove records of an earlier run from later steps than the current one."""
        last = [0]
        if self.accelerator.is_main_process:
            if removed := self._try(records.forget, self.folder, state.global_step):
                (self.folder.parent / PAGE).unlink(missing_ok=True)  # it shows the removed records
                logger.warning(
                    "Removed records of an earlier run (number: %d; steps after %d) from %s.",
                    removed,
                    state.global_step,
                    self.folder,
                )
            last = [max(map(records.step_of, records.files(self.folder)), default=0)]
        self._last_step, self._numbers = broadcast_object_list(last)[0], None
        wanted = self.args.record_steps
        self._every = max(wanted, math.ceil(state.max_steps / MOST)) if wanted else 0
        if self._every > wanted and self.accelerator.is_main_process:
            logger.warning(
                "Rollouts are recorded every %d steps instead of every %d: a run has at most %d records, and this one "
                "has %d steps.",
                self._every,
                wanted,
                MOST,
                state.max_steps,
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._every and state.is_world_process_zero:
            self._try(records.append_metrics, self.folder, {"step": state.global_step, **(logs or {})})

    def on_step_end(self, args, state, control, **kwargs):
        """Add the numbers of the step's loss to the record. Collective. Checkpoints are saved later."""
        if self._numbers is None:
            return
        gathered, self._numbers = gather_object(self._numbers), None
        if not self.accelerator.is_main_process:
            return
        by_step = defaultdict(dict)
        for step, group, rollout, numbers in gathered:
            by_step[step][group, rollout] = numbers
        for step, arrays in by_step.items():
            path = self.folder / records.file_name(step)
            if path.exists():  # not if it could not be written, or if the run resumed in another folder
                self._try(records.add_arrays, path, arrays)

    @contextmanager
    def watching(self, batch: dict[str, Tensor], recorded_B3: Tensor | None) -> Iterator[None]:
        """Keep the numbers of recorded rows that a loss computes in this context.

        Args:
            batch: the batch of the loss.
            recorded_B3: its field `RECORDED`; None if it has none, on all processes.
        """
        if recorded_B3 is None:
            yield
            return
        with trl_seam.stats_in_loss(self.trainer) as stats:
            yield
        self._numbers = self._numbers or []
        rows = (recorded_B3[:, 0] >= 0).nonzero()[:, 0]
        if not stats or not len(rows):
            return
        numbers = trl_seam.numbers_in_loss(self.trainer, batch, *stats[0])
        kept = {name: values_BT[rows].cpu().numpy() for name, values_BT in numbers.items()}
        for i, place in enumerate(recorded_B3[rows].tolist()):
            self._numbers.append((*place, {name: values[i] for name, values in kept.items()}))

    def take_sample(self) -> records.Record | None:
        """Return the group to show, once. None if there is no new one, and on all processes but the first."""
        sample, self._sample = self._sample, None
        return sample

    def look(self, step: int, batch: dict[str, Tensor], rewards: Tensor, correct_PG: Tensor, scored_PG: Tensor, how):
        """Record a generation, or keep its sample, if due. Collective.

        Args:
            step: the generation's first optimizer step, counted from 1.
            batch: TRL's batch on this process, with `credit` if there is a credit method. It gets the field `RECORDED`
                if it is recorded and the numbers of its loss can be added.
            rewards: (rollouts of all processes, reward functions); NaN where a function returned None.
            correct_PG, scored_PG: for the groups of all processes.
            how: how credit is combined with the advantages; None without credit.
        """
        due = self._every and (step - 1) // self._every != (self._last_step - 1) // self._every
        show = self.args.log_completions and how is not None
        if not due and not show:
            return
        n_right_P, n_wrong_P = (correct_PG & scored_PG).sum(1), (~correct_PG & scored_PG).sum(1)
        balance_P = torch.minimum(n_right_P, n_wrong_P)
        by_balance = balance_P.argsort(descending=True, stable=True)
        if due:
            chosen = by_balance[: self.args.record_groups].sort().values.tolist()
            self._last_step = step
        else:
            chosen = []
        shown = by_balance[:1].tolist() if show else []
        if chosen and self._adds_numbers:
            batch[RECORDED] = self._places(chosen, step, batch["completion_ids"], correct_PG.shape[1])
        wanted = sorted({*chosen, *shown})
        rows = gather_object(self._rows(wanted, step, batch, rewards, correct_PG, scored_PG, how))
        if not self.accelerator.is_main_process:
            return
        method = self._method(how, len(correct_PG))
        if shown:
            self._sample = records.Record(method, [row for row in rows if row["group"] == shown[0]])
        if chosen:
            record = records.Record(method, [row for row in rows if row["group"] in set(chosen)])
            self._try(records.write, self.folder / records.file_name(step), record)

    @staticmethod
    def _try(write, *arguments):
        try:
            return write(*arguments)
        except (OSError, UserError) as error:  # a full disk or a damaged record must not end training
            logger.warning("Could not write a record: %s", error)

    def _method(self, how: str | None, groups: int) -> records.Method:
        settings = self.method.settings_of(self.args)
        return records.method_of(self.method, how, settings, special_ids=self.special_ids, generated_groups=groups)

    def _places(self, groups: list[int], step: int, ids_BT: Tensor, G: int) -> Tensor:
        """Return the field `RECORDED` of this process's rows."""
        B = len(ids_BT)
        rows_B = torch.arange(B, device=ids_BT.device) + self.accelerator.process_index * B
        places_B3 = torch.stack([torch.full_like(rows_B, step), rows_B // G, rows_B % G], 1)
        recorded_B = torch.isin(rows_B // G, torch.tensor(groups, device=ids_BT.device))
        return places_B3.where(recorded_B[:, None], -1)

    def _rows(self, groups, step, batch, rewards, correct_PG, scored_PG, how) -> list[dict]:
        """Return the rows of these groups that are on this process."""
        B, G = len(batch["completion_ids"]), correct_PG.shape[1]
        begin = self.accelerator.process_index * B
        own = [i for group in groups for i in range(group * G - begin, (group + 1) * G - begin) if 0 <= i < B]
        if not own:
            return []
        ids_BT, mask_BT = batch["completion_ids"][own], batch["completion_mask"][own].bool()
        trained_BT = mask_BT & batch["tool_mask"][own].bool() if "tool_mask" in batch else mask_BT
        advantages_B = batch["advantages"][own]
        credit_BT = batch["credit"][own] if how is not None else None
        token_advantages_BT = (
            advantages_B[:, None].expand(ids_BT.shape) if how is None else combine(advantages_B, credit_BT, how)
        )
        # A rollout that is masked entirely (mask_truncated_completions) still has tokens: all except the padding.
        present_BT = torch.where(mask_BT.any(1, keepdim=True), mask_BT, ids_BT != self.tokenizer.pad_token_id)
        lengths = (present_BT * torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device)).amax(1).tolist()
        ids = [row[:n] for row, n in zip(ids_BT.tolist(), lengths, strict=True)]
        prompts = [
            row[mask.bool()].tolist()
            for row, mask in zip(batch["prompt_ids"][own], batch["prompt_mask"][own], strict=True)
        ]
        strings = token_strings({i for row in ids for i in row}, self.tokenizer)
        rows = []
        for k, i in enumerate(own):
            group, rollout = divmod(begin + i, G)
            values = rewards[begin + i].tolist()
            n = lengths[k]
            rows.append(
                {
                    "step": step,
                    "group": group,
                    "rollout": rollout,
                    "prompt": self.tokenizer.decode(prompts[k]),
                    "completion": self.tokenizer.decode(ids[k], skip_special_tokens=True),
                    "token_ids": ids[k],
                    "tokens": [strings[t] for t in ids[k]],
                    "trained": trained_BT[k, :n].tolist(),
                    "rewards": {
                        name: None if math.isnan(value) else value
                        for name, value in zip(self.reward_names, values, strict=True)
                    },
                    "correct": bool(correct_PG[group, rollout]) if scored_PG[group, rollout] else None,
                    "advantage": advantages_B[k].item(),
                    "credit": None if credit_BT is None else credit_BT[k, :n].tolist(),
                    "advantages": token_advantages_BT[k, :n].tolist(),
                }
            )
        return rows
