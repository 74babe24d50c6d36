"""How much of the drive's bandwidth the demand path reads with, against fio on the same file.

    python -m tierrun.bench.reads /work/scratch/synthetic/store

Randomly chosen records are demanded from the read queue, into slots like the warm tier's, in two
ways: *saturating* (the next record is demanded when one arrives) and in *batches* (as a layer
with so many misses does: all at once, and the next batch when the last has arrived). Around each
run fio reads the same file at random, with direct I/O, the record's size, and the mean number of
records that our queue had in flight in a pilot run, rounded. Every record is read once before, so
that checksums, which are verified at the first read, are not part of it.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from tierrun.bench import fio
from tierrun.bench.report import Spread, document, emit, open_console, spread
from tierrun.io.reader import open_reader
from tierrun.io.reads import DEFAULT_DEPTH, PART_BYTES, ReadQueue
from tierrun.io.store import ExpertKey, Store
from tierrun.io.tickets import Priority, Ticket
from tierrun.tiers.slab import Slab, host_bytes

OUTSTANDING = 8
"""Records demanded at once by the saturating run; more than any depth keeps in flight."""

AIM = 0.9
"""Of fio's bandwidth, saturating."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of demanding records: `batch` 0 keeps the queue saturated."""

    batch: int

    @property
    def name(self) -> str:
        return f"batches of {self.batch}" if self.batch else "saturating"


class Reading(NamedTuple):
    """One run: bytes per second of all its time, mean records in flight, seconds per batch."""

    bandwidth: float
    mean_depth: float
    batch_seconds: float


class Demander:
    """Demands random records of one shard into slots of its own."""

    def __init__(self, store: Store, queue: ReadQueue, shard: int, seed: int = 0) -> None:
        self._queue = queue
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
            (key, self._slots[slot], Priority.DEMAND) for key, slot in zip(keys, slots, strict=True)
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
        """Keep `OUTSTANDING` records demanded; the number of completed rounds."""
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
        for _ in self._queue.arrivals([ticket for ticket, _ in pending.values()]):
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


class Figures(NamedTuple):
    """All rounds of one arm; `ratio` is ours over the mean of fio before and after, by round."""

    ours: Spread
    fio: Spread
    ratio: Spread
    batch_seconds: Spread
    mean_depth: float
    fio_depth: int


def compare(demander: Demander, path: Path, nbytes: int, arm: Arm, plan: "Plan") -> Figures:
    """fio, ours, fio, ours, …, fio on one arm."""
    pilot = demander.run(arm, plan.seconds / 2)
    depth = max(1, round(pilot.mean_depth))
    yardsticks = [fio.random_reads(path, nbytes, depth, plan.seconds).bandwidth]
    ours: list[Reading] = []
    for number in range(plan.rounds):
        ours.append(demander.run(arm, plan.seconds))
        fresh = fio.random_reads(path, nbytes, depth, plan.seconds, seed=number + 2)
        yardsticks.append(fresh.bandwidth)
    pairs = zip(yardsticks, yardsticks[1:], strict=False)
    ratios = [2 * reading.bandwidth / sum(pair) for reading, pair in zip(ours, pairs, strict=True)]
    return Figures(
        ours=spread([reading.bandwidth for reading in ours]),
        fio=spread(yardsticks),
        ratio=spread(ratios),
        batch_seconds=spread([reading.batch_seconds for reading in ours]),
        mean_depth=sum(reading.mean_depth for reading in ours) / len(ours),
        fio_depth=depth,
    )


class Plan(NamedTuple):
    """How long and how often."""

    seconds: float
    rounds: int


@contextmanager
def open_queue(store: Store, reader: str, depth: int, part_bytes: int) -> Iterator[ReadQueue]:
    """A read queue as the engine makes it."""
    queue = ReadQueue(store, open_reader(reader, store.shard_paths, depth), depth, part_bytes)
    try:
        yield queue
    finally:
        queue.close()


def _table(figures: dict[str, Figures], plan: Plan) -> Table:
    table = Table(title=f"GB/s, median (least–largest) of {plan.rounds} rounds")
    table.add_column("demanded")
    for name in ("ours", "fio", "ours / fio", "ms per batch", "in flight", "fio's depth"):
        table.add_column(name, justify="right")
    for name, row in figures.items():
        table.add_row(
            name,
            row.ours.text(scale=1e-9),
            row.fio.text(scale=1e-9),
            row.ratio.text(),
            row.batch_seconds.text(1, scale=1e3),
            f"{row.mean_depth:.2f}",
            str(row.fio_depth),
        )
    return table


def _as_json(row: Figures) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Spread) else value
        for name, value in row._asdict().items()
    }


def main(
    store: Annotated[Path, typer.Argument(help="From tierrun.bench.synthetic.")],
    depth: Annotated[int, typer.Option(help="Parts in flight.")] = DEFAULT_DEPTH,
    part: Annotated[int, typer.Option(help="Bytes of a part.")] = PART_BYTES,
    reader: Annotated[str, typer.Option(help="direct, mmap or buffered.")] = "direct",
    rounds: Annotated[int, typer.Option(min=1, help="Of fio, ours, fio.")] = 5,
    seconds: Annotated[float, typer.Option(help="Of each run.")] = 2.0,
    batches: Annotated[str, typer.Option(help="Sizes of the batches.")] = "1,2,4,8",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the JSON document here.")
    ] = None,
) -> None:
    """Compare the bandwidth of demand reads with fio's."""
    console = open_console()
    opened, plan = Store.open([store]), Plan(seconds, rounds)
    path = max(opened.shard_paths, key=lambda path: path.stat().st_size)
    nbytes = max(c.nbytes for c in opened.manifest.classes)
    arms = [Arm(0), *(Arm(int(size)) for size in batches.split(","))]
    with open_queue(opened, reader, depth, part) as queue:
        demander = Demander(opened, queue, opened.shard_paths.index(path))
        first = demander.read_each_once()
        console.print(f"first read of each record: {first.bandwidth / 1e9:.2f} GB/s with checksums")
        figures = {arm.name: compare(demander, path, nbytes, arm, plan) for arm in arms}
    console.print(_table(figures, plan))
    good = figures["saturating"].ratio.median >= AIM
    console.print(f"at least {AIM:.0%} of fio: [bold]{'yes' if good else 'NO'}[/bold]")
    results: dict[str, Any] = {
        "record_bytes": nbytes,
        "depth": depth,
        "part_bytes": part,
        "reader": reader,
        "first_read_bandwidth": first.bandwidth,
        "arms": {name: _as_json(row) for name, row in figures.items()},
        "verdict": {"bandwidth_reached": good},
    }
    emit(document("reads", results), json_file)


if __name__ == "__main__":
    typer.run(main)
