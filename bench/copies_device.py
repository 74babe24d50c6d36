"""Copies between a GPU and host memory, one after another, as nvbandwidth times them.

Copies are enqueued while the device still sleeps, and timed by events on their stream: what the
host needs to enqueue them is not part of it. At both directions at once, one is timed while the
other, of twice as many copies, goes on beside it. Copies from and to pageable memory hold up the
host, and are timed by its clock.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tierrun.bench import copies_plan as plan
from tierrun.bench.timed import Work, repeated
from tierrun.io.errors import DeviceError
from tierrun.io.extent import format_bytes
from tierrun.tiers.driver import copy_async
from tierrun.tiers.memory import OrdinaryMemory, PinnedMemory

_TOGETHER = 128
"""Copies enqueued at once: with those of the other direction far fewer than a stream takes."""

_CYCLES = 4 << 20
"""That the device sleeps at first: about 2 ms."""

_MOST_CYCLES = 1 << 28

# torch does not annotate these.
_Stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream
_Event: Callable[..., torch.cuda.Event] = torch.cuda.Event
_sleep: Callable[[int], None] = torch.cuda._sleep

Pair = tuple[torch.Tensor, torch.Tensor]
"""(target, source): uint8, of the same size."""


class DeviceMemory(NamedTuple):
    """As many bytes of locked host memory as of a GPU's."""

    host: torch.Tensor
    inside: torch.Tensor


@contextmanager
def device_memory(device: torch.device, nbytes: int) -> Iterator[DeviceMemory]:
    """Memory to copy between, while it lasts.

    Raises:
        UsageError: so much cannot be locked.
        DeviceError: the GPU has not so much.
    """
    pinned = PinnedMemory(device, strict=True)
    try:
        inside = torch.ones(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        raise DeviceError(f"{device} has no {format_bytes(nbytes)} free to copy to") from None
    host = pinned.allocate(nbytes)
    host.fill_(1)
    try:
        yield DeviceMemory(host, inside)
    finally:
        torch.cuda.synchronize(device)
        pinned.release(host)


class DeviceCopies:
    """The tests of `copies_plan.DEVICE_TESTS`, with copies of up to `most` bytes, half of
    `memory`."""

    def __init__(self, device: torch.device, memory: DeviceMemory, most: int) -> None:
        self._memory, self._bus = memory, Bus(device)
        self._pageable = OrdinaryMemory().allocate(most)
        self._pageable.fill_(1)

    def work(self, test: str, nbytes: int) -> Work:
        """Copies `nbytes` once a time."""
        host, other_host = self._memory.host.view(2, -1)[:, :nbytes]
        inside, other_inside = self._memory.inside.view(2, -1)[:, :nbytes]
        pageable = self._pageable[:nbytes]
        if test == plan.H2D_PAGEABLE:
            return repeated(lambda: inside.copy_(pageable))
        if test == plan.D2H_PAGEABLE:
            return repeated(lambda: pageable.copy_(inside))
        up, down = (inside, host), (other_host, other_inside)
        pairs: dict[str, tuple[Pair, Pair | None]] = {
            plan.H2D: (up, None),
            plan.D2H: (down, None),
            plan.H2D_BOTH: (up, down),
            plan.D2H_BOTH: (down, up),
            plan.LOCAL: ((inside, other_inside), None),
        }
        return self._bus.work(*pairs[test])


class Bus:
    """Two streams of a device, on which copies are enqueued behind a sleep."""

    def __init__(self, device: torch.device) -> None:
        self._cycles = _CYCLES
        self._measured, self._beside = _Stream(device), _Stream(device)

    def work(self, pair: Pair, against: Pair | None) -> Work:
        """Copies `pair`; all the while `against` is copied, too."""

        def work(times: int) -> float:
            whole, rest = divmod(times, _TOGETHER)
            parts = [_TOGETHER] * whole + [rest] * (rest > 0)
            return sum(self._timed(part, pair, against) for part in parts)

        return work

    def _timed(self, count: int, pair: Pair, against: Pair | None) -> float:
        """Seconds of `count` copies; the sleep becomes longer until it outlasts the enqueuing."""
        while True:
            seconds, in_time = self._once(count, pair, against)
            if in_time or self._cycles >= _MOST_CYCLES:
                return seconds
            self._cycles *= 2

    def _once(self, count: int, pair: Pair, against: Pair | None) -> tuple[float, bool]:
        """Seconds, and whether all was enqueued before any of it began."""
        begun, ended = _Event(enable_timing=True), _Event(enable_timing=True)
        with torch.cuda.stream(self._measured):
            _sleep(self._cycles)
        begun.record(self._measured)
        if against is not None:
            self._beside.wait_event(begun)
            _enqueue(self._beside, against, 2 * count)
        _enqueue(self._measured, pair, count)
        ended.record(self._measured)
        query: Callable[[], bool] = begun.query
        in_time = not query()
        ended.synchronize()
        self._beside.synchronize()
        return begun.elapsed_time(ended) / 1000, in_time


def _enqueue(stream: torch.cuda.Stream, pair: Pair, count: int) -> None:
    target, source = pair
    copy = copy_async()
    if copy is None:
        with torch.cuda.stream(stream):
            for _ in range(count):
                target.copy_(source, non_blocking=True)
        return
    to, of, nbytes, handle = target.data_ptr(), source.data_ptr(), len(target), stream.cuda_stream
    for _ in range(count):
        code = copy(to, of, nbytes, handle)
        if code:
            raise DeviceError(f"the GPU failed: a copy of {nbytes} bytes gave error {code}")
