"""Key tokens of rollouts of any origin: rows of prompt, completion and verdict, read, graded, tokenised and valued."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from ktae_trl.arguments import NotFoundError, UserError
from ktae_trl.credit.combine import combine as combine_with
from ktae_trl.credit.ktae.method import COMBINE, KTAE
from ktae_trl.grading import grade_many
from ktae_trl.report.groups import clip, describe, is_key_token_value, split, statistics
from ktae_trl.report.page import collect, progress, write
from ktae_trl.report.records import Method, Record, method_of
from ktae_trl.report.tokens import colour, one_line, shade, token_strings, visible

# What a notebook shows; the page has all.
_INLINE = {"groups": 3, "rollouts": 3, "tokens": 400, "key_tokens": 12, "characters": 2000}


class KeyTokens(NamedTuple):
    """Rollouts with their key-token values. A notebook shows some of it, `save` writes the whole page."""

    record: Record
    name: str = "rollouts"

    def save(self, path: str | Path) -> Path:
        """Write the page with every group and return where it is."""
        return write(path, self.name, collect([self.record]))

    def summary(self) -> str:
        """Say in a line how many groups and rollouts there are, and what can be compared of them."""
        groups = list(split(self.record))
        kinds = Counter(map(_kind, groups))
        parts = [f"{count} {kind}" for kind in _KINDS if (count := kinds[kind])]
        unscored = sum(row["correct"] is None for row in self.record.rows)
        text = f"prompts: {len(groups)} ({', '.join(parts)}); rollouts: {len(self.record.rows)}"
        if unscored:
            text += f", {unscored} without a verdict, left out of the statistics"
        return text

    def __repr__(self) -> str:
        return f"KeyTokens: {self.summary()}"  # a notebook stores it beside the HTML

    def _repr_html_(self) -> str:
        groups = sorted(split(self.record), key=lambda rows: _KINDS.index(_kind(rows)))
        some = [_inline(self.record.method, rows) for rows in groups[: _INLINE["groups"]]]
        environment = Environment(
            loader=PackageLoader("ktae_trl.report", "."), autoescape=True, undefined=StrictUndefined
        )
        return environment.get_template("inline.html.jinja").render(
            groups=some,
            rest=len(groups) - len(some),
            summary=self.summary(),
            ramp=[colour(i / 10) for i in range(-10, 11)],
            ends=_ends(self.record.method),
        )


_KINDS = ("with right and wrong rollouts", "all right", "all wrong", "with one rollout only", "not judged")


def _kind(rows: list[dict[str, Any]]) -> str:
    verdicts = {row["correct"] for row in rows} - {None}
    if len(rows) == 1:
        return "with one rollout only"
    if len(verdicts) == 2:
        return "with right and wrong rollouts"
    return "not judged" if not verdicts else "all right" if True in verdicts else "all wrong"


def explain(
    rows: Iterable[Mapping[str, Any]],
    tokenizer,
    *,
    combine: str = "multiply",
    fisher_weight: float = 1.0,
    ig_weight: float = 1.0,
    tf_weight: float = 1.0,
    leave_one_out: bool = False,
) -> KeyTokens:
    """Value the tokens of rollouts as KTAE would in training.

    Rows with the same prompt are a group, wherever they stand. The rollout advantage is GRPO's, of the reward 1 for a
    right answer and 0 for a wrong one: A = (r - mean) / (std + 1e-4), std unbiased, as TRL has it.

    Args:
        rows: mappings with `prompt` and `completion` (texts or lists of chat messages), and `correct` (true, false, or
            null for one that could not be judged) or `answers` (a text or a list of accepted ones), with which the
            completion is graded as in training.
        tokenizer: of transformers; it should be the model's, since tokens are what is valued.
        combine: how A' comes of A and K, "multiply" or "add", as in `ktae_combine`.
        fisher_weight, ig_weight, tf_weight, leave_one_out: as in `key_token_table`.

    A prompt whose rollouts are all right or all wrong, or that has one only, is kept and has values of 0. A rollout
    without a verdict (null, or answers that cannot be parsed) is kept, takes no part in the statistics, and has values
    of 0. A lone surrogate in a completion, which is no text, counts as U+FFFD.

    Raises:
        ValueError: there are no rows, one lacks a column or has something else in it (its number is named), or a
            setting is unknown or out of range.
    """
    if combine not in COMBINE:
        raise UserError(f"combine must be one of {', '.join(COMBINE)}, not {combine!r}")
    weights = {"fisher_weight": fisher_weight, "ig_weight": ig_weight, "tf_weight": tf_weight}
    settings = KTAE.settings_from({**weights, "leave_one_out": leave_one_out}, combine)
    rows = list(rows)
    if not rows:
        raise UserError("There are no rollouts to explain")
    for number, row in enumerate(rows):
        check_row(row, f"row {number}")

    prompts = [_encodable(_text(row["prompt"])) for row in rows]
    completions = [_encodable(_text(row["completion"], only="assistant")) for row in rows]
    verdicts = _verdicts(rows, completions)
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)

    special = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    ids = tuple(sorted({i for i in special if i is not None}))
    method = method_of(KTAE, combine, settings, special_ids=ids)
    strings: dict[int, str] = {}
    explained = []
    for number, members in enumerate(progress(groups.values(), "Valuing tokens")):
        tokens = tokenizer([completions[i] for i in members], add_special_tokens=False)["input_ids"]
        strings |= token_strings({i for row in tokens for i in row} - strings.keys(), tokenizer)
        advantages = group_advantages([verdicts[i] for i in members])
        group = [
            {
                "step": 0,
                "group": number,
                "rollout": place,
                "prompt": prompts[i],
                "completion": completions[i],
                "token_ids": own,
                "tokens": [strings[token] for token in own],
                "trained": [True] * len(own),
                "rewards": {"correct": None if verdicts[i] is None else float(verdicts[i])},
                "correct": verdicts[i],
                "advantage": advantage,
            }
            for place, (i, own, advantage) in enumerate(zip(members, tokens, advantages, strict=True))
        ]
        for row, values in zip(group, statistics(method, group).values, strict=True):
            row["credit"] = values
            row["advantages"] = combine_with(torch.tensor([row["advantage"]]), torch.tensor([values]), combine)[
                0
            ].tolist()
        explained += group
    return KeyTokens(Record(method, explained))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read rollouts from a `.jsonl` or `.jsonl.gz` file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line is not JSON, or is no row for `explain`; the line is named.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise NotFoundError(f"There is no file {path} (looked in {Path.cwd()})")
    rows = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: not JSON: {error}") from None
                check_row(row, f"{path}, line {number}")
                rows.append(row)
        except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path} is no file of JSON lines: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no rollouts")
    return rows


def check_row(row: Any, where: str) -> None:
    """Raise a ValueError that says where, unless this is a row for `explain`."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a row must be an object with prompt, completion and correct, not {row!r:.60}")
    missing = [name for name in ("prompt", "completion") if name not in row]
    if "correct" not in row and "answers" not in row:
        missing.append("correct (or answers)")
    if missing:
        raise UserError(f"{where}: lacks {', '.join(missing)}. It has: {', '.join(map(str, row)) or 'nothing'}")
    for name in ("prompt", "completion"):
        value = row[name]
        chat = isinstance(value, list) and all(
            isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in value
        )
        if not isinstance(value, str) and not chat:
            raise UserError(f"{where}: {name} must be a text or a list of chat messages, not {value!r:.60}")
    if "correct" in row:
        if row["correct"] is not None and row["correct"] not in (0, 1):
            raise UserError(f"{where}: correct must be true, false or null, not {row['correct']!r:.60}")
        return
    answers = row["answers"]
    if not isinstance(answers, str) and not (
        isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
    ):
        raise UserError(f"{where}: answers must be a text or a list of texts, not {answers!r:.60}")


