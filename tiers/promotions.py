"""Copies up that nobody waits for: of what was computed in RAM, and is worth a slot in VRAM.

They begin after the layers that wanted the experts, on a stream of their own; what they displace
goes down. An expert is found in RAM until its copy has landed, and in VRAM from then on.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tierrun.tiers.placement import Placement
from tierrun.tiers.tier import NOBODY
from tierrun.tiers.transfers import Transfers
from tierrun.tiers.vramslots import VramSlots

_MOST = 16
"""Under way at once: a millisecond of copies."""


class Promotions:
    """Decides which experts come up, and lets them be found when they have."""

    def __init__(self, placement: Placement, slots: VramSlots, transfers: Transfers) -> None:
        self._placement, self._slots, self._transfers = placement, slots, transfers
        classes = np.array(placement.class_of_layer)
        self._class_of: NDArray[np.int64] = np.repeat(classes, np.diff(placement.first))
        self._spare_warm = [self._spare_of(number) for number in range(len(slots.reserve))]
        self._noted: list[int] = []

    def _spare_of(self, record_class: int) -> int:
        """Warm slots that may be held while a layer is leased and one more is read."""
        placement = self._placement
        pairs = zip(placement.class_of_layer, placement.top_k, strict=True)
        needed = max((k for number, k in pairs if number == record_class), default=0) + 1
        return placement.warm.num_slots_of(record_class) - needed

    @property
    def coming(self) -> set[int]:
        """Experts that are under way."""
        return {int(self._slots.tier.owner[slot]) for slot in self._slots.deferred}

    def note(self, experts: Sequence[int]) -> None:
        """`experts` were read into RAM and computed there; the next start is theirs too."""
        self._noted += experts

    @property
    def are_noted(self) -> bool:
        """Whether any is."""
        return bool(self._noted)

    def start(self, experts: NDArray[np.int64]) -> None:
        """Start the copies of those of `experts` and of the noted ones that VRAM would keep.

        Only those come that are in RAM and not in VRAM by now.
        """
        experts = np.union1d(experts, np.array(self._noted, np.int64))
        self._noted.clear()
        experts = experts[self._slots.slot_of[experts] == NOBODY]
        if not len(experts):
            return
        worth = self._placement.policy.worth(experts, self._placement.step)
        pairs, sinking = list[tuple[int, int]](), list[int]()
        above, below = self._slots.tier.leases, self._placement.warm.leases
        try:
            for expert in experts[np.argsort(-worth, kind="stable")].tolist():
                record_class = int(self._class_of[expert])
                home = self._placement.homes.get(expert)
                if not self._has_room(record_class, len(pairs)):
                    break
                if home is None or home.ticket is not None or expert in self.coming:
                    continue
                below[home.slot] += 1  # what sinks in its place takes another slot
                pairs.append((home.slot, NOBODY))
                displaced = self._slots.make_place(record_class, expert)
                if displaced is None and len(self._spare_warm) == 1:
                    break  # nor is any that is worth less
                if displaced is None:
                    continue
                above[displaced] += 1  # not to be reused before they have been copied
                sinking += displaced
                slot = self._slots.take_deferred(record_class, expert)
                if slot is not None:
                    pairs[-1] = (home.slot, slot)
            self._transfers.demote(sinking)
            chosen = [pair for pair in pairs if pair[1] != NOBODY]
            if chosen:
                self._transfers.defer(chosen)
        finally:
            for source, _ in pairs:
                below[source] -= 1
            for slot in sinking:
                above[slot] -= 1

    def _has_room(self, record_class: int, more: int) -> bool:
        """Whether a layer's experts find their slots, above and below, with one more held."""
        count = len(self._transfers.deferred) + more
        return count < min(_MOST, self._spare_warm[record_class])

    def land(self, *, wait: bool = False) -> None:
        """Let be found what has come, with `wait` all; it stays if it is still worth it."""
        slots = self._transfers.ended(wait=wait)
        for slot in slots:
            self._slots.publish(slot)
        if slots:
            self._transfers.admit(slots)
