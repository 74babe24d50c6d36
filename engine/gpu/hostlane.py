"""The CPU lane: experts computed where they lie in RAM, while the GPU does the others.

The device writes a layer's input into pinned memory together with the letter; whoever reads it
(`kernels.answer`) has the threads begin. Results stay in pinned memory, from which one launch
brings them among the others.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tierrun.engine.gpu.layout import ExpertLayout
from tierrun.engine.kernels.geometry import COLUMNS, ROWS
from tierrun.engine.kernels.host import HostExperts
from tierrun.engine.kernels.join import join
from tierrun.io.timeline import LANE, note
from tierrun.tiers.lanes import Cost
from tierrun.tiers.ledger import Counters

if TYPE_CHECKING:
    from tierrun.engine.kernels.answer import LaneArrays

_TRIALS = (1, 2, 4, 8)
_REPEATS = 3
_SANE_BYTE = 0x2C
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
        columns, rows = layouts[0].first[0].matrix[COLUMNS], layouts[0].down.matrix[ROWS]
        self.hidden = torch.zeros(tokens * columns, pin_memory=pinned)
        self._results = torch.zeros(assignments, rows, pin_memory=pinned)
        self._wanted = torch.zeros(assignments, dtype=torch.int64, pin_memory=pinned)
        self._inputs, self._outputs = (
            self.hidden.numpy().reshape(-1, columns),
            self._results.numpy(),
        )
        self._kernels = {
            layout: HostExperts(layout, threads, int8=True) for layout in dict.fromkeys(layouts)
        }
        self._log = np.zeros((len(layouts), 3), dtype=np.int64)
        arrays = {
            layout: kernels.lane(self._inputs, self._outputs, self._wanted.numpy(), self._log)
            for layout, kernels in self._kernels.items()
        }
        self._arrays = [arrays[layout] for layout in layouts]
        (self._workers,) = {kernels.workers for kernels in self._kernels.values()}
        self._claimed: int | None = None
        self.cost = Cost(start=30e-6, slope=1 / 20e9)  # until it is measured

    def calibrate(self, records: Sequence[torch.Tensor], layer: int) -> None:
        """Fit the cost to some runs of `layer`; `records` are free memory."""
        for record in records:
            record.fill_(_SANE_BYTE)
        kernels, most = self._kernels[self._layouts[layer]], min(len(records), len(self._outputs))
        for count in (count for count in _TRIALS if count <= most):
            tokens, which = np.zeros(count, dtype=np.int64), np.arange(count)
            out = self._outputs[:count]
            for _ in range(_REPEATS):
                started = time.perf_counter()
                kernels.compute(records[:count], self._inputs, tokens, which, out)
                nbytes = count * self._record_bytes[layer]
                self.cost.observe(nbytes, time.perf_counter() - started)

    # -- around an answer -----------------------------------------------------------------------

    def claim(self, layer: int) -> "LaneArrays":
        """For the answer to a letter of `layer`; the threads are its own until it is over."""
        self._workers.claim()
        self._claimed = layer
        return self._arrays[layer]

    def release(self) -> None:
        """The letter is answered, and the CPU's part done, if it has one."""
        assert self._claimed is not None, "never claimed"
        self._claimed = None
        self._workers.release()

    def finish(self) -> None:
        """The letter is answered, and the CPU's part under way, if it is claimed: wait for it."""
        layer, self._claimed = self._claimed, None
        if layer is not None:
            was_left = self._workers.finish()
            # what had ended before says nothing of how long it took
            self._log[layer, 1] = time.perf_counter_ns() if was_left else 0

    @property
    def is_claimed(self) -> bool:
        """Whether a letter is being answered."""
        return self._claimed is not None

    def account(self) -> None:
        """Count what has been computed since the last time, and learn from what it took."""
        for layer in np.flatnonzero(self._log[:, 2]).tolist():
            begun, ended, records = self._log[layer].tolist()
            nbytes = records * self._record_bytes[layer]
            self._counters.computed_bytes += nbytes
            if ended:
                self._counters.computed_seconds += (ended - begun) * 1e-9
                self.cost.observe(nbytes, (ended - begun) * 1e-9)
                note(LANE, f"layer {layer}: {records} experts", begun, ended)
        self._log[:, 2] = 0

    # -- its results ----------------------------------------------------------------------------

    def join(self, outputs: torch.Tensor) -> None:
        """Enqueue that what has been computed comes into its rows of `outputs` [T · k, H]."""
        join(self._results, self._wanted[: len(outputs)], outputs)

    def abandon(self) -> None:
        """Nothing is under way any more."""
        self.finish()

    def close(self) -> None:
        """Let the threads go, also where a recorded graph keeps the lane; nothing comes after."""
        self.finish()
        self._kernels.clear()
        self._arrays.clear()
        del self._workers
