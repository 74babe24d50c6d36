"""A tier's memory: allocated once, divided into fixed extents.

Extents are what an arbiter can hand between record classes (and, later, the KV cache); nothing is
ever allocated or freed after start, since pinned memory must not churn.
"""

import mmap

import torch

from tierrun.io.errors import BudgetError
from tierrun.io.extent import PAGE, format_bytes

_HUGE_PAGE = 2 << 20


class Slab:
    """`num_extents` extents of `extent_bytes` each, page-aligned, in host memory.

    With `pinned`, page-locked memory of CUDA, so that copies to the device run asynchronously.
    The one owner of these bytes: everybody else gets views.
    """

    def __init__(self, num_extents: int, extent_bytes: int, pinned: bool = False) -> None:
        assert extent_bytes % PAGE == 0, f"extent of {extent_bytes} bytes is not page-aligned"
        self.num_extents, self.extent_bytes = num_extents, extent_bytes
        self.nbytes = num_extents * extent_bytes
        self._bytes = _allocate(self.nbytes, pinned)

    def view(self, extent: int, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], `offset` bytes into extent number `extent`."""
        assert 0 <= extent < self.num_extents and offset + nbytes <= self.extent_bytes
        start = extent * self.extent_bytes + offset
        return self._bytes[start : start + nbytes]


def host_bytes(view: torch.Tensor) -> memoryview:
    """The memory of a host uint8 tensor, for readers to fill."""
    return view.numpy().data


def _allocate(nbytes: int, pinned: bool) -> torch.Tensor:
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if pinned:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    # Private, because huge pages are not given to shared anonymous memory, Python's default; into
    # scattered small pages a drive reads at a third of its speed (measured: bench/reads.py).
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise BudgetError(f"{format_bytes(nbytes)} of memory are refused ({error})") from None
    if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
