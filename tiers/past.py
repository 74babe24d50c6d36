"""Experts on their way from the drive straight into VRAM, past the warm tier.

For those that a prompt reads and nobody is expected to want again soon: the warm tier keeps what it
has, and no byte is copied twice. Reads are the host's, so unlike copies they are not ordered with
kernels: a slot is read into only when the device has ended all that it was given.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from tierrun.io.store import ExpertKey
from tierrun.tiers.straight import StraightReads
from tierrun.tiers.tier import Tier


class Coming(NamedTuple):
    """Experts of one layer, the slots in VRAM that they are read into, and the reads."""

    experts: list[int]
    slots: list[int]
    reads: list[Future[None]]


class Past:
    """The reads of one layer, group by group, in order."""

    def __init__(self, straight: StraightReads, tier: Tier, layer: int) -> None:
        self._straight, self._tier, self._layer = straight, tier, layer
        self._coming: deque[Coming] = deque()

    def __len__(self) -> int:
        return len(self._coming)

    def begin(self, experts: Sequence[int], slots: Sequence[int]) -> None:
        """Read `experts` into `slots`, which the device does not look at."""
        pairs = zip(experts, slots, strict=True)
        reads = [
            self._straight.submit(ExpertKey(self._layer, expert), self._tier.memory(slot))
            for expert, slot in pairs
        ]
        self._coming.append(Coming(list(experts), list(slots), reads))

    def next(self) -> Coming:
        """The oldest group, all of it there.

        Raises:
            ReadError, CorruptError: the read of one failed.
        """
        for read in self._coming[0].reads:
            read.result()
        return self._coming.popleft()

    def stop(self) -> None:
        """No read is under way any more, whatever came of it."""
        for coming in self._coming:
            for read in coming.reads:
                read.exception()
        self._coming.clear()
