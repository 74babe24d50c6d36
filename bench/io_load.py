"""A closed loop of reads: so many in flight at any time, and how fast and how late each comes.

Every lane is a thread that has one read in flight: it reads, notes when it began and ended, and
reads again. Measured is the time between two moments: when the last lane has ended its first read
(the first reads are the warm-up), and when the first lane stops. All lanes are busy throughout, so
neither filling nor draining the queue is part of it; a read that lies partly in that time counts
for that part of it.

Latency is fio's `lat`: from the call that submits a read to its completion. For one `preadv` in a
thread fio's `clat` is the same; for libaio `lat` is `slat + clat`.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tierrun.bench.report import percentile
from tierrun.io.errors import TierrunError
from tierrun.io.measuring import Place

Read = Callable[[int, Place], None]
"""Fills the buffer of a lane from a place; blocks, calls of different lanes may overlap."""

_LEAST_ROUNDS = 2
"""Reads of every lane, on average, that are counted at least, however long they take."""


Spell = tuple[float, float]
"""When a read began and when it ended, in seconds."""


class Load(NamedTuple):
    """One round: bytes and reads per second, and the seconds within which so many of them came."""

    bandwidth: float
    iops: float
    p50: float
    p95: float
    p99: float


def run_load(read: Read, streams: Sequence[Iterable[Place]], nbytes: int, seconds: float) -> Load:
    """Keep one read of `nbytes` in flight for each of `streams`, until one has no more places, or
    for `seconds` and at least two reads of every lane.

    Lanes may share an iterator.

    Raises:
        OSError: a read failed.
        TierrunError: there are no places.
    """
    loop = _Loop(read, len(streams), seconds)
    threads = [
        threading.Thread(target=loop.run, args=lane, name="tierrun-bench-lane", daemon=True)
        for lane in enumerate(streams)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # also when we are told to end: nobody may write to buffers that are given back
        loop.stop = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if loop.errors:
        raise loop.errors[0]
    return load_of(loop.lanes, nbytes)


def load_of(lanes: Sequence[Sequence[Spell]], nbytes: int) -> Load:
    """The figures of the time in which all lanes were busy, of reads of `nbytes`; of the whole
    time where the places ran out too early for that (files that are small, and in memory).

    Raises:
        TierrunError: nothing was read.
    """
    begin, end = _busy(lanes)
    within = [(a, b) for lane in lanes for a, b in lane if b > begin and a < end]
    parts = ((min(b, end) - max(a, begin)) / (b - a) for a, b in within)
    latencies = sorted(b - a for a, b in within)
    iops = sum(parts) / (end - begin)
    return Load(iops * nbytes, iops, *(percentile(latencies, p) for p in (50, 95, 99)))


def _busy(lanes: Sequence[Sequence[Spell]]) -> Spell:
    """From when the last lane has ended its first read to when the first has ended its last."""
    used = [lane for lane in lanes if lane]
    if not used:
        raise TierrunError("nothing was read")
    begin, end = max(lane[0][1] for lane in used), min(lane[-1][1] for lane in used)
    if begin < end and len(used) == len(lanes):
        return begin, end
    return min(lane[0][0] for lane in used), max(lane[-1][1] for lane in used)


class _Loop:
    """What the lanes share. Each appends to a list of its own, which needs no lock."""

    def __init__(self, read: Read, num_lanes: int, seconds: float) -> None:
        self._read, self._seconds = read, seconds
        self._enough = (1 + _LEAST_ROUNDS) * num_lanes
        self._warm, self._counter = itertools.count(1), itertools.count(1)
        self._deadline = float("inf")
        self.lanes = [list[Spell]() for _ in range(num_lanes)]
        self.errors: list[BaseException] = []
        self.stop = False

    def run(self, lane: int, places: Iterable[Place]) -> None:
        """A lane; when it ends, or fails, all do."""
        try:
            self._loop(lane, self.lanes[lane], places)
        except BaseException as error:
            self.errors.append(error)
        self.stop = True

    def _loop(self, lane: int, mine: list[Spell], places: Iterable[Place]) -> None:
        clock = time.perf_counter
        for place in places:
            began = clock()
            self._read(lane, place)
            ended = clock()
            mine.append((began, ended))
            if len(mine) == 1 and next(self._warm) == len(self.lanes):
                self._deadline = ended + self._seconds
            done = next(self._counter)
            if self.stop or (ended >= self._deadline and done >= self._enough):
                return
