"""What the pages of `docs/` say is what the code does, and their links lead somewhere."""

import contextlib
import dataclasses
import io
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import fisher_exact

from ktae_trl.credit import METHODS, gtpo, otb
from ktae_trl.credit.combine import combine
from ktae_trl.credit.gtpo import entropy_shares
from ktae_trl.credit.ktae.values import importance_weights, key_token_strengths, key_token_table, key_token_values
from ktae_trl.credit.oar import reshape
from ktae_trl.credit.tree import advantages_by_depth, node_values
from tests.trainers import make_trainer

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXT = {path.relative_to(ROOT / "docs").with_suffix("").as_posix(): path.read_text() for path in PAGES}
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# Links


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"- ([\w/]+)\.md$", config, re.MULTILINE))
    folders = re.findall(r"\[(\w+/)\]", config)
    assert named == {page for page in TEXT if not page.startswith(tuple(folders))}


# The group that is worked by hand


def tables(text: str) -> list[list[list[str]]]:
    found = re.findall(r"(?:^\|.*\n)+", without_code(text), re.MULTILINE)
    return [
        [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in found
    ]


def agrees(shown: str, value: float) -> bool:
    """Whether a number is `value`, rounded as it is written."""
    digits = len(shown.partition(".")[2])
    return abs(float(shown.replace(",", "")) - value) <= 0.5001 * 10**-digits


class Group:
    """The statistics of a group of right and wrong rollouts, in plain Python and SciPy."""

    def __init__(self, right: list[list[str]], wrong: list[list[str]]):
        self.right, self.wrong = right, wrong
        self.length_right, self.length_wrong = (sum(map(len, side)) for side in (right, wrong))

    def counts(self, token: str) -> list[int]:
        a, b = (sum(token in rollout for rollout in side) for side in (self.right, self.wrong))
        occurrences = [sum(rollout.count(token) for rollout in side) for side in (self.right, self.wrong)]
        return [a, b, len(self.right) - a, len(self.wrong) - b, *occurrences]

    def strength(self, token: str) -> list[float]:
        a, b, c, d, *_ = self.counts(token)
        p = fisher_exact([[a, b], [c, d]]).pvalue
        fisher = 0 if math.isclose(p, 1) else math.exp(-2 * p)
        rollouts = a + b + c + d
        gain = entropy(a + c, b + d) - (a + b) / rollouts * entropy(a, b) - (c + d) / rollouts * entropy(c, d)
        return [p, fisher, gain, (fisher + gain) / 2]

    def frequencies(self, token: str) -> list[float]:
        *_, n_right, n_wrong = self.counts(token)
        mean = (self.length_right + self.length_wrong) / 2
        shares = [n_right / self.length_right, n_wrong / self.length_wrong]
        return shares + [
            3 * f / (f + 2 * (0.5 + 0.5 * length / mean))
            for f, length in zip(shares, (self.length_right, self.length_wrong), strict=True)
        ]

    def value(self, token: str) -> list[float]:
        a, b, c, d, *_ = self.counts(token)
        *_, tf_right, tf_wrong = self.frequencies(token)
        presence = math.asin(math.sqrt(a / (a + c))) - math.asin(math.sqrt(b / (b + d)))
        ratio = tf_right / (tf_wrong + 1e-5) - tf_wrong / (tf_right + 1e-5)
        product = self.strength(token)[-1] * (presence + ratio)
        return [presence, ratio, presence + ratio, product, math.tanh(product / 2)]


def entropy(x: int, y: int) -> float:
    return sum(n / (x + y) * math.log2((x + y) / n) for n in (x, y) if n)


@pytest.fixture(scope="module")
def worked() -> dict[str, list[list[str]]]:
    """The page's tables by their first two headings."""
    return {" ".join(table[0][:2]): table[2:] for table in tables(TEXT["methods/ktae"])}


@pytest.fixture(scope="module")
def rollouts(worked) -> list[tuple[bool, list[str]]]:
    return [(row[1] == "correct", row[2].split()) for row in worked["rollout answer"]]


@pytest.fixture(scope="module")
def group(rollouts) -> Group:
    return Group([words for right, words in rollouts if right], [words for right, words in rollouts if not right])


def as_tensors(rollouts):
    words = sorted({word for _, rollout in rollouts for word in rollout})
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor([words.index(word) for word in rollout]) for _, rollout in rollouts], True, -1
    )[None]
    return words, ids, ids >= 0, torch.tensor([[right for right, _ in rollouts]])


