"""Every read ends, whatever is asked and whenever the queue is closed."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import FOREVER, Experts, FakeReader, TinyStore, tiny_store, wait_until
from tests.io.queueing import finish, hold, let_go, place, reading, request

from tierrun.io.errors import ReadError
from tierrun.io.extent import PAGE
from tierrun.io.reads import ReadQueue
from tierrun.io.tickets import Priority, State, Ticket

pytestmark = pytest.mark.timeout(60)


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
