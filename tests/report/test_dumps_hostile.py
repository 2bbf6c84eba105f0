"""No content of a file breaks the reading of rollouts, or becomes more than text on the page."""

import copy
import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ktae_trl import tiny
from ktae_trl.arguments import UserError
from ktae_trl.report.dumps import sources
from ktae_trl.report.dumps.formats import BY_NAME
from ktae_trl.report.dumps.rollout import Place, group_key
from ktae_trl.report.dumps.verdicts import deciding
from ktae_trl.report.rows import Valuer, method_with
from ktae_trl.report.run import main
from tests.report import dump_files
from tests.report.dump_files import TOKENIZER, WRITERS, Truth, lines
from tests.reporting import HOSTILE, Page

HIDDEN = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b-\u200f\ufeff\ud800-\udfff]")
TEXTS = [text[:2000] for text in HOSTILE]
TINY = str(tiny.MODEL)


def hostile_groups() -> list[list[Truth]]:
    """Every hostile text is a prompt and a completion, right and wrong."""
    return [
        [
            *(Truth(1, text, TEXTS[(i + k) % len(TEXTS)] + str(k), k % 2 == 0, (-1.0) ** k) for k in range(3)),
            Truth(1, text, text, False, -1.0),
        ]
        for i, text in enumerate(TEXTS)
    ]


def safe(page: Page) -> None:
    assert len(page.code) == 1  # the page's own script
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not [tag for tag, _ in page.elements if tag in ("img", "svg", "iframe")]
    assert not HIDDEN.search(page.text)


@pytest.mark.parametrize("name", WRITERS)
def test_hostile_text_in_every_field_stays_text(tmp_path, monkeypatch, capsys, name):
    groups = hostile_groups()
    for attribute, value in {
        "GROUPS": groups,
        "FIRST": groups,
        "ROLLOUTS": [x for some in groups for x in some],
    }.items():
        monkeypatch.setattr(dump_files, attribute, value)
    folder = dump_files.write(name, tmp_path / "files")
    for file in folder.rglob("*.jsonl"):  # names and values of fields that the format does not know, or only shows
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        more = dict.fromkeys(TEXTS, 0.5) | {f"{text} ": text for text in TEXTS}
        lines(file, [{**more, **row} for row in rows])
    words = ["explain", str(folder), "--tokenizer", TINY, "-o", str(tmp_path / "page.html")]
    if name == "ms_swift":  # names of its rewards are the user's
        words += ["--correct", "MathAccuracy"]
    main(words)
    assert not HIDDEN.search(capsys.readouterr().err.replace("\n", ""))
    html = (tmp_path / "page.html").read_text()
    page = Page(html)
    safe(page)
    assert "__hacked" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert len(page.data("index")["groups"]) == len(groups)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", *TEXTS[7:9]])