def group_advantages(verdicts: list[bool | None]) -> list[float]:
    """Return GRPO's advantages of a group with reward 1 for right and 0 for wrong rollouts, as TRL 1.16 has them.

    0 for one without a verdict, and for all if they are alike or fewer than two have one.
    """
    rewards = torch.tensor([float("nan") if verdict is None else float(verdict) for verdict in verdicts])
    known = rewards[~rewards.isnan()]
    if len(known) < 2:
        return [0.0] * len(verdicts)
    return ((rewards - known.mean()) / (known.std() + 1e-4)).nan_to_num(nan=0.0).tolist()


def _verdicts(rows: list[Mapping[str, Any]], completions: list[str]) -> list[bool | None]:
    verdicts = [None if row.get("correct") is None else bool(row["correct"]) for row in rows]
    asked = [i for i, row in enumerate(rows) if "correct" not in row]
    graded = grade_many([completions[i] for i in asked], [rows[i]["answers"] for i in asked])
    for i, verdict in zip(asked, graded, strict=True):
        verdicts[i] = verdict
    return verdicts


def _text(value: str | list[Mapping[str, str]], only: str | None = None) -> str:
    """Return chat messages as a text that can be read; a single one of the role `only` is its content."""
    if isinstance(value, str):
        return value
    if len(value) == 1 and value[0].get("role") == only:
        return value[0]["content"]
    return "\n\n".join(f"{message.get('role', '')}: {message['content']}" for message in value)


