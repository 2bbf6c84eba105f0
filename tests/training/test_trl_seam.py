"""The one file that knows TRL from the inside: it finds what has changed, and no other file has to."""

import ast
import random
import re
import runpy
import time
import warnings
from pathlib import Path

import numpy
import pytest
import torch
import transformers.trainer
import trl.models
import trl.trainer.utils
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ktae_trl import trl_seam
from ktae_trl.rewards import math_accuracy
from ktae_trl.trl_seam import FEATURES, TESTED_TRL, need
from tests.trainers import logged, make_trainer

PACKAGE = Path(trl_seam.__file__).parent


@pytest.fixture
def anew(monkeypatch):
    """Features are checked again, as in a new process."""
    monkeypatch.setattr(trl_seam, "passed", set())


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("out"))


# The check


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"credit": "none", "scale_rewards": "batch", "num_iterations": 2, "steps_per_generation": 2},
        {"multi_objective_aggregation": "normalize_then_sum", "importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "pad_to_multiple_of": 8},
        {"mask_truncated_completions": True, "off_policy_mask_threshold": 0.5, "log_completions": True},
        *({"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")),
    ],
)
def test_the_installed_trl_does_all_that_is_needed_and_nobody_notices(tmp_path, caplog, anew, settings):
    """A run's random numbers, metrics, logs and counters are as they were. The check takes milliseconds."""
    trainer = make_trainer(tmp_path, max_steps=1, max_completion_length=8, **settings)
    trainer.train()
    before = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    seen = repr([trainer.state, trl_seam.last_texts(trainer, 99), trainer.reward_funcs, trainer.args, vars(trainer)])
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trl_seam.passed.clear()
        begin = time.perf_counter()
        for feature in FEATURES:
            need(feature, trainer)
        assert time.perf_counter() - begin < 1
    assert trl_seam.passed == set(FEATURES)
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert seen == repr(
        [trainer.state, trl_seam.last_texts(trainer, 99), trainer.reward_funcs, trainer.args, vars(trainer)]
    )
    assert caplog.records == []


def test_another_version_that_does_what_is_needed_is_a_warning(anew, trainer):
    for version in ("1.15.0", "1.17.0", "2.0.0.dev0"):
        trl_seam.passed.clear()
        with pytest.warns(UserWarning, match=f"TRL {version} was not tested with ktae_trl .tested: {TESTED_TRL}"):
            need("training", trainer, version)


def test_a_feature_is_checked_once_a_process(anew, trainer, monkeypatch):
    need("credit", trainer)
    monkeypatch.delattr(GRPOTrainer, "_compute_loss")
    need("credit", trainer)


def wrapped(change):
    """Replace a method by one whose result, or arguments, `change` makes of the original."""
    return lambda original: lambda self, *arguments, **named: change(original, self, *arguments, **named)


def with_item(original, self, prompts):
    return *original(self, prompts), None


def without_fields(original, self, prompts):
    items = list(original(self, prompts))
    items[trl_seam.Generated._fields.index("extra_fields")] = {}
    return tuple(items)


def without_mask(original, self, inputs):
    return {name: value for name, value in original(self, inputs).items() if name != "completion_mask"}


def of_rollouts_only(original, self, model, inputs):
    advantages = inputs["advantages"]
    return original(self, model, {**inputs, "advantages": advantages.reshape(len(advantages), -1).mean(1)})


def otherwise(original, self, model, inputs):
    loss = original(self, model, inputs)
    return loss if inputs["advantages"].dim() == 1 else 2 * loss


def of_the_other_sign(original, self, model, inputs):
    return original(self, model, {**inputs, "advantages": -inputs["advantages"]})


def twice(original, self, model, inputs):
    return original(self, model, inputs) + original(self, model, inputs)


def without_entropies(original, self, *arguments, **named):
    return original(self, *arguments, **named | {"compute_entropy": False})


def of_prompts(original, self, model, ids, mask, completion_length, **named):
    logps, *others = original(self, model, ids, mask, ids.shape[1] - 1, **named)
    return logps[:, :completion_length] - 1, *others


def without_last_token(original, self, prompts):
    ids, *more = original(self, prompts)
    return [own[:-1] for own in ids], *more


