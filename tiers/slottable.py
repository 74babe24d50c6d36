"""The slot table: where each expert lies, for kernels to look up by themselves."""

from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray

ABSENT = -1
"""An entry, of an expert that is in neither VRAM nor (as far as the table says) RAM."""

KIND = 7
IN_PLACE, FOR_HOST = 2, 3
"""Low bits of other entries. None are set where VRAM has the record; `IN_PLACE`: the device reads
it in RAM; `FOR_HOST`: it is in RAM, and the CPU is to compute it. (`ABSENT` has all of them.)"""


class InRam(Enum):
    """What the table says of experts that RAM has, and VRAM has not."""

    HIDDEN = "absent"
    FOR_HOST = "for the CPU"
    IN_PLACE = "read in place"


class SlotTable:
    """int64 over all experts: a record's byte offset from the slab's base and what kind it is.

    `tensor` is host memory that the device reads where it is (pinned; a few entries per layer, a
    microsecond). Changes are collected and become visible with `flush`, at once; `mirror` is the
    part of VRAM, offset or ABSENT, as it will be then.

    Assumes: no lookup is under way at a `flush`, and the device has been told to wait for whatever
    copy fills a record before a lookup is launched that may find it.
    """

    def __init__(
        self, num_experts: int, base: int, *, pinned: bool, in_ram: InRam = InRam.HIDDEN
    ) -> None:
        """`base` is the address from which offsets count."""
        self.tensor = torch.full((num_experts,), ABSENT, dtype=torch.int64, pin_memory=pinned)
        self.mirror: NDArray[np.int64] = np.full(num_experts, ABSENT, dtype=np.int64)
        self.addresses: NDArray[np.int64] = np.zeros(num_experts, dtype=np.int64)
        """Where in RAM each record is; 0: it is not."""
        self._entries = self.tensor.numpy()
        self._base, self._in_ram = base, in_ram
        self._changed: set[int] = set()

    # -- VRAM -----------------------------------------------------------------------------------

    def set(self, expert: int, offset: int) -> None:
        """`expert` is at `offset` in VRAM."""
        self.mirror[expert] = offset
        self._changed.add(expert)

    def clear(self, expert: int) -> None:
        """`expert` is not in VRAM."""
        self.set(expert, ABSENT)

    def rebase(self, base: int) -> None:
        """Offsets count from another address."""
        self._base = base
        self._changed.update(range(len(self.mirror)))

    # -- RAM: what a placement tells ------------------------------------------------------------

    def came(self, expert: int, address: int) -> None:
        """The record of `expert` is whole in RAM, at `address`."""
        self.addresses[expert] = address
        self._changed.add(expert)

    def went(self, expert: int) -> None:
        """It is not in RAM any more."""
        self.came(expert, 0)

    # -- what kernels see -----------------------------------------------------------------------

    @property
    def has_changed(self) -> bool:
        """Whether a `flush` is due."""
        return bool(self._changed)

    def flush(self) -> None:
        """Let lookups see what has changed."""
        if self._changed:
            changed = np.fromiter(self._changed, np.int64, len(self._changed))
            self._changed.clear()
            self._entries[changed] = self._entries_of(changed)

    def _entries_of(self, experts: NDArray[np.int64]) -> NDArray[np.int64]:
        offsets, addresses = self.mirror[experts], self.addresses[experts]
        if self._in_ram is InRam.HIDDEN:
            return offsets
        kind = IN_PLACE if self._in_ram is InRam.IN_PLACE else FOR_HOST
        in_ram = np.where(addresses != 0, addresses - self._base + kind, ABSENT)
        return np.where(offsets != ABSENT, offsets, in_ram)

    def check_integrity(self) -> None:
        """Lookups see what the books say."""
        assert not self._changed, "changes that were never flushed"
        everything = np.arange(len(self.mirror))
        assert np.array_equal(self._entries, self._entries_of(everything)), "table and books differ"
