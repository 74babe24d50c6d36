"""The slots of one tier: which expert each holds, in which state, under how many leases."""

from collections.abc import Collection
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from tierrun.io.tickets import Ticket
from tierrun.tiers.slab import Slab

NOBODY = -1
"""Owner of a slot that holds no expert."""


class SlotState(IntEnum):
    """FREE → FILLING → READY → FREE; only READY slots are read, only unleased ones evicted.

    A RETIRED slot has no memory, until its extent is revived.
    """

    FREE = 0
    FILLING = 1
    READY = 2
    RETIRED = 3


_FREE, _FILLING = int(SlotState.FREE), int(SlotState.FILLING)
"""Plain numbers for what every miss does: looking up and converting an enum's costs more."""


class _Cut(NamedTuple):
    """How an extent is cut: its slots, and their record class."""

    slots: range
    record_class: int


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
        self._cuts: dict[int, _Cut] = {}
        self._free: list[list[int]] = [[] for _ in record_bytes]

    def assign(self, extent: int, record_class: int) -> None:
        """Cut an unassigned extent into slots for `record_class`."""
        assert extent not in self._cuts, f"extent {extent} is assigned already"
        views = self._cut_up(extent, record_class)
        first, count = len(self._views), len(views)
        self._views += views
        self._cuts[extent] = _Cut(range(first, first + count), record_class)
        self._free[record_class] += range(first + count - 1, first - 1, -1)
        self.owner = np.append(self.owner, np.full(count, NOBODY))
        self.state = np.append(self.state, np.zeros(count, np.int8))
        self.leases = np.append(self.leases, np.zeros(count, np.int32))
        self.proven = np.append(self.proven, np.zeros(count, np.bool_))
        self.record_class = np.append(self.record_class, np.full(count, record_class, np.int16))

    def _cut_up(self, extent: int, record_class: int) -> list[torch.Tensor]:
        nbytes = self.record_bytes[record_class]
        count = self.slab.extent_bytes // nbytes
        return [self.slab.view(extent, i * nbytes, nbytes) for i in range(count)]

    def slots_in(self, extent: int) -> range:
        """The slots that were cut from `extent`."""
        return self._cuts[extent].slots

    def retire(self, extent: int) -> None:
        """Let go of the memory of an extent's slots, which are FREE: they are not used any more."""
        for slot in self.slots_in(extent):
            assert self.state[slot] == SlotState.FREE, f"slot {slot} of {self.name} is in use"
            self._free[int(self.record_class[slot])].remove(slot)
            self.state[slot], self.record_class[slot] = SlotState.RETIRED, NOBODY
            self._views[slot] = torch.empty(0, dtype=torch.uint8)

    def revive(self, extent: int) -> None:
        """Give the RETIRED slots of an extent, whose memory is there again, back as FREE ones."""
        slots, record_class = self._cuts[extent]
        for slot, view in zip(slots, self._cut_up(extent, record_class), strict=True):
            assert self.state[slot] == SlotState.RETIRED, f"slot {slot} of {self.name} has memory"
            self.state[slot], self.record_class[slot] = SlotState.FREE, record_class
            self._views[slot] = view
        self._free[record_class] += reversed(slots)

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
        assert self.slab.num_extents >= len(self._cuts), "more extents than the slab has"
        retired = self.state == SlotState.RETIRED
        assert (self.record_class[retired] == NOBODY).all(), "a slot without memory has a class"
        sizes = [len(view) for view in self._views]
        assert (np.flatnonzero(retired) == np.flatnonzero(np.array(sizes) == 0)).all(), (
            "slots without memory and retired ones differ"
        )
