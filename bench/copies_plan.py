"""What `tierrun bench copies` measures: which tests, sizes and threads, and for how long.

Tests have the names that they have in nvbandwidth, where it has them; those that end in `_ce` copy
between pinned memory and the GPU, by its copy engines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tierrun.bench.cells import Value
from tierrun.bench.io_sizes import ALL, USUAL
from tierrun.bench.words import (
    checked_duration,
    each,
    fair_seconds,
    known,
    num_cores,
    swept,
    thread_count,
)
from tierrun.io.errors import UsageError
from tierrun.io.extent import parse_bytes

MEMORY_READ, HOST_MEMCPY = "memory_read", "host_memcpy"
H2D, D2H = "host_to_device_memcpy_ce", "device_to_host_memcpy_ce"
H2D_BOTH = "host_to_device_bidirectional_memcpy_ce"
D2H_BOTH = "device_to_host_bidirectional_memcpy_ce"
LOCAL = "device_local_copy"
H2D_PAGEABLE, D2H_PAGEABLE = "host_to_device_memcpy_pageable", "device_to_host_memcpy_pageable"
ENGINE, TORCH_LOOP = "engine_to_device", "torch_to_device"

HOST_TESTS = (MEMORY_READ, HOST_MEMCPY)
DEVICE_TESTS = (H2D, D2H, H2D_BOTH, D2H_BOTH, LOCAL, H2D_PAGEABLE, D2H_PAGEABLE)
ENGINE_TESTS = (TORCH_LOOP, ENGINE)
TESTS = (*HOST_TESTS, *DEVICE_TESTS, *ENGINE_TESTS)

GROUP = 16
"""Records of a batch of the engine's, at most: those of a group in `tiers/vram.py`."""
UNDER_WAY = 2
"""Batches that are waited for no sooner."""

_KIB, _MIB = 1 << 10, 1 << 20
POWERS = tuple(64 * _KIB * 4**i for i in range(7))
"""64 KiB to 256 MiB."""
_USUAL_POWERS = (64 * _KIB, _MIB, 16 * _MIB, 64 * _MIB, 256 * _MIB)
"""The last but one is nvbandwidth's own."""

LEAST, MOST = 4 * _KIB, 1 << 30
"""Bytes of a copy that may be asked for."""

_BUDGET_SECONDS = 60.0
_SHORTEST, _LONGEST = 0.03, 0.5
_LASTS = 2.5
"""What a round of a cell takes, in its seconds: warming up and finding out how often, too."""


class Case(NamedTuple):
    """One cell: a test with copies of `nbytes`; `threads` of the host, where they are counted."""

    test: str
    nbytes: int
    threads: int | None = None

    def key(self) -> dict[str, Value]:
        """As a cell of the results."""
        threads: Value = "-" if self.threads is None else self.threads
        return {"test": self.test, "bytes": self.nbytes, "threads": threads}


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for. None: the usual."""

    tests: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None
    threads: tuple[int, ...] | None = None
    full: bool = False
    rounds: int = 5
    seconds: float | None = None

    @staticmethod
    def of(
        tests: str | None,
        sizes: str | None,
        threads: str | None,
        full: bool,
        rounds: int,
        seconds: float | None,
    ) -> "Plan":
        """From the words of a command line.

        Raises:
            UsageError: one that is not understood.
        """
        return Plan(
            each(tests, lambda name: known("--tests", name, TESTS)),
            each(sizes, _size),
            each(threads, thread_count),
            full,
            rounds,
            checked_duration(seconds),
        )

    def wants(self, tests: Sequence[str]) -> bool:
        """Whether any of `tests` is asked for."""
        return self.tests is None or not set(self.tests).isdisjoint(tests)

    def cases(self, read_bytes: int, records: Sequence[int], device: bool) -> list[Case]:
        """All cells, in the order of `TESTS`.

        Args:
            read_bytes: the memory that `memory_read` goes through.
            records: sizes of a store's records.
            device: whether there is a GPU.
        """
        tests = TESTS if device else HOST_TESTS
        chosen = [test for test in tests if self.tests is None or test in self.tests]
        cases = [case for test in chosen for case in self._cases_of(test, read_bytes, records)]
        return sorted(cases, key=_together)

    def _cases_of(self, test: str, read_bytes: int, records: Sequence[int]) -> Iterator[Case]:
        if test == MEMORY_READ:
            yield from (Case(test, read_bytes, n) for n in self.threads or swept(num_cores()))
            return
        real = (*records, *(ALL if self.full else USUAL))
        powers = () if test in ENGINE_TESTS else POWERS if self.full else _USUAL_POWERS
        for nbytes in self.sizes or sorted({*real, *powers}):
            yield Case(test, nbytes, 1 if test == HOST_MEMCPY else None)

    def seconds_of(self, num_cases: int) -> float:
        """Of each round of each case."""
        if self.seconds is not None:
            return self.seconds
        if self.full:
            return _LONGEST
        goes, budget = num_cases * self.rounds, _BUDGET_SECONDS / _LASTS
        return fair_seconds(goes, budget, _SHORTEST, _LONGEST)


def _together(case: Case) -> tuple[bool, int]:
    """An order in which the engine and the loop beside it take turns, size by size."""
    beside = case.test in ENGINE_TESTS
    return beside, case.nbytes if beside else 0


def _size(text: str) -> int:
    nbytes = parse_bytes(text)
    if not LEAST <= nbytes <= MOST:
        raise UsageError(f"--sizes {text}: a copy has 4 KiB to 1 GiB here")
    return nbytes
