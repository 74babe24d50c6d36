"""The memory that the cases of `tierrun bench copies` share, and what each of them does there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tierrun.bench.cells import Cell, Metric
from tierrun.bench.copies_host import HostMemory
from tierrun.bench.copies_plan import (
    DEVICE_TESTS,
    ENGINE_TESTS,
    HOST_MEMCPY,
    HOST_TESTS,
    UNDER_WAY,
    Case,
)
from tierrun.bench.timed import Work
from tierrun.io.extent import align_up

if TYPE_CHECKING:
    import torch

    from tierrun.bench.copies_device import DeviceMemory

METRICS = (
    Metric("bandwidth", "GB/s", 1e-9, 2, True),
    Metric("seconds", "µs each", 1e6, 1, False),
)


class Needs:
    """Bytes that `cases` need: of ordinary memory, and of locked memory and as much in a GPU."""

    def __init__(self, cases: Sequence[Case]) -> None:
        mine = [case for case in cases if case.test in HOST_TESTS]
        sizes = (2 * align_up(c.nbytes) if c.test == HOST_MEMCPY else c.nbytes for c in mine)
        self.host = max(sizes, default=0)
        copied = [align_up(case.nbytes) for case in cases if case.test in DEVICE_TESTS]
        batched = [case.nbytes for case in cases if case.test in ENGINE_TESTS]
        self.copied = 2 * max(copied, default=0)
        self.device = max(self.copied, memory_for(batched))

    @property
    def in_host(self) -> int:
        """All of the host's: a copy of pageable memory, too."""
        return self.host + self.device + self.copied // 2


_BATCHED_BYTES = 512 << 20
"""Of records that batches go through, in the host and in the device."""


def memory_for(sizes: Sequence[int]) -> int:
    """Bytes in the host, and as many in the device, for batches of records of `sizes`."""
    most = max((align_up(nbytes) for nbytes in sizes), default=0)
    return max(_BATCHED_BYTES, UNDER_WAY * most) if most else 0


class Bench:
    """Makes the work of cases; on a GPU with `memory`."""

    def __init__(
        self,
        needs: Needs,
        device: "torch.device | None" = None,
        memory: "DeviceMemory | None" = None,
    ) -> None:
        self._host = HostMemory(needs.host) if needs.host else None
        self._memory = memory
        if device is not None and memory is not None:
            from tierrun.bench.copies_device import DeviceCopies
            from tierrun.tiers.copies import CudaCopies

            self._single = DeviceCopies(device, memory, needs.copied // 2)
            self._copies = CudaCopies(device)

    def work(self, case: Case) -> tuple[Work, int]:
        """What `case` does, and the bytes of it."""
        if self._host is not None and case.test in HOST_TESTS:
            return self._host.work(case), case.nbytes
        if case.test in DEVICE_TESTS:
            return self._single.work(case.test, case.nbytes), case.nbytes
        from tierrun.bench.copies_engine import Batches

        assert self._memory is not None
        batches = Batches(self._copies, *self._memory, case.nbytes)
        return batches.work(case.test), batches.size * case.nbytes


@contextmanager
def open_bench(needs: Needs, device: "torch.device | None") -> Iterator[Bench]:
    """A bench for cases with such `needs`, while it lasts.

    Raises:
        TierrunError: the memory that it takes is not there, or cannot be locked.
    """
    if device is None or not needs.device:
        yield Bench(needs)
        return
    import torch

    from tierrun.bench.copies_device import device_memory

    with torch.cuda.device(device), device_memory(device, needs.device) as memory:
        yield Bench(needs, device, memory)


def cell_of(case: Case, rates: Sequence[float]) -> Cell:
    """From bytes per second."""
    seconds = tuple(case.nbytes / one for one in rates)
    return Cell(case.key(), {"bandwidth": tuple(rates), "seconds": seconds})
