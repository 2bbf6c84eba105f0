"""Show key tokens in a notebook: a few coloured groups with their most informative tokens. The page has all of them."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from ktae_trl.report.contents import collect
from ktae_trl.report.group_view import clip, describe, is_key_token_value, split
from ktae_trl.report.page import write
from ktae_trl.report.records import Method, Record
from ktae_trl.report.tokens import colour, one_line, shade, visible

# Maximum number of each that is displayed.
_INLINE = {"groups": 3, "rollouts": 3, "tokens": 400, "key_tokens": 12, "characters": 2000}


class KeyTokens(NamedTuple):
    """Rollouts with their key-token values. A notebook displays a few of them; `save` writes a page with all."""

    record: Record
    name: str = "rollouts"
    notes: tuple[str, ...] = ()  # shown on the page

    def save(self, path: str | Path) -> Path:
        """Write a page with all groups to `path` and return the path."""
        shown = collect([self.record])
        shown.notes.extend(self.notes)
        return write(path, self.name, shown)

    def summary(self) -> str:
        """Return one line with the numbers of groups, by verdicts, and of rollouts."""
        kinds = Counter(map(_kind, split(self.record)))
        return told(kinds, len(self.record.rows), sum(row["correct"] is None for row in self.record.rows))

    def __repr__(self) -> str:
        return f"KeyTokens: {self.summary()}"  # notebooks store it together with the HTML

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


_KINDS = ("with correct and wrong rollouts", "all correct", "all wrong", "with a single rollout", "not graded")


def _kind(rows: list[dict[str, Any]]) -> str:
    return kind_of(*(sum(row["correct"] is side for row in rows) for side in (True, False)), len(rows))


def kind_of(right: int, wrong: int, rollouts: int) -> str:
    """Return the kind of a group from the numbers of its correct and wrong rollouts."""
    if rollouts == 1:
        return "with a single rollout"
    if right and wrong:
        return "with correct and wrong rollouts"
    return "not graded" if not right + wrong else "all correct" if right else "all wrong"


def told(kinds: Counter[str], rollouts: int, unscored: int) -> str:
    """Return one line with the numbers of groups of each kind and of rollouts."""
    parts = [f"{count} {kind}" for kind in _KINDS if (count := kinds[kind])]
    text = f"prompts: {kinds.total()} ({', '.join(parts)}); rollouts: {rollouts}"
    return f"{text} ({unscored} not graded and excluded from the statistics)" if unscored else text


def _known(value: float | str | None) -> float | None:
    """Return a number unchanged, and None for a value without credit (None) or that is not finite (a string)."""
    return None if isinstance(value, str) else value


def _written(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:+.4f}"


def _ends(method: Method) -> tuple[str, str]:
    """Return the labels of both ends of the colour scale."""
    if method.how is None or is_key_token_value(method):
        return "K: wrong -1", "+1 correct"
    ends = {"scale": ("weight 0", "2 or more"), "replace": ("advantage below 0", "above 0")}
    return ends.get(method.how, (f"{visible(method.symbol)}: -1", "+1"))


def _inline(method: Method, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a notebook displays of a group: some correct and wrong rollouts and the most informative tokens."""
    group = describe(method, rows)
    tokens = group["tokens"]

    def facts(i: int) -> str:
        if tokens["p"][i] is None:
            return f"{label_of(i)}: no statistics"
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
        "sides": {"Correct": side(True), "Wrong": side(False), "Not graded": side(None)},
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
