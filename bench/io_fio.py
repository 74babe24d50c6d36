"""`--vs-fio`: the same reads by fio, in turns with ours, on the same file.

Compared is O_DIRECT at one size, depth and pattern. Both have buffers in huge pages, begin with a
warm-up that does not count, and then read for the same time, so long that what is in flight at its
ends, which fio counts whole, is a small part of it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tierrun.bench import fio
from tierrun.bench.cells import Cell
from tierrun.bench.fio import FioResult
from tierrun.bench.io_load import Load
from tierrun.bench.io_plan import Case
from tierrun.bench.report import Spread, spread
from tierrun.bench.sheets import Sheet, in_words, show, split_keys
from tierrun.bench.yardstick import Turns, alternate

TOLERANCE = 0.05
"""The medians agree if they differ by less, or if ours lies within fio's own rounds."""

READER = f"fio ({fio.ENGINE})"

_IN_FLIGHT_SHARE = 0.02
"""Of the bytes read: what is in flight at once is at most this. fio counts what was in flight at
the end of its warm-up as read after it, so that its bandwidth is too high by half of this."""

Measure = Callable[[Case, float, int], Load]
"""A round of a case: for so many seconds, with places of this seed."""


class Agreement(NamedTuple):
    """A case, how long its turns took, and the spreads of both in bytes per second."""

    case: Case
    seconds: float
    turns: Turns[Load, FioResult]
    ours: Spread
    fio: Spread
    ratio: Spread

    @property
    def verdict(self) -> str:
        """Whether both say the same."""
        if abs(self.ours.median / self.fio.median - 1) <= TOLERANCE:
            return f"within {TOLERANCE:.0%}".replace("%", " %")
        within = self.fio.least <= self.ours.median <= self.fio.largest
        return "within fio's spread" if within else "differs"

    def cells(self) -> Iterator[Cell]:
        """Ours and fio's, as cells of the results."""
        for reader, runs in (("direct", self.turns.ours), (READER, self.turns.yardsticks)):
            names = Load._fields
            samples = {name: tuple(float(getattr(run, name)) for run in runs) for name in names}
            yield Cell({**self.case.key(), "reader": reader}, samples)

    def to_json(self) -> dict[str, Any]:
        """For the document."""
        return {
            "key": self.case.key(),
            "seconds": self.seconds,
            "ours": self.ours._asdict(),
            "fio": self.fio._asdict(),
            "ratio": self.ratio._asdict(),
            "verdict": self.verdict,
        }


def comparable(case: Case) -> bool:
    """Whether fio can measure the same: direct reads of one file."""
    return case.reader == "direct" and [len(s.paths) for s in case.sources] == [1]


def against_fio(case: Case, measure: Measure, seconds: float, rounds: int) -> Agreement:
    """fio, ours, fio, …, fio at `case`, for `seconds` each or as long as it takes.

    Raises:
        UsageError, TierrunError: no fio, or it failed.
        OSError: a read failed.
    """
    path = case.sources[0].paths[0]
    pilot = measure(case, seconds, rounds)
    seconds = max(seconds, case.in_flight / _IN_FLIGHT_SHARE / pilot.bandwidth)
    turns = alternate(
        lambda number: measure(case, seconds, number),
        lambda number: fio.direct_reads(
            path, case.nbytes, case.depth, seconds, number + 1, case.pattern
        ),
        rounds,
    )
    return Agreement(
        case,
        seconds,
        turns,
        spread([load.bandwidth for load in turns.ours]),
        spread([result.bandwidth for result in turns.yardsticks]),
        spread(turns.ratios(lambda load: load.bandwidth, lambda result: result.bandwidth)),
    )


def sheet_of_agreements(agreements: Sequence[Agreement]) -> Sheet:
    """A row for each case."""
    names, common = split_keys([agreement.case.key() for agreement in agreements])
    rounds = len(agreements[0].turns.ours) if agreements else 0
    return Sheet(
        title=f"{in_words(common)}: GB/s in turns with fio, medians of {rounds} rounds "
        "(least–largest)",
        columns=(*names, "ours", READER, "ours / fio", "p99 ms", "fio's p99", "verdict"),
        rows=tuple(_row(agreement, names) for agreement in agreements),
    )


def _row(found: Agreement, names: Sequence[str]) -> tuple[str, ...]:
    key, turns = found.case.key(), found.turns
    ours, theirs = (spread([run.p99 for run in runs]) for runs in (turns.ours, turns.yardsticks))
    return (
        *(show(name, key[name]) for name in names),
        found.ours.text(2, 1e-9),
        found.fio.text(2, 1e-9),
        found.ratio.text(2),
        f"{ours.median * 1e3:.1f}",
        f"{theirs.median * 1e3:.1f}",
        found.verdict,
    )
