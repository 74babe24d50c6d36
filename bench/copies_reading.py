# mypy: disable-error-code="untyped-decorator, no-any-return, no-untyped-call"
"""How fast so many threads read memory: a sum over all of it, compiled by numba.

Importing this module imports numba, which takes a second, and compiles, which takes some more where
numba has kept nothing.
"""

import numba
import numpy as np
import torch
from numba import njit, prange
from numpy.typing import NDArray

from tierrun.bench.timed import Work, repeated

_BLOCK = 1 << 15
"""Words of a block, which one thread sums up: 256 KiB."""


def reading(memory: torch.Tensor, threads: int) -> Work:
    """Reads all of `memory` (uint8, in whole blocks of 256 KiB) by so many threads, once a time."""
    words = memory.numpy().view(np.int64)

    def read() -> None:
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads, most_threads()))
        try:
            _sum(words)
        finally:
            numba.set_num_threads(before)

    return repeated(read)


def spread_out(memory: torch.Tensor) -> None:
    """Fill `memory` by all threads, so that each page is on the node of one that will read it."""
    _fill(memory.numpy().view(np.int64))


def whole_blocks(nbytes: int) -> int:
    """`nbytes`, or a little less, as `reading` takes them."""
    return nbytes // (8 * _BLOCK) * (8 * _BLOCK)


def most_threads() -> int:
    """As many as numba has."""
    return int(numba.config.NUMBA_NUM_THREADS)


@njit(parallel=True, cache=True)
def _sum(words: NDArray[np.int64]) -> int:
    total = 0
    for block in prange(len(words) // _BLOCK):
        total += words[block * _BLOCK : (block + 1) * _BLOCK].sum()
    return total


@njit(parallel=True, cache=True)
def _fill(words: NDArray[np.int64]) -> None:
    for block in prange(len(words) // _BLOCK):
        words[block * _BLOCK : (block + 1) * _BLOCK] = block
