"""The closed loop: what it counts, that it keeps its lanes busy, and how it ends."""

import itertools
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tierrun.bench.io_load import load_of, run_load
from tierrun.io.errors import TierrunError
from tierrun.io.measuring import Place

PLACES = [Place(0, 4096 * i) for i in range(1000)]


def back_to_back(start: float, durations: Sequence[float]) -> list[tuple[float, float]]:
    ends = list(itertools.accumulate(durations, initial=start))
    return list(zip(ends, ends[1:], strict=False))


@given(
    starts=st.lists(st.floats(0, 1), min_size=1, max_size=16),
    latency=st.floats(0.01, 1),
    count=st.integers(3, 40),
)
def test_lanes_of_one_latency_have_littles_rate(
    starts: list[float], latency: float, count: int
) -> None:
    """Lanes ÷ latency, however they lie to each other."""
    lanes = [back_to_back(start, [latency] * count) for start in starts]
    assume(max(starts) + latency < min(starts) + count * latency)
    load = load_of(lanes, 4096)
    assert load.iops == pytest.approx(len(lanes) / latency)
    assert load.bandwidth == pytest.approx(4096 * load.iops)
    assert load.p50 == pytest.approx(latency) and load.p99 == pytest.approx(latency)


@given(durations=st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=20), min_size=1))
def test_no_more_is_counted_than_was_read(durations: list[list[float]]) -> None:
    lanes = [back_to_back(0, lane) for lane in durations]
    begin, end = max(lane[0][1] for lane in lanes), min(lane[-1][1] for lane in lanes)
    assume(begin < end)
    load = load_of(lanes, 1)
    assert 0 < load.iops * (end - begin) <= sum(map(len, lanes))
    longest, shortest = max(map(max, durations)), min(map(min, durations))
    assert len(lanes) / longest * 0.999 <= load.iops <= len(lanes) / shortest * 1.001
    assert load.p50 <= load.p95 <= load.p99 <= longest * 1.001


def test_too_little_is_counted_whole() -> None:
    """Lanes that never were busy together: everything over all the time."""
    assert load_of([[(0.0, 2.0)]], 1).iops == pytest.approx(1 / 2)
    assert load_of([[(0.0, 1.0), (1.0, 2.0)], []], 1).iops == pytest.approx(2 / 2)
    assert load_of([[(0.0, 1.0), (1.0, 2.0)], [(2.0, 4.0)]], 1).iops == pytest.approx(3 / 4)
    with pytest.raises(TierrunError, match="nothing was read"):
        load_of([[], []], 1)


def test_as_many_are_in_flight_as_there_are_lanes() -> None:
    lock, now, most, seen = threading.Lock(), 0, 0, list[tuple[int, Place]]()

    def read(lane: int, place: Place) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            seen.append((lane, place))
        time.sleep(0.002)
        with lock:
            now -= 1

    shared = itertools.cycle(PLACES)
    load = run_load(read, [shared] * 5, 4096, 0.05)
    assert most == 5 and now == 0
    assert {lane for lane, _ in seen} == set(range(5))
    assert [place for _, place in seen[:5]] == PLACES[:5]
    assert 0.002 <= load.p50 <= load.p99
    assert load.iops <= 5 / 0.002


def test_slow_reads_are_counted_nevertheless() -> None:
    """A time shorter than a read still gives two reads of each lane."""
    count = itertools.count()

    def read(lane: int, place: Place) -> None:
        next(count)
        time.sleep(0.02)

    load = run_load(read, [itertools.cycle(PLACES)] * 3, 1, 0.001)
    assert next(count) >= 9
    assert load.iops == pytest.approx(3 / 0.02, rel=0.5)


def test_it_ends_with_the_places() -> None:
    places = iter(PLACES)
    run_load(lambda lane, place: time.sleep(0.0001), [places] * 2, 1, 60.0)
    assert len(list(places)) < len(PLACES)


def test_a_failing_read_ends_it_at_once() -> None:
    def read(lane: int, place: Place) -> None:
        if place.offset == 4096 * 50:
            raise OSError(19, "No such device")
        time.sleep(0.0001)

    with pytest.raises(OSError, match="No such device"):
        run_load(read, [itertools.cycle(PLACES)] * 4, 1, 60.0)
    assert not [t for t in threading.enumerate() if t.name == "tierrun-bench-lane"]
