"""Methods of one's own: how they are named and given settings, what `Tools` gives them, and the worked examples."""

import hashlib
import importlib.util
import inspect
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ktae_trl import KTAEGRPOConfig, tiny
from ktae_trl.credit import METHODS
from ktae_trl.rollouts.tools import TrainerTools
from ktae_trl.training.changes import own_settings
from ktae_trl.training.run import read_arguments
from tests.credit import examples
from tests.distributed.launching import environment
from tests.reporting import Page
from tests.trainers import difference, first_batch, logged, make_trainer, other_model, prompts, replay, weights

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/methods/your_own.md").read_text()
CPU = {"output_dir": "x", "use_cpu": True, "bf16": False}
REPLAYED = {"rollout_func": replay, "max_steps": 1, "max_completion_length": 40}


@pytest.fixture
def watched(monkeypatch):
    """A function that trains a step with an example and returns the trainer, what the method saw, and its values."""

    def train(folder, name: str, **settings):
        kind, seen = getattr(examples, name), []
        credit = kind.credit

        def spy(self, groups):
            found = credit(self, groups)
            seen.append((groups, found if isinstance(found, torch.Tensor) else found.values_BT))
            return found

        monkeypatch.setattr(kind, "credit", spy)
        trainer = make_trainer(folder, credit=f"tests.credit.examples.{name}", **REPLAYED | settings)
        trainer.train()
        return trainer, *seen[0]

    return train


# The examples


def test_the_page_shows_the_code_that_is_tested():
    shown = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    classes = [examples.EntropyWeight, examples.SegmentValues, examples.SecondOpinion]
    for kind in classes:
        source = inspect.getsource(kind)
        assert source in shown
        assert len(source.splitlines()) <= 25, kind
    head = inspect.getsource(examples).partition('"""\n\n')[2].partition("\n\n\nclass")[0]
    assert f"{head}\n" in shown
    assert f'{inspect.getsource(examples.early)}\n\nearly.how = "scale"\n' in shown


