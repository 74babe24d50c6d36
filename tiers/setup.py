"""The tiers of an engine, within their budgets."""

import logging
from typing import NamedTuple

import torch

from tierrun.io.errors import BudgetError
from tierrun.io.extent import format_bytes
from tierrun.io.reads import PART_BYTES
from tierrun.io.store import Manifest, Store
from tierrun.tiers.budget import (
    Budget,
    DeviceFigures,
    TierPlan,
    device_reserve,
    host_memory,
    plan_tier,
)
from tierrun.tiers.memory import DeviceMemory, Memory, OrdinaryMemory, PinnedMemory
from tierrun.tiers.slab import Slab
from tierrun.tiers.tier import Tier

log = logging.getLogger(__name__)

_LEAST_CHUNKS, _CHUNK_BYTES = 8, 256 << 20
"""Pieces of a device's slab that can be given back one by one: so many, none much larger."""


class DeviceTiers(NamedTuple):
    """The tiers of an engine on a GPU: `hot` in VRAM, `warm` in pinned memory where reads land.

    `none` is the empty hot tier of the residency below. `in_place`: kernels can read `warm`.
    """

    hot: Tier
    warm: Tier
    none: Tier
    in_place: bool


def make_tiers(manifest: Manifest, vram: Budget, ram: Budget) -> tuple[Tier, Tier]:
    """The hot and the warm tier; says what each took and why.

    Raises:
        BudgetError: the tier that reads land in is too small, with the flag and what works; or
            both together are more than this process may use.
    """
    landing_is_hot = ram.nbytes == 0 and vram.nbytes > 0
    hot = _plan("--vram", manifest, vram, landing=landing_is_hot)
    warm = _plan("--ram", manifest, ram, landing=not landing_is_hot)
    memory = host_memory()
    if hot.nbytes + warm.nbytes > memory.total:
        raise BudgetError(
            f"--vram and --ram take {format_bytes(hot.nbytes + warm.nbytes)} together, this "
            f"process may use {format_bytes(memory.total)} ({memory.limit})"
        )
    ordinary = OrdinaryMemory()
    return (
        _make_tier("hot", manifest, vram, hot, ordinary),
        _make_tier("warm", manifest, ram, warm, ordinary),
    )


def make_device_tiers(
    manifest: Manifest, vram: Budget, ram: Budget, device: torch.device, *, strict: bool
) -> DeviceTiers:
    """The tiers for `device`; says what each took and why.

    Raises:
        BudgetError: one cannot hold a layer's top-k and one more, with the flag and what works, or
            is refused.
        UsageError: with `strict`, the warm tier cannot be pinned.
    """
    hot = _plan("--vram", manifest, vram, landing=True)
    warm = _plan("--ram, in which reads land", manifest, ram, landing=True)
    on_gpu = device.type == "cuda"
    pinned = PinnedMemory(device, strict=strict)
    nothing = TierPlan(hot.extent_bytes, ())
    below = _make_tier("warm", manifest, ram, warm, pinned if on_gpu else OrdinaryMemory())
    return DeviceTiers(
        _make_tier("hot", manifest, vram, hot, DeviceMemory(device), _num_chunks(hot)),
        below,
        _make_tier("none", manifest, Budget(0, ""), nothing, OrdinaryMemory()),
        not on_gpu or pinned.is_read_in_place(below.slab.base),
    )


def device_figures(device: torch.device) -> DeviceFigures:
    """What a GPU has and what is free on it now, unused parts of torch's allocator included."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return DeviceFigures(total, free + cached, torch.cuda.get_device_name(device))


def spare_bytes(device: torch.device, workspace: int) -> int:
    """What is free on a GPU but for its reserve and a `workspace`."""
    figures = device_figures(device)
    return max(0, figures.free - device_reserve(figures.total) - workspace)


def _num_chunks(plan: TierPlan) -> int:
    return max(_LEAST_CHUNKS, -(-plan.nbytes // _CHUNK_BYTES))


def _plan(flag: str, manifest: Manifest, budget: Budget, *, landing: bool) -> TierPlan:
    try:
        return plan_tier(budget.nbytes, manifest, landing=landing)
    except BudgetError as error:
        raise BudgetError(f"{flag}: {error} (this one: {budget.reason})") from None


def _make_tier(
    name: str,
    manifest: Manifest,
    budget: Budget,
    plan: TierPlan,
    memory: Memory,
    num_chunks: int = 1,
) -> Tier:
    slab = Slab(len(plan.extent_classes), plan.extent_bytes, memory, num_chunks)
    tier = Tier(name, slab, tuple(c.nbytes for c in manifest.classes))
    for extent, record_class in enumerate(plan.extent_classes):
        tier.assign(extent, record_class)
    if budget.nbytes:
        size, share = format_bytes(slab.nbytes), f"{tier.num_slots} of {manifest.num_experts}"
        log.info("%s tier: %s for %s experts (%s)", name, size, share, budget.reason)
    return tier


def prefill_window(store: Store, landing: Tier, depth: int) -> int:
    """Reads ahead of the compute in prefill: records for `depth` parts in flight per directory."""
    parts = depth * len({path.parent for path in store.shard_paths})
    smallest = min(c.nbytes for c in store.manifest.classes)
    wanted = -(-parts * PART_BYTES // smallest) + 1
    slots = min(landing.num_slots_of(c) for c in range(len(store.manifest.classes)))
    return max(1, min(wanted, slots // 2, 2 * parts))
