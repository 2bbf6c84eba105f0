"""RLSD: self-conditioned credit (Self-Distilled RLVR, arXiv 2604.03128).

The policy reads each rollout twice: after its own prompt, and after the same prompt with a reference solution. Tokens
that the reference makes more likely get more of a positive advantage and less of a negative one.

    A'  = A w
    w   = (1 - lam) + lam clip((P_T / P_S)^sign(A), 1 - eps, 1 + eps)
    lam = rlsd_lambda max(0, 1 - step / rlsd_decay_steps)

P_S is the probability of the sampled token after the prompt, P_T after the prompt with the reference. The formula is
that of the authors' code (iie-ycx/RLSD), the default values those of its launch script. The text of the paper was not
checked. That a correct rollout can be the reference is an idea of SC-GRPO (arXiv 2606.18810), the comparison with a
wrong one of CSCR (arXiv 2607.27888); we could read neither.

Departures from the authors' code:

- P_T and P_S come from the policy that sampled the rollout, once per generation. In the code P_S is computed again in
  every update, and P_T comes from a copy of the policy that is up to 20 steps old.
- Without a worked solution, another correct rollout of the group is the reference. The code needs a column.
- A reference that is too long is not used. The code cuts off its end.
- The words around the reference are our own.
- `step` counts optimizer steps. In the launch script a generation seems to have one.
- Rollouts with advantage 0 are skipped.

Shape suffixes: B rollouts, T completion tokens, L prompt tokens.
"""

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ktae_trl.arguments import UserError
from ktae_trl.credit.method import Card, Credit, Groups, Method, Settings, Tools
from ktae_trl.grading.golds import describe, is_prose

SOLUTION, ROLLOUT = "solution", "rollout"  # values of `rlsd_reference` that are not just the name of a column
MOVED = 0.01  # |log P_T / P_S| from which on a prompt moves a token: below, rounding in bf16 could decide the sign
Prompt = str | list[dict[str, Any]]


