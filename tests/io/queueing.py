"""A read queue over a fake reader, and what its tests do with it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.fakes import FakeReader, TinyStore

from tierrun.io.extent import PAGE
from tierrun.io.reads import ReadQueue
from tierrun.io.store import ExpertKey
from tierrun.io.tickets import Priority, Ticket

DEMAND, LOOKAHEAD, BACKGROUND = Priority


@contextmanager
def reading(
    tiny: TinyStore, reader: FakeReader, depth: int = 8, part_pages: int = 1
) -> Iterator[ReadQueue]:
    queue = ReadQueue(tiny.store, reader, depth, part_pages * PAGE)
    try:
        yield queue
    finally:
        reader.held = lambda shard, offset: False
        queue.close()


def request(
    tiny: TinyStore, layer: int, expert: int, priority: Priority = DEMAND
) -> tuple[ExpertKey, memoryview, Priority]:
    key = ExpertKey(layer, expert)
    return key, memoryview(bytearray(len(tiny.record(key)))), priority


def place(tiny: TinyStore, layer: int, expert: int) -> tuple[int, int]:
    record, extent = tiny.store.locate(ExpertKey(layer, expert))
    return record.shard, extent.offset


def finish(queue: ReadQueue, tickets: Sequence[Ticket]) -> list[Ticket]:
    return list(queue.arrivals(tickets))


def hold(reader: FakeReader) -> None:
    reader.held = lambda shard, offset: True


def let_go(reader: FakeReader) -> None:
    reader.held = lambda shard, offset: False