def test_the_rollouts_and_their_advantages(worked, rollouts):
    rewards = torch.tensor([float(right) for right, _ in rollouts])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert len(rollouts) == 6
    for row, (_, words), reward, advantage in zip(
        worked["rollout answer"], rollouts, rewards, advantages.tolist(), strict=True
    ):
        assert row[3] == str(len(words))
        assert float(row[4]) == reward
        assert agrees(row[5], advantage)


@pytest.mark.parametrize(
    ("table", "statistic"),
    [("token a", "counts"), ("token p", "strength"), ("token f_C", "frequencies"), ("token shares", "value")],
)
def test_the_tables_of_the_worked_group(worked, rollouts, group, table, statistic):
    rows = worked[table]
    assert [row[0] for row in rows] == list(dict.fromkeys(word for _, words in rollouts for word in words))
    for token, *cells in rows:
        values = getattr(group, statistic)(token)
        assert len(cells) == len(values)
        assert all(map(agrees, cells, values)), (token, cells, values)


def test_the_hypergeometric_table_of_the_worked_group(worked, group):
    a, b, c, d, *_ = group.counts("carry")
    rows = worked["correct ones with it wrong ones with it"]
    for x, y, choices, probability in rows:
        assert int(x) + int(y) == a + b
        ways = math.comb(a + c, int(x)) * math.comb(b + d, int(y))
        assert int(choices) == ways
        assert agrees(probability, ways / math.comb(a + b + c + d, a + b))
    assert sum(int(row[2]) for row in rows) == math.comb(6, 4)
    likely = {(row[0], row[1]): float(row[3]) for row in rows}
    seen = likely[str(a), str(b)]
    assert sum(p for p in likely.values() if p <= seen) == pytest.approx(group.strength("carry")[0])


def test_the_package_agrees_with_the_worked_group(rollouts, group):
    words, ids, mask, correct = as_tensors(rollouts)
    table = key_token_table(ids, mask, correct)
    assert len(table.token) == len(words)
    for number, token in enumerate(table.token.tolist()):
        word = words[token]
        p, fisher, gain, _ = group.strength(word)
        *_, D, _, K = group.value(word)
        assert [table.a[number], table.b[number]] == group.counts(word)[:2]
        found = [x[number].item() for x in (table.p, table.F, table.IG, table.D)]
        assert found == pytest.approx([p, fisher, gain, D], rel=1e-5, abs=1e-6)
        assert table.values[ids == token].tolist() == pytest.approx([K] * int((ids == token).sum()), abs=1e-6)


def test_the_advantages_of_the_worked_group(worked, group):
    for token, side, *cells in worked["token in"]:
        advantage = torch.tensor([0.5 / (math.sqrt(6 * 0.25 / 5) + 1e-4) * (1 if side == "correct" else -1)])
        assert any(token in words for words in getattr(group, "right" if side == "correct" else side))
        K = group.value(token)[-1]
        values = [combine(advantage, torch.tensor([[K]]), how).item() for how in ("multiply", "add")]
        assert all(map(agrees, cells, [advantage.item(), K, *values])), (token, side, cells, values)


def test_leaving_one_out_in_the_worked_group(worked, rollouts):
    text = next(table for table in tables(TEXT["methods/ktae"]) if "422" in table[0])
    tokens, (words, ids, mask, correct) = text[0][1:], as_tensors(rollouts)
    values = key_token_values(ids, mask, correct, leave_one_out=True)[0]
    for i, (row, (right, rollout)) in enumerate(zip(text[2:], rollouts, strict=True)):
        others = rollouts[:i] + rollouts[i + 1 :]
        rest = Group(*([w for side, w in others if side is which] for which in (True, False)))
        for token, cell in zip(tokens, row[1:], strict=True):
            assert (cell != "") == (token in rollout)
            if cell:
                known = any(token in w for _, w in others)
                K = rest.value(token)[-1] if known else 0.0
                assert agrees(cell, K), (i, token, cell, K)
                found = values[i][ids[0, i] == words.index(token)]
                assert found.tolist() == pytest.approx([K] * len(found), abs=1e-6)
        assert right == (row[0] in "123")