def of_model(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return the log-probabilities of all tokens at each place of a completion, without padding or batching."""
    with torch.no_grad():
        return model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_the_entropy_weight_is_that_of_single_passes(tmp_path, watched):
    trainer, groups, weights_BT = watched(tmp_path, "EntropyWeight", entropy_floor=0.25)
    model = AutoModelForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32)
    largest = []
    for prompt, completion, row in zip(groups.prompts, groups.completions, weights_BT, strict=True):
        entropy_T = torch.special.entr(of_model(model, prompt, completion).exp()).sum(-1) + 0.25
        torch.testing.assert_close(row[: len(completion)], entropy_T / entropy_T.mean(), atol=1e-4, rtol=1e-4)
        assert (row[len(completion) :] == 1).all()
        largest.append((entropy_T / entropy_T.mean()).max().item())
    assert logged(trainer, "entropy/largest_weight") == pytest.approx([sum(largest) / len(largest)], rel=1e-4)
    assert logged(trainer, "entropy/seconds")[0] > 0


YES, NO = 7, 8  # last tokens of continuations


def ends_well(completion_ids, **kwargs):
    return [float(ids[-1] == YES or (ids[-1] != NO and sum(ids) % 2)) for ids in completion_ids]


def outcome(prefix: list[int], draw: int) -> int:
    return YES if hashlib.sha256(str((prefix, draw)).encode()).digest()[0] % 3 == 0 else NO


def test_segment_values_are_those_of_a_loop(tmp_path, watched, monkeypatch):
    """Continuations are drawn by the text that they go on from, 3 of each."""

    def generate(self, prefixes, limit):
        assert limit == 40
        seen = Counter()
        found = []
        for prefix in prefixes:
            found.append([outcome(prefix, seen[tuple(prefix)] % 3)])
            seen[tuple(prefix)] += 1
        return found, None

    monkeypatch.setattr(TrainerTools, "generate", generate)
    settings = {"segment_tokens": 7, "segment_samples": 3, "reward_funcs": ends_well}
    _, groups, values_BT = watched(tmp_path, "SegmentValues", **settings)
    assert len(set(values_BT.flatten().tolist())) > 4
    for prompt, completion, row in zip(groups.prompts, groups.completions, values_BT, strict=True):
        chances = [
            sum(outcome(prompt + completion[:at], draw) == YES for draw in range(3)) / 3
            for at in range(0, len(completion), 7)
        ]
        chances += ends_well([completion])
        expected = [chances[at // 7 + 1] - chances[at // 7] for at in range(len(completion))]
        torch.testing.assert_close(row, torch.tensor(expected + [0.0] * (len(row) - len(completion))))


def test_the_second_opinion_is_that_of_single_passes(tmp_path, watched):
    second_model = other_model(tmp_path / "second")
    _, groups, weights_BT = watched(tmp_path, "SecondOpinion", second_model=second_model)
    policy, other = (
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (tiny.MODEL, second_model)
    )
    for prompt, completion, row in zip(groups.prompts, groups.completions, weights_BT, strict=True):
        own, second = (of_model(m, prompt, completion)[range(len(completion)), completion] for m in (policy, other))
        raw_T = 1 + (own - second).abs()
        torch.testing.assert_close(row[: len(completion)], raw_T / raw_T.mean(), atol=1e-4, rtol=1e-4)
    assert weights_BT.std() > 0.05


# What the tools give


def test_continuations_are_those_of_the_model_by_itself(tmp_path):
    """Greedily, in rounds of a generation's rows: 16, then 5."""
    trainer = make_trainer(tmp_path, generation_kwargs={"do_sample": False}, **REPLAYED)
    tools = trainer.token_credit.tools
    tokenizer, model = trainer.processing_class, trainer.model
    messages = list(prompts(21)["prompt"])
    prefixes = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    found, logprobs = tools.generate(prefixes, 9)
    assert logprobs is None
    assert trainer.generation_config.max_new_tokens == 40
    for prefix, ids in zip(prefixes, found, strict=True):
        whole = model.generate(torch.tensor([prefix]), do_sample=False, max_new_tokens=9)[0, len(prefix) :].tolist()
        assert ids == whole
        assert len(ids) <= 9
    assert tools.generate([], 9) == ([], None)


def test_prompts_are_rendered_as_those_of_the_run(tmp_path):
    """With the template and its variables that the run has, which may not be the tokenizer's own."""
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ mark }}{% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    tokenizer.chat_template = template
    settings = {"chat_template_kwargs": {"mark": " 7:"}, "processing_class": tokenizer, "max_completion_length": 8}
    trainer = make_trainer(tmp_path, credit="tests.credit.examples.EntropyWeight", max_steps=2, **settings)
    tools = trainer.token_credit.tools
    messages = list(prompts(3)["prompt"])
    texts = ["".join(message["content"] for message in some) + " 7:" for some in messages]
    assert tools.prompt_ids(messages) == tokenizer(texts)["input_ids"]
    assert tools.prompt_ids(["1 + 1", "2"]) == tokenizer(["1 + 1", "2"])["input_ids"]
    assert tools.prompt_ids([]) == []
    assert (tools.step, tools.context_length) == (0, 512)
    batch = first_batch(trainer)
    rows = zip(batch["prompt_ids"], batch["prompt_mask"].bool(), strict=True)
    own = {tuple(ids[mask].tolist()) for ids, mask in rows}
    assert own <= {tuple(ids) for ids in tools.prompt_ids(list(prompts()["prompt"]))}
    trainer.train()
    assert tools.step == 2


def test_grades_are_those_of_the_answers(tmp_path):
    trainer = make_trainer(tmp_path, **REPLAYED)
    tools, tokenizer = trainer.token_credit.tools, trainer.processing_class
    rows = [dict(row) for row in prompts(4)]
    answers = [rows[0]["solution"][0], "999", rows[2]["solution"][0], "no box"]
    texts = [answer if answer == "no box" else rf"\boxed{{{answer}}}" for answer in answers]
    correct, scored = tools.grade(rows, [tokenizer(text)["input_ids"] for text in texts])
    assert correct.tolist() == [True, False, True, False]
    assert scored.tolist() == [True] * 4
    assert [x.tolist() for x in tools.grade([], [])] == [[], []]


def test_tools_leave_training_and_its_metrics_alone(tmp_path):
    def noting(completions, log_metric, log_extra, **kwargs):
        log_metric("completions", len(completions))
        log_extra("place", list(range(len(completions))))
        return [float(i % 2) for i in range(len(completions))]

    logs = []
    for asked in (False, True):
        trainer = make_trainer(tmp_path, max_steps=2, reward_funcs=noting)
        if asked:
            tools, rows = trainer.token_credit.tools, [dict(row) for row in prompts(3)]
            tools.grade(rows, [[5, 6]] * 3)
            tools.frozen(str(tiny.MODEL))
        trainer.train()
        logs.append(
            [
                {k: v for k, v in entry.items() if "time" not in k and "second" not in k and "/seconds" not in k}
                for entry in trainer.state.log_history
            ]
        )
    assert logs[0] == logs[1]


def test_grading_single_completions_needs_a_threshold(tmp_path):
    tools = make_trainer(tmp_path, correctness_threshold="auto", **REPLAYED).token_credit.tools
    with pytest.raises(ValueError, match=r"correctness_threshold: auto .* credit: ktae grades .* to a number"):
        tools.grade([], [])


def test_a_frozen_model_is_loaded_once_and_has_the_policy_s_tokens(tmp_path):
    trainer = make_trainer(tmp_path, **REPLAYED)
    tools = trainer.token_credit.tools
    frozen = tools.frozen(str(tiny.MODEL))
    assert tools.frozen(str(tiny.MODEL)) is frozen
    assert not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())
    small = AutoModelForCausalLM.from_pretrained(tiny.MODEL)
    small.resize_token_embeddings(16)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"small' has 16 token ids, but the policy's tokenizer has \d+"):
        tools.frozen(str(tmp_path / "small"))


