"""The read queue: what is read, in parts, in which order and how many at once."""

from pathlib import Path

import pytest
from tests.fakes import Experts, FakeReader, TinyStore, tiny_store, wait_until
from tests.io.queueing import (
    BACKGROUND,
    DEMAND,
    LOOKAHEAD,
    finish,
    hold,
    let_go,
    place,
    reading,
    request,
)

from tierrun.io.extent import PAGE
from tierrun.io.tickets import State

pytestmark = pytest.mark.timeout(60)


def test_every_read_fills_its_buffer_with_its_record(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    with reading(tiny, reader) as queue:
        requests = [request(tiny, layer, expert) for layer in range(3) for expert in range(6)]
        ended = finish(queue, queue.submit(requests))
        assert {ticket.key for ticket in ended} == {key for key, _, _ in requests}
        for ticket in ended:
            assert ticket.state is State.DONE and ticket.error is None
            assert ticket.into == tiny.record(ticket.key)
        figures = queue.figures()
        assert (figures.records, figures.nbytes) == (18, 18 * PAGE)
        assert (figures.retries, figures.dropped) == (0, 0)


def test_arrivals_come_in_the_order_of_ending(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    late = place(tiny, 0, 0)
    reader.held = lambda shard, offset: (shard, offset) == late
    with reading(tiny, reader) as queue:
        tickets = queue.submit([request(tiny, 0, 0), request(tiny, 0, 1)])
        arrivals = queue.arrivals(tickets)
        assert next(arrivals) is tickets[1]
        let_go(reader)
        assert next(arrivals) is tickets[0]
        assert finish(queue, tickets) == tickets, "what has ended arrives at once"


def test_large_records_are_read_in_parts() -> None:
    tiny = tiny_store([Experts(2, 1, pages=5)])
    reader = FakeReader(tiny.images)
    with reading(tiny, reader, depth=1, part_pages=2) as queue:
        (ticket,) = finish(queue, queue.submit([request(tiny, 0, 1)]))
        assert ticket.into == tiny.record(ticket.key)
    shard, offset = place(tiny, 0, 1)
    assert reader.calls == [
        (shard, offset, 2 * PAGE),
        (shard, offset + 2 * PAGE, 2 * PAGE),
        (shard, offset + 4 * PAGE, PAGE),
    ]


def test_the_first_of_several_records_is_whole_before_the_second_begins() -> None:
    """So that it computes while the second is read."""
    tiny = tiny_store([Experts(3, 1, pages=3)])
    reader = FakeReader(tiny.images)
    with reading(tiny, reader, depth=1) as queue:  # several threads may swap neighbouring parts
        finish(queue, queue.submit([request(tiny, 0, 0), request(tiny, 0, 2)]))
    begin = place(tiny, 0, 0)[1]
    assert [offset - begin for _, offset, _ in reader.calls[:3]] == [0, PAGE, 2 * PAGE]


def order_of_reads(tiny: TinyStore, reader: FakeReader) -> list[tuple[int, int]]:
    return [(shard, offset) for shard, offset, _ in reader.calls]


def test_demand_goes_before_lookahead_before_background(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader, depth=1) as queue:
        first = queue.submit([request(tiny, 0, 0)])
        wait_until(lambda: len(reader.calls) == 1)
        rest = queue.submit(
            [
                request(tiny, 2, 0, BACKGROUND),
                request(tiny, 1, 0, LOOKAHEAD),
                request(tiny, 1, 1, LOOKAHEAD),
                request(tiny, 0, 1, DEMAND),
                request(tiny, 0, 2, DEMAND),
            ]
        )
        let_go(reader)
        finish(queue, first + rest)
    wanted = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert order_of_reads(tiny, reader) == [place(tiny, *key) for key in wanted]


def test_a_demanded_lookahead_overtakes(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader, depth=1) as queue:
        first = queue.submit([request(tiny, 0, 0)])
        wait_until(lambda: len(reader.calls) == 1)
        rest = queue.submit([request(tiny, 1, expert, LOOKAHEAD) for expert in range(3)])
        queue.demand(rest[2:])
        let_go(reader)
        finish(queue, first + rest)
    wanted = [(0, 0), (1, 2), (1, 0), (1, 1)]
    assert order_of_reads(tiny, reader) == [place(tiny, *key) for key in wanted]


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_is_used_and_never_exceeded_in_each_directory(depth: int, tmp_path: Path) -> None:
    """Directories do not wait for each other: all are busy at the same time."""
    roots = [tmp_path / name for name in "abc"]
    tiny = tiny_store([Experts(12, 2, pages=3)], roots)
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader, depth) as queue:
        tickets = queue.submit([request(tiny, 0, expert) for expert in range(12)])
        wait_until(lambda: [reader.in_flight[shard] for shard in range(3)] == [depth] * 3)
        let_go(reader)
        finish(queue, tickets)
        assert 1 <= queue.figures().mean_depth <= 12
    assert dict(reader.most_in_flight) == dict.fromkeys(range(3), depth)


def test_two_shards_in_one_directory_share_its_depth(tmp_path: Path) -> None:
    tiny = tiny_store([Experts(12, 2)], [tmp_path, tmp_path])
    reader = FakeReader(tiny.images, delay=lambda shard, offset: 0.001)
    total = []
    reader.held = lambda shard, offset: total.append(sum(reader.in_flight.values())) is not None
    with reading(tiny, reader, depth=2) as queue:
        tickets = queue.submit([request(tiny, 0, expert) for expert in range(12)])
        wait_until(lambda: len(total) >= 10)
        let_go(reader)
        finish(queue, tickets)
    assert max(total) == 2