def one_process_more(original, self, *arguments):
    rewards = original(self, *arguments)
    return torch.cat([rewards, rewards])


def on_a_copy(original, self, model, inputs):
    return original(self, model, dict(inputs))


CHANGES = [
    ("training", "_get_grad_norm", None, "_get_grad_norm does not exist"),
    ("training", "log", lambda original: lambda self, logs: None, "log does not accept the expected arguments"),
    ("training", "_generate_and_score_completions", wrapped(without_mask), "the batch has no 'completion_mask'"),
    ("training", "_calculate_rewards", None, "AttributeError: .*_calculate_rewards"),
    ("credit", "_compute_loss", wrapped(of_rollouts_only), "_compute_loss does not weight each token by its adv"),
    ("credit", "_compute_loss", wrapped(otherwise), "_compute_loss does not weight each token by its adv"),
    ("token_numbers", "_compute_loss", wrapped(of_the_other_sign), r"the share of clipped tokens is 0\.25, not 0\.75"),
    ("token_numbers", "_compute_loss", wrapped(twice), "_compute_loss computes log-probabilities 2 times"),
    ("token_numbers", "_get_per_token_logps_and_entropies", wrapped(without_entropies), "'NoneType' object has no"),
    ("token_numbers", "_get_per_token_logps_and_entropies", None, "AttributeError: .*_get_per_token_logps"),
    ("token_squares", "_get_per_token_logps_and_entropies", wrapped(without_entropies), "'NoneType' object has no"),
    ("token_squares", "_get_per_token_logps_and_entropies", wrapped(of_prompts), "probabilities or sums of squares"),
    ("dynamic_sampling", "_generate", wrapped(with_item), "_generate returns 9 items, not 8"),
    ("dynamic_sampling", "_generate", wrapped(without_fields), "_generate returns {} as extra_fields"),
    ("dynamic_sampling", "_calculate_rewards", wrapped(one_process_more), "not a reward of 1 from each process"),
    (
        "dynamic_sampling",
        "_log_completion_extra",
        wrapped(lambda *_: None),
        "logged by a reward function are {}",
    ),
    ("dynamic_sampling_reuse", "_compute_loss", wrapped(on_a_copy), "_compute_loss does not read old_per_token_logps"),
    ("grading", "_generate", wrapped(with_item), "_generate returns 9 items, not 8"),
    ("sampling", "_generate", wrapped(with_item), "_generate returns 9 items, not 8"),
    ("sampling", "_tokenize_prompts", None, "_tokenize_prompts does not exist"),
    ("prompt_ids", "_tokenize_prompts", wrapped(without_last_token), "not the token ids of two texts"),
    (
        "sampling",
        "_generate_single_turn",
        lambda original: lambda self, prompt_ids, images: None,
        r"_generate_single_turn does not accept the expected arguments \(too many positional arguments\)",
    ),
    ("checkpoints", "_init_training_state", None, "_init_training_state does not exist"),
    ("push_to_hub", "_push_from_checkpoint", None, "_push_from_checkpoint does not exist"),
]


@pytest.mark.parametrize(("feature", "method", "change", "problem"), CHANGES)
def test_what_has_changed_is_named_when_the_feature_is_asked_for(
    anew, trainer, monkeypatch, feature, method, change, problem
):
    owner = next(kind for kind in GRPOTrainer.__mro__ if method in vars(kind))
    if change is None:
        monkeypatch.delattr(owner, method)
    else:
        monkeypatch.setattr(owner, method, change(getattr(owner, method)))
    what = re.escape(FEATURES[feature].what)
    with pytest.raises(
        ImportError, match=rf"^TRL \S+ is not compatible with {what}: .*{problem}.*pip install 'trl"
    ) as told:
        need(feature, trainer)
    assert "\n" not in str(told.value)
    for other in {"checkpoints", "push_to_hub"} - {feature}:  # which ask for none of the others' parts
        need(other, trainer)


