"""The CPU lane: experts of a miss computed where they lie in RAM, while the GPU does the others.

The device writes a layer's input into pinned memory together with the letter; a thread of its own
computes, so that copies and launches go on meanwhile; the results stay in pinned memory, from which
one launch brings them among the others.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

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

log = logging.getLogger(__name__)

_TRIALS = (1, 2, 4, 8)
_REPEATS = 3
_SANE_BYTE = 0x2C
"""Codes and scales made of it are ordinary numbers; zeros may be denormal ones, which are slow."""

_one_at_a_time = Lock()
"""Two engines' threads would fight for the same cores."""


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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tierrun-cpu-lane")
        self._under_way: Future[float] | None = None
        self._places: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._nbytes = 0
        self.cost = Cost(start=30e-6, slope=1 / 20e9)  # until it is measured

    def calibrate(self, records: Sequence[torch.Tensor], layer: int) -> None:
        """Compile for `layer`, and fit the cost to some runs; `records` are free memory."""
        for record in records:
            record.fill_(_SANE_BYTE)
        most = min(len(records), len(self._results))
        self._run(layer, records[:1], *_one_each(1))  # compiles
        for count in (count for count in _TRIALS if count <= most):
            for _ in range(_REPEATS):
                seconds = self._run(layer, records[:count], *_one_each(count))
                self.cost.observe(sum(len(record) for record in records[:count]), seconds)

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
        self._nbytes = sum(len(record) for record in records)
        self._under_way = self._thread.submit(
            self._run, layer, records, self._places // k, which[self._places]
        )

    def finish(self, outputs: torch.Tensor) -> None:
        """Wait, and enqueue that the results come into their rows of `outputs` [T · k, H]."""
        assert self._under_way is not None, "nothing was started"
        seconds, self._under_way = self._under_way.result(), None
        self.cost.observe(self._nbytes, seconds)
        self._counters.computed_bytes += self._nbytes
        self._counters.computed_seconds += seconds
        wanted = self._wanted[self._launches % len(self._wanted), : len(outputs)]
        self._launches += 1
        wanted.zero_()
        count = len(self._places)
        wanted.numpy()[self._places] = np.arange(self._filled + 1, self._filled + count + 1)
        self._filled += count
        join(self._results, wanted, outputs)

    def abandon(self) -> None:
        """Nothing is under way any more."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _run(
        self,
        layer: int,
        records: Sequence[torch.Tensor],
        tokens: NDArray[np.int64],
        which: NDArray[np.int64],
    ) -> float:
        """Compute into the next free results; the seconds."""
        hidden = self.hidden.numpy().reshape(-1, self._columns)
        out = self._results.numpy()[self._filled : self._filled + len(which)]
        with _one_at_a_time, span(LANE, f"layer {layer}: {len(records)} experts"):
            started = time.perf_counter()
            self._kernels[self._layouts[layer]].compute(records, hidden, tokens, which, out)
            return time.perf_counter() - started


def _one_each(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.zeros(count, dtype=np.int64), np.arange(count)
