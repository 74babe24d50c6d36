"""Spans as intervals that can be reckoned with, and as the JSON that Perfetto reads."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tierrun.io.timeline import Span

Interval = tuple[float, float]
"""Where something begins and ends."""

Row = dict[str, Any]
"""An event of the trace."""

_PAUSE = 1_000_000
"""Nanoseconds between two pieces of work in a trace, whatever was between them."""


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def common(some: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """What two unions share."""
    found, i, j = list[Interval](), 0, 0
    while i < len(some) and j < len(others):
        start, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < end:
            found.append((start, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def gaps(union: Sequence[Interval], whole: Interval) -> list[Interval]:
    """What of `whole` a union does not cover."""
    inside = common(union, [whole])
    begins = [whole[0], *(end for _, end in inside)]
    ends = [*(start for start, _ in inside), whole[1]]
    return [gap for gap in zip(begins, ends, strict=True) if gap[0] < gap[1]]


def length(union: Iterable[Interval]) -> float:
    """What it covers."""
    return sum(end - start for start, end in union)


def chrome_trace(works: Mapping[str, Sequence[Span]], tracks: Sequence[str]) -> dict[str, Any]:
    """The JSON that Perfetto reads: each piece of work a process, one shortly after the other.

    `tracks` are the rows from top to bottom; others follow them.
    """
    rows, now = list[Row](), 0
    for process, (title, spans) in enumerate(works.items(), 1):
        rows.append(_named("process_name", title, process, 0))
        first = min((_ns(span.start) for span in spans), default=0)
        rows += _tracks(spans, tracks, process, first - now)
        now += max((_ns(span.end) for span in spans), default=0) - first + _PAUSE
    return {"displayTimeUnit": "ms", "traceEvents": rows}


def _tracks(
    spans: Iterable[Span], tracks: Sequence[str], process: int, origin: int
) -> Iterable[Row]:
    by_row = _without_overlaps(spans)
    known = {track: place for place, track in enumerate(tracks)}
    order = sorted(by_row, key=lambda row: (known.get(row[0], len(known)), row))
    for thread, (track, number) in enumerate(order, 1):
        name = f"{track} ({number + 1})" if number else track
        yield _named("thread_name", name, process, thread)
        yield _named("thread_sort_index", name, process, thread) | {"args": {"sort_index": thread}}
        for span in by_row[track, number]:
            yield _complete(span, origin) | {"pid": process, "tid": thread}


def _without_overlaps(spans: Iterable[Span]) -> dict[tuple[str, int], list[Span]]:
    """By (track, number): as many rows of a track as it has spans at once."""
    rows = defaultdict[tuple[str, int], list[Span]](list)
    counts = defaultdict[str, int](int)
    for span in sorted(spans, key=lambda span: span.start):
        numbers = range(counts[span.track])
        free = (n for n in numbers if rows[span.track, n][-1].end <= span.start)
        number = next(free, len(numbers))
        counts[span.track] = max(len(numbers), number + 1)
        rows[span.track, number].append(span)
    return rows


def _complete(span: Span, origin: int) -> Row:
    start, end = _ns(span.start), _ns(span.end)
    row = {"ph": "X", "name": span.name, "ts": (start - origin) / 1e3, "dur": (end - start) / 1e3}
    if not span.nbytes:
        return row
    rate = span.nbytes / max(1, end - start)
    return row | {"args": {"bytes": span.nbytes, "GB/s": round(rate, 2)}}


def _named(kind: str, name: str, process: int, thread: int) -> Row:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
