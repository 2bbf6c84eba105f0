"""All access to private names of TRL and transformers, and the check that they still work as expected.

No other file uses private names, except for the methods that `trainer.py` overrides. `need` runs the checks of a
feature when it is first used: it runs TRL's code on a synthetic rollout and compares the result.
"""

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers.trainer
import trl.models
import trl.trainer.utils
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from trl import GRPOTrainer

from ktae_trl.arguments import NotImportedError, UserError, loading

TESTED_TRL = ">=1.16,<1.17"


# Properties of the trainer.


def tokenizer_of(trainer) -> Any:
    """Return the tokenizer, also if the trainer has a processor."""
    return trainer._tokenizer


def model_name(model) -> str:
    """Return the folder or the model id on the Hub from which a model was loaded."""
    return model.config._name_or_path


def introduced_in(trainer) -> dict[str, Any]:
    """Return the name of TRL's method and its paper (`title`, arXiv `id` and `citation`)."""
    return {"name": trainer._name, "paper": trainer._paper}


def checkpoint_folder(trainer, trial=None) -> Path:
    """Return the folder in which the trainer saves the checkpoint of this step."""
    return Path(trainer._get_output_dir(trial=trial), f"checkpoint-{trainer.state.global_step}")


def last_texts(trainer, n: int) -> tuple[list, list]:
    """Return the prompts and completions of the last `n` rollouts of all processes."""
    return list(trainer._logs["prompt"])[-n:], list(trainer._logs["completion"])[-n:]


# Metrics.


def log_metrics(trainer, metrics: dict[str, float]) -> None:
    """Add values to the means that the trainer logs next, for training or evaluation according to its mode."""
    means = _metrics(trainer)
    for name, value in metrics.items():
        means[name].append(value)


def log_state(trainer, metrics: dict[str, float]) -> None:
    """Set values that the trainer logs next as they are, without a mean over steps."""
    _metrics(trainer).update({name: [value] for name, value in metrics.items()})


def last_metric(trainer, name: str) -> float:
    """Return the latest value of a metric."""
    return _metrics(trainer)[name][-1]


def _metrics(trainer) -> dict[str, list[float]]:
    return trainer._metrics["train" if trainer.model.training else "eval"]


# Rollouts that are generated and graded outside a training step, and then passed to one.


class Generated(NamedTuple):
    """What TRL generates for prompts: each list has one item for each prompt."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    mask: list[list[int]] | None  # 0 for tokens that the model did not generate
    completions: list  # texts or conversations, as passed to reward functions
    logprobs: list[list[float]] | None
    extra_fields: dict[str, Any]  # from a rollout_func, for the reward functions
    images: list | None
    tool_images: list


def generate(trainer, prompts: list) -> Generated:
    """Generate a rollout for each prompt without changing the trainer's metrics and counters. Collective."""
    tokens = trainer.state.num_input_tokens_seen
    try:
        with changed(trainer, _metrics={"train": defaultdict(list), "eval": defaultdict(list)}):
            return Generated(*trainer._generate(prompts))
    finally:
        trainer.state.num_input_tokens_seen = tokens


def grade(
    trainer, rows: list[dict], completions: list, completion_ids: list[list[int]]
) -> tuple[Tensor, dict[str, list]]:
    """Return the rewards of all processes' rollouts, and the columns logged by reward functions on this process.

    Values that reward functions log with `log_metric` are averaged over all calls until the next training step.
    Collective.
    """
    prompts = [row["prompt"] for row in rows]
    rewards = trainer._calculate_rewards(rows, prompts, completions, completion_ids)
    columns = {name: list(values) for name, values in trainer._pending_extra_logs.items()}
    trainer._pending_extra_logs.clear()
    return rewards, columns


@contextmanager
def rollouts_given(trainer, rollouts: list[dict]) -> Iterator[None]:
    """Make the trainer use these rollouts, through TRL's `rollout_func`, instead of generating.

    Args:
        rollouts: rollouts of this process. Each has `prompt_ids`, `completion_ids`, `logprobs` and `env_mask` (either
            of these two may be None for all), and `columns`, the values that reward functions logged for it.
    """
    given = {name: [rollout[name] for rollout in rollouts] for name in ("prompt_ids", "completion_ids", "logprobs")}
    if given["logprobs"][0] is None:
        given["logprobs"] = None
    if rollouts[0]["env_mask"] is not None:
        given["env_mask"] = [rollout["env_mask"] for rollout in rollouts]
    for column in {name for rollout in rollouts for name in rollout["columns"]}:
        trainer._pending_extra_logs[column] = [rollout["columns"].get(column) for rollout in rollouts]
    with changed(trainer, rollout_func=lambda prompts, trainer: given):
        yield


