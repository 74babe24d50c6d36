"""What happened when, on the host and on a device: spans on tracks, while somebody records.

    with Timeline() as timeline:
        …
    timeline.spans

Where nobody does, each of these costs a look at one variable. Any thread may write. When something
began on a device is not known before it is over: *moments*, events on its streams, become times on
the host's clock when the recording ends (`Clock`; without one, only the host's spans are kept).
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

READS, HOST, LANE = "reads", "model's thread", "CPU lane"
"""Tracks of the host; spans of `READS` overlap one another."""

UP, DOWN, ASIDE = "copies up", "copies down", "copies aside"
EXPERTS, REST, SEGMENTS = "GPU: experts", "GPU: the rest", "GPU: segments"
"""Tracks of a device: its copies, and its compute stream, of which `SEGMENTS` are both in one."""


class Span(NamedTuple):
    """`start` and `end` are of `time.perf_counter`; `nbytes` is what was copied."""

    track: str
    name: str
    start: float
    end: float
    nbytes: int = 0


class Clock(Protocol):
    """Moments of one device. `begin` and `end` wait until it has nothing left to do."""

    def begin(self) -> None:
        """Moments are about to be noted; earlier ones are worth nothing any more."""

    def moment(self) -> object:
        """When the compute stream comes here; other streams' events are moments too."""

    def end(self) -> float:
        """All moments have passed; the seconds by which their times may be wrong."""

    def time_of(self, moment: object) -> float:
        """Of `time.perf_counter`; after `end` only."""


class _Between(NamedTuple):
    track: str
    name: str
    begun: object
    ended: object
    nbytes: int


class Timeline:
    """Records every span while it is entered. One at a time."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.spans: list[Span] = []
        self.clock = clock
        self.error = 0.0
        """Seconds by which the device's spans may be wrong, all by about the same."""
        self._pending: list[_Between] = []

    def __enter__(self) -> "Timeline":
        global _recording
        assert _recording is None, "another timeline is recording"
        if self.clock is not None:
            self.clock.begin()
        _recording = self
        return self

    def __exit__(self, *_: object) -> None:
        global _recording
        _recording = None
        if self.clock is not None:
            self.error = self.clock.end()
            self.spans += self._over(self.clock)

    def add(self, track: str, name: str, begun: object, ended: object, nbytes: int) -> None:
        """A span between two moments."""
        self._pending.append(_Between(track, name, begun, ended, nbytes))

    def _over(self, clock: Clock) -> Iterator[Span]:
        for track, name, begun, ended, nbytes in self._pending:
            yield Span(track, name, clock.time_of(begun), clock.time_of(ended), nbytes)
        self._pending.clear()


_recording: Timeline | None = None


def span(track: str, name: str) -> AbstractContextManager[object]:
    """A context manager: what its block takes, however it ends."""
    return _NOTHING if _recording is None else _Open(_recording, track, name)


def note(track: str, name: str, start: int, end: int) -> None:
    """A span that is over, in ns of `time.perf_counter_ns`."""
    if _recording is not None:
        _recording.spans.append(Span(track, name, start * 1e-9, end * 1e-9))


def records_device() -> bool:
    """Whether moments are wanted."""
    return _recording is not None and _recording.clock is not None


def moment() -> object:
    """When the device's compute stream comes here; None where nobody wants to know."""
    if _recording is None or _recording.clock is None:
        return None
    return _recording.clock.moment()


def between(track: str, name: str, begun: object, ended: object, nbytes: int = 0) -> None:
    """A span on the device, of two moments; nothing if one is None."""
    if _recording is not None and begun is not None and ended is not None:
        _recording.add(track, name, begun, ended, nbytes)


class _Open:
    def __init__(self, timeline: Timeline, track: str, name: str) -> None:
        self._timeline, self._track, self._name = timeline, track, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        end = time.perf_counter()
        self._timeline.spans.append(Span(self._track, self._name, self._start, end))


_NOTHING = nullcontext()
