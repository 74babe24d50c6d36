"""Spans are kept while somebody records, and only then."""

import threading

import pytest
from tests.clocks import CountingClock

from tierrun.io.timeline import (
    EXPERTS,
    HOST,
    READS,
    UP,
    Span,
    Timeline,
    between,
    moment,
    records_device,
    span,
)


def test_nothing_is_kept_unless_somebody_records() -> None:
    with span(HOST, "before"):
        pass
    with Timeline() as timeline:
        pass
    with span(HOST, "after"):
        pass
    assert timeline.spans == []


def test_spans_of_all_threads_are_kept_with_their_times() -> None:
    def work() -> None:
        with span(READS, "there"):
            pass

    with Timeline() as timeline:
        with span(HOST, "here"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        with pytest.raises(ZeroDivisionError), span(HOST, "fails"):
            _ = 1 / 0
    there, here, fails = timeline.spans
    assert (there.track, there.name, here.name, fails.name) == (READS, "there", "here", "fails")
    assert here.start <= there.start <= there.end <= here.end <= fails.start <= fails.end


def test_one_records_at_a_time() -> None:
    with Timeline(), pytest.raises(AssertionError, match="another"), Timeline():
        pass
    with Timeline() as timeline, span(HOST, "again"):
        pass
    assert len(timeline.spans) == 1


def test_moments_become_spans_when_the_recording_ends() -> None:
    with Timeline(CountingClock()) as timeline:
        begun = moment()
        between(UP, "copy", 0.5, 7.0, nbytes=9)
        between(EXPERTS, "group", begun, moment())
        assert timeline.spans == []
    assert timeline.spans == [Span(UP, "copy", 100.5, 107.0, 9), Span(EXPERTS, "group", 101, 102)]
    assert timeline.error == 0.25


def test_nobody_asks_for_moments_unless_there_is_a_clock() -> None:
    def look() -> None:
        assert moment() is None and not records_device()
        between(EXPERTS, "group", moment(), moment())

    look()
    with Timeline() as timeline:
        look()
    with Timeline(CountingClock()) as other:
        between(UP, "began before", None, moment())
    look()
    assert timeline.spans == other.spans == []