class RLSD(Method):
    """Weights by how much more likely a token becomes if the model has a reference solution in its prompt."""

    @dataclass
    class Settings(Settings):
        """Settings of `credit: rlsd`.

        Parameters:
            rlsd_lambda (`float`, *optional*, defaults to `0.5`):
                Share lam of the advantage that is reweighted at the start of training, in [0, 1].
            rlsd_decay_steps (`int`, *optional*, defaults to `60`):
                Optimizer steps over which lam falls linearly to 0, after which training is GRPO and has no extra cost.
                0 keeps lam constant.
            rlsd_epsilon (`float`, *optional*, defaults to `0.2`):
                Bound eps of the ratio: it is clipped to [1 - eps, 1 + eps].
            rlsd_reference (`str`, *optional*, defaults to `"solution"`):
                The reference. `"solution"`: the worked solution in the dataset's column `solution`, if it has one, else
                another correct rollout of the group; `"rollout"`: always a correct rollout; any other name: the text in
                this column of the dataset, such as `answer` for the answer alone, and a correct rollout for rows where
                it is empty.
            rlsd_max_reference_length (`int`, *optional*, defaults to `1024`):
                Maximum number of tokens of a reference. Longer ones are not used. Lower it if memory runs out.
            rlsd_agreement (`bool`, *optional*, defaults to `True`):
                Measure the metric `rlsd/agreement` with a third forward pass. Does not affect training.
        """

        rlsd_lambda: float = field(
            default=0.5, metadata={"help": "Share of the advantage that is reweighted at the start of training."}
        )
        rlsd_decay_steps: int = field(
            default=60, metadata={"help": "Optimizer steps over which rlsd_lambda falls to 0 (0: it stays)."}
        )
        rlsd_epsilon: float = field(
            default=0.2, metadata={"help": "The ratio of probabilities is clipped to 1 - epsilon and 1 + epsilon."}
        )
        rlsd_reference: str = field(
            default=SOLUTION,
            metadata={
                "help": "The reference: 'solution' (the dataset's column, else a correct rollout), 'rollout', or "
                "another column."
            },
        )
        rlsd_max_reference_length: int = field(
            default=1024, metadata={"help": "Maximum tokens of a reference. Longer ones are not used."}
        )
        rlsd_agreement: bool = field(
            default=True, metadata={"help": "Measure rlsd/agreement with a third forward pass."}
        )

        def check(self) -> None:
            if not 0 <= self.rlsd_lambda <= 1:
                raise UserError(f"rlsd_lambda must be at least 0 and at most 1, not {self.rlsd_lambda}")
            if not 0 < self.rlsd_epsilon < math.inf:
                raise UserError(f"rlsd_epsilon must be a positive number, not {self.rlsd_epsilon}")
            for name, least in (("rlsd_decay_steps", 0), ("rlsd_max_reference_length", 1)):
                if getattr(self, name) < least:
                    raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
            if not self.rlsd_reference:
                raise UserError("rlsd_reference is empty. Set it to solution, rollout or a column of the dataset")

    name = "rlsd"
    how = "scale"
    family = "rlsd"
    title = "RLSD (self-conditioned credit)"
    card = Card(
        "RLSD",
        "Each token gets the advantage of its rollout, weighted by how much more likely the model finds the token if a "
        "reference solution is in its prompt.",
        ("rlsd",),
        {
            "title": "Self-Distilled RLVR",
            "id": "2604.03128",
            "citation": textwrap.dedent("""\
                @misc{yang2026rlsd,
                    title  = {{Self-Distilled RLVR}},
                    author = {Chenxu Yang and Chuanyu Qin and Qingyi Si and Minghui Chen and Naibin Gu and Dingyu Yao
                              and Zheng Lin and Weiping Wang and Jiaqi Wang and Nan Duan},
                    year   = 2026,
                    eprint = {arXiv:2604.03128},
                }"""),
        },
    )
    value = "weight w"
    columns = {
        "ref": ("rlsd/referenced", "{:.0%}", "share of rollouts with A ≠ 0 that have a reference solution"),
        "|w-1|": ("rlsd/mean_change", "{:.3f}", "mean |w - 1| over the tokens of rollouts with a reference"),
        "agree": ("rlsd/agreement", "{:.0%}", "share of tokens that a reference and a wrong rollout move the same way"),
    }
    panels = {
        "Lambda": ["rlsd/lambda"],
        "Shares": ["rlsd/referenced", "rlsd/from_column", "rlsd/clipped_tokens", "rlsd/agreement"],
        "Mean |w - 1|": ["rlsd/mean_change"],
        "Mean |A'| / mean |A|": ["rlsd/advantage_ratio"],
    }
    needs_both_sides = False  # the weights scale rollout advantages from any reward
    no_effect = ("rlsd_agreement",)

    def __init__(self, settings: Any, tools: Tools):
        super().__init__(settings, tools)
        if not settings.rlsd_agreement:
            self.columns = {name: column for name, column in self.columns.items() if name != "agree"}

    def credit(self, groups: Groups) -> Credit:
        """Compute the weights of the tokens of this process's rollouts."""
        lam = annealed(self.settings.rlsd_lambda, self.settings.rlsd_decay_steps, self.tools.step)
        mask_BT, device = groups.mask_BT, groups.mask_BT.device
        sums = {"rlsd/lambda": (torch.tensor(lam, device=device), torch.tensor(1, device=device))}
        if lam == 0:
            return Credit(torch.ones(mask_BT.shape, device=device), sums)
        wanted_B = mask_BT.any(1) & (groups.advantages_B != 0)  # with advantage 0 the weights have no effect
        wanted = wanted_B.tolist()
        columns = [self._from_column(row) if own else None for row, own in zip(groups.rows, wanted, strict=True)]
        right = self._partners(groups, groups.correct_PG & groups.scored_PG, wanted)
        references = [column or rollout for column, rollout in zip(columns, right, strict=True)]

        # Every process makes the same passes, whatever its rollouts have.
        own_BT = self._log_probs(groups, groups.prompts)
        shift_BT, told_B = self._shift(groups, references, own_BT)
        told_BT = mask_BT & told_B[:, None]
        ratio_BT, eps = ratios(shift_BT, groups.advantages_B), self.settings.rlsd_epsilon
        weights_BT = torch.where(told_BT, weights(ratio_BT, lam, eps), 1.0)

        from_column_B = told_B & torch.tensor([bool(column) for column in columns], device=device)
        clipped_BT = told_BT & ((ratio_BT - 1).abs() > eps)
        size_BT = groups.advantages_B.abs()[:, None] * mask_BT
        sums |= {
            "rlsd/referenced": (told_B.sum(), wanted_B.sum()),
            "rlsd/from_column": (from_column_B.sum(), told_B.sum()),
            "rlsd/mean_change": ((weights_BT - 1).abs().sum(), told_BT.sum()),
            "rlsd/clipped_tokens": (clipped_BT.sum(), told_BT.sum()),
            "rlsd/advantage_ratio": ((size_BT * weights_BT).sum(), size_BT.sum()),
        }
        if self.settings.rlsd_agreement:
            wrong = self._partners(groups, ~groups.correct_PG & groups.scored_PG, wanted)
            other_BT, other_B = self._shift(groups, wrong, own_BT)
            sums["rlsd/agreement"] = agreement(shift_BT, other_BT, told_BT & other_B[:, None])
        return Credit(weights_BT, sums)

    def _from_column(self, row: dict[str, Any]) -> str | None:
        """Return the reference that the dataset has for a row, if it has one that is short enough."""
        name = self.settings.rlsd_reference
        text = None if name == ROLLOUT else column_text(row, name)
        if text is None:
            return None
        length = len(self.tools.tokenizer(text, add_special_tokens=False)["input_ids"])
        return text if length <= self.settings.rlsd_max_reference_length else None

    def _partners(self, groups: Groups, side_PG: Tensor, wanted: list[bool]) -> list[str | None]:
        """Return the text of another rollout of the group for each of this process's rollouts (see `partners`)."""
        found = partners(groups, side_PG, self.settings.rlsd_max_reference_length)
        decode = self.tools.tokenizer.decode
        return [
            decode(ids, skip_special_tokens=True).strip() if own and ids else None
            for ids, own in zip(found, wanted, strict=True)
        ]

    def _shift(self, groups: Groups, references: list[str | None], own_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return log P_T - log P_S, (B, T), and which rollouts have a reference that fits the model, (B,).

        Rollouts without one keep their own prompt.
        """
        prompts, T = groups.prompts, groups.mask_BT.shape[1]
        told = [i for i, reference in enumerate(references) if reference]
        messages = [groups.rows[i]["prompt"] for i in told]
        plain = self.tools.prompt_ids(messages)
        longer = self.tools.prompt_ids(
            [with_reference(message, references[i]) for message, i in zip(messages, told, strict=True)]
        )
        told_B = torch.zeros(len(references), dtype=torch.bool, device=own_BT.device)
        for i, own, ids in zip(told, plain, longer, strict=True):
            if own != prompts[i]:
                raise UserError(
                    "credit: rlsd adds a reference to the row's prompt, but the rollout has another prompt than the "
                    "chat template makes of that row. A rollout_func must use the trainer's template, or use another "
                    "credit method"
                )
            if len(ids) + T <= (self.tools.context_length or math.inf):  # all rows are padded to T tokens
                prompts[i] = ids
                told_B[i] = True
        return self._log_probs(groups, prompts) - own_BT, told_B

    def _log_probs(self, groups: Groups, prompts: list[list[int]]) -> Tensor:
        """Return the log-probability of each token of this process's rollouts after other prompts, (B, T)."""
        rows = [torch.tensor(ids, dtype=groups.prompt_ids_BL.dtype) for ids in prompts]
        pad = torch.nn.utils.rnn.pad_sequence
        ids_BL = pad(rows, batch_first=True, padding_value=self.tools.tokenizer.pad_token_id, padding_side="left")
        ones = [torch.ones(len(ids), dtype=groups.prompt_mask_BL.dtype) for ids in prompts]
        mask_BL = pad(ones, batch_first=True, padding_side="left")
        device = groups.prompt_ids_BL.device
        return self.tools.token_stats(
            groups._replace(prompt_ids_BL=ids_BL.to(device), prompt_mask_BL=mask_BL.to(device))
        )[0]

    @classmethod
    def no_signal(cls, sums: dict[str, float], config: Any, first: str) -> str | None:
        if sums.get("rlsd/referenced") != 0:
            return None
        return (
            f"No rollout of {first} has a reference solution, so credit: {cls.name} gives all tokens of a completion "
            "the same advantage. Set rlsd_reference to a column with solutions, or raise num_generations or "
            f"rlsd_max_reference_length ({config.rlsd_max_reference_length} tokens)."
        )


def annealed(lam: float, decay_steps: int, step: int) -> float:
    """Return lam after `step` optimizer steps: it falls linearly to 0 over `decay_steps`, or stays if these are 0."""
    return lam * max(0.0, 1 - step / decay_steps) if decay_steps else lam


def ratios(shift_BT: Tensor, advantages_B: Tensor) -> Tensor:
    """Return (P_T / P_S)^sign(A) from log P_T - log P_S, (B, T). It is 1 where A is 0."""
    return (advantages_B.sign()[:, None] * shift_BT).exp()


def weights(ratio_BT: Tensor, lam: float, epsilon: float) -> Tensor:
    """Convert ratios to weights: w = (1 - lam) + lam clip(ratio, 1 - epsilon, 1 + epsilon).

    Source: the authors' code (iie-ycx/RLSD, `_build_stgca_advantages`) of arXiv 2604.03128.

    Args:
        ratio_BT: (B, T) from `ratios`, at least 0.
        lam: in [0, 1].
        epsilon: above 0.

    Returns:
        (B, T), at least max(0, 1 - lam epsilon) and at most 1 + lam epsilon.
    """
    return (1 - lam) + lam * ratio_BT.clamp(1 - epsilon, 1 + epsilon)


def agreement(shift_BT: Tensor, other_BT: Tensor, told_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Count the tokens that two prompts move, and those of them that both move in the same direction.

    Args:
        shift_BT, other_BT: (B, T) changes of the log-probability of the sampled token by either prompt.
        told_BT: (B, T) bool, the tokens to count.

    Returns:
        The tokens that both move by more than 1% in the same direction, and all that both move by more than 1%.
    """
    moved_BT = told_BT & (shift_BT.abs() > MOVED) & (other_BT.abs() > MOVED)
    return (moved_BT & (shift_BT.sign() == other_BT.sign())).sum(), moved_BT.sum()


def partners(groups: Groups, side_PG: Tensor, longest: int) -> list[list[int] | None]:
    """Return the token ids of another rollout of the group for each of this process's rollouts.

    It is the next one after it, cyclically, that is on the given side and has 1 to `longest` tokens, but not the same
    tokens as the rollout itself: a copy would only repeat it. Its tokens are those that are trained on, without special
    ones. So a rollout that was cut off and is masked out is no partner, and the output of tools is left out.

    Args:
        groups: whole groups.
        side_PG: (P, G) bool, the rollouts to choose from.
        longest: maximum number of tokens of a partner.

    Returns:
        None for a rollout without such a partner.
    """
    kept_PGT = groups.mask_PGT & ~torch.isin(groups.ids_PGT, groups.ids_PGT.new_tensor(groups.special_ids))
    P, G, _ = groups.ids_PGT.shape
    texts = [ids[kept].tolist() for ids, kept in zip(groups.ids_PGT.flatten(0, 1), kept_PGT.flatten(0, 1), strict=True)]
    side = side_PG.flatten().tolist()
    found = []
    for own in range(*groups.own.indices(P * G)):
        begin = own - own % G
        others = (begin + (own + i) % G for i in range(1, G))
        fitting = (texts[j] for j in others if side[j] and 0 < len(texts[j]) <= longest and texts[j] != texts[own])
        found.append(next(fitting, None))
    return found


def column_text(row: dict[str, Any], name: str) -> str | None:
    """Return the reference in a column of the dataset, or None if there is none.

    A column whose name `to_prompts` needs, such as `solution`, is found by its new name (`data_solution`). For
    "solution" the column may be missing or hold the gold answers, and a text that is only an answer is not a worked
    solution: it has no box, no `####`, no "The answer is", and at most seven words.

    Raises:
        UserError: another column does not exist, or holds something other than text.
    """
    key = f"data_{name}" if f"data_{name}" in row else name
    value = row.get(key)
    if name == SOLUTION:
        worked = isinstance(value, str) and (describe(value) not in ("value", "missing") or is_prose(value))
        return value.strip() if worked else None
    if key not in row:
        raise UserError(f"rlsd_reference: the dataset has no column {name!r}. Its columns: {', '.join(map(str, row))}")
    if not isinstance(value, str | None):
        raise UserError(
            f"rlsd_reference: the column {name!r} must hold text, not {type(value).__name__}: {value!r:.80}. "
            "Convert it, or choose another column"
        )
    return (value or "").strip() or None


def with_reference(prompt: Prompt, reference: str) -> Prompt:
    """Return a prompt with a reference: at the end of the last user message, or before a prompt that is text.

    Everything after the user message stays, so the model's turn begins as it does without a reference.

    Raises:
        UserError: no message has the role 'user'.
    """
    intro = "For reference, here is a solution of this problem:"
    if isinstance(prompt, str):
        return f"{intro}\n\n{reference}\n\nNow the problem itself:\n\n{prompt}"
    text = f"\n\n{intro}\n\n{reference}\n\nNow solve the problem yourself, in your own way."
    places = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not places:
        raise UserError(
            "credit: rlsd adds a reference to the user message, but a prompt has no message with the role 'user'"
        )
    messages = list(prompt)
    content = messages[places[-1]]["content"]
    content = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    messages[places[-1]] = {**messages[places[-1]], "content": content}
    return messages
