"""Who computes an expert that lies in RAM: the CPU, on the spot, or the GPU, over its bus.

The two work at the same time, so what counts is the one that ends last. Both costs are straight
lines in the bytes, seconds = start + bytes · slope, fitted at the start, and corrected as it runs:
the CPU's by what it takes, the GPU's by who has ended last. (Fiddler has the idea with constants
and minimises the sum of both; llama.cpp's --n-cpu-moe splits by layers once and for all.)
"""

from dataclasses import dataclass

_MEMORY = 0.998
"""Share of a fit that is kept at each new measurement: some five hundred count."""

_SETTLED, _OUTLIER = 100, 3.0
"""After so many, times what was expected that one counts for at most: somebody else had the CPU."""

HOST_TURN = 60e-6
"""Seconds that the CPU's part of a layer costs beside its compute: the device waits for results and
for the next graph, which it is given only then. What it reads in RAM costs no such turn."""

_CORRECTION, _MOST_CORRECTION = 1.05, 4.0
"""Of the GPU's cost each time that one lane is later mostly, and in all."""
_MOSTLY = 0.65
"""Share of the layers of which it is the later one then."""

_EVERY = 8
"""Forward passes between two looks at whether the split is still the best."""


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
        if self._n > _SETTLED:
            seconds = min(seconds, _OUTLIER * self.seconds(nbytes))
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


LANES = ("auto", "gpu", "cpu")
"""Both by cost; or only one of them."""


class Lanes:
    """Splits the experts that RAM has between the two; `mode` is one of `LANES`."""

    def __init__(self, gpu: Cost, cpu: Cost, mode: str = "auto") -> None:
        self.gpu, self.cpu, self.mode = gpu, cpu, mode
        self._correction, self._passes, self._shared = 1.0, 0, ""
        self._gpu_last, self._both = 0, 0

    def cpu_share(self, number: int, nbytes: int) -> int:
        """Of `number` experts of `nbytes` each, how many the CPU computes."""
        if self.mode != "auto":
            return number if self.mode == "cpu" else 0
        balanced = self._balanced(number, nbytes)
        shares = sorted({max(0, min(share, number)) for share in (0, balanced, balanced + 1)})
        return min(shares, key=lambda share: self._seconds(number, share, nbytes))

    def _balanced(self, number: int, nbytes: int) -> int:
        """The share, rounded down, with which both would end at the same time."""
        gpu, cpu = self._correction * nbytes * self.gpu.slope, nbytes * self.cpu.slope
        later = self._correction * self.gpu.start - self.cpu.start - HOST_TURN
        return int((number * gpu + later) / (gpu + cpu)) if gpu + cpu > 0 else 0

    def _seconds(self, number: int, share: int, nbytes: int) -> float:
        gpu = self.gpu.seconds((number - share) * nbytes) * self._correction
        return max(gpu, self.cpu.seconds(share * nbytes) + HOST_TURN * (share > 0))

    def balance(self, *, gpu_was_last: bool) -> None:
        """Both have computed a part of a layer, and which of them has ended last."""
        self._gpu_last += gpu_was_last
        self._both += 1

    def _correct(self) -> None:
        """Believe the GPU to be slower, or faster, if it was the last of the two, or the first."""
        if not self._both:
            return
        share = self._gpu_last / self._both
        factor = _CORRECTION if share > _MOSTLY else 1.0
        factor = 1 / _CORRECTION if share < 1 - _MOSTLY else factor
        corrected = self._correction * factor
        self._correction = min(max(corrected, 1 / _MOST_CORRECTION), _MOST_CORRECTION)
        self._gpu_last, self._both = 0, 0

    def has_changed(self) -> bool:
        """Whether to ask for the shares anew; to be called once per forward pass."""
        self._passes += 1
        if self._shared == self.mode and (self.mode != "auto" or self._passes % _EVERY):
            return False
        self._correct()
        self._shared = self.mode
        return True

    def text(self) -> str:
        """Both costs, for people."""
        return f"the CPU {self.cpu.text()}, the GPU {self.gpu.text()} × {self._correction:.2f}"
