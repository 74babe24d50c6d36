"""Copies between host and device arrive whole, and in the order that was promised."""

import time
from itertools import count

import pytest
import torch
from tests.clocks import CountingClock
from tests.tiers.streams import FakeStreams
from tests.tiers.vramrig import CUDA, KINDS, device_of, make_copies, on_cuda

from tierrun.engine.gpu.clock import CudaClock
from tierrun.io.timeline import ASIDE, DOWN, UP, Timeline
from tierrun.tiers import copies as module
from tierrun.tiers.copies import Copies, CudaCopies
from tierrun.tiers.memory import PinnedMemory

kinds = pytest.mark.parametrize("kind", KINDS)

LARGE = 64 << 20


def bytes_of(value: int, nbytes: int = 4096) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


def there(copies: Copies, nbytes: int = 4096) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device=device_of(copies))


@kinds
def test_bytes_go_there_and_back(kind: str) -> None:
    copies = make_copies(kind)
    slots, back = [there(copies), there(copies)], [bytes_of(0), bytes_of(0)]
    copies.synchronize()  # the zeros are written on another stream than the copies
    copies.to_device([(slots[0], bytes_of(1)), (slots[1], bytes_of(2))])
    copy = copies.to_host([(back[0], slots[1]), (back[1], slots[0])])
    assert copy.wait() >= 0.0
    assert torch.equal(back[0], bytes_of(2)) and torch.equal(back[1], bytes_of(1))


@kinds
@pytest.mark.parametrize("way", ["aside", "to_host"])
def test_what_kernels_read_is_overwritten_after_them(kind: str, way: str) -> None:
    copies = make_copies(kind)
    slot, new = there(copies, LARGE), there(copies, LARGE)
    target = slot if way == "aside" else pinned_if(copies, torch.zeros(LARGE, dtype=torch.uint8))
    source = pinned_if(copies, bytes_of(1, LARGE)) if way == "aside" else new.fill_(1)
    copies.synchronize()
    found: list[torch.Tensor] = []
    run(copies, found, target)
    getattr(copies, way)([(target, source)]).wait()
    copies.synchronize()
    assert found[0].tolist() == [0, 0] and target.min() == 1


def pinned_if(copies: Copies, memory: torch.Tensor) -> torch.Tensor:
    return memory.pin_memory() if isinstance(copies, CudaCopies) else memory


@kinds
def test_the_compute_stream_sees_what_is_ready(kind: str) -> None:
    copies = make_copies(kind)
    slot = there(copies, LARGE)
    source = bytes_of(7, LARGE)
    for value in range(1, 5):
        source.fill_(value)
        copy = copies.to_device([(slot, source)])
        copies.ready()
        found: list[torch.Tensor] = []
        run(copies, found, slot)
        copy.wait()
        copies.synchronize()
        assert found[0].tolist() == [value, value]


@kinds
def test_a_copy_behind_a_barrier_does_not_overtake_the_kernels(kind: str) -> None:
    copies = make_copies(kind)
    slot, sources = there(copies, LARGE), [bytes_of(1, LARGE), bytes_of(2, LARGE)]
    copies.to_device([(slot, sources[0])])
    copies.ready()
    found: list[torch.Tensor] = []
    run(copies, found, slot)
    copies.computed()()
    quarters = list(zip(slot.chunk(4), pinned_if(copies, sources[1]).chunk(4), strict=True))
    copies.to_device(quarters).wait()
    copies.synchronize()
    assert found[0].tolist() == [1, 1] and slot.min() == 2


@kinds
def test_a_batch_comes_after_the_batch_before_it(kind: str) -> None:
    copies = make_copies(kind)
    slot = there(copies, LARGE)
    sources = [pinned_if(copies, bytes_of(value, LARGE)) for value in range(8)]
    for source in sources:
        copy = copies.to_device(list(zip(slot.chunk(3), source.chunk(3), strict=True)))
    copies.ready()
    found: list[torch.Tensor] = []
    run(copies, found, slot)
    copy.wait()
    copies.synchronize()
    assert found[0].tolist() == [7, 7]


def run(copies: Copies, found: list[torch.Tensor], slot: torch.Tensor) -> None:
    """A slow kernel, and then one that looks at the ends of `slot`."""

    def look() -> None:
        if slot.is_cuda:
            big = torch.ones(4096, 4096, device=slot.device)
            for _ in range(20):
                big = big @ big
        found.append(torch.stack([slot.min(), slot.max()]))

    if isinstance(copies, FakeStreams):
        copies.compute.enqueue(look)
    else:
        look()


