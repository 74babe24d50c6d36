"""Intervals, by counting points; and the trace that Perfetto reads."""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tierrun.bench.spans import Interval, chrome_trace, common, gaps, length, merged
from tierrun.io.timeline import HOST, READS, UP, Span

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
    assert all(a[1] < b[0] for a, b in pairwise(one))
    assert points(common(one, other)) == points(some) & points(others)


@given(intervals, intervals.filter(bool))
def test_gaps_are_what_is_not_covered(some: list[Interval], wholes: list[Interval]) -> None:
    whole = wholes[0]
    found = gaps(merged(some), whole)
    assert points(found) == points([whole]) - points(some)
    assert all(start < end for start, end in found)
    assert all(a[1] < b[0] for a, b in pairwise(found))


READING = [Span(READS, name, 5.0 + n, 7.0 + n) for n, name in enumerate("abc")]
CHUNK = [Span(HOST, "waits", 5.5, 6.0), Span(UP, "2 records", 4.0, 4.5, 10**9), *READING]
TOKEN = [Span(HOST, "waits", 90.0, 91.0)]


def rows_of(works: dict[str, list[Span]], kind: str) -> list[dict[str, Any]]:
    trace = json.loads(json.dumps(chrome_trace(works, [UP, HOST])))
    return [row for row in trace["traceEvents"] if kind in (row["ph"], row["name"])]


def test_the_trace_names_works_and_tracks_from_top_to_bottom() -> None:
    works = {"chunk": CHUNK, "token": TOKEN}
    named = [row["args"]["name"] for row in rows_of(works, "process_name")]
    assert named == ["chunk", "token"]
    tracks = [(row["pid"], row["args"]["name"]) for row in rows_of(works, "thread_name")]
    assert tracks == [(1, UP), (1, HOST), (1, READS), (1, f"{READS} (2)"), (2, HOST)]
    order = [(row["pid"], row["args"]["sort_index"]) for row in rows_of(works, "thread_sort_index")]
    assert order == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1)]


def test_works_follow_one_another_and_copies_have_their_rate() -> None:
    events = {row["name"]: row for row in rows_of({"c": CHUNK}, "X")}
    assert events["2 records"]["ts"] == 0 and events["2 records"]["dur"] == 0.5e6
    assert events["2 records"]["args"] == {"bytes": 10**9, "GB/s": 2.0}
    assert "args" not in events["a"] and events["c"]["ts"] + events["c"]["dur"] == 5e6
    (token,) = [row for row in rows_of({"c": CHUNK, "t": TOKEN}, "X") if row["pid"] == 2]
    assert token["ts"] == 5e6 + 1000


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 9), st.integers(0, 5))))
def test_no_row_has_two_things_at_once(drawn: list[tuple[str, int, int]]) -> None:
    spans = [Span(track, "", start, start + taken) for track, start, taken in drawn]
    events = rows_of({"work": spans}, "X")
    assert len(events) == len(spans)
    for thread in {row["tid"] for row in events}:
        mine = sorted((row["ts"], row["ts"] + row["dur"]) for row in events if row["tid"] == thread)
        assert all(a[1] <= b[0] for a, b in pairwise(mine))
    used = {row["tid"] for row in events}
    assert used == {row["tid"] for row in rows_of({"work": spans}, "thread_name")}
