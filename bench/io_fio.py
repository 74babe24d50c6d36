"""`--vs-fio`: the same reads by fio, in turns with ours, on the same file.

Compared is O_DIRECT at one size, depth and pattern, with buffers in huge pages. Both are counted in
one way: in a time in which as many reads as were asked for are in flight, and a read that lies
partly in it for that part. fio's own figure is another: reads that end after its warm-up, whole,
over the time until the last has ended. What is in flight at the end of the warm-up, and was read
in it for the most part, is at 64 × 39 MB as much as the drive gives in a second; the own figure
needs a minute to forget that, and is kept beside ours.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tierrun.bench import fio
from tierrun.bench.cells import Cell
from tierrun.bench.io_load import Load
from tierrun.bench.io_plan import Case
from tierrun.bench.report import Spread, spread
from tierrun.bench.sheets import Sheet, in_words, show, split_keys
from tierrun.bench.yardstick import Turns

TOLERANCE = 0.05
"""The medians agree if they differ by less, or if ours lies within fio's own rounds."""

READER = f"fio ({fio.ENGINE})"


class FioTurn(NamedTuple):
    """A round of fio's, counted as ours are, and the bytes per second that fio itself states."""

    load: Load
    own: float


class Agreement(NamedTuple):
    """A case, the seconds of its turns that count, and the turns."""

    case: Case
    seconds: float
    turns: Turns[Load, FioTurn]

    @property
    def ours(self) -> Spread:
        """Bytes per second."""
        return spread([load.bandwidth for load in self.turns.ours])

    @property
    def fio(self) -> Spread:
        """The same of fio's turns."""
        return spread([turn.load.bandwidth for turn in self.turns.yardsticks])

    @property
    def own(self) -> Spread:
        """By fio's own figure."""
        return spread([turn.own for turn in self.turns.yardsticks])

    @property
    def ratio(self) -> Spread:
        """Each of ours over the mean of fio's turns before and after it."""
        return spread(
            self.turns.ratios(lambda load: load.bandwidth, lambda turn: turn.load.bandwidth)
        )

    @property
    def verdict(self) -> str:
        """Whether both say the same."""
        ours, theirs = self.ours, self.fio
        if abs(ours.median / theirs.median - 1) <= TOLERANCE:
            return f"within {TOLERANCE:.0%}".replace("%", " %")
        return "within fio's spread" if theirs.least <= ours.median <= theirs.largest else "differs"

    def words(self) -> str:
        """In a line."""
        return f"ours {self.ours.text(2, 1e-9)}, fio {self.fio.text(2, 1e-9)} GB/s, {self.verdict}"

    def cells(self) -> Iterator[Cell]:
        """Ours and fio's, as cells of the results."""
        theirs = [turn.load for turn in self.turns.yardsticks]
        for reader, loads in (("direct", self.turns.ours), (READER, theirs)):
            samples = {name: tuple(getattr(load, name) for load in loads) for name in Load._fields}
            yield Cell({**self.case.key(), "reader": reader}, samples)

    def to_json(self) -> dict[str, Any]:
        """For the document."""
        return {
            "key": self.case.key(),
            "seconds": self.seconds,
            "rounds": len(self.turns.ours),
            "ours": self.ours._asdict(),
            "fio": self.fio._asdict(),
            "fio_own": self.own._asdict(),
            "ratio": self.ratio._asdict(),
            "verdict": self.verdict,
        }


def comparable(case: Case) -> bool:
    """Whether fio can measure the same: direct reads of one file."""
    return case.reader == "direct" and [len(s.paths) for s in case.sources] == [1]


def ended_early(agreements: Sequence[Agreement], num_cases: int, rounds: int) -> str:
    """What there is of a run that was told to end, in a sentence."""
    whole = sum(len(found.turns.ours) == rounds for found in agreements)
    said = f"told to end after {whole} of {num_cases} cells"
    more = [len(found.turns.ours) for found in agreements[whole:]]
    return f"{said} and {more[0]} of {rounds} rounds of the next" if more else said


def about(agreements: Sequence[Agreement]) -> Iterator[str]:
    """What has to be known to read the table."""
    above = [found.own.median / found.fio.median - 1 for found in agreements]
    yield (
        "both counted alike: while as many reads as asked for are in flight, what is partly in "
        "that time for its part. fio's own figure (--json) counts what was in flight when its "
        f"warm-up ended as read after it: here {min(above):+.0%} to {max(above):+.0%}"
    )


def sheet_of_agreements(agreements: Sequence[Agreement]) -> Sheet:
    """A row for each case."""
    names, common = split_keys([agreement.case.key() for agreement in agreements])
    rounds = max((len(agreement.turns.ours) for agreement in agreements), default=0)
    return Sheet(
        title=f"{in_words(common)}: GB/s in turns with fio, medians of {rounds} rounds "
        "(least–largest)",
        columns=(*names, "ours", READER, "ours / fio", "p99 ms", "fio's p99", "verdict"),
        rows=tuple(_row(agreement, names) for agreement in agreements),
    )


def _row(found: Agreement, names: Sequence[str]) -> tuple[str, ...]:
    key, theirs = found.case.key(), [turn.load for turn in found.turns.yardsticks]
    p99, fio_p99 = (spread([load.p99 for load in loads]) for loads in (found.turns.ours, theirs))
    return (
        *(show(name, key[name]) for name in names),
        found.ours.text(2, 1e-9),
        found.fio.text(2, 1e-9),
        found.ratio.text(2),
        f"{p99.median * 1e3:.1f}",
        f"{fio_p99.median * 1e3:.1f}",
        found.verdict,
    )
