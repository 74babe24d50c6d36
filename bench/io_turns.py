"""The turns of `--vs-fio`: how long they are, and how fio's reads are counted."""

from collections.abc import Callable, Iterator, Sequence

from tierrun.bench import fio
from tierrun.bench.fio import FioResult
from tierrun.bench.io_fio import Agreement, FioTurn
from tierrun.bench.io_load import Load, Spell
from tierrun.bench.io_plan import OVERHEAD_SECONDS, USUAL_BANDWIDTH, Case
from tierrun.bench.report import percentile
from tierrun.bench.sheets import in_words
from tierrun.bench.steps import Steps
from tierrun.bench.yardstick import by_rounds
from tierrun.io.errors import TierrunError

_LATENCIES = 2
"""The time that counts is at least so many times what a read takes."""

_STARTING_SECONDS = 0.4
"""Of a process of fio's, and of its end."""

Measure = Callable[[Case, float, int], Load]
"""A round of a case: for so many seconds, with places of this seed."""


def take_turns(
    cases: Sequence[Case],
    measure: Measure,
    seconds: float,
    rounds: int,
    steps: Steps,
    agreements: list[Agreement],
) -> None:
    """All turns of all `cases` into `agreements`: an entry for each, from its first round on.

    Raises:
        UsageError, TierrunError: no fio, or it failed, or the drive did.
    """
    steps.expect(sum(expected_seconds(case, seconds, rounds) for case in cases))
    steps.begin("how fast the drive is, about")
    bandwidth = measure(cases[0], seconds, rounds).bandwidth
    for number, case in enumerate(cases):
        name = f"{number + 1} of {len(cases)}, {in_words(case.key())}"
        begin = _Beginning(steps, name, rounds)
        for agreement in against_fio(case, measure, seconds, bandwidth, rounds, begin):
            agreements[number:] = [agreement]
        bandwidth = agreements[-1].ours.median
        steps.end(f"{name}: {agreements[-1].words()}", expected_seconds(case, seconds, rounds))


class _Beginning:
    """Shows whose turn it is, and in which round."""

    def __init__(self, steps: Steps, name: str, rounds: int) -> None:
        self._steps, self._name, self._rounds = steps, name, rounds

    def __call__(self, number: int, who: str) -> None:
        self._steps.begin(f"{self._name}: round {number} of {self._rounds}, {who}")


def against_fio(
    case: Case,
    measure: Measure,
    seconds: float,
    bandwidth: float,
    rounds: int,
    begin: Callable[[int, str], None],
) -> Iterator[Agreement]:
    """fio, ours, fio, …, fio at `case`; what is known after each round. `bandwidth` is about what
    the drive gives; `begin` is told of each turn.

    Raises:
        UsageError, TierrunError: no fio, or it failed.
        OSError: a read failed.
    """
    path, counted = case.sources[0].paths[0], counted_seconds(case, seconds, bandwidth)
    runtime = counted + case.in_flight / bandwidth  # what is in flight at its end does not count

    def ours(number: int) -> Load:
        begin(number + 1, "ours")
        return measure(case, counted, number)

    def theirs(number: int) -> FioTurn:
        begin(max(1, number), "fio")
        found = fio.direct_reads(path, case.nbytes, case.depth, runtime, number + 1, case.pattern)
        return FioTurn(load_of_fio(found), found.bandwidth)

    for turns in by_rounds(ours, theirs, rounds):
        yield Agreement(case, counted, turns)


def counted_seconds(case: Case, seconds: float, bandwidth: float = USUAL_BANDWIDTH) -> float:
    """What a turn counts, where `seconds` are asked for and about `bandwidth` is to be had."""
    return max(seconds, _LATENCIES * case.in_flight / bandwidth)


def expected_seconds(case: Case, seconds: float, rounds: int) -> float:
    """What all turns of `case` take, about."""
    latency, counted = case.in_flight / USUAL_BANDWIDTH, counted_seconds(case, seconds)
    ours = OVERHEAD_SECONDS + latency + counted + latency
    theirs = _STARTING_SECONDS + fio.ramp_seconds(case.in_flight) + counted + 2 * latency
    return rounds * ours + (rounds + 1) * theirs


def load_of_fio(found: FioResult) -> Load:
    """fio's reads, counted as ours are: while all that were asked for are in flight, and a read
    that lies partly in that time for that part of it.

    From the end of the warm-up until the first read began that ended in the drain: fio notes what
    ends then when all has ended, and which part of it came when, nobody knows.

    Raises:
        TierrunError: it read nothing but that.
    """
    last = max((began for began, _ in found.reads), default=0.0)
    if last <= 0:
        raise TierrunError("fio began no read after its warm-up: give it more with --duration")
    drained = min((began for began, ended in found.reads if ended > last), default=last)
    return _load_until(max(drained, last / 2), found.reads, found.block_bytes)


def _load_until(end: float, reads: Sequence[Spell], nbytes: int) -> Load:
    """The figures of the time from 0 to `end`."""
    within = [(a, b) for a, b in reads if b > 0 and a < end]
    parts = ((min(b, end) - max(a, 0)) / (b - a) for a, b in within)
    latencies = sorted(b - a for a, b in within)
    iops = sum(parts) / end
    return Load(iops * nbytes, iops, *(percentile(latencies, p) for p in (50, 95, 99)))
