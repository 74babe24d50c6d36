"""Host memory: how fast threads read it, and how fast one thread copies it (memcpy)."""

import ctypes
import itertools

import torch

from tierrun.bench.copies_plan import MEMORY_READ, Case
from tierrun.bench.timed import Work, repeated
from tierrun.io.extent import align_up
from tierrun.tiers.memory import OrdinaryMemory


class HostMemory:
    """`nbytes` of ordinary memory that tests go through from one end to the other.

    Raises:
        BudgetError: there is not so much.
    """

    def __init__(self, nbytes: int) -> None:
        from tierrun.bench.copies_reading import spread_out

        self._memory = OrdinaryMemory().allocate(nbytes)
        spread_out(self._memory)

    def work(self, case: Case) -> Work:
        """Reads `case.nbytes`, or copies as many from one half to the other, once a time."""
        if case.test != MEMORY_READ:
            return copying(self._memory, case.nbytes)
        from tierrun.bench.copies_reading import reading

        assert case.threads is not None
        return reading(self._memory[: case.nbytes], case.threads)


def copying(memory: torch.Tensor, nbytes: int) -> Work:
    """Copies `nbytes` by libc's memcpy, from places of the one half of `memory` in turn to places
    of the other: what was copied last is in no cache when it is its turn again."""
    half, address = len(memory) // 2, memory.data_ptr()
    places = range(0, half - nbytes + 1, align_up(nbytes))
    assert places, "no room for one copy"
    offsets = itertools.cycle(places)

    def copy() -> None:
        offset = next(offsets)
        ctypes.memmove(address + half + offset, address + offset, nbytes)

    return repeated(copy)
