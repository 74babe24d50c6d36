"""A tier's memory: divided into fixed extents.

In host memory nothing is allocated after start, since pinned memory must not churn. A device's slab
is many chunks, each an allocation of its own: what hands memory to and fro between the experts and
the key-value cache, or gives it back when the device runs out of memory.
"""

import torch

from tierrun.io.extent import PAGE
from tierrun.tiers.memory import Memory, OrdinaryMemory

_HOST = OrdinaryMemory()


class Slab:
    """`num_extents` extents of `extent_bytes` each, page-aligned, in at most `num_chunks` chunks.

    The one owner of these bytes: everybody else gets views.
    """

    def __init__(
        self, num_extents: int, extent_bytes: int, memory: Memory = _HOST, num_chunks: int = 1
    ) -> None:
        assert extent_bytes % PAGE == 0, f"extent of {extent_bytes} bytes is not page-aligned"
        self.num_extents, self.extent_bytes = num_extents, extent_bytes
        self._memory = memory
        self._per_chunk = max(1, -(-num_extents // num_chunks))
        self._chunks: dict[int, torch.Tensor] = {}
        for number in range(-(-max(1, num_extents) // self._per_chunk)):
            self._chunks[number] = memory.allocate(self.nbytes_of(number))
        self._num_chunks = len(self._chunks)
        self._base = self._lowest()

    def _lowest(self) -> int:
        """The chunk at the lowest address, so that every offset from it is positive."""
        return min(self._chunks, key=lambda number: self._chunks[number].data_ptr())

    @property
    def nbytes(self) -> int:
        return sum(len(chunk) for chunk in self._chunks.values())

    @property
    def base(self) -> torch.Tensor:
        """The chunk that offsets count from; never dropped. It moves with `restore` only."""
        return self._chunks[self._base]

    @property
    def droppable(self) -> list[int]:
        """The numbers of the chunks that can be dropped."""
        return [number for number in self._chunks if number != self._base]

    @property
    def dropped(self) -> list[int]:
        """The numbers of the chunks that have been dropped."""
        return [number for number in range(self._num_chunks) if number not in self._chunks]

    def view(self, extent: int, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], `offset` bytes into extent number `extent`."""
        assert 0 <= extent < self.num_extents and offset + nbytes <= self.extent_bytes
        number, place = divmod(extent, self._per_chunk)
        start = place * self.extent_bytes + offset
        return self._chunks[number][start : start + nbytes]

    def offset(self, view: torch.Tensor) -> int:
        """Where `view` begins, in bytes from the beginning of `base`."""
        return view.data_ptr() - self.base.data_ptr()

    def extents_of(self, chunk: int) -> range:
        """The extents in chunk number `chunk`."""
        first = chunk * self._per_chunk
        return range(first, min(first + self._per_chunk, self.num_extents))

    def nbytes_of(self, chunk: int) -> int:
        """The bytes of a chunk, whether it is there or not."""
        return len(self.extents_of(chunk)) * self.extent_bytes

    def drop(self, chunk: int) -> int:
        """Let go of a chunk, and of its extents; the bytes that were in it.

        It is free once nobody holds a view of it; no copy or kernel may be using it.
        """
        assert chunk != self._base, "offsets count from this chunk"
        memory = self._chunks.pop(chunk)
        self._memory.release(memory)
        return len(memory)

    def restore(self, chunk: int) -> None:
        """Allocate a chunk that was dropped, at whatever address; offsets change if it is lower.

        Raises:
            BudgetError: there is not so much; everything is as it was.
        """
        assert chunk not in self._chunks, f"chunk {chunk} was never dropped"
        self._chunks[chunk] = self._memory.allocate(self.nbytes_of(chunk))
        self._base = self._lowest()

    def release(self) -> None:
        """Unlock what is locked; nothing may be copied from or to here any more."""
        for chunk in self._chunks.values():
            self._memory.release(chunk)


def host_bytes(view: torch.Tensor) -> memoryview:
    """The memory of a host uint8 tensor, for readers to fill."""
    return view.numpy().data
