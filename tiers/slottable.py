"""The slot table: where each expert lies in VRAM, for kernels to look up by themselves."""

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.tiers.copies import Copies

ABSENT = -1
"""In the table, of an expert that is not in VRAM."""


class SlotTable:
    """int64 over all experts: byte offset of the record from the slab's base, or ABSENT.

    `tensor` is on the device; `mirror` is what it will say once all that was flushed has run.
    Changes are collected and flushed together, in order with the copies to the device: an entry
    that is flushed after a record's copy is seen by no kernel before that record is there. Between
    a copy into a reused slot and the flush, the tensor still has an entry of whom it held before.
    """

    def __init__(self, num_experts: int, device: torch.device, copies: Copies) -> None:
        self.tensor = torch.full((num_experts,), ABSENT, dtype=torch.int64, device=device)
        self.mirror: NDArray[np.int64] = np.full(num_experts, ABSENT, dtype=np.int64)
        self._copies = copies
        self._changed: dict[int, int] = {}

    def set(self, expert: int, offset: int) -> None:
        """`expert` is at `offset` from the next flush on."""
        self.mirror[expert] = offset
        self._changed[expert] = offset

    def clear(self, expert: int) -> None:
        """`expert` is not in VRAM from the next flush on."""
        self.set(expert, ABSENT)

    def flush(self) -> None:
        """Enqueue what has changed."""
        if not self._changed:
            return
        count = len(self._changed)
        indices = np.fromiter(self._changed.keys(), np.int64, count)
        values = np.fromiter(self._changed.values(), np.int64, count)
        self._changed.clear()
        self._copies.scatter(self.tensor, indices, values)

    def check_integrity(self) -> None:
        """The device and the mirror agree; nothing may be under way."""
        assert not self._changed, "changes that were never flushed"
        assert np.array_equal(self.tensor.cpu().numpy(), self.mirror), "table and mirror differ"
