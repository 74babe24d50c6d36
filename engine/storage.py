"""Which way experts take from the drive to memory and to VRAM: measured once per drive and GPU."""

import asyncio
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

import torch

from tierrun.engine.options import Options
from tierrun.io import gds
from tierrun.io.direct import DirectReader
from tierrun.io.drives import Drive, drives_of
from tierrun.io.extent import format_bytes
from tierrun.io.gds import GdsReader
from tierrun.io.measuring import HostTrial, Place, Plan, Trial, describe, measure, short_plan
from tierrun.io.profiles import (
    DIRECT,
    GDS,
    GDS_DEVICE,
    STAGED,
    WAYS,
    Cell,
    Profile,
    ProfileFile,
    Setting,
    Way,
    choose_paths,
)
from tierrun.io.reader import Measured, choose_reader, num_threads
from tierrun.io.store import Store
from tierrun.tiers.staging import DeviceReader, Lanes, SparedDeviceReader, StagedReader
from tierrun.tiers.straight import StraightReads

log = logging.getLogger(__name__)


def measured_paths(store: Store, options: Options, device: torch.device) -> Measured:
    """The ways to use for `store` on `device`; measures its drives if nobody has yet (`--io auto`).

    Never raises for what GPUDirect Storage lacks: the usual ways are used, and the reason says so.
    """
    if options.io == "gds":
        usable = choose_reader("gds", store.shard_paths).name == "gds"
        return Measured("gds", "gds" if usable else "staged", "as asked")
    if options.io != "auto":
        return Measured(options.io, "staged", "as asked")
    obstacle = _obstacle(store, device)
    if obstacle is not None:
        return Measured("direct", "staged", f"gds: off, {obstacle}")
    try:
        return choose_paths(_profile(store, device))
    except OSError as error:
        return Measured("direct", "staged", f"gds: off, it could not be measured: {error}")


def _obstacle(store: Store, device: torch.device) -> str | None:
    """Why there is nothing to measure, or None."""
    if device.type != "cuda":
        return "it is for GPUs"
    usual = choose_reader("auto", store.shard_paths)
    return usual.reason if usual.fallback else gds.obstacle_to_gds(store.shard_paths[0])


def _profile(store: Store, device: torch.device) -> Profile:
    """What is known about the drives of `store`, measured now as far as it is not."""
    drives = drives_of(path.parent for path in store.shard_paths)
    setting, file = _setting(drives, device), ProfileFile(drives)
    known, plan = file.read(), short_plan(store, len(WAYS))
    reason = _reason_to_measure(known, setting, plan.sizes)
    if known is not None and reason is None:
        return known.restricted(plan.sizes)
    log.info("measuring how to read %s, once, a few seconds (%s)", store.roots[0], reason)
    cells = measure_store(store, device, plan)
    for line in describe(cells):
        log.debug("%s", line)
    same = known is not None and setting == known.setting
    before = known if known is not None and same else Profile(setting, ())
    profile = before.joined(cells)
    if {cell.way for cell in cells} == set(WAYS):
        file.write(profile)
    return profile.restricted(plan.sizes)


def _reason_to_measure(known: Profile | None, setting: Setting, sizes: Sequence[int]) -> str | None:
    """Why `known` does not do, in a clause; None if it does."""
    if known is None:
        return "there is no profile of it"
    changed = setting.difference(known.setting)
    if changed is not None:
        return f"its profile was of another {changed}"
    missing = [nbytes for nbytes in sizes if known.stand_in(nbytes) is None]
    return f"its profile has no records of about {format_bytes(missing[0])}" if missing else None


def _setting(drives: Sequence[Drive], device: torch.device) -> Setting:
    return Setting(
        drives=", ".join(drive.identity for drive in drives),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        kvikio=gds.version(),
        mode=gds.mode().reason,
    )


# -- measuring --------------------------------------------------------------------------------


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
        lanes = Lanes(self._memory.device, self._threads)
        self._stack.callback(lanes.release)
        reader = StagedReader(self._paths, lanes, os.O_DIRECT)
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


# -- reading into VRAM ------------------------------------------------------------------------


def open_straight(
    store: Store, options: Options, device: torch.device, to_device: str
) -> StraightReads:
    """What reads experts into VRAM without a stay in the warm tier: `Measured.to_device`.

    Where kvikio fails in mid-run, its reads are repeated through pinned memory, then all go there.
    """
    paths, threads = store.shard_paths, num_threads(store.shard_paths, options.depth)
    lanes = Lanes(device, threads)
    direct = choose_reader("direct", paths).name == "direct"
    staged = StagedReader(paths, lanes, os.O_DIRECT if direct else 0)
    reader: DeviceReader = staged
    closers = [staged.close]
    if to_device == "gds":
        kvikio = GdsReader(paths, options.depth)
        reader = SparedDeviceReader(kvikio, staged)
        closers.append(kvikio.release)

    def close() -> None:
        for closer in closers:
            closer()

    return StraightReads(store, reader, lanes, threads, close)
