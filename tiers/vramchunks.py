"""The chunks of the slab in VRAM: which of them is worth least, given back and taken again.

What a chunk is worth in traffic (bytes per token that would have to be copied if it were not there)
is what an arbiter weighs against other uses of the memory.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tierrun.io.errors import BudgetError
from tierrun.tiers.placement import Placement
from tierrun.tiers.tier import NOBODY
from tierrun.tiers.vramslots import VramSlots

_Counts = NDArray[np.int64]
"""Slots of each record class."""


class VramChunks:
    """The chunks in which `slots` lie.

    Assumes: nothing is under way while one is dropped or restored.
    """

    def __init__(self, placement: Placement, slots: VramSlots) -> None:
        self._placement, self._slots = placement, slots
        self._tier, self._slab = slots.tier, slots.tier.slab
        sizes = np.array(slots.tier.record_bytes)[placement.class_of_layer]
        self._record_bytes: NDArray[np.int64] = np.repeat(sizes, np.diff(placement.first))

    # -- fewer and more -------------------------------------------------------------------------

    @property
    def can_drop(self) -> int:
        """Bytes that can be given back while every layer can still run."""
        left, given = self._counts(self._tier.record_class), 0
        for chunk in self._slab.droppable:
            lost = self._lost_with(chunk)
            if self._suffices(left - lost, lost):
                left, given = left - lost, given + self._slab.nbytes_of(chunk)
        return given

    def drop_least(self) -> int:
        """Give the chunk that is worth least back to the device; its bytes, or 0.

        One with a leased slot stays, as does one that a class needs.
        """
        chunks = [chunk for chunk in self._slab.droppable if self._may_drop(chunk)]
        if not chunks:
            return 0
        chunk = min(chunks, key=self._worth)
        self._slots.retire(self._slab.extents_of(chunk))
        return self._slab.drop(chunk)

    def restore(self, nbytes: int) -> int:
        """Take chunks that were dropped again, of at most `nbytes`; the bytes that came.

        Their slots are free. The slab's base, and with it every offset, may change.
        """
        restored = list(self._restore(nbytes))
        if restored:
            extents = [extent for chunk in restored for extent in self._slab.extents_of(chunk)]
            self._slots.revive(extents)
        return sum(map(self._slab.nbytes_of, restored))

    def _restore(self, nbytes: int) -> Iterable[int]:
        for chunk in self._slab.dropped:
            if self._slab.nbytes_of(chunk) > nbytes:
                continue
            try:
                self._slab.restore(chunk)
            except BudgetError:  # somebody else was quicker
                return
            nbytes -= self._slab.nbytes_of(chunk)
            yield chunk

    # -- what they are worth --------------------------------------------------------------------

    @property
    def traffic(self) -> float:
        """Bytes per token that are not copied because they are here."""
        return float(self._traffic_of(np.flatnonzero(self._slots.slot_of != NOBODY)).sum())

    def traffic_of_more(self, nbytes: int) -> float:
        """Bytes per token that need not be copied with `nbytes` more, for what is not here."""
        absent = np.flatnonzero(self._slots.slot_of == NOBODY)
        traffic, sizes = self._traffic_of(absent), self._record_bytes[absent]
        best_first = np.argsort(-traffic / sizes, kind="stable")
        fitting = np.cumsum(sizes[best_first]) <= nbytes
        return float(traffic[best_first][fitting].sum())

    def _traffic_of(self, experts: NDArray[np.int64]) -> NDArray[np.float64]:
        placement = self._placement
        return placement.policy.rate(experts, placement.step) * self._record_bytes[experts]

    def _worth(self, chunk: int) -> float:
        owners = self._tier.owner[self._slots_of(chunk)]
        held = owners[owners != NOBODY]
        return float(self._placement.policy.worth(held, self._placement.step).sum())

    # -- what must stay -------------------------------------------------------------------------

    def _may_drop(self, chunk: int) -> bool:
        lost = self._lost_with(chunk)
        leased = self._tier.leases[self._slots_of(chunk)].any()
        return not leased and self._suffices(self._counts(self._tier.record_class) - lost, lost)

    def _slots_of(self, chunk: int) -> list[int]:
        extents = self._slab.extents_of(chunk)
        return [slot for extent in extents for slot in self._tier.slots_in(extent)]

    def _lost_with(self, chunk: int) -> _Counts:
        return self._counts(self._tier.record_class[self._slots_of(chunk)])

    def _counts(self, classes: NDArray[np.int16]) -> _Counts:
        return np.bincount(classes[classes != NOBODY], minlength=len(self._slots.least))

    def _suffices(self, left: _Counts, lost: _Counts) -> bool:
        """Whether those classes that have `lost` slots still have more than their least."""
        return bool((left > self._slots.least)[lost > 0].all())