@contextmanager
def changed(owner: object, **values: Any) -> Iterator[None]:
    """Set attributes of an object, and restore them at the end.

    An attribute of the class, such as a method, is the object's own only in between.
    """
    kept = {name: getattr(owner, name) for name in values}
    of_class = values.keys() - vars(owner).keys()
    vars(owner).update(values)
    try:
        yield
    finally:
        vars(owner).update(kept)
        for name in of_class:
            del vars(owner)[name]


# Rollouts that an older policy sampled: see `dynamic_sampling_reuse`.


def corrects_sampling(trainer) -> bool:
    """Return whether TRL corrects for the difference between vLLM's policy and the current one."""
    return trainer.use_vllm and trainer.vllm_importance_sampling_correction


@contextmanager
def older_policy(trainer, batch: dict[str, Tensor], logps_BT: Tensor | None) -> Iterator[None]:
    """Make the loss use pi_old = the policy that sampled, for rollouts of an older one.

    TRL's loss reads `old_per_token_logps` of the batch after it has computed log-probabilities. They are set in
    between, for the other rollouts to the current log-probabilities, as TRL does without `old_per_token_logps`.

    Args:
        batch: the batch of the loss, without `old_per_token_logps`. It gets them.
        logps_BT: log-probabilities of the tokens by the policy that sampled them; NaN for tokens that the current
            policy sampled. None: nothing is changed.
    """
    if logps_BT is None:
        yield
        return
    compute = trainer._get_per_token_logps_and_entropies

    def and_set_old(*arguments, **named):
        now_BT, *rest = compute(*arguments, **named)
        batch["old_per_token_logps"] = torch.where(logps_BT.isnan(), now_BT.detach(), logps_BT)
        return now_BT, *rest

    with changed(trainer, _get_per_token_logps_and_entropies=and_set_old):
        yield


# The tools of credit methods: see `ktae_trl.rollouts.tools`.


