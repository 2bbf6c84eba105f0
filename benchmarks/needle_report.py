"""Tables, plot and page of the needle benchmark. See needle.py.

The unit is the seed, and differences are between runs with the same seed. Intervals are 95% t intervals, and p-values
are from the paired t test. The primary comparison is one test. Holm's correction is applied to the secondary ones. All
other comparisons have intervals only.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from needle import BEST, LOW, ROOT, TUNING, Results, rate_of, seeds_of
from needle_rows import ROWS
from needle_task import Cell
from scipy import stats

from ktae_trl.evaluation.statistics import Difference, Estimate, holm
from ktae_trl.files.writing import replace_text
from ktae_trl.report.markdown import table

TEMPLATE = Path(__file__).with_name("needle_page.md")
BASELINE, CEILING = "grpo", "oracle"
NOT_RUN = "not run"
# A row has the same colour in all panels.
COLOURS = {row: plt.get_cmap("tab20")(2 * n % 20 + n // 10) for n, row in enumerate(ROWS)}


def interval(values: np.ndarray) -> Estimate:
    """Return the mean and its 95% t interval, NaN for fewer than two values."""
    if len(values) < 2:
        return Estimate(float(values.mean()) if len(values) else np.nan, np.nan, np.nan)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def difference(one: dict[int, float], other: dict[int, float]) -> Difference:
    """Return `one - other`, paired by seed. Only seeds in both are used."""
    seeds = sorted(set(one) & set(other))
    values = np.array([one[seed] - other[seed] for seed in seeds])
    p = float(stats.ttest_1samp(values, 0).pvalue) if len(seeds) > 1 else np.nan
    return Difference(*interval(values), p)


def share_of_ceiling(one: dict[int, float], baseline: dict[int, float], ceiling: dict[int, float]) -> Estimate:
    """Return (one - baseline) / (ceiling - baseline) of the means, with a bootstrap interval over seeds.

    NaN if the ceiling is not above the baseline with confidence, because the ratio then means nothing.
    """
    seeds = sorted(set(one) & set(baseline) & set(ceiling))
    if len(seeds) < 2 or not difference(ceiling, baseline).low > 0:
        return Estimate(np.nan, np.nan, np.nan)
    x, y, z = (np.array([values[seed] for seed in seeds]) for values in (one, baseline, ceiling))
    drawn = np.random.default_rng(0).integers(len(seeds), size=(4000, len(seeds)))
    ratios = (x - y)[drawn].mean(1) / (z - y)[drawn].mean(1)
    return Estimate(float((x - y).mean() / (z - y).mean()), *map(float, np.quantile(ratios, [0.025, 0.975])))


class Finished:
    """The finished runs of a config, by row, setting and kind of rate ("best", "low" or the rate itself)."""

    def __init__(self, config: dict, results: Results):
        self.config, self.results = config, results

    def cell(self, row: str, at: str | float, setting: dict) -> Cell | None:
        """Return the cell, or None if its tuning is not finished."""
        try:
            rate = rate_of(self.config, self.results, row, at, setting)
        except LookupError:
            return None
        return Cell(row, rate, **setting)

    def of(self, row: str, at: str | float, setting: dict, column: str = "area") -> dict[int, float]:
        """Return the values of the main seeds, empty if there are none."""
        cell = self.cell(row, at, setting)
        tuning = {s for part in self.config["programme"] if part["at"] == TUNING for s in seeds_of(part)}
        found = self.results.of(cell, column) if cell else {}
        return {seed: value for seed, value in found.items() if seed not in tuning}

    def budget(self, row: str, at: str | float, setting: dict) -> int:
        cell = self.cell(row, at, setting)
        return next(line["budget"] for line in self.results.lines if Cell(**line["cell"]) == cell)

    def tokens(self, row: str, at: str | float, setting: dict) -> dict[int, float]:
        """Return the tokens to the target by seed; a run that does not reach it counts with its budget."""
        found = self.of(row, at, setting, "tokens_to_target")
        limit = self.budget(row, at, setting) if found else 0
        return {seed: min(value, limit) for seed, value in found.items()}

    def parts(self, at: str | float) -> list[tuple[dict, list[str]]]:
        """Return each setting with its rows at this kind of rate, in the order of the programme."""
        found: list[tuple[dict, list[str]]] = []
        for part in self.config["programme"]:
            for setting in part["settings"] if part["at"] == at else ():
                rows = next((rows for known, rows in found if known == setting), None)
                if rows is None:
                    found.append((setting, rows := []))
                rows += [row for row in part["rows"] if row not in rows]
        return found


def p_values(finished: Finished) -> dict[tuple[str, str], float]:
    """Return the p-value of each compared (kind of rate, row) at the main setting, corrected as the config says."""
    setting, config = finished.config["setting"], finished.config

    def p(at: str, row: str) -> float:
        return difference(finished.of(row, at, setting), finished.of(BASELINE, at, setting)).p

    found = {(config["primary"]["at"], row): p(config["primary"]["at"], row) for row in config["primary"]["rows"]}
    family = [(entry["at"], row) for entry in config["secondary"] for row in entry["rows"]]
    # A comparison that was not run counts in the family, so that a cut programme does not weaken the correction.
    corrected = holm([1.0 if np.isnan(value := p(*pair)) else value for pair in family])
    return found | dict(zip(family, corrected, strict=True))


def show(x: Estimate | Difference, scale: float = 100, digits: int = 2) -> str:
    if np.isnan(x.value):
        return ""
    if np.isnan(x.low):
        return f"{x.value * scale:+.{digits}f}"
    return f"{x.value * scale:+.{digits}f} ({x.low * scale:+.{digits}f} to {x.high * scale:+.{digits}f})"


def describe(setting: dict) -> str:
    """Return a setting in words, such as "filler 72, group 8"."""
    return ", ".join(f"{name} {value:g}" if name != "rule" else f"rule `{value}`" for name, value in setting.items())


def comparison_table(finished: Finished, at: str | float, setting: dict, rows: list[str]) -> str:
    """Return a table of area and tokens to the target, with the paired differences to GRPO."""
    main = setting == finished.config["setting"]
    corrected = p_values(finished) if main else {}
    baseline, ceiling = (finished.of(row, at, setting) for row in (BASELINE, CEILING))
    lines = []
    for row in rows:
        areas = finished.of(row, at, setting)
        if not areas:
            lines.append([f"`{row}`", NOT_RUN, *[""] * 9])
            continue
        tokens = finished.tokens(row, at, setting)
        reached = np.isfinite(list(finished.of(row, at, setting, "tokens_to_target").values())).mean()
        line = [f"`{row}`", f"{finished.cell(row, at, setting).rate:g}", str(len(areas))]
        line.append(f"{100 * np.mean(list(areas.values())):.2f}")
        if row == BASELINE:
            line += ["", "", ""]
        else:
            p = corrected.get((at, row), np.nan)
            share = share_of_ceiling(areas, baseline, ceiling)
            line += [show(difference(areas, baseline)), "" if np.isnan(p) else f"{p:.2g}"]
            line.append("" if np.isnan(share.value) else f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})")
        line.append(f"{np.median(list(tokens.values())):,.0f} ({reached:.0%})")
        line.append("" if row == BASELINE else show(difference(tokens, finished.tokens(BASELINE, at, setting)), 1, 0))
        line += [f"{np.mean(list(finished.of(row, at, setting, name).values())):.2f}" for name in ("focus", "signal")]
        lines.append(line)
    head = [
        *("method", "rate", "seeds", "area, %", "less GRPO, points", "p", "share of the oracle's gain"),
        *("median tokens to the target (runs that reach it)", "mean less GRPO", "focus", "signal"),
    ]
    return table(head, lines)


def rates_table(finished: Finished) -> str:
    """Return a table of the mean area at each rate on the tuning seeds, the best one in bold."""
    lines, rates = [], sorted({rate for part in finished.config["programme"] for rate in part.get("rates", ())})
    for part in finished.config["programme"]:
        for setting in part["settings"] if part["at"] == TUNING else ():
            for row in part["rows"]:
                means = {}
                for rate in part["rates"]:
                    found = finished.results.of(Cell(row, rate, **setting))
                    values = [found[seed] for seed in seeds_of(part) if seed in found]
                    means[rate] = np.mean(values) if values else np.nan
                best = max((mean for mean in means.values() if not np.isnan(mean)), default=None)
                shown = {rate: "" if np.isnan(mean) else f"{mean:.1%}" for rate, mean in means.items()}
                cells = [f"**{shown[rate]}**" if means.get(rate) == best else shown.get(rate, "") for rate in rates]
                lines.append([describe(setting), f"`{row}`", *cells])
    return table(["setting", "method", *(f"{rate:g}" for rate in rates)], lines)


def primary(finished: Finished) -> str:
    """Return the result of the primary comparison in a sentence."""
    config = finished.config
    at, (row,), setting = config["primary"]["at"], config["primary"]["rows"], config["setting"]
    one, other = finished.of(row, at, setting), finished.of(BASELINE, at, setting)
    found = difference(one, other)
    if np.isnan(found.p):
        return f"The primary comparison was {NOT_RUN}."
    return (
        f"`{row}` less GRPO, {describe(setting)}, each at its best rate: {show(found)} points of area, "
        f"p = {found.p:.2g}, {len(set(one) & set(other))} seeds. GRPO's area is "
        f"{100 * np.mean(list(other.values())):.2f}."
    )


def tables(finished: Finished, at: str | float, *, main: bool) -> str:
    """Return the tables of the main setting, or those of all others, at this kind of rate."""
    parts = [
        f"**{describe(setting)}**\n\n{comparison_table(finished, at, setting, rows)}"
        for setting, rows in finished.parts(at)
        if (setting == finished.config["setting"]) == main
    ]
    return "\n\n".join(parts)


def equal_rates(finished: Finished) -> str:
    """Return the tables of the parts that name their rate."""
    rates = dict.fromkeys(part["at"] for part in finished.config["programme"] if not isinstance(part["at"], str))
    return "\n\n".join(f"### Rate {rate:g}\n\n{tables(finished, rate, main=True)}" for rate in rates)


def plot(finished: Finished, path: Path) -> None:
    """Draw the differences to GRPO over the number of filler words, and the learning curves of the main setting."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 8.5), layout="constrained")
    for (dose, curves), at in zip(axes.T, (BEST, LOW), strict=True):
        settings = finished.parts(at)
        plain = sorted((setting["filler"], rows) for setting, rows in settings if set(setting) == {"filler"})
        rows = list(dict.fromkeys(row for _, some in plain if len(plain) > 1 for row in some if row != BASELINE))
        for row in rows:
            found = [
                (
                    filler,
                    difference(finished.of(row, at, {"filler": filler}), finished.of(BASELINE, at, {"filler": filler})),
                )
                for filler, some in plain
                if row in some
            ]
            found = [(filler, d) for filler, d in found if not np.isnan(d.low)]
            if len(found) < 2:
                continue
            x = [3 / (3 * filler + 9) for filler, _ in found]
            y = 100 * np.array([d.value for _, d in found])
            bars = 100 * np.array([(d.value - d.low, d.high - d.value) for _, d in found]).T
            dose.errorbar(x, y, bars, marker="o", capsize=3, label=row, color=COLOURS[row])
        dose.axhline(0, color="black", linewidth=0.8)
        shares = [3 / (3 * filler + 9) for filler, _ in plain]
        dose.set_xscale("log")
        dose.set_xticks(shares, [f"{share:.1%}" for share in shares])
        dose.minorticks_off()
        dose.set(xlabel="share of tokens that matter", ylabel="area less GRPO's, points")
        dose.set_title(f"{'Best rate of each method' if at == BEST else 'Low rate'}", loc="left", fontweight="bold")
        setting = finished.config["setting"]
        there = next((rows for known, rows in settings if known == setting), [])
        for row in there:
            if finished.of(row, at, setting):
                curve = finished.results.curve(finished.cell(row, at, setting))
                at_tokens = (np.arange(len(curve)) + 0.5) / len(curve) * finished.budget(row, at, setting)
                curves.plot(at_tokens / 1000, curve, label=row, color=COLOURS[row], linewidth=1.5)
        curves.set(xlabel="generated tokens, thousands", ylabel="expected accuracy")
        curves.set_title(describe(setting), loc="left")
        for axis in (dose, curves):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def filled(template: str, finished: Finished) -> str:
    """Return the page: each line `<!-- NAME -->` of the template is replaced with the part of this name."""
    parts = {
        "primary": lambda: primary(finished),
        "main_best": lambda: tables(finished, BEST, main=True),
        "main_low": lambda: tables(finished, LOW, main=True),
        "main_equal": lambda: equal_rates(finished),
        "others_best": lambda: tables(finished, BEST, main=False),
        "others_low": lambda: tables(finished, LOW, main=False),
        "rates": lambda: rates_table(finished),
    }
    for name, part in parts.items():
        template = template.replace(f"<!-- {name} -->", part() or NOT_RUN)
    return template


def write(config: dict) -> None:
    """Write the plot and the page, and print the page."""
    results = Results(ROOT / config["results"])
    if not results.lines:
        sys.exit(f"needle.py: {results.path} has no finished runs. Start them with: python benchmarks/needle.py run")
    finished = Finished(config, results)
    page = filled(TEMPLATE.read_text(), finished)
    plot(finished, ROOT / config["plot"])
    replace_text(ROOT / config["page"], page)
    print(page)
