"""Spans are kept while somebody records, and only then."""

import threading

import pytest

from tierrun.io.timeline import HOST, READS, Timeline, span


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
