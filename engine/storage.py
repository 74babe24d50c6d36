"""Which way experts take from the drive to memory and to VRAM: measured once per drive and GPU."""

import logging
import os
from collections.abc import Iterable, Sequence

import torch

from tierrun.engine.options import Options
from tierrun.engine.trials import measure_store
from tierrun.io import gds
from tierrun.io.drives import Drive, drives_of
from tierrun.io.extent import format_bytes
from tierrun.io.gds import GdsReader
from tierrun.io.measuring import describe, record_sizes, short_plan
from tierrun.io.profiles import WAYS, Profile, ProfileFile, Setting, choose_paths
from tierrun.io.reader import Measured, choose_reader, num_threads
from tierrun.io.store import Store
from tierrun.tiers.staging import BounceBuffers, DeviceReader, SparedDeviceReader, StagedReader
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
    setting = setting_of(store, device)
    file = ProfileFile(drives_of(path.parent for path in store.shard_paths))
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


def drive_bandwidth(store: Store) -> float | None:
    """Bytes per second that the drives of `store` are known to give; None where nobody has measured
    them."""
    drives = drives_of(path.parent for path in store.shard_paths)
    known = ProfileFile(drives).read()
    if known is None or known.setting.drives != _identities(drives):
        return None
    return known.restricted(record_sizes(store)).fastest("host")


def _identities(drives: Iterable[Drive]) -> str:
    return ", ".join(drive.identity for drive in drives)


def _reason_to_measure(known: Profile | None, setting: Setting, sizes: Sequence[int]) -> str | None:
    """Why `known` does not do, in a clause; None if it does."""
    if known is None:
        return "there is no profile of it"
    changed = setting.difference(known.setting)
    if changed is not None:
        return f"its profile is of something else: {changed}"
    missing = [nbytes for nbytes in sizes if known.stand_in(nbytes) is None]
    return f"its profile has no records of about {format_bytes(missing[0])}" if missing else None


def setting_of(store: Store, device: torch.device, obstacle: str | None = None) -> Setting:
    """What numbers about `store` and `device` are true for; `obstacle`: why there is no kvikio."""
    drives = drives_of(path.parent for path in store.shard_paths)
    return Setting(
        drives=_identities(drives),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        kvikio="none" if obstacle else gds.version(),
        mode=f"no kvikio: {obstacle}" if obstacle else gds.mode().reason,
    )


def open_straight(
    store: Store, options: Options, device: torch.device, to_device: str
) -> StraightReads:
    """What reads experts into VRAM without a stay in the warm tier: `Measured.to_device`.

    Where kvikio fails in mid-run, its reads are repeated through pinned memory, then all go there.
    """
    paths, threads = store.shard_paths, num_threads(store.shard_paths, options.depth)
    buffers = BounceBuffers(device, threads)
    direct = choose_reader("direct", paths).name == "direct"
    staged = StagedReader(paths, buffers, os.O_DIRECT if direct else 0)
    reader: DeviceReader = staged
    closers = [staged.close]
    if to_device == "gds":
        kvikio = GdsReader(paths, options.depth)
        reader = SparedDeviceReader(kvikio, staged)
        closers.append(kvikio.close)

    def close() -> None:
        for closer in closers:
            closer()

    return StraightReads(store, reader, buffers, threads, close)
