"""Bandwidth of reads of existing records, at different sizes and depths, in different ways.

Nothing is written, and the page cache is not used: the ways measured read past it.
"""

import itertools
import logging
import mmap
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

from tierrun.io.profiles import Cell, Way
from tierrun.io.reader import Reader
from tierrun.io.store import ExpertKey, Store

log = logging.getLogger(__name__)

DEPTHS = (1, 4, 16)

_MOST_PLACES = 1024
"""Records that are read in turn."""

_SECONDS, _LONGEST = 3.0, 0.2
"""Of a short plan, and of a cell of it; as much again goes into starting and ending reads."""

_BUFFER_BYTES = 64 << 20
"""Of host memory to read into, where records are not larger."""


class Place(NamedTuple):
    """Where a record begins."""

    shard: int
    offset: int


class Trial(Protocol):
    """A way of reading, into memory of its own; `lane` is which of the overlapping reads it is."""

    def read(self, lane: int, place: Place, nbytes: int) -> None: ...


class HostTrial:
    """A reader into page-aligned host memory, whose bytes nobody wants: lanes may share it."""

    def __init__(self, reader: Reader, nbytes: int) -> None:
        self._reader = reader
        count = max(1, _BUFFER_BYTES // nbytes)
        self._buffers = [memoryview(mmap.mmap(-1, nbytes)) for _ in range(count)]

    def read(self, lane: int, place: Place, nbytes: int) -> None:
        """See `Trial`."""
        buffer = self._buffers[lane % len(self._buffers)]
        self._reader.read(place.shard, place.offset, buffer[:nbytes])


class Plan(NamedTuple):
    """What is measured: record sizes, reads at once, and the seconds of each."""

    sizes: Sequence[int]
    depths: Sequence[int]
    seconds: float


def short_plan(store: Store, ways: int) -> Plan:
    """The smallest and the largest record of `store`, all in a few seconds."""
    sizes = record_sizes(store)
    ends = tuple(sorted({sizes[0], sizes[-1]}))
    cells = len(ends) * len(DEPTHS) * ways
    return Plan(ends, DEPTHS, min(_LONGEST, _SECONDS / cells))


def record_sizes(store: Store) -> tuple[int, ...]:
    """The sizes of the records of `store`, ascending."""
    layers = range(len(store.manifest.layers))
    return tuple(sorted({store.manifest.class_of(layer).nbytes for layer in layers}))


def places_of(store: Store, nbytes: int, seed: int = 0) -> list[Place]:
    """Records of `nbytes`, in an order without a pattern."""
    layers = enumerate(store.manifest.layers)
    keys = [
        ExpertKey(number, expert)
        for number, layer in layers
        if store.manifest.class_of(number).nbytes == nbytes
        for expert in range(len(layer.records))
    ]
    chosen = random.Random(seed).sample(keys, min(len(keys), _MOST_PLACES))
    records = (store.locate(key)[0] for key in chosen)
    return [Place(record.shard, record.offset) for record in records]


def measure(store: Store, trials: Mapping[Way, Trial], plan: Plan) -> list[Cell]:
    """Every way at every size and depth; one that fails is left out, and that is said."""
    cells: list[Cell] = []
    for way, trial in trials.items():
        try:
            cells += _measure_one(store, way, trial, plan)
        except OSError as error:
            log.warning("%s could not be measured: %s", way.label, error.strerror or error)
    return cells


def _measure_one(store: Store, way: Way, trial: Trial, plan: Plan) -> Iterator[Cell]:
    for nbytes in plan.sizes:
        places = itertools.cycle(places_of(store, nbytes))
        for depth in plan.depths:
            bandwidth = _bandwidth(trial, places, nbytes, depth, plan.seconds)
            yield Cell(way, nbytes, depth, bandwidth)


def _bandwidth(
    trial: Trial, places: Iterator[Place], nbytes: int, depth: int, seconds: float
) -> float:
    """Bytes per second of `depth` reads at once, after one of each lane that does not count."""

    def lane(number: int, deadline: float) -> int:
        count = 0
        while count == 0 or time.perf_counter() < deadline:
            trial.read(number, next(places), nbytes)
            count += 1
        return count

    with ThreadPoolExecutor(depth, thread_name_prefix="tierrun-trial") as pool:

        def all_lanes(deadline: float) -> int:
            lanes = [pool.submit(lane, number, deadline) for number in range(depth)]
            wait(lanes)  # also for those that go on where one has failed
            return sum(one.result() for one in lanes)

        all_lanes(0.0)
        started = time.perf_counter()
        count = all_lanes(started + seconds)
        return count * nbytes / (time.perf_counter() - started)


def describe(cells: Iterable[Cell]) -> Iterator[str]:
    """A line for each cell."""
    for cell in cells:
        size, rate = cell.nbytes / 2**20, cell.bandwidth / 1e9
        yield f"{cell.way.label}: {size:.2f} MiB, {cell.depth} at once: {rate:.2f} GB/s"
