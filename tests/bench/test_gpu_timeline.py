"""What a timeline says, from intervals that can be counted by hand."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierrun.bench.gpu_timeline import (
    Event,
    Interval,
    Recorded,
    chrome_trace,
    common,
    figures,
    length,
    merged,
)

intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 6)).map(lambda t: (float(t[0]), float(sum(t)))),
    max_size=8,
)


def points(found: Sequence[Interval]) -> set[int]:
    return {p for start, end in found for p in range(int(start), int(end))}


@given(intervals, intervals)
def test_unions_and_what_they_share(some: list[Interval], others: list[Interval]) -> None:
    one, other = merged(some), merged(others)
    assert points(one) == points(some) and length(one) == len(points(some))
    assert all(a[1] < b[0] for a, b in zip(one, one[1:], strict=False))
    assert points(common(one, other)) == points(some) & points(others)


WORK = Recorded(
    100.0,
    [
        Event("host", "work", "all of it", 1000.0, 100.0, {}),
        Event("device", "kernels, stream 7", "product", 1010.0, 50.0, {}),
        Event("device", "kernels, stream 7", "norm", 1050.0, 20.0, {}),
        Event("device", "copies, stream 9", "Memcpy HtoD", 1040.0, 40.0, {"bytes": 4000}),
        Event("device", "copies, stream 7", "Memcpy DtoH", 1000.0, 5.0, {"bytes": 10}),
    ],
)


def test_figures_of_a_piece_of_work() -> None:
    found = figures(WORK)
    assert (found.kernels_busy, found.uploads_busy, found.upload_bytes) == (0.6, 0.4, 4000)
    assert found.upload_rate == pytest.approx(4000 / 40e-6)
    assert found.uploads_behind_kernels == 30 / 40


def test_the_trace_names_processes_and_tracks() -> None:
    trace = json.loads(json.dumps(chrome_trace({"prefill": WORK, "decode": WORK})))
    rows = trace["traceEvents"]
    names = {row["args"]["name"] for row in rows if row["name"] == "process_name"}
    assert names == {f"{w}: {p}" for w in ("prefill", "decode") for p in ("host", "device")}
    events = [row for row in rows if row["ph"] == "X"]
    assert len(events) == 10 and min(row["ts"] for row in events) == 0
    threads = {(row["pid"], row["tid"]) for row in rows if row["name"] == "thread_name"}
    assert {(row["pid"], row["tid"]) for row in events} <= threads
