"""The tiers of an engine, within their budgets."""

import logging

from tierrun.io.errors import BudgetError
from tierrun.io.extent import format_bytes
from tierrun.io.reads import PART_BYTES
from tierrun.io.store import Manifest
from tierrun.tiers.budget import Budget, plan_tier
from tierrun.tiers.slab import Slab
from tierrun.tiers.tier import Tier

log = logging.getLogger(__name__)


def make_tiers(manifest: Manifest, vram: Budget, ram: Budget) -> tuple[Tier, Tier]:
    """The hot and the warm tier; says what each took and why.

    Raises:
        BudgetError: the tier that reads land in is too small; names the flag and what works.
    """
    landing_is_hot = ram.nbytes == 0 and vram.nbytes > 0
    return (
        _make_tier("hot", "--vram", manifest, vram, landing=landing_is_hot),
        _make_tier("warm", "--ram", manifest, ram, landing=not landing_is_hot),
    )


def _make_tier(name: str, flag: str, manifest: Manifest, budget: Budget, *, landing: bool) -> Tier:
    try:
        plan = plan_tier(budget.nbytes, manifest, landing=landing)
    except BudgetError as error:
        raise BudgetError(f"{flag}: {error}") from None
    slab = Slab(len(plan.extent_classes), plan.extent_bytes)
    tier = Tier(name, slab, tuple(c.nbytes for c in manifest.classes))
    for extent, record_class in enumerate(plan.extent_classes):
        tier.assign(extent, record_class)
    if budget.nbytes:
        size, share = format_bytes(slab.nbytes), f"{tier.num_slots} of {manifest.num_experts}"
        log.info("%s tier: %s for %s experts (%s)", name, size, share, budget.reason)
    return tier


def prefill_window(manifest: Manifest, landing: Tier, depth: int) -> int:
    """Reads ahead of the compute in prefill: enough records to keep `depth` parts in flight."""
    smallest = min(c.nbytes for c in manifest.classes)
    wanted = -(-depth * PART_BYTES // smallest) + 1
    slots = min(landing.num_slots_of(c) for c in range(len(manifest.classes)))
    return max(1, min(wanted, slots // 2, 2 * depth))