@on_cuda
def test_enqueueing_on_the_gpu_does_not_wait() -> None:
    pinned = PinnedMemory(CUDA, strict=True)
    source = pinned.allocate(LARGE)
    try:
        copies = CudaCopies(CUDA)
        slot = there(copies, LARGE)
        copies.synchronize()
        ends = [copies.to_device([(slot, source)]) for _ in range(40)]
        assert not ends[-1].is_done(), "40 copies of 64 MiB take 50 ms at least"
        assert all(end.wait() > 0 for end in ends)
    finally:
        torch.cuda.synchronize()
        pinned.release(source)


class CountedEvent:
    """Knows as how many-th it was recorded."""

    numbers = count(1)
    done = True

    def __init__(self, **_: object) -> None:
        self.number = 0

    def record(self, stream: object) -> None:
        self.number = next(self.numbers)

    def __float__(self) -> float:
        return float(self.number)

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "CountedEvent") -> float:
        return 1000.0 * (later.number - self.number)


class IdleStream:
    def __init__(self, *_: object) -> None:
        self.device = CUDA

    def wait_event(self, event: object) -> None:
        pass


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CudaCopies:
    """Copies of a GPU without one: at once, each event a second after the last."""
    monkeypatch.setattr(CountedEvent, "numbers", count(1))
    monkeypatch.setattr(module, "_Event", CountedEvent)
    monkeypatch.setattr(module, "_Stream", IdleStream)
    monkeypatch.setattr(module, "copy_async", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", IdleStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.inference_mode(False))
    return CudaCopies(CUDA)


def test_copies_are_on_the_timeline(counted: CudaCopies) -> None:
    pair = bytes_of(0, 4096), bytes_of(1, 4096)
    counted.to_device([pair])
    with Timeline(CountingClock()) as timeline:
        counted.to_device([pair, pair])
        counted.to_host([pair])
        counted.aside([pair])
    counted.to_device([pair])
    assert [tuple(span) for span in timeline.spans] == [
        (UP, "2 records", 103, 104, 8192),
        (DOWN, "1 records", 107, 108, 4096),
        (ASIDE, "1 records", 110, 111, 4096),
    ]


def test_copies_begin_where_those_before_them_end(
    counted: CudaCopies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountedEvent, "done", False)
    pair = bytes_of(0), bytes_of(1)
    copies = [counted.to_device([pair]) for _ in range(3)]  # events 1 2, 3, 4
    counted.to_host([pair])  # 5 (a fence), 6 (another), 7 8
    hold_back = counted.computed()  # 9
    after_others = counted.to_device([pair])  # 10
    hold_back()
    behind_the_barrier = counted.to_device([pair])  # 11 12
    assert [copy.wait() for copy in copies] == [1, 1, 1]
    assert [after_others.wait(), behind_the_barrier.wait()] == [6, 1]
    assert counted.to_device([pair]).wait() == 1  # the last has been waited for
    assert [copy.wait() for copy in copies] == [1, 1, 1]


@on_cuda
def test_events_are_used_again_and_tell_the_same_twice() -> None:
    copies = CudaCopies(CUDA)
    slot, source = there(copies, LARGE), bytes_of(3, LARGE).pin_memory()
    first = copies.to_device([(slot, source)])
    seconds = first.wait()
    second = copies.to_device([(slot[:4096], source[:4096])])
    assert second.wait() > 0 and seconds == first.wait() and first.is_done()


@on_cuda
def test_copies_on_the_timeline_took_what_they_took() -> None:
    pinned = PinnedMemory(CUDA, strict=True)
    source = pinned.allocate(LARGE)
    try:
        copies, clock = CudaCopies(CUDA), CudaClock(CUDA, 64)
        slot = there(copies, LARGE)
        with Timeline(clock) as timeline:
            started = time.perf_counter()
            seconds = copies.to_device([(slot, source)]).wait()
            ended = time.perf_counter()
        (span,) = timeline.spans
        assert span.nbytes == LARGE and span.end - span.start == pytest.approx(seconds, rel=0.01)
        assert started - timeline.error <= span.start <= span.end <= ended + timeline.error
        assert timeline.error < 1e-3
    finally:
        torch.cuda.synchronize()
        pinned.release(source)