# By name


MODULE = '''
from dataclasses import dataclass, field

import torch

from ktae_trl.credit.method import Credit, Method, Settings


class Window(Method):
    """Trust the first tokens."""

    @dataclass
    class Settings(Settings):
        window: int = field(default=4, metadata={"help": "Tokens that count."})
        window_weight: float | None = None

    how = "scale"

    def credit(self, groups):
        return (groups.mask_BT.cumsum(1) <= self.settings.window).float()


def flat(groups):
    return torch.zeros_like(groups.mask_BT, dtype=torch.float32)


def odd(groups):
    return flat(groups)[:, 1:]


odd.how = "scale"


def crooked(groups):
    return flat(groups)


crooked.how = "times"


class NoMethod:
    pass


class Taken(Method):
    @dataclass
    class Settings(Settings):
        learning_rate: float = 1.0


number = 3
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with the module `own_credit` in it."""
    (tmp_path / "own_credit.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_credit", None)


def test_in_python(here):
    args = KTAEGRPOConfig(credit="own_credit.Window", window=9, **CPU)
    assert isinstance(args, KTAEGRPOConfig)
    assert (args.window, args.window_weight, args.ktae_combine) == (9, None, "multiply")
    again = pickle.loads(pickle.dumps(args))
    assert (again.window, again.credit, type(again)) == (9, "own_credit.Window", type(args))
    assert KTAEGRPOConfig(credit="own_credit.flat", **CPU).credit == "own_credit.flat"
    with pytest.raises(TypeError, match="'window'"):
        KTAEGRPOConfig(window=9, **CPU)


def test_in_yaml_and_on_the_command_line(here):
    recipe = {**CPU, "credit": "own_credit.Window", "window": 7, "dataset_name": "x", "report_to": "none"}
    (here / "run.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--config", "run.yaml"]
    _, args, _ = read_arguments(words)
    assert (args.credit, args.window) == ("own_credit.Window", 7)
    _, args, _ = read_arguments([*words, "--window", "8", "--window_weight", "null"])
    assert (args.window, args.window_weight) == (8, None)
    with pytest.raises(ValueError, match=r"Unknown setting: 'windw' \(did you mean 'window'\?\)"):
        read_arguments([*words, "--windw", "8"])
    with pytest.raises(ValueError, match="Unknown setting: 'window'"):
        read_arguments([*words, "--credit", "ktae"])


@pytest.mark.parametrize(
    ("credit", "words"),
    [
        ("windw", r"credit='windw' is unknown\. Choose from: none, ktae, .*, or give a dotted path such as my_package"),
        ("no_such.thing", "The credit method 'no_such.thing' could not be imported: there is no module 'no_such'"),
        ("own_credit.Windw", r"the module 'own_credit' .* has no 'Windw' \(did you mean 'Window'\?\)"),
        ("own_credit.NoMethod", r"credit='own_credit.NoMethod' is a class, but not a subclass of .*\.Method"),
        ("own_credit.number", "credit='own_credit.number' must be a class or a function, not an object of type int"),
        ("own_credit.crooked", "credit='own_credit.crooked': how must be one of multiply, .*, not 'times'"),
        (
            "own_credit.Taken",
            "credit='own_credit.Taken' has settings .* in the config: learning_rate. Rename",
        ),
    ],
)
def test_errors_name_the_offender(here, credit, words):
    with pytest.raises(ValueError, match=words):
        KTAEGRPOConfig(credit=credit, **CPU)


def test_values_of_another_shape_are_refused(here):
    trainer = make_trainer(here, credit="own_credit.odd", **REPLAYED)
    with pytest.raises(ValueError, match=r"credit='own_credit.odd' must return .* shape \(16, 40\), not \(16, 39\)"):
        trainer.train()


def test_a_function_of_zeros_is_grpo(here):
    """By `multiply`, which is the default of a function."""
    settings = {**REPLAYED, "max_steps": 2}
    plain = make_trainer(here / "a", credit="none", **settings)
    plain.train()
    flat = make_trainer(here / "b", credit="own_credit.flat", **settings)
    start = weights(flat)
    flat.train()
    assert difference(weights(flat), weights(plain)) < 1e-7
    assert difference(weights(flat), start) > 0
    assert logged(flat, "flat/seconds")


def test_settings_shape_training_for_a_resume(here):
    args = KTAEGRPOConfig(credit="own_credit.Window", window=9, **CPU)
    assert own_settings(args) == {"settings of the credit method": {"window": 9, "window_weight": None}}
    assert own_settings(KTAEGRPOConfig(**CPU)) == {}


@pytest.mark.slow
def test_a_class_trains_resumes_and_shows_itself(here):
    """From the command line: console columns, page and card read what the class says."""
    (here / "run.yaml").write_text((ROOT / "ktae_trl/configs/quickstart.yaml").read_text())
    words = ["--credit", "own_credit.Window", "--window", "5", "--max_steps", "4", "--output_dir", "run"]
    words += ["--record_steps", "2", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no"]
    command = [sys.executable, str(ROOT / "train.py"), "--config", "run.yaml", *words]
    done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    card = (here / "run/README.md").read_text()
    assert "credit: own_credit.Window" in card
    assert "window: 5" in card
    assert "trained with GRPO" in card
    assert "\nTrust the first tokens.\n" in card
    again = subprocess.run(
        [*command, "--window", "6", "--resume_from_checkpoint", "run/checkpoint-2"],
        cwd=here,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "settings of the credit method changed from" in again.stderr


# Nothing else knows a method by name


def test_no_other_file_names_a_method():
    """Quoted names of methods, of their metrics and settings stand in `credit/` only."""
    names = {*METHODS, *(method.family for method in METHODS.values())}
    quoted = re.compile(rf"""["'`]({"|".join(names)})(["']|/\w|_(?!trl)[a-z]+["'])""")
    package = ROOT / "ktae_trl"
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".js", ".jinja", ".css")]
    found = {
        f"{path.relative_to(package)}: {match[0]}"
        for path in files
        if "credit" not in path.relative_to(package).parts
        for match in quoted.finditer(path.read_text())
    }
    # The default; the command, which has the name of a method.
    assert found == {f'{file}: "ktae"' for file in ("config.py", "cli.py", "hub/upload.py", "training/closing.py")}
    assert quoted.search((package / "credit/tree.py").read_text())  # the check sees names at all


# A fourth method of the package


EARLY = '''"""Early tokens: trust the beginning of a completion."""

