"""The read queue: order, joining, dropping, depth, errors; and that everything ends."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import FOREVER, Experts, FakeReader, TinyStore, tiny_store

from tierrun.io.errors import CorruptError, ReadError, TierrunError
from tierrun.io.extent import PAGE
from tierrun.io.reads import ReadQueue
from tierrun.io.store import ExpertKey
from tierrun.io.tickets import Priority, State, Ticket

pytestmark = pytest.mark.timeout(60)

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


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def hold(reader: FakeReader) -> None:
    reader.held = lambda shard, offset: True


def let_go(reader: FakeReader) -> None:
    reader.held = lambda shard, offset: False


# -- the plain case ---------------------------------------------------------------------------


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
    with reading(tiny, reader, depth=2) as queue:
        finish(queue, queue.submit([request(tiny, 0, 0), request(tiny, 0, 2)]))
    begin = place(tiny, 0, 0)[1]
    assert [offset - begin for _, offset, _ in reader.calls[:3]] == [0, PAGE, 2 * PAGE]


# -- order and depth ---------------------------------------------------------------------------


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


# -- joining and dropping ----------------------------------------------------------------------


def test_requests_for_the_same_expert_share_one_read(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader) as queue:
        (first,) = queue.submit([request(tiny, 0, 0, LOOKAHEAD)])
        wait_until(lambda: len(reader.calls) == 1)
        again = queue.submit([request(tiny, 0, 0, BACKGROUND), request(tiny, 0, 0, DEMAND)])
        assert again == [first, first]
        assert first.priority is DEMAND
        let_go(reader)
        assert finish(queue, [first, *again]) == [first] * 3
    assert len(reader.calls) == 1


def test_a_read_that_ended_is_not_joined(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    with reading(tiny, reader) as queue:
        (first,) = finish(queue, queue.submit([request(tiny, 0, 0)]))
        (second,) = finish(queue, queue.submit([request(tiny, 0, 0)]))
        assert second is not first and second.into == tiny.record(second.key)
    assert len(reader.calls) == 2


def test_a_queued_lookahead_that_is_dropped_is_never_read(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader, depth=1) as queue:
        (first,) = queue.submit([request(tiny, 0, 0)])
        wait_until(lambda: len(reader.calls) == 1)
        stale = queue.submit([request(tiny, 1, expert, LOOKAHEAD) for expert in range(4)])
        queue.drop(stale)
        assert [ticket.state for ticket in stale] == [State.DROPPED] * 4
        assert finish(queue, stale) == stale
        let_go(reader)
        finish(queue, [first])
        assert queue.figures().dropped == 4
    assert len(reader.calls) == 1


def test_a_dropped_read_under_way_issues_no_further_part() -> None:
    tiny = tiny_store([Experts(2, 1, pages=4)])
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader, depth=2) as queue:
        (ticket,) = queue.submit([request(tiny, 0, 0, LOOKAHEAD)])
        wait_until(lambda: len(reader.calls) == 2)
        queue.drop([ticket])
        assert not ticket.ended, "its buffer is still being written"
        let_go(reader)
        finish(queue, [ticket])
        assert ticket.state is State.DROPPED
    assert len(reader.calls) == 2


def test_a_dropped_read_with_all_parts_issued_is_done(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader) as queue:
        (ticket,) = queue.submit([request(tiny, 0, 0, LOOKAHEAD)])
        wait_until(lambda: len(reader.calls) == 1)
        queue.drop([ticket])
        let_go(reader)
        finish(queue, [ticket])
        assert ticket.state is State.DONE
        assert ticket.into == tiny.record(ticket.key)


def test_a_dropped_read_that_is_demanded_again_goes_on() -> None:
    tiny = tiny_store([Experts(2, 1, pages=4)])
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader, depth=1) as queue:
        (ticket,) = queue.submit([request(tiny, 0, 0, LOOKAHEAD)])
        wait_until(lambda: len(reader.calls) == 1)
        queue.drop([ticket])
        queue.demand([ticket])
        let_go(reader)
        finish(queue, [ticket])
        assert ticket.state is State.DONE
        assert ticket.into == tiny.record(ticket.key)


def test_a_request_does_not_join_a_read_that_is_being_dropped() -> None:
    tiny = tiny_store([Experts(2, 1, pages=4)])
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader, depth=1) as queue:
        (stale,) = queue.submit([request(tiny, 0, 0, LOOKAHEAD)])
        wait_until(lambda: len(reader.calls) == 1)
        queue.drop([stale])
        (fresh,) = queue.submit([request(tiny, 0, 0)])
        assert fresh is not stale
        let_go(reader)
        finish(queue, [stale, fresh])
        assert (stale.state, fresh.state) == (State.DROPPED, State.DONE)
        assert fresh.into == tiny.record(fresh.key)


# -- errors ------------------------------------------------------------------------------------


def test_a_failed_read_is_tried_once_more(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    reader.failures[place(tiny, 1, 2)] = 1
    with reading(tiny, reader) as queue:
        (ticket,) = finish(queue, queue.submit([request(tiny, 1, 2)]))
        assert ticket.state is State.DONE
        assert ticket.into == tiny.record(ticket.key)
        assert queue.figures().retries == 1


def test_a_read_that_fails_twice_names_shard_layer_expert_and_errno(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images, errno=121)
    reader.failures[place(tiny, 1, 2)] = 2
    with reading(tiny, reader) as queue:
        ended = finish(queue, queue.submit([request(tiny, 1, 2), request(tiny, 1, 3)]))
        states = {ticket.key.expert: ticket.state for ticket in ended}
        assert states == {2: State.FAILED, 3: State.DONE}, "only its own read fails"
        error = next(ticket.error for ticket in ended if ticket.error)
        assert isinstance(error, ReadError)
        assert (error.layer, error.expert, error.errno) == (1, 2, 121)
        assert error.shard == str(tiny.store.shard_paths[0])
        for word in (error.shard, "layer 1", "expert 2", "errno 121"):
            assert word in str(error)
        (again,) = finish(queue, queue.submit([request(tiny, 1, 2)]))
        assert again.state is State.DONE, "a later request is a new attempt"


def test_a_failing_part_fails_its_record_and_no_further_part_is_read() -> None:
    tiny = tiny_store([Experts(2, 1, pages=6)])
    reader = FakeReader(tiny.images)
    shard, offset = place(tiny, 0, 0)
    reader.failures[shard, offset + PAGE] = FOREVER
    with reading(tiny, reader, depth=1) as queue:
        (ticket,) = finish(queue, queue.submit([request(tiny, 0, 0)]))
        assert ticket.state is State.FAILED
        assert isinstance(ticket.error, ReadError)
    assert [at - offset for _, at, _ in reader.calls] == [0, PAGE, PAGE]


def test_a_checksum_mismatch_is_read_once_more(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    reader.flips[place(tiny, 0, 4)] = 1
    with reading(tiny, reader) as queue:
        (ticket,) = finish(queue, queue.submit([request(tiny, 0, 4)]))
        assert ticket.state is State.DONE
        assert ticket.into == tiny.record(ticket.key)
        assert queue.figures().retries == 1
    assert len(reader.calls) == 2


def test_a_second_mismatch_is_corrupt_and_names_shard_layer_and_expert(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    reader.flips[place(tiny, 0, 4)] = 4
    with reading(tiny, reader) as queue:
        for _ in range(2):  # what was found corrupt is not taken for verified afterwards
            (ticket,) = finish(queue, queue.submit([request(tiny, 0, 4)]))
            assert ticket.state is State.FAILED
            assert isinstance(ticket.error, CorruptError)
            for word in (str(tiny.store.shard_paths[0]), "layer 0", "expert 4"):
                assert word in str(ticket.error)
        (healed,) = finish(queue, queue.submit([request(tiny, 0, 4)]))
        assert healed.state is State.DONE


@pytest.mark.parametrize("page", range(3))
def test_a_flipped_bit_anywhere_in_a_record_is_caught(page: int) -> None:
    tiny = tiny_store([Experts(2, 1, pages=3)])
    reader = FakeReader(tiny.images)
    shard, offset = place(tiny, 0, 1)
    reader.flips[shard, offset + page * PAGE] = FOREVER
    reader.flips[shard, offset] += FOREVER  # the second reading is of the whole record
    with reading(tiny, reader) as queue:
        (ticket,) = finish(queue, queue.submit([request(tiny, 0, 1)]))
        assert isinstance(ticket.error, CorruptError)


def test_a_failing_second_reading_is_a_read_error(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    spot = place(tiny, 0, 4)
    reader.flips[spot] = 1

    def failing_from_now_on(shard: int, offset: int) -> float:
        reader.failures[spot] = FOREVER if len(reader.calls) > 1 else 0
        return 0.0

    reader.delay = failing_from_now_on
    with reading(tiny, reader) as queue:
        (ticket,) = finish(queue, queue.submit([request(tiny, 0, 4)]))
        assert isinstance(ticket.error, ReadError)


@pytest.mark.parametrize("calls_before", [0, 1])
def test_a_bug_in_a_reader_fails_the_read_and_hangs_nobody(
    calls_before: int, tiny: TinyStore
) -> None:
    """Also when it shows only in the second reading, after a checksum mismatch."""
    reader = FakeReader(tiny.images, error=lambda errno: ZeroDivisionError("a bug"))
    spot = place(tiny, 0, 4)
    reader.flips[spot] = 1

    def failing_from_now_on(shard: int, offset: int) -> float:
        reader.failures[spot] = FOREVER if len(reader.calls) > calls_before else 0
        return 0.0

    reader.delay = failing_from_now_on
    with reading(tiny, reader) as queue:
        tickets = queue.submit([request(tiny, 0, 4)])
        wait_until(lambda: tickets[0].ended)
        assert tickets[0].state is State.FAILED
        assert isinstance(tickets[0].error, TierrunError)
        assert "layers.0.experts.4" in str(tickets[0].error) and "a bug" in str(tickets[0].error)


# -- the end -----------------------------------------------------------------------------------


def test_closing_ends_every_read_and_waits_for_those_in_flight(tiny: TinyStore) -> None:
    reader = FakeReader(tiny.images)
    hold(reader)
    queue = ReadQueue(tiny.store, reader, depth=2, part_bytes=PAGE)
    tickets = queue.submit([request(tiny, 0, expert) for expert in range(6)])
    wait_until(lambda: len(reader.calls) == 2)
    closing = threading.Thread(target=queue.close)
    closing.start()
    assert not reader.closed
    let_go(reader)
    closing.join(20)
    assert not closing.is_alive() and reader.closed
    states = [ticket.state for ticket in tickets]
    assert states == [State.DONE] * 2 + [State.DROPPED] * 4


def test_a_closed_queue_takes_no_request_and_closes_again_quietly(tiny: TinyStore) -> None:
    queue = ReadQueue(tiny.store, FakeReader(tiny.images))
    queue.close()
    queue.close()
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit([request(tiny, 0, 0)])


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "demand", "drop", "pause"]),
        st.integers(0, 7),
        st.sampled_from(Priority),
    ),
    max_size=30,
)


@given(
    operations=OPERATIONS,
    depth=st.integers(1, 3),
    delays=st.lists(st.sampled_from([0, 0, 0.0002, 0.002]), min_size=1, max_size=5),
    failing=st.sets(st.integers(0, 7), max_size=2),
)
@settings(max_examples=150)
def test_whatever_is_asked_each_ticket_ends_and_tells_the_truth(
    operations: list[tuple[str, int, Priority]],
    depth: int,
    delays: list[float],
    failing: set[int],
) -> None:
    """Done means the record's bytes, dropped that somebody dropped it, failed that it failed; and
    a buffer is not touched after its ticket has ended."""
    tiny = tiny_store([Experts(8, 2, pages=3)])
    reader = FakeReader(tiny.images, delay=lambda shard, offset: delays[offset % len(delays)])
    for expert in failing:
        shard, offset = place(tiny, 0, expert)
        reader.failures[shard, offset + PAGE] = FOREVER
    tickets: list[Ticket] = []
    dropped: set[int] = set()
    with reading(tiny, reader, depth) as queue:
        for operation, expert, priority in operations:
            chosen = [ticket for ticket in tickets if ticket.key.expert == expert]
            if operation == "submit":
                tickets += queue.submit([request(tiny, 0, expert, priority)])
            elif operation == "demand":
                queue.demand(chosen)
            elif operation == "drop":
                queue.drop(chosen)
                dropped |= {id(ticket) for ticket in chosen}
            else:
                time.sleep(0.0005)
        finish(queue, tickets)
        distinct = list({id(ticket): ticket for ticket in tickets}.values())
        for ticket in distinct:
            check_truth(tiny, ticket, id(ticket) in dropped, ticket.key.expert in failing)
        figures = queue.figures()
        states = [ticket.state for ticket in distinct]
        assert figures.records == states.count(State.DONE)
        assert figures.dropped == states.count(State.DROPPED)
        after = [bytes(ticket.into) for ticket in distinct]
        finish(queue, queue.submit([request(tiny, 0, e) for e in range(8) if e not in failing]))
    assert [bytes(ticket.into) for ticket in distinct] == after
    assert max(reader.most_in_flight.values(), default=0) <= depth


def check_truth(tiny: TinyStore, ticket: Ticket, dropped: bool, failing: bool) -> None:
    if ticket.state is State.DONE:
        assert ticket.into == tiny.record(ticket.key)
        assert ticket.error is None and not failing
    elif ticket.state is State.DROPPED:
        assert dropped
    else:
        assert ticket.state is State.FAILED and failing
        assert isinstance(ticket.error, ReadError)
