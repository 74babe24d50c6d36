"""A GPU's events as times on the host's clock, for `tierrun.io.timeline`."""

import time
from collections.abc import Callable
from typing import NamedTuple, cast

import torch

# torch does not annotate it.
_Event: Callable[..., torch.cuda.Event] = torch.cuda.Event

_LOOKS = 20


class _Look(NamedTuple):
    """An event on an idle device, and when the host had not yet, and had, seen it pass."""

    event: torch.cuda.Event
    before: float
    after: float

    @property
    def time(self) -> float:
        return (self.before + self.after) / 2

    @property
    def error(self) -> float:
        return (self.after - self.before) / 2


class CudaClock:
    """See `Clock`. Moments are those of the device's current stream.

    Making an event takes 15 µs on some machines, so `count` are made beforehand, and used by one
    recording after another; one that needs more makes them as it goes.
    """

    def __init__(self, device: torch.device, count: int = 4096) -> None:
        self._device = device
        self._free = [self._record(_Event(enable_timing=True)) for _ in range(count)]
        self._used: list[torch.cuda.Event] = []

    def begin(self) -> None:
        """See `Clock`."""
        self._free += self._used
        self._used = []
        self._origin = self._closest_look()

    def moment(self) -> torch.cuda.Event:
        """See `Clock`."""
        event = self._free.pop() if self._free else _Event(enable_timing=True)
        self._used.append(event)
        return self._record(event)

    def end(self) -> float:
        """See `Clock`; the two clocks' drift is part of the error."""
        last = self._closest_look()
        return max(self._origin.error, abs(self.time_of(last.event) - last.time))

    def time_of(self, moment: object) -> float:
        """See `Clock`."""
        milliseconds: float = self._origin.event.elapsed_time(cast(torch.cuda.Event, moment))
        return self._origin.time + milliseconds / 1000

    def _closest_look(self) -> _Look:
        """The closest of several; the first ones meet a device that has just woken."""
        torch.cuda.synchronize(self._device)
        return min((self._look() for _ in range(_LOOKS)), key=lambda look: look.error)

    def _look(self) -> _Look:
        event = self.moment()
        self._wait(event)  # an event that was recorded before is quicker
        before = time.perf_counter()
        self._wait(self._record(event))
        return _Look(event, before, time.perf_counter())

    def _record(self, event: torch.cuda.Event) -> torch.cuda.Event:
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait(self, event: torch.cuda.Event) -> None:
        query: Callable[[], bool] = event.query
        while not query():
            pass
