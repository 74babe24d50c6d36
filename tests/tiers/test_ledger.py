"""Counters that subtract, and the time that the bytes alone would take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.tiers.ledger import LayerTiming, Ledger, Timings, bound_seconds


def test_snapshots_subtract_to_what_happened_between_them() -> None:
    ledger = Ledger()
    ledger.counters.hot += 2
    before = ledger.snapshot()
    ledger.counters.hot += 1
    ledger.counters.cold += 3
    ledger.counters.read_bytes += 4096
    between = ledger.snapshot() - before
    assert (between.hot, between.cold, between.read_bytes, between.lookups) == (1, 3, 4096, 4)
    assert before.hot == 2, "a snapshot does not move"


def timing(resident: float, hits: float, misses: float, read_bytes: int) -> LayerTiming:
    return LayerTiming(0, 0, 1, resident, hits, misses, 0.0, read_bytes)


@given(st.lists(st.tuples(st.integers(0, 1 << 60), st.floats(0, 1)), max_size=30))
def test_the_newest_timings_are_kept_as_they_were(made: list[tuple[int, float]]) -> None:
    kept = Timings(capacity=7)
    timings = [LayerTiming(n, 1, 2, wait, 0.0, 0.0, wait, n) for n, wait in made]
    for one in timings:
        kept.append(one)
    assert list(kept) == timings[-7:] and len(kept) == min(7, len(timings))
    assert all(isinstance(one.step, int) for one in kept)


def test_the_bounds_follow_their_definitions() -> None:
    timings = [timing(1.0, 2.0, 1.0, 300), timing(1.0, 5.0, 0.0, 100)]
    no_foresight, foresight = bound_seconds(timings, bandwidth=100.0)
    assert no_foresight == (1 + 3) + (1 + 5), "reads overlap hits of their own layer only"
    assert foresight == 10.0, "all compute is longer than four seconds of reads"
    assert bound_seconds(timings, bandwidth=10.0)[1] == 40.0


def test_foresight_is_never_slower() -> None:
    timings = [timing(0.1 * i, 0.3, 0.2, 50 * i) for i in range(8)]
    for bandwidth in (1.0, 100.0, 1e9):
        no_foresight, foresight = bound_seconds(timings, bandwidth)
        compute = sum(t.resident + t.hits + t.misses for t in timings)
        assert foresight <= max(no_foresight, compute) + 1e-9
    assert bound_seconds([], 1.0) == pytest.approx((0.0, 0.0))
