"""Find the groups of gigabytes of rollouts with little memory: a compact index first, then only the chosen rollouts."""

import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ktae_trl.arguments import UserError
from ktae_trl.grading import grade_many
from ktae_trl.report.dumps import sources
from ktae_trl.report.dumps.formats import BY_NAME, Format, recognised, unknown
from ktae_trl.report.dumps.rollout import Place, Rollout, group_key
from ktae_trl.report.dumps.verdicts import UndecidedError, deciding, threshold_of
from ktae_trl.report.notebook import kind_of, told
from ktae_trl.report.tokens import visible

_GRADED_TOGETHER = 512  # completions
_TRIED = 20  # rows of a file, of which the first that can be read says its format
logger = logging.getLogger(__name__)


def recognise(paths: list[Path], chosen: Format | None = None) -> tuple[Format, list[Path]]:
    """Return the format of some files, and those of them that have it.

    Files of no known format, or that cannot be read, are left out with a warning if there are others.

    Args:
        chosen: The format that the user chose. Files that lack its keys are left out.

    Raises:
        UserError: There is no file of a known format, or there are several formats.
    """
    of_format: dict[str, list[Path]] = {}
    wrong: list[UserError] = []
    for path in paths:
        try:
            of_format.setdefault(_format_of(path, chosen).name, []).append(path)
        except UserError as error:
            wrong.append(error)
    if not of_format:
        raise wrong[0]
    if len(of_format) > 1:
        kinds = "; ".join(f"{name} ({len(some)}, such as {some[0]})" for name, some in of_format.items())
        raise UserError(f"The files have several formats: {kinds}. Choose one with --format, or name its files")
    if wrong:
        logger.warning("Left out %d of %d files. The first: %s", len(wrong), len(paths), visible(str(wrong[0])))
    ((name, some),) = of_format.items()
    kind = chosen or BY_NAME[name]
    return kind, kind.files(some)


def _format_of(path: Path, chosen: Format | None) -> Format:
    damage: UserError | None = None
    for tried, (_, _, row) in enumerate(sources.read(path)):
        if isinstance(row, dict):
            fits = recognised(set(row)) if chosen is None else chosen.needs <= set(row)
            if not fits:
                raise unknown(path, set(row), chosen)
            return chosen or fits
        damage = damage or row
        if tried == _TRIED:
            break
    raise damage or UserError(f"{path} contains no rollouts: it is empty")


