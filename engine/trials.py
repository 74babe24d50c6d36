"""Every way from a store's drives into RAM and VRAM, tried on its own records."""

import asyncio
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

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

    On a thread of its own: the caller's may have an event loop that runs, as in a notebook.

    Raises:
        OSError: the shards cannot be opened.
    """
    with ThreadPoolExecutor(1, "tierrun-measuring") as pool:
        return pool.submit(asyncio.run, _measure(store, device, plan, with_gds)).result()


async def _measure(store: Store, device: torch.device, plan: Plan, with_gds: bool) -> list[Cell]:
    paths, depth, largest = store.shard_paths, max(plan.depths), max(plan.sizes)
    async with AsyncExitStack() as stack:
        direct = DirectReader(paths, depth)
        stack.push_async_callback(direct.close)
        trials: dict[Way, Trial] = {DIRECT: HostTrial(direct, largest)}
        into_device = _DeviceTrials(store, device, plan, stack)
        trials |= into_device.staged()
        if with_gds:
            kvikio = GdsReader(paths, depth)
            stack.push_async_callback(kvikio.close)
            trials |= {GDS: HostTrial(kvikio, largest)} | into_device.of(GDS_DEVICE, kvikio)
        return await measure(store, trials, plan)


class _DeviceTrials:
    """Trials of reads into VRAM; none without a GPU, or where it has no memory to spare."""

    def __init__(
        self, store: Store, device: torch.device, plan: Plan, stack: AsyncExitStack
    ) -> None:
        self._paths, self._threads, self._stack = store.shard_paths, max(plan.depths), stack
        self._memory = _device_memory(max(plan.sizes), device)
        self._pool = stack.enter_context(ThreadPoolExecutor(self._threads, "tierrun-trial"))

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
        return {way: _DeviceTrial(reader, self._memory, self._pool)}


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

    def __init__(
        self, reader: DeviceReader, memory: torch.Tensor, pool: ThreadPoolExecutor
    ) -> None:
        self._reader, self._memory, self._pool = reader, memory, pool

    async def read(self, lane: int, place: Place, nbytes: int) -> None:
        """See `Trial`."""
        loop, into = asyncio.get_running_loop(), self._memory[:nbytes]
        await loop.run_in_executor(self._pool, self._reader.read_device, *place, into)
