"""Records and pages for the tests of the report."""

import base64
import json
import random
import zlib
from html.parser import HTMLParser
from pathlib import Path

from ktae_trl.credit import find_method
from ktae_trl.report import records
from tests.reference import ktae_loop

# Each would do harm on a page that took it for markup, or on a screen that obeyed it.
HOSTILE = [
    "</script><script>window.__hacked = 1</script>",
    "<img src=x onerror='window.__hacked = 1'>",
    '"><svg onload=alert(1)>',
    "<!--<script>",
    "]]></style><style>*{display:none}</style>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}${alert(1)}`",
    "abc\u202edcba\u2066x\u2069\u200f",
    "\0\x01\x1b[31m\x7f\x85",
    "zero\u200bwidth\u200d\ufeff\u2028\u2029",
    "e" + "\u0301" * 50,
    "\u0301alone",
    "&lt;b&gt;&amp;&#60;",
    "a" * 1_000_000,
]


def rows_of_group(
    tokens: list[list[str]],
    correct: list[bool | None],
    *,
    how: str | None = "multiply",
    step: int = 1,
    group: int = 0,
    prompt: str = "What is 2 + 2?",
    credit: list[list[float]] | None = None,
    trained: list[list[bool]] | None = None,
    special: tuple[int, ...] = (),
    **weights,
) -> list[dict]:
    """Rows as the trainer records them, with KTAE's values by the reference loop unless others are given.

    A token's id is the number of its string among the distinct ones; advantages are 1 or -1.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(text for row in tokens for text in row))}
    ids = [[number[text] for text in row] for row in tokens]
    trained = trained or [[True] * len(row) for row in ids]
    if credit is None and how is not None:
        longest = max(map(len, ids))
        padded, mask = ([[*row, *[0] * (longest - len(row))] for row in some] for some in (ids, trained))
        values = ktae_loop.key_token_values(
            [padded],
            [mask],
            [[bool(verdict) for verdict in correct]],
            scored=[[verdict is not None for verdict in correct]],
            ignore_ids=special,
            **weights,
        )[0]
        credit = [values[i, : len(row)].tolist() for i, row in enumerate(ids)]
    rows = []
    for i, (row, verdict) in enumerate(zip(tokens, correct, strict=True)):
        A = {True: 1.0, False: -1.0, None: 0.0}[verdict]
        own = credit[i] if credit else None
        combine = {
            "multiply": lambda k, A=A: A + abs(A) * k,
            "add": lambda k, A=A: A + k,
            "scale": lambda k, A=A: A * k,
            "replace": lambda k: k,
        }
        rows.append(
            {
                "step": step,
                "group": group,
                "rollout": i,
                "prompt": prompt,
                "completion": "".join(row),
                "token_ids": ids[i],
                "tokens": row,
                "trained": trained[i],
                "rewards": {"math_accuracy": None if verdict is None else float(verdict)},
                "correct": verdict,
                "advantage": A,
                "credit": own,
                "advantages": [combine[how](k) for k in own] if own is not None else [A] * len(row),
            }
        )
    return rows


def random_group(seed: int, G: int = 8, T: int = 30, **settings) -> list[dict]:
    """A group of right and wrong rollouts of unequal length, whose words differ a little by side."""
    rng = random.Random(seed)
    correct = [True, False, *(rng.random() < 0.5 for _ in range(G - 2))]
    tokens = [
        [f" w{int(rng.triangular(0, 40, 5 if right else 35))}" for _ in range(rng.randint(T // 2, T))]
        for right in correct
    ]
    return rows_of_group(tokens, correct, **settings)


def write_run(folder: Path, steps: dict[int, list[list[dict]]], **method) -> Path:
    """Write groups as the records of a run."""
    settings = {"credit": "ktae", "how": "multiply", "settings": {}, **method}
    method = records.method_of(find_method(settings.pop("credit")), **settings)
    for step, groups in steps.items():
        rows = [{**row, "step": step, "group": number} for number, group in enumerate(groups) for row in group]
        path = folder / records.FOLDER / f"step_{step:06d}.parquet"
        records.write(path, records.Record(method, rows))
    return folder


class Page(HTMLParser):
    """A page as a browser would parse it: its elements, the texts of scripts, and its packed data."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text = ""
        self._script: tuple[dict, list[str]] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs), []

    def handle_endtag(self, tag):
        if tag == "script":
            attributes, texts = self._script
            self.scripts.append((attributes, "".join(texts)))
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self._script[1].append(data)
        else:
            self.text += data

    def data(self, name: str):
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(zlib.decompress(base64.b64decode(text)), parse_constant=_refuse)

    @property
    def code(self) -> list[str]:
        """The scripts that a browser runs."""
        return [text for attributes, text in self.scripts if "type" not in attributes]

    @property
    def policy(self) -> str:
        (policy,) = [a["content"] for tag, a in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        return policy


def _refuse(name: str):
    raise AssertionError(f"{name} is no JSON")
