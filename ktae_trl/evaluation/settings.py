"""The settings of a measurement."""

import importlib.util
import json
import math
from dataclasses import dataclass, field

from ktae_trl.arguments import UserError, nearest
from ktae_trl.data.few_shot import FEW_SHOT_HELP
from ktae_trl.grading import ANSWER_FORMATS, check_budget, check_format
from ktae_trl.prompts import AUTO, SYSTEM_PROMPT_HELP, TEMPLATES, instruction

_CHOICES = {
    "backend": ("vllm", "transformers"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "prompt": TEMPLATES,
}


@dataclass
class EvalArguments:
    """What is measured, how it is sampled, and where the results go."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a model or of a PEFT adapter."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub model."})
    benchmarks: list[dict] = field(
        default_factory=list,
        metadata={"help": "In the config: a list of name, dataset, config, split, problem, answer, id."},
    )
    only: list[str] | None = field(default=None, metadata={"help": "Names of the benchmarks to run. Default: all."})
    benchmark_folder: str | None = field(
        default=None, metadata={"help": "Read NAME.jsonl (id, problem, answers) from here instead of the Hub."}
    )
    limit: int | None = field(default=None, metadata={"help": "At most this many problems of each benchmark."})
    prompt: str = field(default="chat", metadata={"help": f"How to ask: {', '.join(TEMPLATES)}."})
    answer_format: str = field(
        default="boxed", metadata={"help": f"Where a completion has its answer: {', '.join(ANSWER_FORMATS)}."}
    )
    # None: a training can do with an answer that was not compared, a measurement would be wrong by it.
    grading_budget: float | None = field(
        default=None,
        metadata={"help": "Seconds that grading 1,000 completions may take, such as 60. Default: no limit."},
    )
    system_prompt: str | None = field(default=AUTO, metadata={"help": SYSTEM_PROMPT_HELP})
    system_prompt_in_user: bool = field(
        default=False,
        metadata={"help": "Put it at the head of the problem: for models without a system role, such as Gemma."},
    )
    few_shot: str | None = field(default=None, metadata={"help": FEW_SHOT_HELP})
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "For the chat template, as JSON on the command line: '{\"enable_thinking\": false}'."},
    )
    samples: int = field(default=1, metadata={"help": "Completions per problem (n)."})
    k: list[int] | None = field(
        default=None, metadata={"help": "The k of pass@k and maj@k, at most n. Default: the powers of two up to n."}
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy, which needs samples: 1."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling distribution."})
    max_new_tokens: int = field(default=3000, metadata={"help": "Longest completion."})
    seed: int = field(default=0, metadata={"help": "Seed of the samples."})
    backend: str | None = field(
        default=None, metadata={"help": "vllm or transformers. Default: vllm if it is installed."}
    )
    batch_size: int = field(
        default=32, metadata={"help": "Completions at once with transformers; changes samples by rounding at most."}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights, such as bfloat16."})
    vllm_options: dict | str | None = field(
        default=None,
        metadata={"help": "Options of vLLM's engine, as JSON on the command line: '{\"tensor_parallel_size\": 2}'."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Default: runs/eval/MODEL/CONFIG."})

    def __post_init__(self):
        self.model_name_or_path = self.model_name_or_path.rstrip("/")
        check_format(self.answer_format)
        check_budget("grading_budget", self.grading_budget)
        self.system_prompt = instruction(self.system_prompt, self.answer_format) or ""
        self.backend = self.backend or ("vllm" if importlib.util.find_spec("vllm") else "transformers")
        self.only = [self.only] if isinstance(self.only, str) else self.only
        for name in ("vllm_options", "chat_template_kwargs"):
            setattr(self, name, _object(name, getattr(self, name)))
        for name in ("samples", "batch_size", "max_new_tokens", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        self.k = [self.k] if isinstance(self.k, int) else self.k
        if self.k is None:
            self.k = [2**i for i in range(self.samples.bit_length())]
        for k in self.k:
            if not 1 <= k <= self.samples:
                raise UserError(f"k must lie between 1 and samples ({self.samples}), not {k}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise UserError(f"temperature {self.temperature} or top_p {self.top_p} is out of range")
        if self.temperature == 0 and self.samples > 1:
            raise UserError("temperature 0 gives the same completion every time: set samples to 1, or a temperature")
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}{nearest(value, allowed)}")


def _object(name: str, value: dict | str | None) -> dict:
    """Return a setting of names and values, which the command line gives as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{name} is not JSON: {error}") from None
    if not isinstance(value or {}, dict):
        raise UserError(f"{name} must be an object of names and values, not {value!r}")
    return value or {}
