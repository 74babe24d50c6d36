"""The memory of a device, and how much of it a piece of work takes."""

from collections.abc import Callable
from typing import Protocol

import torch

from tierrun.tiers.budget import DeviceFigures
from tierrun.tiers.setup import device_figures


class Gauge(Protocol):
    """The memory of a device."""

    interpreted: bool

    def figures(self) -> DeviceFigures:
        """What there is, and what is free now."""

    def peak(self, work: Callable[[], object]) -> int:
        """The most bytes that `work` has allocated at once."""


class CudaGauge:
    """A GPU's."""

    interpreted = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def figures(self) -> DeviceFigures:
        """See `Gauge`; what torch keeps in reserve is given back."""
        torch.cuda.empty_cache()
        return device_figures(self._device)

    def peak(self, work: Callable[[], object]) -> int:
        """See `Gauge`."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        work()
        return torch.cuda.max_memory_allocated(self._device) - before


class NoGauge:
    """Of a CPU that stands in for a GPU: nobody measures it."""

    interpreted = True

    def figures(self) -> DeviceFigures:
        """See `Gauge`."""
        return DeviceFigures(1 << 60, 1 << 60, "the CPU")

    def peak(self, work: Callable[[], object]) -> int:
        """See `Gauge`."""
        work()
        return 0
