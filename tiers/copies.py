"""Copies between host and device, and who waits for whom.

The model's thread enqueues; nothing here blocks it but `Copy.wait` and `synchronize`.

Guarantees:
- `to_device` runs one after another, in the order in which they were enqueued;
- `to_host` starts after every `to_device` enqueued before it, so it reads what was written;
- `to_host` and `aside` start after all that the compute stream has been given so far: what they
  overwrite, in RAM or in VRAM, is read no more;
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

import torch

from tierrun.io.errors import DeviceError
from tierrun.io.timeline import ASIDE, DOWN, UP, between, records_device
from tierrun.tiers.driver import CopyAsync, copy_async

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(target, source): uint8 views of the same size."""

Barrier = Callable[[], None]
"""Called, holds back later copies to the device; see `Copies.computed`."""

# torch does not annotate these two.
_Stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream
_Event: Callable[..., torch.cuda.Event] = torch.cuda.Event


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
        """As `to_device`, but beside other copies: nothing later waits for it but its `wait`."""

    def ready(self) -> None:
        """The compute stream waits for every copy to the device enqueued so far."""

    def computed(self) -> Barrier:
        """A barrier at what the compute stream has been given so far."""

    def is_computing(self) -> bool:
        """Whether the compute stream has something left to do."""

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

    def ready(self) -> None:
        """See `Copies`."""

    def computed(self) -> Barrier:
        """See `Copies`."""
        return _nothing

    def is_computing(self) -> bool:
        """See `Copies`."""
        return False

    def synchronize(self) -> None:
        """See `Copies`."""


def _nothing() -> None:
    pass


class _Moment:
    """In a stream; its event goes back to `spare` when nobody who took it needs it any more."""

    def __init__(self, stream: torch.cuda.Stream, spare: list[torch.cuda.Event] | None) -> None:
        self.event = spare.pop() if spare else _Event(enable_timing=True)
        self.event.record(stream)
        self._spare, self._holders = spare, 0

    def take(self) -> "_Moment":
        self._holders += 1
        return self

    def let_go(self) -> None:
        self._holders -= 1
        if self._holders == 0 and self._spare is not None:
            self._spare.append(self.event)

    def is_to_come(self, spare: list[torch.cuda.Event] | None) -> bool:
        """Whether somebody still waits for it, not in vain, and its event goes back to `spare`."""
        query: Callable[[], bool] = self.event.query
        return self._holders > 0 and self._spare is spare and not query()


class _CudaCopy:
    """Between two moments."""

    def __init__(self, begun: _Moment, ended: _Moment) -> None:
        self._begun, self._ended, self._seconds = begun.take(), ended.take(), -1.0

    def wait(self) -> float:
        if self._seconds < 0:
            self._ended.event.synchronize()
            self._seconds = self._begun.event.elapsed_time(self._ended.event) / 1000
            self._begun.let_go()
            self._ended.let_go()
        return self._seconds

    def is_done(self) -> bool:
        query: Callable[[], bool] = self._ended.event.query
        return self._seconds >= 0 or query()


class CudaCopies:
    """One stream for each direction, as PCIe is full duplex, and one for what nobody waits for.

    Sources and targets in pageable memory are copied correctly too, but the host waits meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up, self._down, self._aside = (_Stream(device) for _ in range(3))
        self._enqueued, self._fence = _Event(), _Event()
        self._spare: list[torch.cuda.Event] = []
        """Events that are in no copy: making one takes 15 µs on some machines."""
        self._last_up: _Moment | None = None
        """The end of the last copies to the device, if those that follow begin with it."""

    def to_device(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        return self._copy(self._up, pairs, UP)

    def to_host(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        self._let_wait(self._down, self._up)
        self._let_wait(self._down, self._compute())
        return self._copy(self._down, pairs, DOWN)

    def aside(self, pairs: Pairs) -> Copy:
        """See `Copies`."""
        self._let_wait(self._aside, self._compute())
        return self._copy(self._aside, pairs, ASIDE)

    def _let_wait(self, later: torch.cuda.Stream, earlier: torch.cuda.Stream) -> None:
        """For all that `earlier` has been given so far; a wait keeps what the event said then."""
        self._fence.record(earlier)
        later.wait_event(self._fence)

    def _copy(self, stream: torch.cuda.Stream, pairs: Pairs, track: str) -> _CudaCopy:
        recorded = records_device()
        spare = None if recorded else self._spare
        begun = self._begin(stream, spare)
        by_driver = copy_async()
        if by_driver is None:
            _copy_by_torch(stream, pairs)
        else:
            _copy_by_driver(by_driver, stream.cuda_stream, pairs)
        ended = _Moment(stream, spare)
        if stream is self._up:
            self._last_up = ended
        if recorded:
            nbytes = sum(target.nbytes for target, _ in pairs)
            between(track, f"{len(pairs)} records", begun.event, ended.event, nbytes)
        return _CudaCopy(begun, ended)

    def _begin(self, stream: torch.cuda.Stream, spare: list[torch.cuda.Event] | None) -> _Moment:
        """Where other copies are before these, it is their end: each event more, of the kind that
        tells the time, holds a stream up by some 3 µs."""
        last = self._last_up
        if stream is self._up and last is not None and last.is_to_come(spare):
            return last
        return _Moment(stream, spare)

    def _compute(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def ready(self) -> None:
        """See `Copies`."""
        self._enqueued.record(self._up)
        self._compute().wait_event(self._enqueued)

    def computed(self) -> Barrier:
        """See `Copies`."""
        event = _Event()
        event.record(self._compute())
        return lambda: self._hold_back(event)

    def _hold_back(self, event: torch.cuda.Event) -> None:
        self._up.wait_event(event)
        self._last_up = None

    def is_computing(self) -> bool:
        """See `Copies`."""
        query: Callable[[], bool] = self._compute().query
        return not query()

    def synchronize(self) -> None:
        """See `Copies`."""
        torch.cuda.synchronize(self._device)


def _copy_by_driver(copy: CopyAsync, stream: int, pairs: Pairs) -> None:
    for target, source in pairs:
        nbytes = target.numel()
        code = copy(target.data_ptr(), source.data_ptr(), nbytes, stream)
        if code:
            raise DeviceError(f"the GPU failed: a copy of {nbytes} bytes gave error {code}")


def _copy_by_torch(stream: torch.cuda.Stream, pairs: Pairs) -> None:
    with torch.cuda.stream(stream):
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