from dataclasses import dataclass, field

import torch

from ktae_trl.credit.method import Card, Credit, Groups, Method, Settings


class Early(Method):
    """Weights that fall over the tokens of a rollout."""

    @dataclass
    class Settings(Settings):
        early_power: float = field(default=1.0, metadata={"help": "How fast the weights fall."})

    name = "early"
    how = "scale"
    title = "Early (the first tokens)"
    card = Card("Early", "The first tokens of a completion get most of its advantage.", ("early",))
    value = "weight w"
    columns = {"early w": ("early/weight", "{:.3f}")}
    panels = {"Mean early weight": ["early/weight"]}

    def credit(self, groups: Groups) -> Credit:
        mask_BT = groups.mask_BT
        place_BT = mask_BT.cumsum(1) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        weights_BT = torch.where(mask_BT, 2 - 2 * place_BT**self.settings.early_power, 1.0)
        return Credit(weights_BT, {"early/weight": (weights_BT[mask_BT].sum(), mask_BT.sum())})
'''


def files_of(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_adding_a_method_touches_its_file_its_line_its_page_and_its_tests(tmp_path):
    """In a copy of the repository a fourth method is trained from YAML, and seen wherever methods are."""
    for name in ("ktae_trl", "docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    before = files_of(tmp_path)

    (tmp_path / "ktae_trl/credit/early.py").write_text(EARLY)
    methods = tmp_path / "ktae_trl/credit/__init__.py"
    text = methods.read_text().replace("(KTAE, OARG", "(KTAE, Early, OARG")
    place = "from ktae_trl.credit.oar"
    methods.write_text(text.replace(place, f"from ktae_trl.credit.early import Early\n{place}"))
    (tmp_path / "docs/methods/early.md").write_text(
        "# Early\n\nThe first tokens: [metrics](../reference/metrics.md).\n"
    )
    (tmp_path / "tests/credit").mkdir(parents=True)
    (tmp_path / "tests/credit/test_early.py").write_text("")
    after = files_of(tmp_path)
    touched = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    own = {"ktae_trl/credit/early.py", "docs/methods/early.md", "tests/credit/test_early.py"}
    assert touched == {*own, "ktae_trl/credit/__init__.py"}

    recipe = yaml.safe_load((ROOT / "ktae_trl/configs/quickstart.yaml").read_text())
    recipe |= {"credit": "early", "early_power": 2.0, "max_steps": 4, "output_dir": "run", "record_steps": 2}
    recipe |= {"logging_steps": 1, "report_to": "none", "held_out_samples": 0, "save_strategy": "no"}
    (tmp_path / "early.yaml").write_text(yaml.safe_dump(recipe))
    variables = {**environment(), "PYTHONPATH": str(tmp_path)}

    def done(*words: str) -> str:
        ran = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout + ran.stderr

    said = done(sys.executable, "train.py", "--config", "early.yaml")
    assert re.search(r"^step .* early w", said, re.MULTILINE)  # the console
    assert re.search(r"^4 +.* [01]\.\d{3}", said, re.MULTILINE)
    card = (tmp_path / "run/README.md").read_text()
    assert "The first tokens of a completion get most of its advantage." in card
    assert "- early\n" in card
    assert "early_power: 2.0" in card
    page = (tmp_path / "run/key_tokens.html").read_text()
    assert "Early (the first tokens)" in page
    assert "early_power" in page
    assert Page(page).data("index")["panels"][-1]["title"] == "Mean early weight"
    assert "  early: Early\n      The first tokens" in done(sys.executable, "-m", "ktae_trl", "methods")
    assert "--early_power" in done(sys.executable, "train.py", "--help")
    if importlib.util.find_spec("mkdocs"):
        done(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", "site")
        assert "methods/early.html" in (tmp_path / "site/index.html").read_text()
