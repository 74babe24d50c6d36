# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A layer's experts for one token, all of which lie in RAM, in two compiled calls.

Which they are and where they lie is looked up here; what was used is noted in a journal, from which
the books are kept once per token.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.engine.kernels.host import HostExperts
from tierrun.engine.kernels.host_job import (
    ADDRESS,
    BEGIN,
    DONE,
    END,
    RECORDS,
    TABLE_ROW,
    UNQUANTISED,
)
from tierrun.engine.kernels.int8_tasks import prepare
from tierrun.engine.kernels.jit import njit
from tierrun.engine.kernels.native import nanoseconds, put_word, word
from tierrun.engine.kernels.reals import weighted_sum
from tierrun.engine.kernels.workers import begin, finish

(
    _STATE, _PERFORM, _JOB, _TABLE, _OUT, _TASKS, _COUNT, _WIDTH, _ADDRESSES, _USAGE, _JOURNAL,
    _EXPERTS, _FIRST,
) = range(0, 8 * 13, 8)  # fmt: skip
BEGAN, ENDED, USED = 0, 8, 16
"""Bytes into a layer's row of the journal: when its experts began and ended, in ns of the monotonic
clock (0: not in this token), and after them the numbers of those used, over all layers."""


class TokenExperts:
    """The experts of one layer for one token; `journal` is the layer's own row, `usage` its counts.

    `addresses` says where in RAM each of its experts is (0: not there); `first` is the number of
    the first of them over all layers. All are read in place, whenever a token comes.
    """

    def __init__(
        self,
        kernels: HostExperts,
        shared: "Scratch",
        addresses: NDArray[np.int64],
        first: int,
        usage: int,
        journal: NDArray[np.int64],
    ) -> None:
        self._workers = kernels.workers
        self._kept = shared, addresses, journal
        lane, count = shared.lane, len(shared.out)
        self._top_k = count
        words = [lane.state, lane.perform, lane.job.ctypes.data, lane.table.ctypes.data]
        words += [shared.out.ctypes.data, lane.tasks_per_record, count, shared.out.shape[1]]
        words += [addresses.ctypes.data, usage, journal.ctypes.data, len(addresses), first]
        self._words = np.array(words, np.int64)
        self.address: int = self._words.ctypes.data

    def takes(self, hidden: torch.Tensor, top_k: torch.Tensor, weights: torch.Tensor) -> bool:
        """Whether these are one token's, as `__call__` reads them."""
        return (
            top_k.numel() == self._top_k
            and top_k.dtype == torch.int64
            and weights.dtype == torch.float32
            and top_k.is_contiguous()
            and weights.is_contiguous()
            and hidden.is_contiguous()
        )

    def begin(self, hidden: int, top_k: int) -> bool:
        """Let the other threads apply experts `top_k` int64 [k] to `hidden` fp32 (addresses).

        False, and nothing has been done, where one of them is not there, or is named twice; else
        `finish` must follow, and until then nothing given, and no expert, may move.
        """
        self._workers.claim()
        begun = bool(begin_experts(self.address, hidden, top_k))
        if not begun:
            self._workers.release()
        return begun

    def finish(self, weights: int, target: int) -> None:
        """Help, and put the sum of the outputs, times `weights` fp32 [k], at `target`."""
        finish_experts(self.address, weights, target)
        self._workers.release()


class Scratch:
    """What all layers of one geometry share: the outputs [k, H] of one token's experts, and a job
    that computes them."""

    def __init__(self, kernels: HostExperts, top_k: int) -> None:
        hidden, outer = kernels.widths
        self.out = np.zeros((top_k, outer), np.float32)
        self.lane = kernels.lane(
            np.zeros((1, hidden), np.float32),
            self.out,
            np.zeros(top_k, np.int64),
            np.zeros((1, 3), np.int64),
        )


@njit("boolean(int64, int64)", nogil=True, cache=True)
def _all_there(layer, top_k):
    addresses, count = word(layer + _ADDRESSES), word(layer + _COUNT)
    for i in range(count):
        expert = word(top_k + 8 * i)
        if not 0 <= expert < word(layer + _EXPERTS) or word(addresses + 8 * expert) == 0:
            return False
        for j in range(i):
            if word(top_k + 8 * j) == expert:
                return False
    return True


@njit("void(int64, int64)", nogil=True, cache=True)
def _note(layer, top_k):
    """That these were used."""
    usage, journal = word(layer + _USAGE), word(layer + _JOURNAL)
    for i in range(word(layer + _COUNT)):
        expert = word(top_k + 8 * i)
        put_word(usage + 8 * expert, word(usage + 8 * expert) + 1)
        put_word(journal + USED + 8 * i, word(layer + _FIRST) + expert)


@njit("boolean(int64, int64, int64)", nogil=True, cache=True)
def begin_experts(layer, hidden, top_k):
    """See `TokenExperts.begin`."""
    if not _all_there(layer, top_k):
        return False
    put_word(word(layer + _JOURNAL) + BEGAN, nanoseconds())
    job, table, count = word(layer + _JOB), word(layer + _TABLE), word(layer + _COUNT)
    pairs = table + TABLE_ROW * count
    for i in range(count):
        row = table + TABLE_ROW * i
        put_word(row + ADDRESS, word(word(layer + _ADDRESSES) + 8 * word(top_k + 8 * i)))
        put_word(row + BEGIN, i)
        put_word(row + END, i + 1)
        put_word(row + DONE, 0)
        put_word(pairs + 16 * i, i)
        put_word(pairs + 16 * i + 8, 0)
    put_word(job + RECORDS, count)
    put_word(job + UNQUANTISED, hidden)
    prepare(job, 1)
    begin(word(layer + _STATE), word(layer + _PERFORM), job, count * word(layer + _TASKS))
    _note(layer, top_k)
    return True


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def finish_experts(layer, weights, target):
    """See `TokenExperts.finish`."""
    finish(word(layer + _STATE))
    weighted_sum(word(layer + _OUT), weights, word(layer + _COUNT), word(layer + _WIDTH), target)
    put_word(word(layer + _JOURNAL) + ENDED, nanoseconds())
