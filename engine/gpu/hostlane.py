"""The CPU lane: experts of a miss computed where they lie in RAM, while the GPU does the others.

The device writes a layer's input into pinned memory together with the letter. Other threads begin
to compute, the model's thread goes on to copies and launches and helps when it is through; results
stay in pinned memory, from which one launch brings them among the others.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.engine.gpu.layout import ExpertLayout
from tierrun.engine.kernels.geometry import COLUMNS, ROWS
from tierrun.engine.kernels.host import HostExperts
from tierrun.engine.kernels.join import join
from tierrun.io.timeline import LANE, span
from tierrun.tiers.lanes import Cost
from tierrun.tiers.ledger import Counters
from tierrun.tiers.residency import Held

_TRIALS = (1, 2, 4, 8)
_REPEATS = 3
_SANE_BYTE = 0x2C
"""Codes and scales made of it are ordinary numbers; zeros may be denormal ones, which are slow."""


class HostLane:
    """Computes some assignments of a layer on the CPU, for at most `tokens` tokens at a time.

    `layouts` are those of the layers. Assumes: whatever the device was given before a letter is
    done when that letter is read, so what one layer's results lay in is free for the next.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        tokens: int,
        assignments: int,
        threads: int,
        counters: Counters,
        *,
        pinned: bool,
    ) -> None:
        self._layouts, self._counters = layouts, counters
        self._columns = layouts[0].first[0].matrix[COLUMNS]
        self._kernels = {layout: HostExperts(layout, threads) for layout in dict.fromkeys(layouts)}
        self.hidden = torch.zeros(tokens * self._columns, pin_memory=pinned)
        rows = layouts[0].down.matrix[ROWS]
        self._results = torch.zeros(assignments, rows, pin_memory=pinned)
        self._wanted = torch.zeros(
            2 * assignments, assignments, dtype=torch.int64, pin_memory=pinned
        )
        self._launches = self._filled = 0
        self._under_way: HostExperts | None = None
        self._places: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._nbytes, self._started, self._span = 0, 0.0, span(LANE, "")
        self.cost = Cost(start=30e-6, slope=1 / 20e9)  # until it is measured

    def calibrate(self, records: Sequence[torch.Tensor], layer: int) -> None:
        """Fit the cost to some runs of `layer`; `records` are free memory."""
        for record in records:
            record.fill_(_SANE_BYTE)
        most = min(len(records), len(self._results))
        for count in (count for count in _TRIALS if count <= most):
            for _ in range(_REPEATS):
                self._run(layer, records, count)

    def begin(self) -> None:
        """A letter has been read: what earlier layers' results lay in is free."""
        self._filled = 0

    def start(self, layer: int, held: Sequence[Held], experts: NDArray[np.int64], k: int) -> None:
        """Begin to compute those of the assignments `experts` [T · k] that want one of `held`."""
        which = np.full(len(experts), -1, dtype=np.int64)
        for number, one in enumerate(held):
            which[experts == one.expert] = number
        self._places = np.flatnonzero(which >= 0)
        records = [one.tier.memory(one.slot) for one in held]
        self._begin(layer, records, self._places // k, which[self._places])

    def finish(self, outputs: torch.Tensor) -> None:
        """Wait, and enqueue that the results come into their rows of `outputs` [T · k, H]."""
        seconds = self._finish()
        self._counters.computed_bytes += self._nbytes
        self._counters.computed_seconds += seconds
        wanted = self._wanted[self._launches % len(self._wanted), : len(outputs)]
        self._launches += 1
        numbers, count = wanted.numpy(), len(self._places)
        numbers[:] = 0
        numbers[self._places] = np.arange(self._filled + 1, self._filled + count + 1)
        self._filled += count
        join(self._results, wanted, outputs)

    def abandon(self) -> None:
        """Nothing is under way any more."""
        if self._under_way is not None:
            self._finish()

    def _run(self, layer: int, records: Sequence[torch.Tensor], count: int) -> None:
        """Compute one product of each of the first `count`; what it took counts for the cost."""
        numbers = np.arange(count)
        self._begin(layer, records[:count], np.zeros_like(numbers), numbers)
        self._finish()

    def _begin(
        self,
        layer: int,
        records: Sequence[torch.Tensor],
        tokens: NDArray[np.int64],
        which: NDArray[np.int64],
    ) -> None:
        """Into the next free results."""
        hidden = self.hidden.numpy().reshape(-1, self._columns)
        out = self._results.numpy()[self._filled : self._filled + len(which)]
        kernels = self._kernels[self._layouts[layer]]
        self._nbytes = sum(len(record) for record in records)
        self._span = span(LANE, f"layer {layer}: {len(records)} experts")
        self._span.__enter__()
        self._started = time.perf_counter()
        kernels.begin(records, hidden, tokens, which, out)
        self._under_way = kernels

    def _finish(self) -> float:
        """Wait; the seconds since it began, which count for the cost unless it ended before."""
        assert self._under_way is not None, "nothing was started"
        was_left = self._under_way.finish()
        self._under_way = None
        seconds = time.perf_counter() - self._started
        self._span.__exit__(None, None, None)
        if was_left or seconds < self.cost.seconds(self._nbytes):
            self.cost.observe(self._nbytes, seconds)
        return seconds