def test_lone_surrogates_and_controls_in_every_field(tmp_path, caplog, text):
    turns = [{"role": text, "content": text}, {"role": "assistant", "content": text}]
    rows = [
        {"prompt": [{"role": text, "content": text}], "completion": turns, "reward": r, "group": text, text: 1.0}
        for r in (1.0, 0.0)
    ]
    file = lines(tmp_path / "x.jsonl", rows)
    main(["explain", str(file), "--tokenizer", TINY, "-o", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    safe(page)
    assert len(page.data("block-0")["rollouts"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["explain", str(lines(tmp_path / "y.jsonl", [{text: text}])), "--tokenizer", TINY])
    assert not HIDDEN.search(stopped.value.code)
    bad = lines(tmp_path / "z.jsonl", [*rows, {"prompt": "p", "completion": "c", text: text}])
    main(["explain", str(bad), "--tokenizer", TINY, "-o", str(tmp_path / "page.html")])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "Skipped 1 of 3 rows" in warning
    assert not HIDDEN.search(warning)


def test_hostile_messages_in_parquet(tmp_path):
    message = [[{"role": TEXTS[0], "content": text.encode(errors="replace").decode()}] for text in TEXTS[:4]]
    frame = pd.DataFrame(
        {"step": 1, "prompt": [message[0]] * 4, "completion": message, TEXTS[1]: [1.0, 0.0, 1.0, 0.0], "advantage": 0.5}
    )
    frame.to_parquet(tmp_path / "x.parquet")
    main(["explain", str(tmp_path / "x.parquet"), "--tokenizer", TINY, "-o", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text())
    safe(page)
    assert list(page.data("block-0")["rollouts"][0]["rewards"]) == [TEXTS[1]]


# Values of every type in every place

JUNK: list[Any] = [
    *(None, True, 0, -1, 2**40, 10**400, 0.5, math.inf, math.nan, "", "x", "1"),
    *([], {}, [[]], [None], [0.5], ["x"], [True], [10**400], [{}], [{"content": 3}], {"a": 1}, [-1], [2**31]),
]


def places(value: Any, path: tuple = (), depth: int = 4) -> Iterator[tuple]:
    """The places in a row: fields, fields of fields, and the first element of each list."""
    yield path
    if isinstance(value, dict) and depth:
        for key in value:
            yield from places(value[key], (*path, key), depth - 1)
    elif isinstance(value, list) and value and depth:
        yield from places(value[0], (*path, 0), depth - 1)


def mutations(row: dict) -> Iterator[dict]:
    for path in places(row, depth=6):
        for junk in JUNK if path else ():
            changed = copy.deepcopy(row)
            inside = changed
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = copy.deepcopy(junk)
            yield changed
        if path and isinstance(path[-1], str):
            changed = copy.deepcopy(row)
            inside = changed
            for key in path[:-1]:
                inside = inside[key]
            del inside[path[-1]]
            yield changed


@pytest.mark.parametrize("name", WRITERS)
def test_any_value_in_any_place_is_read_or_refused(tmp_path, name):
    """No other error than a `UserError`, which skips the line; what is read can be grouped, decided and valued."""
    kind = BY_NAME[name]
    dump_files.write(name, tmp_path)
    path = next(one for one in sources.files([tmp_path]) if "metadata" not in one.name)
    row = next(row for _, _, row in sources.read(path))
    if name == "rows":
        row |= {"token_ids": [5, 6], "logprobs": [-0.5, -0.5], "advantage": 0.5, "group": "a", "reward": 1.0}
    valuer = Valuer(method_with("multiply", 1.0, 1.0, 1.0, False), TOKENIZER)
    read = refused = 0
    for changed in mutations(row):
        try:
            rollouts = kind.rollouts(changed, Place(path))
            for rollout in rollouts:
                deciding(rollout)
                assert isinstance(group_key(rollout), bytes)
        except UserError:
            refused += 1
            continue
        read += 1
        if rollouts and read % 5 == 0:
            with suppress(UserError):  # the tokenizer does not fit
                assert len(valuer.rows(0, [rollouts[0], rollouts[0]], [True, False])) == 2
    assert read > 20
    assert refused > 20


def test_the_name_of_a_tokenizer_is_only_text(tmp_path, capsys):
    dump_files.write("open_instruct", tmp_path / "files")
    TOKENIZER.save_pretrained(tmp_path / "x\x1b[31m<b>")
    lines(tmp_path / "files" / "run_metadata.jsonl", [{"model_name": str(tmp_path / "x\x1b[31m<b>")}])
    main(["explain", str(tmp_path / "files"), "-o", str(tmp_path / "page.html")])
    said = capsys.readouterr().err
    assert "x⟨ESC⟩[31m<b>" in said
    assert not HIDDEN.search(said.replace("\n", ""))


def test_paths_of_any_name(tmp_path):
    folder = Path(tmp_path / "a [b] \x1b[31m 5")
    rows = [{"input": "p", "output": str(i), "score": float(i)} for i in range(2)]
    lines(folder / "x.jsonl", rows)
    main(["explain", str(folder), "--tokenizer", TINY, "-o", str(tmp_path / "page.html")])
    safe(Page((tmp_path / "page.html").read_text()))
