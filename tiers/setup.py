"""The tiers of an engine, within their budgets."""

import logging

from tierrun.io.errors import BudgetError
from tierrun.io.extent import format_bytes
from tierrun.io.reads import PART_BYTES
from tierrun.io.store import Manifest, Store
from tierrun.tiers.budget import Budget, TierPlan, host_memory, plan_tier
from tierrun.tiers.slab import Slab
from tierrun.tiers.tier import Tier

log = logging.getLogger(__name__)


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
    return _make_tier("hot", manifest, vram, hot), _make_tier("warm", manifest, ram, warm)


def _plan(flag: str, manifest: Manifest, budget: Budget, *, landing: bool) -> TierPlan:
    try:
        return plan_tier(budget.nbytes, manifest, landing=landing)
    except BudgetError as error:
        raise BudgetError(f"{flag}: {error} (this one: {budget.reason})") from None


def _make_tier(name: str, manifest: Manifest, budget: Budget, plan: TierPlan) -> Tier:
    slab = Slab(len(plan.extent_classes), plan.extent_bytes)
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