def test_trl_no_longer_calls_what_is_overridden(anew, trainer, monkeypatch):
    for name, called in (("_generate_and_score_completions", "_calculate_rewards"), ("compute_loss", "_compute_loss")):
        original = getattr(GRPOTrainer, name)

        def by_another_name(self, *arguments, original=original, called=called, **named):
            setattr(self, called, lambda *arguments: getattr(GRPOTrainer, called)(self, *arguments))
            return original(self, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(GRPOTrainer, name, by_another_name)
            with pytest.raises(ImportError, match=f"{name} no longer calls {called}"):
                need("training", trainer)


@pytest.mark.parametrize(
    ("features", "owner", "name"),
    [
        ({"checkpoints"}, trl.trainer.utils, "RepeatSampler"),
        ({"frozen", "token_squares"}, trl.trainer.utils, "add_fused_lm_head"),
        ({"push_to_hub"}, transformers.trainer, "hf_api"),
    ],
)
def test_what_a_module_no_longer_has_is_missed_by_its_features_alone(anew, trainer, monkeypatch, features, owner, name):
    monkeypatch.delattr(owner, name)
    runpy.run_path(trl_seam.__file__)  # it can be imported
    for other in FEATURES.keys() - features:
        need(other, trainer)
    for feature in features:
        what = FEATURES[feature].what.partition(" (")[0]
        with pytest.raises(ImportError, match=f"{what}.*: {name} does not exist"):
            need(feature, trainer)


def test_a_sampler_that_is_told_its_epoch_would_break_resuming(anew, trainer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RepeatSampler, "set_epoch", lambda self, epoch: None, raising=False)
        with pytest.raises(ImportError, match="RepeatSampler has a new method set_epoch"):
            need("checkpoints", trainer)
    draw = RepeatSampler.__iter__

    def anew_each_pass(self):
        self.generator.manual_seed(self.seed)
        return draw(self)

    monkeypatch.setattr(RepeatSampler, "__iter__", anew_each_pass)
    with pytest.raises(ImportError, match="RepeatSampler no longer draws a new permutation"):
        need("checkpoints", trainer)


@pytest.mark.parametrize(
    ("feature", "settings", "owner", "name", "change"),
    [
        ("credit", {"credit": "ktae"}, GRPOTrainer, "_compute_loss", wrapped(of_rollouts_only)),
        (
            "dynamic_sampling",
            {"dynamic_sampling": True},
            GRPOTrainer,
            "_log_completion_extra",
            wrapped(lambda *_: None),
        ),
        ("checkpoints", {"save_strategy": "steps"}, RepeatSampler, "set_epoch", lambda _: lambda self, epoch: None),
    ],
)
def test_a_run_without_the_feature_trains(tmp_path, anew, monkeypatch, feature, settings, owner, name, change):
    monkeypatch.setattr(owner, name, change(getattr(owner, name, None)), raising=False)
    plain = {"credit": "none", "reward_funcs": math_accuracy, "max_steps": 1, "max_completion_length": 8}
    trainer = make_trainer(tmp_path / "plain", **plain)
    trainer.train()
    assert len(logged(trainer, "loss")) == 1
    with pytest.raises(ImportError, match=re.escape(FEATURES[feature].what)):
        make_trainer(tmp_path / "asked", **{**plain, **settings}).train()


# No other file

ALLOWED = {
    "_actions": "of argparse",
    "_asdict": "of named tuples",
    "_current_frames": "of sys",
    "_exit": "of os",
    "_fields": "of named tuples",
    "_instances": "of tqdm",
    "_replace": "of named tuples",
    "_repr_html_": "of IPython's protocol",
}


def private_names(file: Path) -> list[str]:
    """Return where a file names what is private to others, as `line: name`."""
    tree = ast.parse(file.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls")
    }
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found = []
    for function in [None, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
        for node in ast.walk(function) if function else ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
                if of_super and function is None:
                    continue  # looked at below, with the function that it stands in
                if of_super and file.name == "trainer.py" and function.name == node.attr:
                    continue
                if function is not None and not of_super:
                    continue
                if node.attr in own | ALLOWED.keys() and not of_super:
                    continue
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            elif function is None and isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant) and re.match(r"_[a-z]", name.value) and name.value not in own:
                    found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_other_file_names_what_is_private(file):
    if file.name == "trl_seam.py":
        assert private_names(file)  # the test sees some
    else:
        assert private_names(file) == []
