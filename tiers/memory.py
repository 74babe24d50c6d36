"""Kinds of memory that a slab can be made of: ordinary, page-locked, and a device's."""

import logging
import mmap
from collections.abc import Callable
from typing import Any, Protocol
from weakref import finalize

import torch

from tierrun.io.errors import BudgetError, UsageError
from tierrun.io.extent import PAGE, format_bytes
from tierrun.tiers.driver import device_address

log = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20


class Memory(Protocol):
    """Where a slab's bytes are.

    Guarantees: what is allocated begins on a page, also on a device.
    """

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes].

        Raises:
            BudgetError: there is not so much.
        """

    def release(self, memory: torch.Tensor) -> None:
        """`memory` is used no more, by no copy and no kernel; the caller lets go of it next."""


class OrdinaryMemory:
    """Ordinary memory, in huge pages where the system has them."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See `Memory`."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        # Private, because huge pages are not given to shared anonymous memory, Python's default;
        # into scattered small pages a drive reads at a third of its speed (bench/reads.py).
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise BudgetError(f"{format_bytes(nbytes)} of memory are refused ({error})") from None
        if nbytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def release(self, memory: torch.Tensor) -> None:
        """See `Memory`."""


class PinnedMemory:
    """Ordinary memory that is locked for `device`, so that copies run while the host goes on.

    Registered rather than allocated by torch, whose allocator rounds up to powers of two. Where it
    is refused, the memory stays pageable and that is said; with `strict`, it is an error.
    """

    def __init__(self, device: torch.device, *, strict: bool) -> None:
        self._device, self._strict = device, strict
        self._ordinary = OrdinaryMemory()
        self._unpin: dict[int, finalize[..., torch.Tensor]] = {}

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See `Memory`; with `strict` also:

        Raises:
            UsageError: it cannot be pinned.
        """
        memory = self._ordinary.allocate(nbytes)
        obstacle = self._pin(memory) if nbytes else None
        if obstacle is not None and self._strict:
            self.release(memory)
            raise UsageError(f"pinning {format_bytes(nbytes)} failed ({obstacle}); lower --ram")
        if obstacle is not None:
            log.warning(
                "pinning %s failed (%s): pageable memory is used, copies to the GPU make the "
                "model wait; a lower --ram may be pinned",
                format_bytes(nbytes),
                obstacle,
            )
        return memory

    def release(self, memory: torch.Tensor) -> None:
        """See `Memory`."""
        unpin = self._unpin.pop(memory.data_ptr(), None)
        if unpin is not None:
            unpin()

    def is_read_in_place(self, memory: torch.Tensor) -> bool:
        """Whether kernels can read `memory`, which is from `allocate`, at its own address."""
        address = memory.data_ptr()
        return address in self._unpin and device_address(address) == address

    def _pin(self, memory: torch.Tensor) -> str | None:
        """Why `memory` could not be pinned; None if it is, and works."""
        try:
            code = int(_cudart().cudaHostRegister(memory.data_ptr(), len(memory), 0))
        except (RuntimeError, AssertionError) as error:  # no CUDA in this torch, or none that works
            return str(error).splitlines()[0].rstrip(".")
        if code:
            self._forget_error()
            return f"cudaHostRegister: error {code}"
        address = memory.data_ptr()
        self._unpin[address] = finalize(memory, _unregister, address)
        if all(self._round_trip(part) for part in (memory[:PAGE], memory[-PAGE:])):
            return None
        self.release(memory)
        return "bytes came back changed from the GPU"

    def _round_trip(self, part: torch.Tensor) -> bool:
        """Whether a pattern comes back from the device as it went there; `part` is zeros after."""
        pattern = (torch.arange(len(part)) * 37 % 251).to(torch.uint8)
        part.copy_(pattern)
        there = part.to(self._device, non_blocking=True)
        torch.cuda.synchronize(self._device)
        part.zero_()
        part.copy_(there, non_blocking=True)
        torch.cuda.synchronize(self._device)
        same = torch.equal(part, pattern)
        part.zero_()
        return same

    def _forget_error(self) -> None:
        """CUDA reports a failed call once more at the next launch; let it be this one."""
        try:
            torch.zeros(1, device=self._device).cpu()
        except RuntimeError:
            pass


def _unregister(address: int) -> None:
    _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    """CUDA's runtime, which torch does not annotate."""
    cudart: Callable[[], Any] = torch.cuda.cudart
    return cudart()


class DeviceMemory:
    """Memory of `device`, from torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See `Memory`."""
        try:
            whole = torch.empty(nbytes + PAGE, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info(self._device)
            raise BudgetError(
                f"--vram: {format_bytes(nbytes)} more of {self._device} are refused: "
                f"{format_bytes(free)} of {format_bytes(total)} are free; ask for less"
            ) from None
        start = -whole.data_ptr() % PAGE
        return whole[start : start + nbytes]

    def release(self, memory: torch.Tensor) -> None:
        """See `Memory`."""
