"""Batches of records on their way to the device, as a prompt copies them, beside a plain loop.

The engine's way is `Copies.to_device` (`tiers/copies.py`): groups of experts, of which the next is
enqueued before the last is waited for. The plain loop copies the same records with torch, one after
the other on one stream, and waits at the end. Both are timed by the clock on the wall, the host's
work included.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterator

import torch

from tierrun.bench.copies_plan import ENGINE, GROUP, UNDER_WAY
from tierrun.bench.timed import Work
from tierrun.io.extent import align_up
from tierrun.tiers.copies import Copies, Copy, Pairs


class Batches:
    """Records of one size in `host` (pinned) and `inside` (the device's), as batches of pairs."""

    def __init__(
        self, copies: Copies, host: torch.Tensor, inside: torch.Tensor, nbytes: int
    ) -> None:
        self._copies = copies
        stride = align_up(nbytes)
        count = min(len(host), len(inside)) // stride
        assert count >= UNDER_WAY, "no room for two records"
        places = [slice(i * stride, i * stride + nbytes) for i in range(count)]
        pairs = [(inside[place], host[place]) for place in places]
        self.size = min(GROUP, count // UNDER_WAY)
        """Records of a batch."""
        self._batches = [
            pairs[first : first + self.size] for first in range(0, count - self.size + 1, self.size)
        ]

    def work(self, test: str) -> Work:
        """Copies a batch once a time."""
        go = self._by_engine if test == ENGINE else self._by_torch

        def work(times: int) -> float:
            batches = itertools.islice(itertools.cycle(self._batches), times)
            self._copies.synchronize()
            began = time.perf_counter()
            go(batches)
            return time.perf_counter() - began

        return work

    def _by_engine(self, batches: Iterator[Pairs]) -> None:
        waiting = deque[Copy]()
        for batch in batches:
            waiting.append(self._copies.to_device(batch))
            if len(waiting) > UNDER_WAY:
                waiting.popleft().wait()
        for copy in waiting:
            copy.wait()

    def _by_torch(self, batches: Iterator[Pairs]) -> None:
        for batch in batches:
            for target, source in batch:
                target.copy_(source, non_blocking=True)
        self._copies.synchronize()
