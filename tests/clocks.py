"""A clock of a device that is not there."""

from typing import Any


class CountingClock:
    """Each moment comes a second after the last; the device's zero is at 100 s of the host's.

    Moments of others are whatever `float` takes.
    """

    def __init__(self) -> None:
        self._now = 0

    def begin(self) -> None:
        self._now = 0

    def moment(self) -> object:
        self._now += 1
        return self._now

    def end(self) -> float:
        return 0.25

    def time_of(self, moment: Any) -> float:
        return 100.0 + float(moment)