def _encodable(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _known(value: float | str | None) -> float | None:
    """Return a number as it is, and None for what is none: no credit, or the name of a NaN."""
    return None if isinstance(value, str) else value


def _written(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:+.4f}"


def _ends(method: Method) -> tuple[str, str]:
    """Return what the ends of the colours mean."""
    if method.how is None or is_key_token_value(method):
        return "K: wrong -1", "+1 right"
    ends = {"scale": ("weight 0", "2 or more"), "replace": ("advantage below 0", "above 0")}
    return ends.get(method.how, (f"{visible(method.symbol)}: -1", "+1"))


def _inline(method: Method, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a notebook shows of a group: some rollouts of each side and the tokens that tell most."""
    group = describe(method, rows)
    tokens = group["tokens"]

    def facts(i: int) -> str:
        if tokens["p"][i] is None:
            return f"{label_of(i)}: not counted"
        a, b = tokens["a"][i], tokens["b"][i]
        numbers = "".join(f"  {name} {tokens[name][i]:.4g}" for name in ("p", "F", "IG", "D", "K"))
        return f"{label_of(i)}  a {a}  b {b}  c {group['right'] - a}  d {group['wrong'] - b}{numbers}"

    def label_of(i: int) -> str:
        return one_line(tokens["text"][i])

    def rollout(own: dict[str, Any]) -> dict[str, Any]:
        cells = own["cells"]
        shown = [
            {
                "text": tokens["text"][cells["token"][cell]],
                "title": f"{facts(cells['token'][cell])}  A' {_written(cells['advantage'][cell])}",
                "colour": colour(shade(_known(cells["value"][cell]), method.how, most)),
            }
            for cell in own["at"][: _INLINE["tokens"]]
        ]
        return {**own, "shown": shown, "rest": len(own["at"]) - len(shown)}

    def side(correct: bool | None) -> tuple[list[dict[str, Any]], int]:
        all_of_it = [own for own in group["rollouts"] if own["correct"] is correct]
        return [rollout(own) for own in all_of_it[: _INLINE["rollouts"]]], len(all_of_it)

    values = [_known(value) for own in group["rollouts"] for value in own["cells"]["value"]]
    most = max((abs(value) for value in values if value is not None), default=0.0)
    counted = [i for i, p in enumerate(tokens["p"]) if p is not None]
    counted.sort(key=lambda i: (-tokens["IG"][i], -abs(tokens["K"][i])))
    return {
        "prompt": clip(visible(rows[0]["prompt"]), _INLINE["characters"]),
        "notes": group["notes"],
        "sides": {"Right": side(True), "Wrong": side(False), "Not judged": side(None)},
        "right": group["right"],
        "wrong": group["wrong"],
        "key_tokens": [
            {
                "label": label_of(i),
                "colour": colour(tokens["K"][i]),
                **{name: tokens[name][i] for name in "abpK"},
                "IG": tokens["IG"][i],
            }
            for i in counted[: _INLINE["key_tokens"]]
        ],
        "counted": len(counted),
    }
