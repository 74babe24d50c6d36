"""A device whose streams run as late, or as early, as their ordering lets them."""

import random
from collections import deque
from collections.abc import Callable

from tierrun.tiers.copies import Barrier, Pairs


class Stream:
    """Work in order; an item may be to wait for a place in another stream."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None] | tuple[Stream, int]] = deque()
        self.enqueued, self.done = 0, 0

    def enqueue(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        self.enqueued += 1

    def wait_for(self, other: "Stream") -> None:
        self.wait_until(other, other.enqueued)

    def wait_until(self, other: "Stream", place: int) -> None:
        self._work.append((other, place))
        self.enqueued += 1

    def try_one(self) -> bool:
        """Do one item, unless there is none or it waits for another stream."""
        if not self._work:
            return False
        work = self._work[0]
        if isinstance(work, tuple):
            other, place = work
            if other.done < place:
                return False
        else:
            work()
        self._work.popleft()
        self.done += 1
        return True

    def advance(self, place: int) -> None:
        """Do everything before `place`, and of other streams only what that waits for."""
        while self.done < place:
            work = self._work[0]
            if isinstance(work, tuple):
                work[0].advance(work[1])
            assert self.try_one()


class _Copy:
    def __init__(self, stream: Stream) -> None:
        self._stream, self._place = stream, stream.enqueued

    def wait(self) -> float:
        self._stream.advance(self._place)
        return 0.0

    def is_done(self) -> bool:
        return self._stream.done >= self._place


class FakeStreams:
    """`Copies` that holds everything back until it is waited for.

    With `drift`, each stream also gets ahead at random, in halves of records.
    """

    def __init__(self, drift: random.Random | None = None) -> None:
        self.up, self.down, self.compute, self.beside = Stream(), Stream(), Stream(), Stream()
        self._drift = drift

    def to_device(self, pairs: Pairs) -> _Copy:
        return self._copy(self.up, pairs)

    def aside(self, pairs: Pairs) -> _Copy:
        self.beside.wait_for(self.compute)
        return self._copy(self.beside, pairs)

    def to_host(self, pairs: Pairs) -> _Copy:
        self.down.wait_for(self.up)
        self.down.wait_for(self.compute)
        return self._copy(self.down, pairs)

    def _copy(self, stream: Stream, pairs: Pairs) -> _Copy:
        for target, source in pairs:
            half = len(target) // 2
            for part in (slice(None, half), slice(half, None)):
                stream.enqueue(lambda to=target[part], of=source[part]: to.copy_(of))
        self._wander()
        return _Copy(stream)

    def ready(self) -> None:
        self.compute.wait_for(self.up)
        self._wander()

    def computed(self) -> Barrier:
        place = self.compute.enqueued
        return lambda: self.up.wait_until(self.compute, place)

    def is_computing(self) -> bool:
        return self.compute.done < self.compute.enqueued

    def synchronize(self) -> None:
        for stream in (self.up, self.down, self.compute, self.beside):
            stream.advance(stream.enqueued)

    def _wander(self) -> None:
        if self._drift is not None:
            for _ in range(self._drift.randrange(6)):
                streams = (self.up, self.down, self.compute, self.beside)
                self._drift.choice(streams).try_one()
