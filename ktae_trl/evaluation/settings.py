"""The settings of `ktae eval`."""

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
    """The model, the benchmarks, how completions are sampled and graded, and where the results are saved."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of a model or PEFT adapter."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub model."})
    benchmarks: list[dict] = field(
        default_factory=list,
        metadata={"help": "List of benchmarks in the config, with name, dataset, config, split, problem, answer, id."},
    )
    only: list[str] | None = field(default=None, metadata={"help": "Names of the benchmarks to run. Default: all."})
    benchmark_folder: str | None = field(
        default=None,
        metadata={"help": "Folder with NAME.jsonl files (id, problem, answers) to use instead of the Hub."},
    )
    limit: int | None = field(default=None, metadata={"help": "Maximum number of problems per benchmark."})
    prompt: str = field(default="chat", metadata={"help": f"Prompt template: {', '.join(TEMPLATES)}."})
    answer_format: str = field(
        default="boxed", metadata={"help": f"Where a completion states its answer: {', '.join(ANSWER_FORMATS)}."}
    )
    # Unlike training, a measurement has no limit by default: answers that are not compared count as wrong.
    grading_budget: float | None = field(
        default=None,
        metadata={"help": "Maximum seconds for grading 1,000 completions, such as 60. Default: no limit."},
    )
    system_prompt: str | None = field(default=AUTO, metadata={"help": SYSTEM_PROMPT_HELP})
    system_prompt_in_user: bool = field(
        default=False,
        metadata={"help": "Prepend the system prompt to the problem, for models without a system role, such as Gemma."},
    )
    few_shot: str | None = field(default=None, metadata={"help": FEW_SHOT_HELP})
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Arguments of the chat template; JSON on the command line: '{\"enable_thinking\": false}'."},
    )
    samples: int = field(default=1, metadata={"help": "Completions per problem (n)."})
    k: list[int] | None = field(
        default=None,
        metadata={"help": "Values of k for pass@k and maj@k, at most n. Default: the powers of two up to n."},
    )
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature. 0: greedy, needs samples: 1."})
    top_p: float = field(default=1.0, metadata={"help": "Cumulative probability for nucleus sampling."})
    max_new_tokens: int = field(default=3000, metadata={"help": "Maximum number of tokens per completion."})
    seed: int = field(default=0, metadata={"help": "Random seed for sampling."})
    backend: str | None = field(
        default=None,
        metadata={"help": "vllm or transformers. Default: vllm if it is installed, else transformers."},
    )
    batch_size: int = field(
        default=32,
        metadata={"help": "Batch size with transformers. It changes samples by rounding errors at most."},
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights, such as bfloat16."})
    vllm_options: dict | str | None = field(
        default=None,
        metadata={"help": "Options of vLLM's engine; JSON on the command line: '{\"tensor_parallel_size\": 2}'."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for the results. Default: runs/eval/MODEL/CONFIG."}
    )

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
                raise UserError(f"k must be between 1 and samples ({self.samples}), not {k}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.temperature == 0 and self.samples > 1:
            raise UserError(
                f"temperature 0 always gives the same completion, but samples is {self.samples}. Set samples to 1, or "
                "temperature above 0"
            )
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}{nearest(value, allowed)}")


def _object(name: str, value: dict | str | None) -> dict:
    """Return a mapping setting as a dictionary. On the command line it is given as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value or {}, dict):
        raise UserError(f"{name} must be a JSON object, not {value!r}")
    return value or {}
