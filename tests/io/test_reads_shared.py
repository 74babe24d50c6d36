"""Reads that several want, and reads that nobody wants any more."""

import pytest
from tests.fakes import Experts, FakeReader, TinyStore, tiny_store, wait_until
from tests.io.queueing import (
    BACKGROUND,
    DEMAND,
    LOOKAHEAD,
    finish,
    hold,
    let_go,
    reading,
    request,
)

from tierrun.io.tickets import State

pytestmark = pytest.mark.timeout(60)


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


def test_a_dropped_read_between_two_of_its_parts_ends() -> None:
    """What is more urgent has gone before its next part: no part of it will ever come back."""
    tiny = tiny_store([Experts(2, 1, pages=3)])
    reader = FakeReader(tiny.images)
    hold(reader)
    with reading(tiny, reader, depth=1) as queue:
        (ahead,) = queue.submit([request(tiny, 0, 0, LOOKAHEAD)])
        wait_until(lambda: len(reader.calls) == 1)
        (urgent,) = queue.submit([request(tiny, 0, 1)])
        first = reader.calls[0][:2]
        reader.held = lambda shard, offset: (shard, offset) != first
        wait_until(lambda: len(reader.calls) == 2)
        queue.drop([ahead])
        assert ahead.state is State.DROPPED
        let_go(reader)
        assert finish(queue, [ahead, urgent]) == [ahead, urgent]
        assert urgent.state is State.DONE


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