def test_the_weights_of_the_worked_group(worked, rollouts, group):
    (text,) = [table for table in tables(TEXT["methods/ktae"]) if table[0][:2] == ["rollout", "mean of 1 + S"]]
    tokens, (words, ids, mask, correct) = text[0][2:], as_tensors(rollouts)
    found = importance_weights(key_token_strengths(ids, mask, correct)[0], mask[0], beta=1.0)
    for i, (row, (_, rollout)) in enumerate(zip(text[2:], rollouts, strict=True)):
        raw = {token: 1 + group.strength(token)[-1] for token in rollout}
        mean = sum(raw[token] for token in rollout) / len(rollout)
        assert agrees(row[1], mean)
        for token, cell in zip(tokens, row[2:], strict=True):
            assert (cell != "") == (token in rollout)
            if cell:
                w = raw[token] / mean
                assert agrees(cell, w), (i, token, cell, w)
                own = found[i, : len(rollout)][ids[0, i, : len(rollout)] == words.index(token)]
                assert own.tolist() == pytest.approx([w] * len(own), abs=1e-6)
    fourth = dict(zip(tokens, text[5][2:], strict=True))
    assert fourth["carry"] == fourth["so"]
    page = " ".join(TEXT["methods/ktae"].split())
    exact = {token: found[3, t].item() for t, token in enumerate(rollouts[3][1])}
    blames = [f"{-0.9127 * exact[token]:.3f}" for token in ("carry", ":", "322")]
    assert f"-0.913 x 1.162 = {blames[0]}, the colon by {blames[1]} and `322` by {blames[2]}" in page


def test_the_smallest_effective_share_of_importance():
    """Of weights between 1 and 1 + beta: a share x of them is 1 + beta, the others 1."""
    for page in ("methods/ktae", "reference/metrics"):
        text = " ".join(TEXT[page].split())
        shown = re.search(
            r"(0\.\d\d) (?:for beta = 1|with `ktae_importance_beta: 1`),? (?:and )?(0\.\d\d)", text
        ).groups()
        for cell, beta in zip(shown, (1, 4), strict=True):
            x = np.linspace(0, 1, 100_001)
            mean, square = 1 + beta * x, 1 + x * ((1 + beta) ** 2 - 1)
            assert agrees(cell, (mean**2 / square).min())
            assert (mean**2 / square).min() == pytest.approx(4 * (1 + beta) / (2 + beta) ** 2, rel=1e-6)


def test_the_numbers_in_the_words_of_the_worked_group(group):
    """Those of the derivation for `carry`, which stand between the tables."""
    section = TEXT["methods/ktae"]
    section = " ".join(section[section.index("### 2. Fisher's p") : section.index("### 6.")].split())
    a, b, c, d, *_ = group.counts("carry")
    p, fisher, gain, strength = group.strength("carry")
    f_right, f_wrong, tf_right, tf_wrong = group.frequencies("carry")
    presence, ratio, D, product, K = group.value("carry")
    norms = [2 * (0.5 + 0.5 * length / 12) for length in (group.length_right, group.length_wrong)]
    for text in (
        f"exp(-{2 * p:.1f}) = {fisher:.3f}",
        f"it is {entropy(a, b):.3f} bits",
        f"IG = 1 - 4/6 x {entropy(a, b):.3f} - 2/6 x {entropy(c, d):.0f} = {gain:.3f} bits",
        f"({fisher:.3f} + {gain:.3f}) / 2 = {strength:.3f}",
        f"= {3 * f_right:.3f} / ({f_right:.3f} + {norms[0]:.3f}) = {tf_right:.3f}",
        f"= {3 * f_wrong:.3f} / ({f_wrong:.3f} + {norms[1]:.3f}) = {tf_wrong:.3f}",
        f"= {math.asin(1):.3f} - {math.asin(math.sqrt(1 / 3)):.3f} = {presence:.3f}",
        f"{tf_right:.3f} / {tf_wrong:.3f} - {tf_wrong:.3f} / {tf_right:.3f} = {ratio:.3f}",
        f"D = {D:.3f}, S D = {product:.3f}, K = 2 sigmoid({product:.3f}) - 1 = {K:.3f}",
    ):
        assert text in section, text


