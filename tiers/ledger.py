"""What happened: lookups, bytes and seconds per tier and edge, and each layer's timing.

Read with `Ledger.snapshot()`; two snapshots subtract to what happened between them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

_KEPT_TIMINGS = 200_000
"""Layer timings kept: 3 000 tokens of a 60-layer model."""


@dataclass(slots=True)
class Counters:
    """Totals since the engine was loaded.

    A lookup is one expert wanted by one layer for one forward pass; it counts for the tier that
    held the expert, `cold` when its bytes came from the store for this use (read ahead or not).
    `computed` is what the CPU computed for a GPU, where the experts lay; `zero_copy` what the GPU
    read there over its bus.
    """

    hot: int = 0
    warm: int = 0
    cold: int = 0
    read_bytes: int = 0
    promoted_bytes: int = 0
    demoted_bytes: int = 0
    computed_bytes: int = 0
    zero_copy_bytes: int = 0
    wait_seconds: float = 0.0
    copy_seconds: float = 0.0
    computed_seconds: float = 0.0
    ahead_issued: int = 0
    ahead_useful: int = 0
    ahead_late: int = 0
    ahead_wasted: int = 0
    ahead_dropped: int = 0

    @property
    def lookups(self) -> int:
        return self.hot + self.warm + self.cold

    def __sub__(self, before: "Counters") -> "Counters":
        names = [field.name for field in fields(self)]
        return Counters(**{name: getattr(self, name) - getattr(before, name) for name in names})


class LayerTiming(NamedTuple):
    """One experts layer of one forward pass, in seconds and bytes.

    `resident` is everything since the previous experts layer ended (attention, norms, router);
    `hits` and `misses` are the compute of experts that were there and that came; `wait` is blocked.
    """

    step: int
    layer: int
    tokens: int
    resident: float
    hits: float
    misses: float
    wait: float
    read_bytes: int


_TIMING = np.dtype(
    [
        (name, np.int64 if name in ("step", "layer", "tokens", "read_bytes") else np.float64)
        for name in LayerTiming._fields
    ]
)


class Timings:
    """The newest `capacity` layer timings, oldest first, in memory that is taken once."""

    def __init__(self, capacity: int = _KEPT_TIMINGS) -> None:
        self._rows = np.zeros(capacity, _TIMING)
        self._rows.fill(0)  # its pages are taken now, not one by one in a long run
        self._count = 0

    def append(self, timing: LayerTiming) -> None:
        """Note one; the oldest goes if there is no room."""
        self._rows[self._count % len(self._rows)] = timing
        self._count += 1

    def __len__(self) -> int:
        return min(self._count, len(self._rows))

    def __iter__(self) -> Iterator[LayerTiming]:
        first = max(0, self._count - len(self._rows))
        for number in range(first, self._count):
            yield LayerTiming(*self._rows[number % len(self._rows)].tolist())


class Ledger:
    """The counters, written by the residency and the engine, on the model's thread only."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.timings = Timings()

    def snapshot(self) -> Counters:
        return replace(self.counters)


def bound_seconds(timings: list[LayerTiming], bandwidth: float) -> tuple[float, float]:
    """The least time `timings` could have taken at `bandwidth` bytes per second of reads.

    First the bound without foresight: a layer's reads start when its router has spoken and overlap
    only the compute of its hits. Then the bound with perfect foresight: the larger of all reads and
    all compute.
    """
    no_foresight = sum(t.resident + max(t.read_bytes / bandwidth, t.hits) for t in timings)
    reads = sum(t.read_bytes for t in timings) / bandwidth
    compute = sum(t.resident + t.hits + t.misses for t in timings)
    return no_foresight, max(reads, compute)
