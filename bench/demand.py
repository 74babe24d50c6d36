"""Demand reads of random records, as a decoding model makes them, into slots like a tier's."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from tierrun.io.reader import open_reader
from tierrun.io.reads import ReadQueue
from tierrun.io.store import ExpertKey, Store
from tierrun.io.tickets import Priority, Ticket
from tierrun.tiers.slab import Slab, host_bytes

OUTSTANDING = 8
"""Records demanded at once by the saturating run; more than any depth keeps in flight."""


@contextmanager
def open_queue(store: Store, reader: str, depth: int, part_bytes: int) -> Iterator[ReadQueue]:
    """A read queue as the engine makes it."""
    queue = ReadQueue(store, open_reader(reader, store.shard_paths, depth), depth, part_bytes)
    try:
        yield queue
    finally:
        queue.close()


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of demanding records: `batch` 0 keeps the queue saturated."""

    batch: int

    @property
    def name(self) -> str:
        return f"batches of {self.batch}" if self.batch else "saturating"


class Reading(NamedTuple):
    """One run: bytes per second, mean records in flight, seconds per batch (or per record)."""

    bandwidth: float
    mean_depth: float
    batch_seconds: float


class Demander:
    """Demands random records of one shard into slots of its own."""

    def __init__(self, store: Store, queue: ReadQueue, shard: int, seed: int = 0) -> None:
        self._store, self._queue = store, queue
        layers = enumerate(store.manifest.layers)
        self._keys = [
            ExpertKey(number, expert)
            for number, layer in layers
            for expert, record in enumerate(layer.records)
            if record.shard == shard
        ]
        nbytes = max(c.nbytes for c in store.manifest.classes)
        slab = Slab(OUTSTANDING, nbytes)
        self._slots = [host_bytes(slab.view(i, 0, nbytes)) for i in range(OUTSTANDING)]
        self._random = random.Random(seed)

    def _demand(self, keys: list[ExpertKey], slots: list[int]) -> list[Ticket]:
        requests = [
            (key, self._slots[slot][: self._store.locate(key)[1].nbytes], Priority.DEMAND)
            for key, slot in zip(keys, slots, strict=True)
        ]
        return self._queue.submit(requests)

    def read_each_once(self) -> Reading:
        """Every record, in a random order: what a first read costs, checksum included."""
        keys = iter(self._random.sample(self._keys, len(self._keys)))
        return self._measured(lambda: self._saturate(keys))

    def run(self, arm: Arm, seconds: float) -> Reading:
        """Demand as `arm` does for `seconds`."""
        deadline = time.perf_counter() + seconds
        if arm.batch:
            return self._measured(lambda: self._batches(arm.batch, deadline))
        return self._measured(lambda: self._saturate(self._until(deadline)))

    def _until(self, deadline: float) -> Iterator[ExpertKey]:
        """Random records, none of them twice among the ones in flight, until the deadline."""
        while time.perf_counter() < deadline:
            yield from self._random.sample(self._keys, min(2 * OUTSTANDING, len(self._keys)))

    def _saturate(self, keys: Iterator[ExpertKey]) -> int:
        """Keep `OUTSTANDING` records demanded; returns how many were read."""
        pending: dict[int, tuple[Ticket, int]] = {}
        free, count = list(range(OUTSTANDING)), 0
        in_flight: set[ExpertKey] = set()
        for key in keys:
            if key in in_flight:
                continue
            slot = free.pop()
            (ticket,) = self._demand([key], [slot])
            pending[id(ticket)] = (ticket, slot)
            in_flight.add(key)
            if not free:
                ended = _first(self._queue, [ticket for ticket, _ in pending.values()])
                free.append(pending.pop(id(ended))[1])
                in_flight.discard(ended.key)
                count += 1
        for ticket in self._queue.arrivals([ticket for ticket, _ in pending.values()]):
            _raise(ticket)
            count += 1
        return count

    def _batches(self, size: int, deadline: float) -> int:
        count = 0
        while time.perf_counter() < deadline:
            keys = self._random.sample(self._keys, size)
            for ticket in self._queue.arrivals(self._demand(keys, list(range(size)))):
                _raise(ticket)
            count += 1
        return count

    def _measured(self, work: Callable[[], int]) -> Reading:
        before, started = self._queue.figures(), time.perf_counter()
        count = work()
        seconds = time.perf_counter() - started
        after = self._queue.figures()
        busy = after.busy_seconds - before.busy_seconds
        depth = (after.record_seconds - before.record_seconds) / busy
        return Reading((after.nbytes - before.nbytes) / seconds, depth, seconds / max(1, count))


def _first(queue: ReadQueue, tickets: list[Ticket]) -> Ticket:
    ticket = next(iter(queue.arrivals(tickets)))
    _raise(ticket)
    return ticket


def _raise(ticket: Ticket) -> None:
    if ticket.error is not None:
        raise ticket.error
