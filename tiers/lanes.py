"""Who computes an expert that lies in RAM: the CPU, on the spot, or the GPU, after a copy.

The two work at the same time, so what counts is the one that ends last. Both costs are straight
lines in the bytes, seconds = start + bytes · slope, fitted to what was measured and refitted as it
runs, the newest counting most. (Fiddler has the idea with constants and minimises the sum of both;
llama.cpp's --n-cpu-moe splits by layers once and for all.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

_MEMORY = 0.98
"""Share of a fit that is kept at each new measurement: some fifty count."""


@dataclass(slots=True)
class Cost:
    """Seconds by bytes, least squares with fading weights; starts as the line it is made with.

    `weight` measurements at each of `sizes` are what that line counts for.
    """

    start: float
    slope: float
    sizes: tuple[int, ...] = (1 << 20, 1 << 22)
    weight: float = 0.01
    _n: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def __post_init__(self) -> None:
        for nbytes in self.sizes:
            self._add(nbytes, self.start + nbytes * self.slope, self.weight)

    def seconds(self, nbytes: float) -> float:
        """What `nbytes` will take; nothing takes nothing."""
        return self.start + nbytes * self.slope if nbytes else 0.0

    def observe(self, nbytes: int, seconds: float) -> None:
        """`nbytes` took `seconds`."""
        self._n, self._x, self._y = self._n * _MEMORY, self._x * _MEMORY, self._y * _MEMORY
        self._xx, self._xy = self._xx * _MEMORY, self._xy * _MEMORY
        self._add(nbytes, seconds, 1.0)
        self._fit()

    def _add(self, nbytes: int, seconds: float, weight: float) -> None:
        self._n += weight
        self._x += weight * nbytes
        self._y += weight * seconds
        self._xx += weight * nbytes * nbytes
        self._xy += weight * nbytes * seconds

    def _fit(self) -> None:
        """The best line that neither starts nor falls below zero."""
        spread = self._n * self._xx - self._x * self._x
        slope = (self._n * self._xy - self._x * self._y) / spread if spread > 0 else 0.0
        self.slope = max(0.0, slope)
        self.start = (self._y - self.slope * self._x) / self._n
        if self.start < 0:
            self.start, self.slope = 0.0, self._xy / self._xx

    def text(self) -> str:
        """For people: what a start takes, and GB/s beyond it."""
        speed = f"{1e-9 / self.slope:.1f} GB/s" if self.slope else "any speed"
        return f"{self.start * 1e6:.0f} us + {speed}"


LANES = ("auto", "copy", "cpu")
"""Both by cost; or only one of them."""


class Lanes:
    """Splits the experts that RAM has between the two; `mode` is one of `LANES`."""

    def __init__(self, copy: Cost, cpu: Cost, mode: str = "auto") -> None:
        self.copy, self.cpu, self.mode = copy, cpu, mode

    def num_copied(self, nbytes: Sequence[int], work: Sequence[int]) -> int:
        """How many to copy, the first ones, while the CPU computes the others.

        `nbytes` are what each takes to copy, `work` what it takes to compute: its bytes, once per
        token that wants it.
        """
        if self.mode != "auto":
            return len(nbytes) if self.mode == "copy" else 0
        ends = [
            max(self.copy.seconds(sum(nbytes[:count])), self.cpu.seconds(sum(work[count:])))
            for count in range(len(nbytes) + 1)
        ]
        return ends.index(min(ends))