def token_stats(
    trainer, model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, *, completion_length: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and entropies of the last tokens of each row, (B, completion_length) each.

    Args:
        rows: maximum number of rows in a forward pass.
    """
    logps_BT, entropies_BT, _ = trainer._get_per_token_logps_and_entropies(
        model, ids_BL, mask_BL, completion_length, batch_size=rows, compute_entropy=True
    )
    return logps_BT, entropies_BT


def token_squares(
    trainer, model: nn.Module, ids_BL: Tensor, mask_BL: Tensor, *, completion_length: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Return pi(token) and the sum of pi^2 over the vocabulary, at the last tokens of each row: see `token_stats`.

    TRL's fused head computes this sum too, but the head of the trainer's model is not set up for it.
    """
    owner = trainer.accelerator.unwrap_model(model)
    owner = owner.get_base_model() if hasattr(owner, "get_base_model") else owner  # PEFT

    def read(**inputs) -> SimpleNamespace:
        output = model(**inputs)
        return SimpleNamespace(log_probs=output.log_probs, entropy=output.log_sum_sq_probs)

    with changed(owner, forward=owner.forward):
        trl.trainer.utils.add_fused_lm_head(
            owner,
            temperature=trainer.temperature,
            cast_lm_head_to_fp32=trainer.args.cast_lm_head_to_fp32,
            outputs=("log_probs", "log_sum_sq_probs"),
        )
        logps_BT, log_squares_BT = token_stats(
            trainer, read, ids_BL, mask_BL, completion_length=completion_length, rows=rows
        )
    return logps_BT.float().exp(), log_squares_BT.float().exp()


def add_token_stats(model: nn.Module, temperature: float = 1.0) -> None:
    """Make a model able to return numbers of its tokens without keeping logits, as TRL's policy does."""
    trl.trainer.utils.add_fused_lm_head(
        model, temperature=temperature, outputs=("log_probs", "entropy", "log_sum_sq_probs")
    )


def token_stats_of(model: nn.Module, ids_BL: Tensor, wanted_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities, entropies and sums of pi^2 of the wanted tokens.

    Each is (B, L - 1), from the second token on.

    Args:
        model: a model with `add_token_stats`.
        ids_BL: token ids, padded on the right with any id.
        wanted_BL: bool. The result is 0 for other tokens.
    """
    output = model(input_ids=ids_BL, labels=ids_BL.masked_fill(~wanted_BL, -100), fused_lm_head=True)
    return output.log_probs, output.entropy, output.log_sum_sq_probs.exp() * wanted_BL[:, 1:]


def continuations(trainer, prefixes: list[list[int]], limit: int) -> tuple[list[list[int]], list[list[float]] | None]:
    """Sample a continuation of at most `limit` tokens for each prefix. Log-probabilities are None without vLLM."""
    holder, name = _limit(trainer)
    with changed(holder, **{name: limit}):
        return trainer._generate_single_turn(prefixes, None, {}, num_generations=1)


def _limit(trainer) -> tuple[object, str]:
    """Return the object and attribute that hold the trainer's maximum number of new tokens."""
    if "vllm_generation" in vars(trainer):
        return trainer.vllm_generation, "max_completion_length"
    return trainer.generation_config, "max_new_tokens"


def prompt_ids_of(trainer, prompts: list) -> list[list[int]]:
    """Return the token ids from which the trainer generates."""
    return trainer._tokenize_prompts(prompts)[0]


def rewards(trainer, index: int, rows: list[dict[str, Any]], completion_ids: list[list[int]]) -> Tensor:
    """Return the rewards of one reward function for the completions of all processes, (N,). Logs nothing.

    Collective: all processes must pass equally many completions.
    """
    prompts = [row["prompt"] for row in rows]
    completions = _as_reward_functions_read(trainer, prompts, completion_ids)
    lists = ("reward_funcs", "reward_processing_classes", "reward_func_names")
    only = {name: getattr(trainer, name)[index : index + 1] for name in lists}
    with changed(trainer, **only, _pending_extra_logs=defaultdict(list), _pending_metrics=defaultdict(list)):
        return GRPOTrainer._calculate_rewards(trainer, rows, prompts, completions, completion_ids)[:, 0]


def _as_reward_functions_read(trainer, prompts: list, completion_ids: list[list[int]]) -> list:
    """Return completions in the form in which TRL passes them to reward functions, which it builds in `_generate`."""
    rollouts = {"prompt_ids": prompt_ids_of(trainer, prompts), "completion_ids": completion_ids, "logprobs": None}
    nowhere = {
        "rollout_func": lambda prompts, trainer: rollouts,
        "tools": [],
        "use_vllm": False,  # else the weights would be loaded into vLLM
    }
    with changed(trainer, **nowhere):
        return generate(trainer, prompts).completions


def recomputes(layer: nn.Module) -> bool:
    """Return whether a transformers layer uses non-reentrant gradient checkpointing in training mode.

    Reentrant checkpointing does not support `torch.autograd.grad`.
    """
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)  # a partial
    wanted = getattr(layer, "gradient_checkpointing", False) and checkpoint is not None
    return wanted and not checkpoint.keywords.get("use_reentrant")


def frozen_model(trainer, name: str) -> nn.Module:
    """Load a second model like TRL's reference model, prepared for the device, DeepSpeed or FSDP2.

    Raises:
        UserError: the model cannot be loaded, or has fewer token ids than the tokenizer.
    """
    policy, args = trainer.model, trainer.args
    how = {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        how["device_map"] = None
    with loading(f"The frozen model {name!r}"):
        model = trl.trainer.utils.create_model_from_path(name, trust_remote_code=args.trust_remote_code, **how)
    tokens = len(trainer._tokenizer)
    if model.config.get_text_config().vocab_size < tokens:
        raise UserError(
            f"The frozen model {name!r} has {model.config.get_text_config().vocab_size} token ids, but the policy's "
            f"tokenizer has {tokens}. Choose a model with the same tokenizer"
        )
    model.requires_grad_(False)
    add_token_stats(model, trainer.temperature)
    if trainer.is_deepspeed_enabled:
        model = trl.models.prepare_deepspeed(model, trainer.accelerator)
    elif trainer.is_fsdp_enabled:
        model = trl.models.prepare_fsdp(model, trainer.accelerator)
    else:
        model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()  # not in the return statement: returns None for a DeepSpeed engine
    return model


# The numbers of each token that TRL's loss computes, for the records: see `ktae_trl.training.recorder`.


@contextmanager
def stats_in_loss(trainer) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the log-probabilities and entropies, (B, T) each and without gradient, of each loss that is computed."""
    found: list[tuple[Tensor, Tensor]] = []
    compute = trainer._get_per_token_logps_and_entropies

    def keep(*arguments, **named):
        logps_BT, entropies_BT, *_ = stats = compute(*arguments, **named)
        found.append((logps_BT.detach(), entropies_BT.detach()))
        return stats

    with changed(trainer, _get_per_token_logps_and_entropies=keep):
        yield found


def numbers_in_loss(trainer, batch: dict[str, Tensor], logps_BT: Tensor, entropies_BT: Tensor) -> dict[str, Tensor]:
    """Return the numbers of each token in TRL's loss, by name.

        log_probability           log pi(token), at the run's temperature
        entropy                   of the distribution over the next token, in nats, at the run's temperature
        ratio                     r = pi / pi_old; with importance_sampling_level: sequence, the geometric mean of a row
        clipped                   1 if r < 1 - epsilon_low and A' < 0, or r > 1 + epsilon_high and A' > 0, else 0
        sampling_log_probability  as reported by vLLM or by a rollout_func

    For `clipped`, `delta` is an upper bound of r. With `cispo`, it is 1 if r > epsilon_high and A' > 0. Losses that do
    not clip (`sapo`, `vespo`) have no `clipped`. This is what TRL's metrics `clip_ratio/region_mean` and
    `cispo_clip_ratio` count, for all tokens or, with one ratio and one advantage for a row, for rows. Without
    `old_per_token_logps` in the batch, pi_old is pi.

    Args:
        batch: the batch of the loss; its `advantages` are (B,) or (B, T).
        logps_BT, entropies_BT: from `stats_in_loss`.

    Returns:
        (B, T) in float32, NaN for tokens that are not trained on.
    """
    mask_BT = batch["completion_mask"] * batch.get("tool_mask", 1)
    log_ratio_BT = logps_BT - batch.get("old_per_token_logps", logps_BT)
    if trainer.importance_sampling_level == "sequence":
        means_B1 = (log_ratio_BT * mask_BT).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        log_ratio_BT = means_B1.expand_as(log_ratio_BT)
    ratio_BT = log_ratio_BT.exp()
    numbers = {"log_probability": logps_BT, "entropy": entropies_BT, "ratio": ratio_BT}
    advantages = batch["advantages"].reshape(len(mask_BT), -1)  # (B, T) or (B, 1)
    if trainer.loss_type == "cispo":
        numbers["clipped"] = (ratio_BT > trainer.epsilon_high) & (advantages > 0)
    elif trainer.loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
        bounded_BT = ratio_BT if trainer.args.delta is None else ratio_BT.clamp(max=trainer.args.delta)
        low_BT = (bounded_BT < 1 - trainer.epsilon_low) & (advantages < 0)
        high_BT = (bounded_BT > 1 + trainer.epsilon_high) & (advantages > 0)
        numbers["clipped"] = low_BT | high_BT
    if "sampling_per_token_logps" in batch:
        numbers["sampling_log_probability"] = batch["sampling_per_token_logps"]
    return {name: values_BT.float().masked_fill(mask_BT == 0, torch.nan) for name, values_BT in numbers.items()}


# Checkpoints.


class Place(NamedTuple):
    """The position of a training run between two generations."""

    step: int  # number of forward passes so far
    rollouts: list[dict] | None  # batches of the last generation


def place(trainer) -> Place:
    """Return the position of a training run."""
    return Place(trainer._step, trainer._buffered_inputs)


def take_up(trainer, place: Place) -> None:
    """Make a training run continue from a position."""
    trainer._step, trainer._buffered_inputs = place


@contextmanager
def older_checkpoints_stay() -> Iterator[None]:
    """Keep transformers from removing old checkpoints."""
    with changed(transformers.trainer, rotate_checkpoints=lambda **_: None):
        yield


# Saving and the Hub.


def gather_when_saving(trainer) -> None:
    """Make DeepSpeed gather the weights when it saves a model, also without `zero3_save_16bit_model`."""
    trainer.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = True


def wait_for_upload(trainer) -> None:
    """Wait for the background upload of a checkpoint to finish."""
    trainer._finish_current_push()


@contextmanager
def uploading_by(api: Callable[[], object]) -> Iterator[None]:
    """Make transformers upload checkpoints with the client that `api` returns.

    This is the only way to choose which files it uploads.
    """
    with changed(transformers.trainer, hf_api=api):
        yield


# The compatibility check.


class _StandIn(nn.Module):
    """Minimal model for the check: the log-probability of each token of a rollout is a parameter."""

    is_gradient_checkpointing = False

    def __init__(self, tokens: int):
        super().__init__()
        self.logps_BT = nn.Parameter(torch.linspace(-2.0, -1.0, tokens)[None])

    def forward(self, input_ids: Tensor, **_) -> SimpleNamespace:
        prompt = input_ids.shape[1] - self.logps_BT.shape[1]
        return SimpleNamespace(
            log_probs=nn.functional.pad(self.logps_BT, (prompt, 0)),
            entropy=torch.ones(input_ids.shape, device=input_ids.device),
            aux_loss=self.logps_BT.new_zeros(()),
        )


class _Probe(GRPOTrainer):
    """TRL's trainer with the settings of a run and one synthetic rollout per process. It logs nothing.

    It shares no object with the run that TRL modifies. TRL's collective calls run here too, so all processes must
    create one.
    """

    def __init__(self, trainer):
        # Without attributes that replace TRL's methods.
        own = {name: value for name, value in vars(trainer).items() if not hasattr(GRPOTrainer, name)}
        vars(self).update(own)
        tokens = [self._tokenizer.eos_token_id] * 4
        self.rows = [{"prompt": [{"role": "user", "content": "1"}], "noted": "x"}]
        self.prompts = [row["prompt"] for row in self.rows]
        self.rollouts = {"prompt_ids": [tokens[:2]], "completion_ids": [tokens], "logprobs": None}
        self.rollout_func = lambda prompts, trainer: dict(self.rollouts)
        self.args = copy.copy(self.args)
        self.args.report_to = []
        self.state = copy.copy(self.state)
        self.num_generations = self.current_gradient_accumulation_steps = 1
        self.tools, self.environments, self.environment_factories = [], None, None
        self.use_vllm, self.beta, self.mask_truncated_completions = False, 0.0, False
        self.reward_funcs, self.reward_func_names, self.reward_processing_classes = [self.reward], ["probe"], [None]
        self.reward_weights = torch.ones(1)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._pending_extra_logs, self._pending_metrics = defaultdict(list), defaultdict(list)
        texts = {name: [] for name in self._logs}
        self._logs = texts | {"rewards": defaultdict(list), "extra": defaultdict(list)}
        self.called: set[str] = set()
        # `pad_to_multiple_of` may pad the rollout.
        multiple = self.pad_to_multiple_of or 1
        self.model = _StandIn(-(-len(tokens) // multiple) * multiple).to(self.accelerator.device).train()

    def reward(self, completions, log_extra, noted, **_) -> list[float]:
        log_extra("noted", noted)
        return [1.0]

    def _generate(self, prompts):
        self.called.add("_generate")
        return super()._generate(prompts)

    def _calculate_rewards(self, *arguments):
        self.called.add("_calculate_rewards")
        return super()._calculate_rewards(*arguments)

    def _compute_loss(self, model, inputs):
        self.called.add("_compute_loss")
        return super()._compute_loss(model, inputs)


def _makes_batches(probe: _Probe) -> str:
    batch = probe._generate_and_score_completions(probe.rows)
    if missing := {"_generate", "_calculate_rewards"} - probe.called:
        return f"_generate_and_score_completions no longer calls {' and '.join(sorted(missing))}"
    shapes = {"prompt_ids": 2, "prompt_mask": 2, "completion_ids": 2, "completion_mask": 2, "advantages": 1}
    for name, dimensions in shapes.items():
        if name not in batch:
            return f"the batch has no {name!r}"
        if len(batch[name]) != 1 or batch[name].dim() != dimensions:
            return f"{name!r} of the batch has shape {tuple(batch[name].shape)}"
    world = probe.accelerator.num_processes
    if [len(texts) for texts in last_texts(probe, world)] != [world, world]:
        return "the batch's prompts and completions are not logged"
    if "completions/clipped_ratio" not in _metrics(probe):
        return "the metric 'completions/clipped_ratio' is not logged"
    probe.compute_loss(probe.model, batch)
    return "" if "_compute_loss" in probe.called else "compute_loss no longer calls _compute_loss"


def _takes_token_advantages(probe: _Probe) -> str:
    probe.importance_sampling_level = "token"
    batch = probe._generate_and_score_completions(probe.rows)
    logps_BT = probe.model.logps_BT
    advantages_BT = torch.linspace(1.0, 2.0, logps_BT.shape[1], device=logps_BT.device)[None]
    gradients = []
    for advantages in (torch.ones_like(advantages_BT[:, 0]), advantages_BT):
        loss = probe._compute_loss(probe.model, {**batch, "advantages": advantages})
        gradients += torch.autograd.grad(loss, logps_BT)
    of_rollout, of_tokens = gradients
    if torch.allclose(of_tokens, of_rollout * advantages_BT):
        return ""
    return "_compute_loss does not weight each token by its advantage if advantages have shape (B, T)"


def _tells_of_tokens(probe: _Probe) -> str:
    ids_BL = torch.tensor([[*probe.rollouts["prompt_ids"][0], *probe.rollouts["completion_ids"][0]]])
    ids_BL = ids_BL.to(probe.accelerator.device)
    found = token_stats(probe, probe.model, ids_BL, torch.ones_like(ids_BL), completion_length=4, rows=1)
    if [x.shape for x in found] != [(1, 4), (1, 4)] or not (found[1] == 1).all():
        return f"_get_per_token_logps_and_entropies returns {found}, not the log-probabilities and entropies of a row"
    return ""


class _HeadStandIn(nn.Module):
    """Minimal model for TRL's fused head: the logits of the next token are 0, 1/2 and 1 times the id of a token."""

    is_gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: self.config)
        self.head = SimpleNamespace(weight=torch.tensor([[0.0], [0.5], [1.0]]), bias=None)

    def base_model(self, input_ids: Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=input_ids[..., None].float())

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head

    def forward(self) -> None:
        raise NotImplementedError


def _squares_probabilities(probe: _Probe) -> str:
    model, ids_BL = _HeadStandIn(), torch.tensor([[2, 1, 2, 0]])
    with changed(trl.trainer.utils, maybe_gather_lm_head_ctx=lambda *_: nullcontext()):  # no weights of ZeRO-3
        found = token_squares(probe, model, ids_BL, torch.ones_like(ids_BL), completion_length=3, rows=1)
    probs_BTV = (ids_BL[:, :-1, None] / probe.temperature * model.head.weight[:, 0]).softmax(-1)
    wanted = probs_BTV.gather(2, ids_BL[:, 1:, None])[..., 0], probs_BTV.square().sum(-1)
    for x_BT, y_BT in zip(found, wanted, strict=True):
        if x_BT.shape != y_BT.shape or not torch.allclose(x_BT, y_BT, atol=0.01):
            return f"the fused head computes probabilities or sums of squares {x_BT.tolist()}, not {y_BT.tolist()}"
    return ""


def _renders(probe: _Probe) -> str:
    found, wanted = prompt_ids_of(probe, ["1", "2"]), probe._tokenizer(["1", "2"])["input_ids"]
    return "" if found == wanted else f"_tokenize_prompts returns {found}, not the token ids of two texts, {wanted}"


def _computes_numbers(probe: _Probe) -> str:
    batch = probe._generate_and_score_completions(probe.rows)
    logps_BT = probe.model.logps_BT.detach()
    signs_BT = torch.ones_like(logps_BT)
    signs_BT[:, 0] = -1
    shifts_BT = torch.linspace(-2.0, 3.0, logps_BT.shape[1], device=logps_BT.device)
    batch |= {"advantages": signs_BT, "old_per_token_logps": logps_BT - shifts_BT}
    with stats_in_loss(probe) as found:
        probe._compute_loss(probe.model, batch)
    if len(found) != 1:
        return f"_compute_loss computes log-probabilities {len(found)} times, not once"
    if not torch.equal(found[0][0], logps_BT) or not (found[0][1] == 1).all():
        return f"_compute_loss computes {found[0]}, not the log-probabilities and entropies of a rollout"
    numbers = numbers_in_loss(probe, batch, *found[0])
    metrics = _metrics(probe)
    logged = metrics.get("clip_ratio/region_mean") or metrics.get("cispo_clip_ratio")
    if (logged is None) != ("clipped" not in numbers):
        return f"the metrics of clipped tokens with loss_type {probe.loss_type} are {logged}"
    if logged and abs(logged[-1] - numbers["clipped"].nanmean().item()) > 1e-6:
        return f"the share of clipped tokens is {logged[-1]}, not {numbers['clipped'].nanmean().item()}"
    return ""


def _reads_old_policy_late(probe: _Probe) -> str:
    # With pi_old given for the first tokens only, and the loss of the same pi_old given for all.
    batch = probe._generate_and_score_completions(probe.rows)
    batch.pop("old_per_token_logps", None)
    batch["advantages"] = torch.ones_like(batch["advantages"])
    logps_BT = probe.model.logps_BT.detach()
    old_BT = logps_BT - 0.1
    old_BT[:, 2:] = torch.nan
    losses = [
        probe._compute_loss(probe.model, {**batch, "old_per_token_logps": old_BT.where(~old_BT.isnan(), logps_BT)})
    ]
    with older_policy(probe, batch, old_BT):
        losses.append(probe._compute_loss(probe.model, batch))
    if torch.equal(*losses):
        return ""
    return f"_compute_loss does not read old_per_token_logps after the log-probabilities: {losses[1]}, not {losses[0]}"


def _generates(probe: _Probe) -> str:
    given = probe.rollouts | {"env_mask": [[1, 1, 0, 1]], "noted": ["x"]}
    probe.rollouts = dict(given)
    items = probe._generate(probe.prompts)
    if len(items) != len(Generated._fields):
        return f"_generate returns {len(items)} items, not {len(Generated._fields)} ({', '.join(Generated._fields)})"
    wanted = {
        "prompt_ids": given["prompt_ids"],
        "completion_ids": given["completion_ids"],
        "mask": given["env_mask"],
        "logprobs": None,
        "extra_fields": {"noted": ["x"]},
        "images": None,
    }
    found = Generated(*items)._asdict()
    return ", ".join(f"_generate returns {found[n]!r} as {n}, not {w!r}" for n, w in wanted.items() if found[n] != w)


def _grades(probe: _Probe) -> str:
    made = generate(probe, probe.prompts)
    rewards, columns = grade(probe, probe.rows, made.completions, made.completion_ids)
    if rewards.tolist() != [[1.0]] * probe.accelerator.num_processes:
        return f"_calculate_rewards returns {rewards.tolist()}, not a reward of 1 from each process"
    return "" if columns == {"noted": ["x"]} else f"the columns logged by a reward function are {columns}"


def _samples_by_permutation(_) -> str:
    # Resuming starts one pass of the sampler per past epoch. This requires that no epoch is set on the sampler.
    sampler = trl.trainer.utils.RepeatSampler
    whole, resumed = (sampler(range(9), mini_repeat_count=1, seed=1) for _ in range(2))
    first, second = list(whole), list(whole)
    next(iter(resumed))
    if first == second or list(resumed) != second:
        return "RepeatSampler no longer draws a new permutation at the start of a pass"
    return "RepeatSampler has a new method set_epoch" if hasattr(sampler, "set_epoch") else ""


def _limits_tokens(probe: _Probe) -> str:
    holder, name = _limit(probe)
    return "" if hasattr(holder, name) else f"{type(holder).__name__} has no {name}"


def _takes(method: str, *arguments: Any, **named: Any) -> Callable[[_Probe], str]:
    """Return a check that a method of TRL's trainer exists and accepts these arguments."""

    def check(_) -> str:
        function = getattr(GRPOTrainer, method, None)
        if function is None:
            return f"{method} does not exist"
        try:
            inspect.signature(function).bind(None, *arguments, **named)
        except TypeError as error:
            return f"{method} does not accept the expected arguments ({error})"
        return ""

    return check


def _has(owner: object | None, *names: str) -> Callable[[_Probe], str]:
    """Return a check that a module, or by default the trainer, has these attributes."""
    return lambda probe: ", ".join(f"{name} does not exist" for name in names if not hasattr(owner or probe, name))


class _Feature(NamedTuple):
    what: str  # name of the feature in error messages
    checks: tuple[Callable[[_Probe], str], ...]  # each returns the problem or ""; the first problem ends the check


FEATURES = {
    "training": _Feature(
        "KTAEGRPOTrainer",
        (_takes("log", {}, None), _takes("_get_grad_norm", None, None), _makes_batches),
    ),
    "credit": _Feature("credit other than none", (_takes_token_advantages,)),
    "token_numbers": _Feature("log-probabilities, entropies and ratios in the records", (_computes_numbers,)),
    "token_stats": _Feature("a credit method that uses token_stats", (_tells_of_tokens,)),
    "token_squares": _Feature(
        "a credit method that uses token_squares",
        (_has(trl.trainer.utils, "add_fused_lm_head"), _squares_probabilities),
    ),
    "prompt_ids": _Feature("a credit method that renders prompts", (_takes("_tokenize_prompts", []), _renders)),
    "frozen": _Feature(
        "a credit method with a second model",
        (
            _has(trl.models, "prepare_deepspeed", "prepare_fsdp"),
            _has(trl.trainer.utils, "add_fused_lm_head", "create_model_from_path"),
        ),
    ),
    "sampling": _Feature(
        "a credit method that samples",
        (
            _generates,
            _takes("_tokenize_prompts", []),
            _takes("_generate_single_turn", [], None, {}, num_generations=1),
            _limits_tokens,
        ),
    ),
    "grading": _Feature("grading outside training steps (held-out accuracy)", (_generates, _grades)),
    "dynamic_sampling": _Feature("dynamic_sampling", (_generates, _grades)),
    "dynamic_sampling_reuse": _Feature("dynamic_sampling_reuse", (_tells_of_tokens, _reads_old_policy_late)),
    "checkpoints": _Feature(
        "saving and resuming (set save_strategy: no to train without)",
        (
            _has(None, "_step", "_buffered_inputs"),
            _has(transformers.trainer, "rotate_checkpoints"),
            _takes("_save_checkpoint", None, None),
            _takes("_get_output_dir", trial=None),
            _takes("_get_train_sampler", None),
            _takes("_init_training_state", 1, 1, 1, None, None),
            _has(trl.trainer.utils, "RepeatSampler"),
            _samples_by_permutation,
        ),
    ),
    "push_to_hub": _Feature(
        "push_to_hub",
        (
            _has(transformers.trainer, "hf_api"),
            _takes("init_hf_repo", None),
            _takes("_push_from_checkpoint", ""),
            _takes("_finish_current_push"),
        ),
    ),
}
passed: set[str] = set()  # features that passed their checks in this process


def need(feature: str, trainer, version: str = trl.__version__) -> None:
    """Check once per process that the installed TRL supports a feature of the package. Collective.

    Args:
        feature: a key of `FEATURES`.
        trainer: an initialized `KTAEGRPOTrainer`. The check does not change it, random states, logs or trackers.

    Raises:
        NotImportedError: something is missing or behaves differently. The message names it and the tested versions.

    Warns:
        UserWarning: the checks passed, but this version of TRL was not tested.
    """
    if feature in passed:
        return
    what, checks = FEATURES[feature]
    for check in checks:
        cause = None
        try:
            problem = check(_Probe(trainer))
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # typical of changed code
            problem, cause = f"{type(error).__name__}: {error}", error
        if problem:
            raise NotImportedError(
                f"TRL {version} is not compatible with {what}: {problem}. Install a tested version: "
                f"pip install 'trl{TESTED_TRL}'"
            ) from cause
    if not passed and not SpecifierSet(TESTED_TRL).contains(version, prereleases=True):
        warnings.warn(
            f"TRL {version} was not tested with ktae_trl (tested: {TESTED_TRL}), but passed the check for {what}",
            stacklevel=2,
        )
    passed.add(feature)


def check_loss_type(trainer) -> None:
    """Raise a UserError if TRL does not know the run's `loss_type`: TRL itself says so at the first step only."""
    probe = _Probe(trainer)
    try:
        probe._compute_loss(probe.model, probe._generate_and_score_completions(probe.rows))
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # others are for `need`
        if str(error).startswith("Unknown loss type"):
            raise UserError(f"{error} (TRL {trl.__version__}). `ktae train --help` lists the values") from error