def test_the_python_of_the_pages_runs(group):
    program = next(block for block in blocks(TEXT["methods/ktae"], "python") if "key_token_table" in block)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    assert re.search(r"^carry 3 1 0\.4\d* 4\.71\d+$", printed.getvalue(), re.MULTILINE)
    for text in TEXT.values():
        for block in blocks(text, "python"):
            compile(block, "docs", "exec")


def test_without_term_frequencies_nothing_saturates():
    """The bound that two pages name: |K| of a token that all right and no wrong rollouts have, S < 1, D = pi / 2."""
    bound = math.tanh(math.pi / 4)
    for page in ("reference/metrics", "guides/hyperparameters"):
        shown = re.search(r"\|K\| is\s+then at most (0\.\d+)", TEXT[page])[1]
        assert agrees(shown, bound)
    half = torch.tensor([[True] * 20 + [False] * 20])
    values = key_token_values(half.int()[..., None], torch.ones(1, 40, 1), half, tf_weight=0.0)
    assert values.abs().max().item() == pytest.approx(bound, abs=1e-4)


# The cases worked by hand of the other methods


def test_the_weights_of_the_worked_rollout():
    (table,) = [table for table in tables(TEXT["methods/oar_g"]) if table[0][:2] == ["token", "influence I"]]
    rows = np.array([[float(cell) for cell in row] for row in table[2:]])
    log = np.log1p(rows[:, 1])
    scaled = (log - log.min()) / (log.max() - log.min())
    tau = np.quantile(scaled, 0.25)
    raw = np.where(scaled < tau, np.maximum(scaled / tau, 0.1), 1 + (scaled - tau) / (1 - tau))
    assert np.abs(rows[:, 2:] - np.stack([log, scaled, raw, raw / raw.mean()], 1)).max() < 0.00051
    package = reshape(torch.tensor(rows[None, :, 1]), torch.ones(1, 5, dtype=torch.bool))[0]
    assert np.abs(package.numpy() - rows[:, 5]).max() < 0.00051
    page = " ".join(TEXT["methods/oar_g"].split())
    assert (
        f"With A = -0.94, token 4 is blamed by {-0.94 * rows[3, 5]:.2f} and token 1 by {-0.94 * rows[0, 5]:.2f}" in page
    )


def test_the_influence_of_the_worked_token():
    kept, lost = 0.9 * math.log(0.9 / 0.6), 0.1 * math.log(0.1 / 0.4)
    assert f"= {kept:.3f} - {-lost:.3f} = {kept + lost:.3f}" in TEXT["methods/oar_p"]
    assert f"ln 0.9 - ln 0.6 = {math.log(0.9 / 0.6):.3f}" in TEXT["methods/oar_p"]


def test_the_worked_tree():
    (table,) = [table for table in tables(TEXT["methods/tree"]) if table[0][:2] == ["node", "v"]]
    leaves = [1.0, 1.0, 1.0, 0.0]
    inner = [np.mean(leaves[:2]), np.mean(leaves[2:])]
    expected = []
    for siblings in (inner, leaves[:2], leaves[2:]):
        mean, std = np.mean(siblings), np.std(siblings, ddof=1)
        for v in siblings:
            row = [v, mean] + [(v - mean) / n if std else 0 for n in (np.sqrt(mean * (1 - mean)) or 1, std + 1e-4, 1)]
            expected.append(row)
    shown = [[float(cell) for cell in row[1:]] for row in table[2:]]
    assert np.abs(np.array(shown) - np.array(expected)).max() < 0.00051
    tree = torch.tensor([leaves])
    assert torch.cat([x.flatten() for x in node_values(tree, 2)[1:]]).tolist() == [row[0] for row in shown]
    for column, normalizer in enumerate(("bernoulli", "std", "none"), 2):
        found = torch.cat([x.flatten() for x in advantages_by_depth(tree, 2, 0.1, normalizer)])
        assert np.abs(found.numpy() - np.array(shown)[:, column]).max() < 0.00051


def test_the_worked_tokens_of_gtpo():
    (table,) = [table for table in tables(TEXT["methods/gtpo"]) if table[0][:2] == ["rollout", "H"]]
    entropies = torch.tensor([float(row[1]) for row in table[2:]])[None, :, None]
    correct = torch.tensor([[row[0] == "correct" for row in table[2:]]])
    every = torch.ones(1, 4, 1, dtype=torch.bool)
    shares = entropy_shares(entropies, every, correct)
    rewards = torch.where(correct, 1.0, -1.0)[..., None] * (1 + 0.1 * shares)
    by = [gtpo.token_advantages(entropies, every, correct, every[..., 0], normalize=how) for how in ("group", "sides")]
    for i, row in enumerate(table[2:]):
        assert all(map(agrees, row[2:], (x[0, i, 0].item() for x in (shares, rewards, *by)))), row


