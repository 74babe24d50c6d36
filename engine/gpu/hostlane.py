"""The CPU lane: experts computed where they lie in RAM, while the GPU does the others.

The device writes a layer's input into pinned memory together with the letter. Other threads begin
to compute, the model's thread goes on with what else there is to do and helps when it is through;
results stay in pinned memory, from which one launch brings them among the others.
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

_TRIALS = (1, 2, 4, 8)
_REPEATS = 3
SANE_BYTE = 0x2C
"""Codes and scales made of it are ordinary numbers; zeros may be denormal ones, which are slow."""


class HostLane:
    """Computes some assignments of a layer on the CPU, for at most `tokens` tokens at a time.

    `layouts` are those of the layers, `nbytes` their records' sizes. Assumes: whatever the device
    was given before a letter is done when that letter is read, so what one layer's results lay in
    is free for the next.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        nbytes: Sequence[int],
        tokens: int,
        assignments: int,
        threads: int,
        counters: Counters,
        *,
        pinned: bool,
    ) -> None:
        self._layouts, self._record_bytes, self._counters = layouts, nbytes, counters
        self._columns = layouts[0].first[0].matrix[COLUMNS]
        self._kernels = {layout: HostExperts(layout, threads) for layout in dict.fromkeys(layouts)}
        self.hidden = torch.zeros(tokens * self._columns, pin_memory=pinned)
        rows = layouts[0].down.matrix[ROWS]
        self._results = torch.zeros(assignments, rows, pin_memory=pinned)
        self._wanted = torch.zeros(assignments, dtype=torch.int64, pin_memory=pinned)
        self._inputs = self.hidden.numpy().reshape(-1, self._columns)
        self._outputs, self._numbers = self._results.numpy(), self._wanted.numpy()
        self._joins = False
        self._under_way: HostExperts | None = None
        self._nbytes, self._started, self._span = 0, 0.0, span(LANE, "")
        self.cost = Cost(start=30e-6, slope=1 / 20e9)  # until it is measured

    def calibrate(self, records: Sequence[torch.Tensor], layer: int) -> None:
        """Fit the cost to some runs of `layer`; `records` are free memory."""
        for record in records:
            record.fill_(SANE_BYTE)
        addresses = np.array([record.data_ptr() for record in records], dtype=np.int64)
        most = min(len(records), len(self._results))
        for count in (count for count in _TRIALS if count <= most):
            for _ in range(_REPEATS):
                self._begin(layer, addresses[:count], np.zeros(count, dtype=np.int64))
                self._finish()

    def start(
        self, layer: int, places: NDArray[np.int64], addresses: NDArray[np.int64], top_k: int
    ) -> None:
        """Begin to compute the assignments `places` (of token a // top_k) from the records at
        `addresses`, one for each."""
        self._numbers[:] = 0
        self._numbers[places] = np.arange(1, len(places) + 1)
        self._joins = True
        self._begin(layer, addresses, places // top_k)

    def finish(self) -> None:
        """Wait until the results are there for `join`; nothing, where nothing is under way."""
        if self._under_way is not None:
            seconds = self._finish()
            self._counters.computed_bytes += self._nbytes
            self._counters.computed_seconds += seconds

    def join(self, outputs: torch.Tensor) -> None:
        """Enqueue that what `finish` has waited for comes into its rows of `outputs` [T · k, H]."""
        join(self._results, self._wanted[: len(outputs)], outputs)

    def reset(self) -> None:
        """A letter has been read: there is nothing to `join` yet."""
        if self._joins:
            self._numbers[:] = 0
            self._joins = False

    def abandon(self) -> None:
        """Nothing is under way any more."""
        if self._under_way is not None:
            self._finish()
        self.reset()

    def _begin(self, layer: int, addresses: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        records, which = addresses, np.arange(len(addresses))
        if tokens.any():  # several tokens may want the same
            records, which = np.unique(addresses, return_inverse=True)
        kernels = self._kernels[self._layouts[layer]]
        self._nbytes = len(records) * self._record_bytes[layer]
        self._span = span(LANE, f"layer {layer}: {len(records)} experts")
        self._span.__enter__()
        self._started = time.perf_counter()
        kernels.begin(records, self._inputs, tokens, which, self._outputs[: len(which)])
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
