"""The slots in VRAM: which are free, proven or unproven, and who may stay.

A missing expert is copied into a free or an unproven slot. If it then proves to be worth more than
the least of the proven ones, the two change roles and nothing is copied: the other's slot becomes
unproven, and goes on being hit until it is reused. So of each record class a *reserve* of slots is
free or unproven at any time: at least the top-k of its layers, so that one layer's misses always
find a place; more where that costs little, so that prefill has room to copy ahead.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tierrun.tiers.placement import Placement
from tierrun.tiers.slottable import ABSENT, SlotTable
from tierrun.tiers.tier import NOBODY, SlotState, Tier

_READY = int(SlotState.READY)

_RANKED = 32
"""Slots that are ranked at once: more than one step displaces, most of the time."""

_SHARE_OF_RESERVE = 16
_MOST_RESERVE = 96
"""The reserve is at most a 16th of the slots, and 96, unless top-k is more."""


_COPY_PAYS = 2.0
"""How much more than the least proven one must be worth whose copy serves nothing else."""


@dataclass(slots=True)
class _Ranking:
    """The proven slots of least worth at `step`, the least last, and what each was worth then."""

    step: int = -1
    slots: list[int] = field(default_factory=list)
    worth: list[float] = field(default_factory=list)


class VramSlots:
    """Slots of `tier`, whose offsets `table` publishes. `slot_of` is −1 for experts elsewhere.

    Guarantees: a leased slot is never taken from its expert; free and unproven slots of a class are
    never fewer than its reserve.
    """

    def __init__(self, placement: Placement, tier: Tier, table: SlotTable) -> None:
        self.tier, self.table, self._placement = tier, table, placement
        num_experts, classes = len(table.mirror), range(len(tier.record_bytes))
        self.slot_of: NDArray[np.int64] = np.full(num_experts, NOBODY, dtype=np.int64)
        self.proven_experts: NDArray[np.bool_] = np.zeros(num_experts, dtype=np.bool_)
        slots = range(len(tier.owner))
        self._offsets = [tier.slab.offset(tier.memory(slot)) for slot in slots]
        self._class = tier.record_class.tolist()
        self.least = least_reserve(placement, tier)
        self._unproven: list[dict[int, None]] = [{} for _ in classes]
        self._filling: set[int] = set()
        self.deferred: set[int] = set()
        """Those that copies fill which no call waits for."""
        self._rankings = [_Ranking() for _ in classes]
        self.reserve = [self._reserve_of(record_class) for record_class in classes]

    def _reserve_of(self, record_class: int) -> int:
        slots = self.tier.num_slots_of(record_class)
        ample = min(_MOST_RESERVE, slots // _SHARE_OF_RESERVE)
        return min(slots, max(self.least[record_class], ample))

    def offset(self, slot: int) -> int:
        """Where the slot begins, in bytes from the slab's base."""
        return self._offsets[slot]

    def slack(self, record_class: int) -> int:
        """How many more slots may become proven."""
        coming = sum(self._class[slot] == record_class for slot in self.deferred)
        return self._num_open(record_class) + coming - self.reserve[record_class]

    def _num_open(self, record_class: int) -> int:
        return self.tier.num_free(record_class) + len(self._unproven[record_class])

    def num_passing(self, record_class: int) -> int:
        """Slots that are free, or hold something unproven and are not leased."""
        leases = self.tier.leases
        idle = sum(leases[slot] == 0 for slot in self._unproven[record_class])
        return self.tier.num_free(record_class) + int(idle)

    # -- filling --------------------------------------------------------------------------------

    def make_room(self, record_class: int, count: int) -> bool:
        """Evict unproven experts, the least worth first, until `count` slots are free.

        False, and nothing is changed, where too few are unleased.
        """
        needed = count - self.tier.num_free(record_class)
        if needed <= 0:
            return True
        leases = self.tier.leases
        idle = [slot for slot in self._unproven[record_class] if leases[slot] == 0]
        if len(idle) < needed:
            return False
        worth = self._worth(idle)
        for place in np.argsort(worth, kind="stable")[:needed].tolist():
            self.evict(idle[place])
        return True

    def take(self, record_class: int, expert: int) -> int:
        """A slot for a copy of `expert`, for which room has been made; unproven, not yet seen."""
        slot = self.tier.take(record_class, expert, proven=False)
        assert slot is not None, "no room was made"
        self._filling.add(slot)
        return slot

    def take_deferred(self, record_class: int, expert: int) -> int | None:
        """A slot for a copy of `expert` that goes on after the call; FILLING until `publish`.

        None where the layers' misses would not find enough places beside it.
        """
        enough = self._num_open(record_class) > self.least[record_class]
        if not enough or not self.make_room(record_class, 1):
            return None
        slot = self.take(record_class, expert)
        self._filling.remove(slot)
        self.deferred.add(slot)
        return slot

    def publish(self, slot: int) -> None:
        """The copy into `slot` is enqueued: lookups that are enqueued later may find it."""
        expert = int(self.tier.owner[slot])
        self.tier.state[slot] = _READY
        self._filling.discard(slot)
        self.deferred.discard(slot)
        self.slot_of[expert] = slot
        self.table.set(expert, self._offsets[slot])
        self._unproven[self._class[slot]][slot] = None

    def evict(self, slot: int) -> None:
        """Free an unleased slot; its expert is nowhere in VRAM."""
        expert = int(self.tier.owner[slot])
        self.slot_of[expert] = NOBODY
        self.proven_experts[expert] = False
        self.table.clear(expert)
        self._unproven[self._class[slot]].pop(slot, None)
        self.tier.give(slot)

    def sweep(self) -> None:
        """Free the slots whose copy was never published, after an error."""
        for slot in self._filling:
            self.tier.give(slot)
        self._filling.clear()

    # -- staying --------------------------------------------------------------------------------

    def make_place(self, record_class: int, expert: int) -> list[int] | None:
        """Let `expert`, which is to come, find a place among the proven.

        The slots that became unproven for it; None where it is not worth that.
        """
        if self.slack(record_class) > 0:
            return []
        rival, its = self._least_proven(record_class)
        worth = self._placement.policy.worth(np.array([expert]), self._placement.step)
        if rival is None or float(worth[0]) <= _COPY_PAYS * its:
            return None
        self.unprove(rival)
        return [rival]

    def admit(self, slots: Sequence[int]) -> list[int]:
        """Prove those of `slots` that are worth it; the slots that became unproven instead."""
        if not any(slot in self._unproven[self._class[slot]] for slot in slots):
            return []
        worth = self._worth(slots).tolist()
        displaced = [self._admit(*pair) for pair in zip(slots, worth, strict=True)]
        return [slot for slot in displaced if slot is not None and not self.tier.proven[slot]]

    def _admit(self, slot: int, worth: float) -> int | None:
        record_class = self._class[slot]
        if slot not in self._unproven[record_class]:
            return None
        if self.slack(record_class) > 0:
            self.prove(slot)
            return None
        rival, its = self._least_proven(record_class)
        if rival is None or worth <= its:
            return None
        self.unprove(rival)
        self.prove(slot)
        return rival

    def prove(self, slot: int) -> None:
        """`slot` keeps its expert until a better one comes."""
        self._set_proven(slot, True)
        self._unproven[self._class[slot]].pop(slot, None)

    def unprove(self, slot: int) -> None:
        """`slot` may be reused."""
        self._set_proven(slot, False)
        self._unproven[self._class[slot]][slot] = None

    def _set_proven(self, slot: int, proven: bool) -> None:
        self.tier.proven[slot] = proven
        self.proven_experts[self.tier.owner[slot]] = proven

    def _least_proven(self, record_class: int) -> tuple[int | None, float]:
        """The proven slot that is worth least, and its worth.

        The least are ranked once a step: within one, only those that are used or come change, and
        these are worth more than they were.
        """
        ranking = self._rankings[record_class]
        if ranking.step != self._placement.step:
            self._rank(record_class)
        slot, worth = self._next_ranked(ranking)
        if slot is None:
            self._rank(record_class)
            slot, worth = self._next_ranked(ranking)
        return slot, worth

    def _next_ranked(self, ranking: _Ranking) -> tuple[int | None, float]:
        while ranking.slots:
            slot = ranking.slots[-1]
            if self.tier.proven[slot]:
                worth = float(self._worth([slot])[0])
                if worth <= ranking.worth[-1]:
                    return slot, worth
            ranking.slots.pop()
            ranking.worth.pop()
        return None, 0.0

    def _rank(self, record_class: int) -> None:
        proven = self.tier.proven & (self.tier.record_class == record_class)
        slots = np.flatnonzero(proven)
        worth = self._placement.policy.worth(self.tier.owner[slots], self._placement.step)
        if len(slots) > _RANKED:
            least = np.flatnonzero(worth <= np.partition(worth, _RANKED)[_RANKED])
            slots, worth = slots[least], worth[least]
        order = np.argsort(-worth, kind="stable")
        ranking = self._rankings[record_class]
        ranking.step = self._placement.step
        ranking.slots, ranking.worth = slots[order].tolist(), worth[order].tolist()

    def _worth(self, slots: Sequence[int]) -> NDArray[np.float64]:
        owners = self.tier.owner[slots]
        return self._placement.policy.worth(owners, self._placement.step)

    # -- when the slab shrinks and grows --------------------------------------------------------

    def retire(self, extents: Iterable[int]) -> None:
        """Evict whatever lies in `extents`, none of it leased, and never use them again."""
        for extent in extents:
            for slot in self.tier.slots_in(extent):
                if self.tier.state[slot] == SlotState.READY:
                    self.evict(slot)
                self._offsets[slot] = ABSENT
            self.tier.retire(extent)
        self.table.flush()
        self._restore_reserves()

    def revive(self, extents: Iterable[int]) -> None:
        """Use `extents` again, which have memory again; no lookup may be under way.

        Offsets change where the memory came below what was the slab's base.
        """
        tier = self.tier
        for extent in extents:
            tier.revive(extent)
        for slot in np.flatnonzero(tier.state != SlotState.RETIRED).tolist():
            self._offsets[slot] = tier.slab.offset(tier.memory(slot))
        for expert in np.flatnonzero(self.slot_of != NOBODY).tolist():
            self.table.set(expert, self._offsets[self.slot_of[expert]])
        self.table.rebase(tier.slab.base.data_ptr())
        self.table.flush()
        self._restore_reserves()

    def _restore_reserves(self) -> None:
        for record_class in range(len(self.reserve)):
            self.reserve[record_class] = self._reserve_of(record_class)
            while self.slack(record_class) < 0:
                weakest, _ = self._least_proven(record_class)
                assert weakest is not None, "a reserve larger than its class"
                self.unprove(weakest)

    def check_integrity(self) -> None:
        """free + unproven + proven = slots, and table, mirror and slots tell the same story."""
        tier = self.tier
        assert not self._filling, "copies of no call"
        tier.check_integrity(self.deferred)
        ready = np.flatnonzero(tier.state == SlotState.READY).tolist()
        assert {int(tier.owner[s]): s for s in ready} == {
            int(expert): int(self.slot_of[expert])
            for expert in np.flatnonzero(self.slot_of != NOBODY)
        }, "slots and experts differ"
        offsets = np.full(len(self.slot_of), ABSENT)
        offsets[tier.owner[ready]] = [self._offsets[slot] for slot in ready]
        assert np.array_equal(offsets, self.table.mirror), "slots and table differ"
        unproven = {slot for slots in self._unproven for slot in slots}
        assert unproven == {slot for slot in ready if not tier.proven[slot]}, "unproven differ"
        proven = np.flatnonzero(self.proven_experts).tolist()
        assert sorted(tier.owner[tier.proven].tolist()) == proven, "proven differ"
        for record_class, reserve in enumerate(self.reserve):
            assert reserve >= min(self.least[record_class], tier.num_slots_of(record_class))
            assert self.slack(record_class) >= 0, "less than the reserve is free or unproven"
        self.table.check_integrity()


def least_reserve(placement: Placement, tier: Tier) -> list[int]:
    """Per record class the largest top-k of its layers."""
    least = [0] * len(tier.record_bytes)
    for record_class, top_k in zip(placement.class_of_layer, placement.top_k, strict=True):
        least[record_class] = max(least[record_class], top_k)
    return least