def test_the_worked_rollouts_of_otb():
    page = TEXT["methods/otb"]
    (table,) = [table for table in tables(page) if table[0][:2] == ["position", "W"]]
    rewards = torch.tensor([1.0, 0.0, 0.0])
    advantages = (rewards - rewards.mean()) / rewards.std()
    assert agrees("1.15", advantages[0].item())
    assert agrees("-0.58", advantages[1].item())
    columns = [row[1].split(", ") for row in table[2:]]
    alive = torch.tensor([[cell != "ended" for cell in column] for column in columns]).T[None]
    energies = torch.tensor([[0.0 if cell == "ended" else float(cell) for cell in column] for column in columns])
    values = otb.token_advantages(advantages[None], energies.T[None], alive)[0]
    for t, row in enumerate(table[2:]):
        for i, cell in enumerate(row[3].split(", ")):
            assert (cell == "ended") == (not alive[0, i, t])
            if cell != "ended":
                assert agrees(cell, values[i, t].item())
                assert agrees(row[2], (advantages[i] - values[i, t]).item())


# Settings


def test_the_tables_of_settings_are_up_to_date():
    """If this fails, run `python docs/settings.py`."""
    pages = runpy.run_path(str(ROOT / "docs/settings.py"))["written"]()
    for page, text in pages.items():
        assert page.read_text() == text, page
    with_settings = {method.Settings for method in METHODS.values() if dataclasses.fields(method.Settings)}
    assert {METHODS[page.stem].Settings for page in pages} == with_settings


def test_a_table_of_settings_has_every_field_with_its_default_and_meaning():
    (shown,) = [table for table in tables(TEXT["methods/tree"]) if table[0] == ["setting", "default", "meaning"]]
    recipe = METHODS["tree"].Settings()
    assert [row[0] for row in shown[2:]] == list(vars(recipe))
    assert [yaml.safe_load(row[1]) for row in shown[2:]] == list(vars(recipe).values())
    assert shown[2][2] == "Number of segments sampled from each node."
    multiply = next(line for line in TEXT["methods/ktae"].splitlines() if line.startswith("| `ktae_combine` |"))
    assert r"`A + \|A\| K`" in multiply  # a bar would end the cell


# Metrics


def test_what_a_training_logs_has_a_row(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, dynamic_sampling=True)
    trainer.train()
    rows = set(re.findall(r"^\| `([^`]+)` \|", TEXT["reference/metrics"], re.MULTILINE))
    logged = {name.replace("/math_accuracy/", "/NAME/") for name in trainer.state.log_history[0]}
    assert len(logged) > 30
    assert logged - rows == {"step"}


# The site


def build(source: Path, output: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(output)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_site_builds_and_asks_no_network(tmp_path):
    pytest.importorskip("mkdocs")
    built = build(ROOT, tmp_path)
    assert built.returncode == 0, built.stderr
    for path in PAGES:
        page = (tmp_path / path.relative_to(ROOT / "docs").with_suffix(".html")).read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]*)"', page)
        loaded += re.findall(r'<link[^>]*\shref="([^"]*)"', page)
        assert loaded
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)]
        assert "](../" not in page
    api = (tmp_path / "reference/api.html").read_text()
    for name in re.findall(r"^::: (\S+)$", TEXT["reference/api"], re.MULTILINE):
        assert f'id="{name}"' in api, name
    assert "*optional*" not in api


@pytest.mark.slow
@pytest.mark.parametrize("link", ["nowhere.md", "guides/errors.md#nothing-of-that-name"])
def test_a_broken_link_fails_the_build(tmp_path, link):
    pytest.importorskip("mkdocs")
    for name in ("docs", "ktae_trl", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    index = tmp_path / "docs" / "index.md"
    index.write_text(index.read_text() + f"\n[broken]({link})\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert link.partition("#")[0] in built.stderr
    assert built.stderr.count("WARNING -") == 1, built.stderr
