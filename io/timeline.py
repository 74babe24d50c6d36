"""What happened when, on the host: spans on named tracks, kept only while somebody records.

    with Timeline() as timeline:
        …
    timeline.spans

Where nobody does, `span` costs a look at one variable. Any thread may write.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

READS, HOST, LANE = "reads", "model's thread", "CPU lane"
"""Tracks; spans of `READS` overlap one another."""


class Span(NamedTuple):
    """`start` and `end` are of `time.perf_counter`."""

    track: str
    name: str
    start: float
    end: float


class Timeline:
    """Records every span while it is entered. One at a time."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __enter__(self) -> "Timeline":
        global _recording
        assert _recording is None, "another timeline is recording"
        _recording = self
        return self

    def __exit__(self, *_: object) -> None:
        global _recording
        _recording = None


_recording: Timeline | None = None


def span(track: str, name: str) -> AbstractContextManager[object]:
    """A context manager: what its block takes, however it ends."""
    return _NOTHING if _recording is None else _Open(_recording, track, name)


def note(track: str, name: str, start: int, end: int) -> None:
    """A span that is over, in ns of `time.perf_counter_ns`."""
    if _recording is not None:
        _recording.spans.append(Span(track, name, start * 1e-9, end * 1e-9))


class _Open:
    def __init__(self, timeline: Timeline, track: str, name: str) -> None:
        self._timeline, self._track, self._name = timeline, track, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        end = time.perf_counter()
        self._timeline.spans.append(Span(self._track, self._name, self._start, end))


_NOTHING = nullcontext()
