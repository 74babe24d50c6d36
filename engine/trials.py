"""Every way from a store's drives into RAM and VRAM, tried on its own records."""

import logging
import os
from contextlib import ExitStack

import torch

from tierrun.io.direct import DirectReader
from tierrun.io.gds import GdsReader
from tierrun.io.measuring import HostTrial, Place, Plan, Trial, measure
from tierrun.io.profiles import DIRECT, GDS, GDS_DEVICE, STAGED, Cell, Way
from tierrun.io.store import Store
from tierrun.tiers.staging import BounceBuffers, DeviceReader, StagedReader

log = logging.getLogger(__name__)


def measure_store(
    store: Store, device: torch.device, plan: Plan, *, with_gds: bool = True
) -> list[Cell]:
    """Every way there is: to the host, and where `device` is a GPU to it.

    Raises:
        OSError: the shards cannot be opened.
    """
    paths, depth, largest = store.shard_paths, max(plan.depths), max(plan.sizes)
    with ExitStack() as stack:
        direct = DirectReader(paths)
        stack.callback(direct.close)
        trials: dict[Way, Trial] = {DIRECT: HostTrial(direct, largest)}
        into_device = _DeviceTrials(store, device, plan, stack)
        trials |= into_device.staged()
        if with_gds:
            kvikio = GdsReader(paths, depth)
            stack.callback(kvikio.close)
            trials |= {GDS: HostTrial(kvikio, largest)} | into_device.of(GDS_DEVICE, kvikio)
        return measure(store, trials, plan)


class _DeviceTrials:
    """Trials of reads into VRAM; none without a GPU, or where it has no memory to spare."""

    def __init__(self, store: Store, device: torch.device, plan: Plan, stack: ExitStack) -> None:
        self._paths, self._threads, self._stack = store.shard_paths, max(plan.depths), stack
        self._memory = _device_memory(max(plan.sizes), device)

    def staged(self) -> dict[Way, Trial]:
        """The way through pinned memory."""
        if self._memory is None:
            return {}
        buffers = BounceBuffers(self._memory.device, self._threads)
        self._stack.callback(buffers.release)
        reader = StagedReader(self._paths, buffers, os.O_DIRECT)
        self._stack.callback(reader.close)
        return self.of(STAGED, reader)

    def of(self, way: Way, reader: DeviceReader) -> dict[Way, Trial]:
        """`reader` as `way`."""
        if self._memory is None:
            return {}
        return {way: _DeviceTrial(reader, self._memory)}


def _device_memory(nbytes: int, device: torch.device) -> torch.Tensor | None:
    """Memory to read into; None without a GPU, or where it has none to spare."""
    if device.type != "cuda":
        return None
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        log.warning("no VRAM is free to measure reads into it: they go through memory")
        return None


class _DeviceTrial:
    """A reader into device memory, whose bytes nobody wants: all lanes share it."""

    def __init__(self, reader: DeviceReader, memory: torch.Tensor) -> None:
        self._reader, self._memory = reader, memory

    def read(self, lane: int, place: Place, nbytes: int) -> None:
        """See `Trial`."""
        self._reader.read_device(*place, self._memory[:nbytes])
