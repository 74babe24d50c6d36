"""Two results of one benchmark, cell by cell: what changed by more than the spread of the rounds.

A cell of one is the cell of the other if their keys agree in all that tells cells apart; what has
one value in each (such as the directory) does not, and is a note where it differs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, NamedTuple

from tierrun.bench.cells import Cell, Metric, Value
from tierrun.bench.documents import Saved
from tierrun.bench.report import Spread
from tierrun.bench.sheets import Sheet, show, split_keys
from tierrun.bench.significance import ALPHA, least_p, mann_whitney
from tierrun.io.errors import UsageError

_HARDWARE = ("cpu", "cores", "memory_bytes", "gpus", "gpu_memory_bytes")
"""Of `machine`: what makes it another one. The rest is what is installed on it."""


class Change(NamedTuple):
    """One cell in both: what tells it apart, its spreads, and the p-value of their difference."""

    key: dict[str, Value]
    old: Spread
    new: Spread
    p: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.new.median / self.old.median if self.old.median else float("nan")


@dataclass(frozen=True, slots=True)
class Comparison:
    """All cells that both have, and what has to be known to read them."""

    metric: Metric
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    def sheet(self) -> Sheet:
        """A row for each cell."""
        names, _ = split_keys([change.key for change in self.changes])
        scale, digits = self.metric.scale, self.metric.digits
        return Sheet(
            title=f"{self.metric.label}: medians (least–largest), old and new",
            columns=(*names, "old", "new", "change", "p", "verdict"),
            rows=tuple(
                (
                    *(show(name, change.key[name]) for name in names),
                    change.old.text(digits, scale),
                    change.new.text(digits, scale),
                    f"{change.ratio - 1:+.1%}".replace("%", " %"),
                    f"{change.p:.3f}",
                    change.verdict,
                )
                for change in self.changes
            ),
        )


def compare(old: Saved, new: Saved, metric_name: str | None = None) -> Comparison:
    """The changes from `old` to `new` in one metric, by default the first of `new`.

    Raises:
        UsageError: results of different benchmarks, no such metric in both, no cell in common.
    """
    if old.results.benchmark != new.results.benchmark:
        raise UsageError(
            f"{old.name} has results of `{old.results.benchmark}`, {new.name} of "
            f"`{new.results.benchmark}`: there is nothing to compare"
        )
    metric = _metric(old, new, metric_name)
    theirs, mine = _by_distinction(old, new)
    changes = tuple(
        _change(cell, theirs[key], metric) for key, cell in mine.items() if key in theirs
    )
    if not changes:
        raise UsageError(f"{old.name} and {new.name} have no cell in common")
    notes = (*differences(old, new), *_left_out(theirs, mine, old, new), *_about(changes))
    return Comparison(metric, changes, notes)


def _metric(old: Saved, new: Saved, name: str | None) -> Metric:
    known = {metric.name for metric in old.results.metrics}
    both = [metric for metric in new.results.metrics if metric.name in known]
    found = [metric for metric in both if name is None or metric.name == name]
    if not found:
        names = ", ".join(metric.name for metric in both) or "none"
        raise UsageError(f"no metric {name or 'in common'} in both results; they share: {names}")
    return found[0]


_Distinction = frozenset[tuple[str, Value]]


def _by_distinction(
    old: Saved, new: Saved
) -> tuple[dict[_Distinction, Cell], dict[_Distinction, Cell]]:
    """The cells of both by what tells them apart in either."""
    names = _names_apart(old) | _names_apart(new)

    def by_key(saved: Saved) -> dict[_Distinction, Cell]:
        return {
            frozenset((name, value) for name, value in cell.key.items() if name in names): cell
            for cell in saved.results.cells
        }

    return by_key(old), by_key(new)


def _names_apart(saved: Saved) -> set[str]:
    return set(split_keys([cell.key for cell in saved.results.cells])[0])


def _change(mine: Cell, theirs: Cell, metric: Metric) -> Change:
    old, new = theirs.samples[metric.name], mine.samples[metric.name]
    p = mann_whitney(old, new)
    before, after = theirs.spread(metric), mine.spread(metric)
    if least_p(len(old), len(new)) >= ALPHA:
        verdict = "too few rounds"
    elif p >= ALPHA or before.median == after.median:
        verdict = "within the spread"
    else:
        better = (after.median > before.median) == metric.higher_is_better
        verdict = "better" if better else "worse"
    return Change(dict(mine.key), before, after, p, verdict)


def differences(old: Saved, new: Saved) -> Iterator[str]:
    """What else is not the same in both, a sentence each."""
    hardware = list(_unequal(_part(old.machine, True), _part(new.machine, True)))
    if hardware:
        yield f"another machine, which may be the whole difference: {'; '.join(hardware)}"
    software = list(_unequal(_part(old.machine, False), _part(new.machine, False)))
    if software:
        yield f"other software: {'; '.join(software)}"
    if (old.tierrun, old.commit) != (new.tierrun, new.commit):
        yield f"tierrun {old.tierrun} ({old.commit}) then, {new.tierrun} ({new.commit}) now"
    settings = list(_unequal(_setting(old), _setting(new)))
    if settings:
        yield f"measured otherwise: {'; '.join(settings)}"


def _part(machine: Mapping[str, Any], hardware: bool) -> dict[str, Any]:
    return {name: value for name, value in machine.items() if (name in _HARDWARE) == hardware}


def _setting(saved: Saved) -> dict[str, Any]:
    """What all cells of `saved` have in common."""
    return {**saved.results.setting, **split_keys([cell.key for cell in saved.results.cells])[1]}


def _unequal(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*old, *new]):
        then, now = old.get(name), new.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            yield from _unequal(then, now)
        elif then != now:
            yield f"{name} {_text(then)} then, {_text(now)} now"


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def _left_out(
    theirs: Mapping[_Distinction, Cell],
    mine: Mapping[_Distinction, Cell],
    old: Saved,
    new: Saved,
) -> Iterator[str]:
    for here, there, name in ((theirs, mine, old.name), (mine, theirs, new.name)):
        count = len(here.keys() - there.keys())
        if count:
            yield f"{count} cells only in {name}"


def _about(changes: Sequence[Change]) -> Iterator[str]:
    ratio = geometric_mean([max(change.ratio, 1e-9) for change in changes])
    yield f"all {len(changes)} cells together, geometric mean: {ratio - 1:+.1%}".replace("%", " %")
    yield (
        "p: two-sided Mann-Whitney U test of the rounds, exact to 40 of them; below "
        f"{ALPHA:g} is called a change. By chance alone about {ALPHA * len(changes):.0f} of "
        f"{len(changes)} cells would be. Rounds of one run lie closer together than runs do: "
        "where a small change matters, repeat both"
    )
    if any(change.verdict == "too few rounds" for change in changes):
        yield "too few rounds: no order of them has p < 0.05; both need at least 4 (--rounds)"
