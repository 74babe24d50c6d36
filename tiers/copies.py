"""Copies between host and device, and who waits for whom.

The model's thread enqueues; nothing here blocks it but `Copy.wait` and `synchronize`.

Guarantees:
- `to_device` and `scatter` run one after another, in the order in which they were enqueued: a
  table entry that is scattered after a copy is never seen before that copy's last byte;
- `to_host` starts after every `to_device` enqueued before it, so it reads what was written;
- after `ready`, what is launched on the compute stream sees everything enqueued before it;
- after calling a barrier of `computed`, copies to the device start only when all that the compute
  stream had been given at the time of `computed` is done.
Assumes:
- nobody writes a source, or reads or writes a target, from the host until its `Copy.wait`;
- a copy to the device that overwrites what an earlier `to_host` reads is enqueued after its `wait`:
  the two directions are streams of their own and run at the same time.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(target, source): uint8 views of the same size."""

Barrier = Callable[[], None]
"""Called, holds back later copies to the device; see `Copies.computed`."""

# torch does not annotate these two.
_Stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream
_Event: Callable[..., torch.cuda.Event] = torch.cuda.Event

_RING_ROWS = 64
_FEW_PAIRS, _MANY_PAIRS = 16, 256
"""Table entries that one small copy carries: those of a miss or two, those of a prefill."""


class Copy(Protocol):
    """Some copies that were enqueued together."""

    def wait(self) -> float:
        """Block until they are done; the seconds that they took once begun."""

    def is_done(self) -> bool:
        """Whether `wait` would not block."""


class Copies(Protocol):
    """The copies of one device. See the module for what is ordered."""

    def to_device(self, pairs: Pairs) -> Copy:
        """Enqueue copies from host memory to the device."""

    def to_host(self, pairs: Pairs) -> Copy:
        """Enqueue copies from the device to host memory."""

    def aside(self, pairs: Pairs) -> Copy:
        """As `to_device`, but beside everything: nothing is ordered with it but its `wait`."""

    def scatter(
        self, table: torch.Tensor, indices: NDArray[np.int64], values: NDArray[np.int64]
    ) -> None:
        """Enqueue `table[indices] = values`, int64 on the device; the indices are distinct."""

    def ready(self) -> None:
        """The compute stream waits for every copy to the device enqueued so far."""

    def computed(self) -> Barrier:
        """A barrier at what the compute stream has been given so far."""

    def synchronize(self) -> None:
        """Block until the device has nothing left to do: no copy and no kernel."""


class _Done(NamedTuple):
    seconds: float

    def wait(self) -> float:
        return self.seconds

    def is_done(self) -> bool:
        return True


class HostCopies:
    """Copies at once, where the device is the CPU."""

    def to_device(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        started = time.perf_counter()
        for target, source in pairs:
            target.copy_(source)
        return _Done(time.perf_counter() - started)

    def to_host(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        return self.to_device(pairs)

    def aside(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        return self.to_device(pairs)

    def scatter(
        self, table: torch.Tensor, indices: NDArray[np.int64], values: NDArray[np.int64]
    ) -> None:
        """See `Copies`."""
        table[torch.from_numpy(indices)] = torch.from_numpy(values)

    def ready(self) -> None:
        """See `Copies`."""

    def computed(self) -> Barrier:
        """See `Copies`."""
        return _nothing

    def synchronize(self) -> None:
        """See `Copies`."""


def _nothing() -> None:
    pass


class _CudaCopy(NamedTuple):
    begun: torch.cuda.Event
    ended: torch.cuda.Event

    def wait(self) -> float:
        self.ended.synchronize()
        milliseconds: float = self.begun.elapsed_time(self.ended)
        return milliseconds / 1000

    def is_done(self) -> bool:
        query: Callable[[], bool] = self.ended.query
        return query()


class CudaCopies:
    """One stream for each direction, as PCIe is full duplex, and one for what nobody waits for.

    Sources and targets in pageable memory are copied correctly too, but the host waits meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Before compute where both are queued: the scatter is a kernel of a few entries.
        self._up = _Stream(device, priority=-1)
        self._down, self._aside = _Stream(device), _Stream(device)
        self._enqueued = _Event()
        self._few, self._many = _Ring(device, _FEW_PAIRS), _Ring(device, _MANY_PAIRS)

    def to_device(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        return _copy(self._up, pairs)

    def to_host(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        self._down.wait_stream(self._up)
        return _copy(self._down, pairs)

    def aside(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        return _copy(self._aside, pairs)

    def scatter(
        self, table: torch.Tensor, indices: NDArray[np.int64], values: NDArray[np.int64]
    ) -> None:
        """See `Copies`."""
        ring = self._few if len(indices) <= _FEW_PAIRS else self._many
        with torch.cuda.stream(self._up):
            for first in range(0, len(indices), ring.pairs):
                last = first + ring.pairs
                ring.scatter(self._up, table, indices[first:last], values[first:last])

    def ready(self) -> None:
        """See `Copies`."""
        self._enqueued.record(self._up)
        torch.cuda.current_stream(self._device).wait_event(self._enqueued)

    def computed(self) -> Barrier:
        """See `Copies`."""
        event = _Event()
        event.record(torch.cuda.current_stream(self._device))
        return lambda: self._up.wait_event(event)

    def synchronize(self) -> None:
        """See `Copies`."""
        torch.cuda.synchronize(self._device)


def _copy(stream: torch.cuda.Stream, pairs: Pairs) -> _CudaCopy:
    copy = _CudaCopy(_Event(enable_timing=True), _Event(enable_timing=True))
    with torch.cuda.stream(stream):
        copy.begun.record(stream)
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        copy.ended.record(stream)
    return copy


class _Ring:
    """Table entries on their way to the device, in pinned rows that are used in turn.

    Assumes: one stream only, so that a row on the device is read before it is overwritten; for the
    row on the host an event says so.
    """

    def __init__(self, device: torch.device, pairs: int) -> None:
        shape = (_RING_ROWS, 2 * pairs)
        host = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        there = torch.empty(shape, dtype=torch.int64, device=device)
        self.pairs = pairs
        self._rows = [_Row(*row, pairs) for row in zip(host, there, strict=True)]
        self._next = 0

    def scatter(
        self,
        stream: torch.cuda.Stream,
        table: torch.Tensor,
        indices: NDArray[np.int64],
        values: NDArray[np.int64],
    ) -> None:
        """Enqueue on `stream`, which is the current one: between 1 and `pairs` entries."""
        row = self._rows[self._next]
        self._next = (self._next + 1) % _RING_ROWS
        row.fill(indices, values)
        row.send(stream, table)


class _Row:
    """`pairs` table entries, and every view of them that is ever needed."""

    def __init__(self, host: torch.Tensor, there: torch.Tensor, pairs: int) -> None:
        self._host, self._there = host, there
        self._indices, self._values = host.numpy()[:pairs], host.numpy()[pairs:]
        self._places, self._entries = there[:pairs], there[pairs:]
        self._sent = _Event()

    def fill(self, indices: NDArray[np.int64], values: NDArray[np.int64]) -> None:
        """Write entries, the first of them again and again where there are fewer than `pairs`."""
        self._sent.synchronize()
        count = len(indices)
        self._indices[:count], self._indices[count:] = indices, indices[0]
        self._values[:count], self._values[count:] = values, values[0]

    def send(self, stream: torch.cuda.Stream, table: torch.Tensor) -> None:
        self._there.copy_(self._host, non_blocking=True)
        self._sent.record(stream)
        table.scatter_(0, self._places, self._entries)
