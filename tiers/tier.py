"""The slots of one tier: which expert each holds, in which state, under how many leases."""

from collections.abc import Collection
from enum import IntEnum

import numpy as np
import torch

from tierrun.io.tickets import Ticket
from tierrun.tiers.slab import Slab

NOBODY = -1
"""Owner of a slot that holds no expert."""


class SlotState(IntEnum):
    """FREE → FILLING → READY → FREE; only READY slots are read, only unleased ones evicted.

    A RETIRED slot has no memory any more.
    """

    FREE = 0
    FILLING = 1
    READY = 2
    RETIRED = 3


_FREE, _FILLING = int(SlotState.FREE), int(SlotState.FILLING)
"""Plain numbers for what every miss does: looking up and converting an enum's costs more."""


class Tier:
    """Slots carved from the extents of a slab, by record class.

    `owner`, `state`, `leases`, `proven` and `record_class` are arrays over slots. A slot is
    *unproven* until a lookup has wanted what it holds: look-ahead and prefill leave such slots,
    and they are the first to be reused.
    """

    def __init__(self, name: str, slab: Slab, record_bytes: tuple[int, ...]) -> None:
        self.name, self.slab, self.record_bytes = name, slab, record_bytes
        self.owner = np.empty(0, dtype=np.int64)
        self.state = np.empty(0, dtype=np.int8)
        self.leases = np.empty(0, dtype=np.int32)
        self.proven = np.empty(0, dtype=np.bool_)
        self.record_class = np.empty(0, dtype=np.int16)
        self.tickets: dict[int, Ticket] = {}
        self._views: list[torch.Tensor] = []
        self._extent_of: list[int] = []
        self._free: list[list[int]] = [[] for _ in record_bytes]

    def assign(self, extent: int, record_class: int) -> None:
        """Cut an unassigned extent into slots for `record_class`."""
        assert extent not in self._extent_of, f"extent {extent} is assigned already"
        nbytes = self.record_bytes[record_class]
        count = self.slab.extent_bytes // nbytes
        first = len(self._views)
        self._views += [self.slab.view(extent, i * nbytes, nbytes) for i in range(count)]
        self._extent_of += [extent] * count
        self._free[record_class] += range(first + count - 1, first - 1, -1)
        self.owner = np.append(self.owner, np.full(count, NOBODY))
        self.state = np.append(self.state, np.zeros(count, np.int8))
        self.leases = np.append(self.leases, np.zeros(count, np.int32))
        self.proven = np.append(self.proven, np.zeros(count, np.bool_))
        self.record_class = np.append(self.record_class, np.full(count, record_class, np.int16))

    def slots_in(self, extent: int) -> list[int]:
        """The slots that were cut from `extent`."""
        return [slot for slot, its in enumerate(self._extent_of) if its == extent]

    def retire(self, extent: int) -> None:
        """Let go of the memory of an extent's slots, which are FREE, and never use them again."""
        for slot in self.slots_in(extent):
            assert self.state[slot] == SlotState.FREE, f"slot {slot} of {self.name} is in use"
            self._free[int(self.record_class[slot])].remove(slot)
            self.state[slot], self.record_class[slot] = SlotState.RETIRED, NOBODY
            self._views[slot] = torch.empty(0, dtype=torch.uint8)

    @property
    def num_slots(self) -> int:
        return int((self.state != SlotState.RETIRED).sum())

    def num_slots_of(self, record_class: int) -> int:
        return int((self.record_class == record_class).sum())

    def num_free(self, record_class: int) -> int:
        return len(self._free[record_class])

    def memory(self, slot: int) -> torch.Tensor:
        """uint8 view of the slot's bytes; stays valid until the slot is retired."""
        return self._views[slot]

    def take(self, record_class: int, owner: int, *, proven: bool) -> int | None:
        """A free slot, now FILLING for `owner`; None when there is none."""
        if not self._free[record_class]:
            return None
        slot = self._free[record_class].pop()
        self.owner[slot], self.state[slot], self.proven[slot] = owner, _FILLING, proven
        return slot

    def give(self, slot: int) -> None:
        """Back to the free list; the slot must not be leased."""
        assert self.leases[slot] == 0, f"slot {slot} of {self.name} is leased"
        assert self.state[slot] != _FREE, f"slot {slot} of {self.name} is free already"
        self.owner[slot], self.state[slot], self.proven[slot] = NOBODY, _FREE, False
        self.tickets.pop(slot, None)
        self._free[int(self.record_class[slot])].append(slot)

    def evictable(self, record_class: int, *, unproven_only: bool = False) -> np.ndarray:
        """Slots of the class that are READY and unleased."""
        mask = (self.state == SlotState.READY) & (self.leases == 0)
        mask &= self.record_class == record_class
        if unproven_only:
            mask &= ~self.proven
        return np.flatnonzero(mask)

    def check_integrity(self, copied: Collection[int] = ()) -> None:
        """free + filling + ready = slots, and each array tells the same story.

        `copied` are the slots that copies fill, not reads.
        """
        free = sorted(slot for slots in self._free for slot in slots)
        assert free == np.flatnonzero(self.state == SlotState.FREE).tolist(), "free list differs"
        assert (self.owner[free] == NOBODY).all(), "a free slot has an owner"
        held = self.owner[(self.state == SlotState.FILLING) | (self.state == SlotState.READY)]
        assert len(set(held.tolist())) == len(held) and (held >= 0).all(), (
            "an owner holds two slots"
        )
        assert (self.leases >= 0).all() and (self.leases[free] == 0).all(), "a free slot is leased"
        filling = set(np.flatnonzero(self.state == SlotState.FILLING).tolist())
        coming = {*self.tickets, *copied}
        assert filling == coming, "filling slots and what is under way differ"
        assert self.slab.num_extents >= len(set(self._extent_of)), "more extents than the slab has"