class Index:
    """Where the rollouts of some files are, the group of each, and the value that says whether it is correct.

    An index takes about 30 bytes per rollout and 200 per group, however long the texts are.
    """

    def __init__(self, paths: list[Path], kind: Format, correct: str | None = None):
        """Read all files once.

        Args:
            paths: Files of the format `kind`.
            correct: The reward that says whether a rollout is correct. Default: as the format says.

        Raises:
            UserError: No row can be read, or it is unknown which reward says whether a rollout is correct.
        """
        self.paths, self.kind, self.correct = paths, kind, correct
        self.name = ""  # what says whether a rollout is correct
        self.steps = array("q")  # per group
        self.bad: list[str] = []  # the first row that could not be read
        self.rows = self.bad_rows = self.repeated = 0
        self._groups: dict[bytes, int] = {}
        self._columns = {name: array(code) for name, code in _COLUMNS.items()}
        self._ungraded: list[tuple[int, str, list[str]]] = []
        self._seen: set[bytes] = set()
        with _progress() as bar:
            task = bar.add_task("Reading files", total=sum(path.stat().st_size for path in paths))
            done = 0
            for number in range(len(paths)):
                size = paths[number].stat().st_size
                for at in self._read(number):
                    bar.update(task, completed=done + min(at, size))
                done += size
        self._grade()
        self._groups, self._seen = {}, set()  # not needed any more
        if not len(self):
            raise UserError(
                f"{_some(paths)} contains no rollouts: none of the {self.rows} rows can be read. {self.bad[0]}"
                if self.bad
                else f"{_some(paths)} contains no rollouts: it is empty"
            )
        self.group, self.file, self.at, self.part, self.value = (
            np.frombuffer(column, column.typecode) for column in self._columns.values()
        )
        self.sizes = np.bincount(self.group, minlength=len(self.steps))
        if self.bad_rows:
            logger.warning("%s", visible(self.skipped()))

    def __len__(self) -> int:
        return len(self._columns["group"])

    def skipped(self) -> str:
        """Return a sentence about the rows that could not be read, or ""."""
        if not self.bad_rows:
            return ""
        return f"Skipped {self.bad_rows:,} of {self.rows:,} rows that could not be read. The first: {self.bad[0]}"

    def _read(self, number: int) -> Iterator[int]:
        """Add the rollouts of a file, and yield the places up to which it has been read."""
        path, begin, content = self.paths[number], len(self), blake2b(digest_size=16)
        rows = sources.read(path)
        while True:
            try:
                at, where, row = next(rows)
            except StopIteration:
                break
            except UserError as error:  # the rest of the file is lost
                self._skip(str(error))
                break
            self.rows += 1
            try:
                if isinstance(row, UserError):
                    raise row
                found = self.kind.rollouts(row, Place(path, at))
                decided = [deciding(rollout, self.correct) for rollout in found]
            except UndecidedError:
                raise
            except UserError as error:
                self._skip(str(error) if isinstance(row, UserError) else f"{path}, {where}: {error}")
                continue
            for part, (rollout, (name, value)) in enumerate(zip(found, decided, strict=True)):
                self.name = self.name or name
                self._add(number, at, part, rollout, value)
                if self.kind.repeats:
                    content.update(f"{rollout.prompt}\0{rollout.text}\0{rollout.advantage}\0".encode())
            yield at
        if self.kind.repeats and len(self) > begin:
            if content.digest() in self._seen:
                self.repeated += 1
                for column in self._columns.values():
                    del column[begin:]
                self._ungraded = [one for one in self._ungraded if one[0] < begin]
            self._seen.add(content.digest())

    def _skip(self, reason: str) -> None:
        self.bad_rows += 1
        if not self.bad:
            self.bad.append(reason)

    def _add(self, file: int, at: int, part: int, rollout: Rollout, value: float) -> None:
        group = self._groups.setdefault(group_key(rollout), len(self.steps))
        if group == len(self.steps):
            self.steps.append(rollout.step)
        row = (group, file, at, part, value)
        for column, one in zip(self._columns.values(), row, strict=True):
            column.append(one)
        if value != value and rollout.answers is not None and self.correct is None:
            self._ungraded.append((len(self) - 1, rollout.text, rollout.answers))
            if len(self._ungraded) == _GRADED_TOGETHER:
                self._grade()

    def _grade(self) -> None:
        places, texts, answers = zip(*self._ungraded, strict=True) if self._ungraded else ((), (), ())
        verdicts = grade_many(list(texts), list(answers), answer_format=self.kind.answer_format)
        for place, verdict in zip(places, verdicts, strict=True):
            self._columns["value"][place] = float("nan") if verdict is None else float(verdict)
        self._ungraded = []

    # What is in it

    def verdicts(self, threshold: float | None) -> np.ndarray:
        """Return 1 for each correct rollout, 0 for each wrong one, and -1 for each that is neither."""
        limit = threshold_of(self.value, self.name, threshold)
        return np.where(np.isnan(self.value), -1, self.value > limit).astype(np.int8)

    def recognised(self) -> str:
        """Return one line about what the files are."""
        sizes = self.sizes[self.sizes > 0]
        same = sizes.min() == sizes.max()
        rollouts = f"x {_plural(sizes[0], 'rollout')}" if same else f"with {sizes.min()} to {sizes.max()} rollouts"
        steps = len({step for step, size in zip(self.steps, self.sizes, strict=True) if size})
        where = f"{_plural(steps, 'step')}, " if set(self.steps) != {0} else ""
        return (
            f"Recognised {_plural(len(self.paths), 'file')} as {self.kind.title} ({where}"
            f"{_plural(len(sizes), 'prompt')} {rollouts})"
        )

    def summary(self, verdicts: np.ndarray) -> str:
        """Return one line with the numbers of groups, by verdicts, and of rollouts."""
        right, wrong = self._sides(verdicts)
        groups = zip(right.tolist(), wrong.tolist(), self.sizes.tolist(), strict=True)
        kinds = Counter(kind_of(*group) for group in groups if group[2])
        return told(kinds, len(self), int((verdicts < 0).sum()))

    def _sides(self, verdicts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.bincount(self.group[verdicts == side], minlength=len(self.steps)) for side in (1, 0))

    def notes(self, shown: int, threshold: float | None) -> list[str]:
        """Return what a reader of a page with `shown` groups should know."""
        notes = []
        groups = int((self.sizes > 0).sum())
        if shown < groups:
            notes.append(
                f"This page shows {shown:,} of {groups:,} groups: for each step, those closest to an equal number of "
                "correct and wrong rollouts. To see more, raise --max_groups."
            )
        if self.name not in _VERDICT_NAMES or threshold is not None:
            limit = threshold_of(self.value, self.name, threshold)
            notes.append(f"A rollout is correct if its {self.name} is above {limit:g}.")
        if self.repeated:
            notes.append(f"{_plural(self.repeated, 'file')} repeated the rollouts of another file and was left out.")
        if self.bad_rows:
            notes.append(self.skipped())
        return notes

    # The chosen groups

    def choose(self, verdicts: np.ndarray, most: int) -> list[int]:
        """Return at most `most` groups, sorted by step: for each step those closest to as many correct as wrong ones.

        If there are more steps than `most`, only some of the steps, evenly spaced, have a group.
        """
        smaller = np.minimum(*self._sides(verdicts))
        of_step: dict[int, list[int]] = {}
        for group in np.flatnonzero(self.sizes).tolist():
            of_step.setdefault(self.steps[group], []).append(group)
        steps = sorted(of_step)
        steps = [steps[i * len(steps) // most] for i in range(most)] if len(steps) > most else steps
        share = most // len(steps)
        chosen = []
        for step in steps:
            best = sorted(of_step[step], key=lambda group: -smaller[group])[:share]
            chosen += sorted(best)
        return chosen

    def groups(self, chosen: list[int], verdicts: np.ndarray) -> Iterator[tuple[int, list[Rollout], list[bool | None]]]:
        """Read the rollouts of these groups, and yield each group with its verdicts, in this order.

        A file is read from its beginning to its end. Groups whose rollouts lie among those of others wait in memory.
        """
        waiting = list(reversed(chosen))
        members: dict[int, list[tuple[Rollout, bool | None]]] = {group: [] for group in chosen}
        wanted = np.flatnonzero(np.isin(self.group, chosen))
        for file in np.unique(self.file[wanted]).tolist():
            own = wanted[self.file[wanted] == file]
            for i, rollout in zip(own.tolist(), self._rollouts(file, own), strict=True):
                members[int(self.group[i])].append((rollout, _VERDICTS[int(verdicts[i])]))
                while waiting and len(members[waiting[-1]]) == self.sizes[waiting[-1]]:
                    group = waiting.pop()
                    rollouts, own_verdicts = zip(*members.pop(group), strict=True)
                    yield group, list(rollouts), list(own_verdicts)

    def _rollouts(self, file: int, own: np.ndarray) -> Iterator[Rollout]:
        path = self.paths[file]
        places, counts = np.unique(self.at[own], return_counts=True)
        rows = sources.read_at(path, places.tolist())
        begin = 0
        for at, count, row in zip(places.tolist(), counts.tolist(), rows, strict=True):
            found = self.kind.rollouts(row, Place(path, at))
            for part in self.part[own[begin : begin + count]].tolist():
                yield found[part]
            begin += count

    def numbers(self) -> list[int]:
        """Return the number of each group in its step, in the order in which they first appear."""
        seen: Counter[int] = Counter()
        result = []
        for step in self.steps:
            result.append(seen[step])
            seen[step] += 1
        return result


_VERDICT_NAMES = ("correct", "acc")
_COLUMNS = {"group": "i", "file": "i", "at": "q", "part": "i", "value": "d"}
_VERDICTS = {1: True, 0: False, -1: None}


def _progress() -> Progress:
    console = Console(stderr=True, markup=False, emoji=False)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _some(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} (and {len(paths) - 1} more files)"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"
