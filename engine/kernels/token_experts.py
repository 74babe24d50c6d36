# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A layer's experts for one token, where they lie in RAM, in two compiled calls.

Which they are and where they lie is looked up here. Where all are there, what was used is noted in
a journal, from which the books are kept once per token; else a lease keeps them, and those that are
there are computed while others arrive.
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
from tierrun.engine.kernels.workers import begin, finish, load_left

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
        self._top_k, self._left = count, shared.left
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

    def start(self) -> None:
        """A token whose experts are not all there: none of them is computed yet."""
        self._left[:] = 1

    def begin_some(self, hidden: int, top_k: int) -> bool:
        """As `begin`, with those that are there now and have not been computed since `start`.

        False where there are none; else `finish_some` must follow, and until then no expert that is
        there may move.
        """
        self._workers.claim()
        begun = bool(begin_some(self.address, hidden, top_k, self._left.ctypes.data))
        if not begun:
            self._workers.release()
        return begun

    def finish_some(self) -> bool:
        """Help with what was begun; whether anything of it was left."""
        left = bool(load_left(self._workers.state))
        finish(self._workers.state)
        self._workers.release()
        return left

    @property
    def threads(self) -> int:
        """That compute, the caller's among them."""
        return self._workers.threads

    def sum(self, weights: int, target: int) -> None:
        """What `finish` puts at `target`, where all have been computed."""
        assert not self._left.any(), "an expert that was leased is not there"
        sum_experts(self.address, weights, target)


class Scratch:
    """What all layers of one geometry share: the outputs [k, H] of one token's experts, which of
    them are `left` to be computed, and a job that computes them."""

    def __init__(self, kernels: HostExperts, top_k: int) -> None:
        hidden, outer = kernels.widths
        self.out = np.zeros((top_k, outer), np.float32)
        self.left = np.zeros(top_k, np.int64)
        self.lane = kernels.lane(
            np.zeros((1, hidden), np.float32),
            self.out,
            np.zeros(top_k, np.int64),
            np.zeros((1, 3), np.int64),
        )


@njit("boolean(int64, int64)", nogil=True, cache=True)
def _is_there(layer, expert):
    known = 0 <= expert < word(layer + _EXPERTS)
    return known and word(word(layer + _ADDRESSES) + 8 * expert) != 0


@njit("boolean(int64, int64)", nogil=True, cache=True)
def _all_there(layer, top_k):
    for i in range(word(layer + _COUNT)):
        expert = word(top_k + 8 * i)
        if not _is_there(layer, expert):
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


@njit("void(int64, int64, int64, int64, int64)", nogil=True, cache=True)
def _put_row(layer, number, records, top_k, i):
    """Row `number` of the table of so many: number `i` of the chosen experts, and of outputs."""
    table = word(layer + _TABLE)
    row, pairs = table + TABLE_ROW * number, table + TABLE_ROW * records
    put_word(row + ADDRESS, word(word(layer + _ADDRESSES) + 8 * word(top_k + 8 * i)))
    put_word(row + BEGIN, number)
    put_word(row + END, number + 1)
    put_word(row + DONE, 0)
    put_word(pairs + 16 * number, i)
    put_word(pairs + 16 * number + 8, 0)


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def _start(layer, hidden, records):
    """Let the threads go through so many rows of the table."""
    job = word(layer + _JOB)
    put_word(job + RECORDS, records)
    put_word(job + UNQUANTISED, hidden)
    prepare(job, 1)
    begin(word(layer + _STATE), word(layer + _PERFORM), job, records * word(layer + _TASKS))


@njit("boolean(int64, int64, int64, int64)", nogil=True, cache=True)
def begin_some(layer, hidden, top_k, left):
    """See `TokenExperts.begin_some`; `left` int64 [k]: 0 where nothing is to be done any more."""
    found, count = 0, word(layer + _COUNT)
    for i in range(count):
        found += word(left + 8 * i) != 0 and _is_there(layer, word(top_k + 8 * i))
    if found == 0:
        return False
    number = 0
    for i in range(count):
        if number < found and word(left + 8 * i) != 0 and _is_there(layer, word(top_k + 8 * i)):
            _put_row(layer, number, found, top_k, i)
            put_word(left + 8 * i, 0)
            number += 1
    _start(layer, hidden, found)
    return True


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def sum_experts(layer, weights, target):
    """See `TokenExperts.sum`."""
    weighted_sum(word(layer + _OUT), weights, word(layer + _COUNT), word(layer + _WIDTH), target)


@njit("boolean(int64, int64, int64)", nogil=True, cache=True)
def begin_experts(layer, hidden, top_k):
    """See `TokenExperts.begin`."""
    if not _all_there(layer, top_k):
        return False
    put_word(word(layer + _JOURNAL) + BEGAN, nanoseconds())
    count = word(layer + _COUNT)
    for i in range(count):
        _put_row(layer, i, count, top_k, i)
    _start(layer, hidden, count)
    _note(layer, top_k)
    return True


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def finish_experts(layer, weights, target):
    """See `TokenExperts.finish`."""
    finish(word(layer + _STATE))
    sum_experts(layer, weights, target)
    put_word(word(layer + _JOURNAL) + ENDED, nanoseconds())
