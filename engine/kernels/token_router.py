# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""A plain router for one token: product, softmax over all, the largest, perhaps renormalised."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import types

from tierrun.engine.kernels.jit import cfunc, njit
from tierrun.engine.kernels.native import put_real, put_word, real, word
from tierrun.engine.kernels.reals import dot, exponentials
from tierrun.engine.kernels.workers import begin, finish

if TYPE_CHECKING:
    from tierrun.engine.kernels.workers import Workers

_STATE, _PERFORM, _WEIGHT, _EXPERTS, _HIDDEN, _TOP_K, _SHARES, _TASKS, _SHARED = range(0, 72, 8)
_SOURCE, _LOGITS = 72, 80
_ROWS = 8
"""Of a task."""


class TokenRouter:
    """What `weight` fp32 [experts, hidden] chooses for one token."""

    def __init__(
        self, weight: torch.Tensor, top_k: int, renormalise: bool, workers: "Workers"
    ) -> None:
        experts, hidden = weight.shape
        self._weight, self.workers, self.top_k = weight.contiguous(), workers, top_k
        self._shares = np.zeros(experts, np.float32)
        words = [workers.state, perform().address, self._weight.data_ptr(), experts, hidden]
        words += [top_k, self._shares.ctypes.data, -(-experts // _ROWS), renormalise, 0, 0]
        self._table = np.array(words, np.int64)
        self.experts, self.hidden = experts, hidden
        self.address: int = self._table.ctypes.data

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`x` fp32 [hidden]: logits [1, experts], scores [1, k] and their experts [1, k]."""
        logits, scores = torch.empty(1, self.experts), torch.empty(1, self.top_k)
        chosen = torch.empty(1, self.top_k, dtype=torch.int64)
        to = logits.data_ptr(), scores.data_ptr(), chosen.data_ptr()
        if self.workers.try_claim():
            route(self.address, x.data_ptr(), *to, True)
            self.workers.release()
        else:  # they compute a layer's experts while the next router is asked
            route(self.address, x.data_ptr(), *to, False)
        return logits, scores, chosen


def _task(table, task):
    hidden = word(table + _HIDDEN)
    for row in range(_ROWS * task, min(_ROWS * (task + 1), word(table + _EXPERTS))):
        found = dot(word(table + _WEIGHT) + 4 * hidden * row, word(table + _SOURCE), hidden)
        put_real(word(table + _LOGITS) + 4 * row, found)


_here = njit("void(int64, int64)", nogil=True, cache=True)(_task)


@lru_cache
def perform() -> Any:
    """What threads call for a task."""
    return cfunc("void(int64, int64)", cache=True)(_task)


@njit("int64(int64, int64)", nogil=True, cache=True)
def _largest(values, count):
    """Which is the largest; the first of equal ones. NaN is never larger: 0 where all are."""
    best, most = 0, types.float32(-2)
    for i in range(count):
        value = real(values + 4 * i)
        if value > most:
            best, most = i, value
    return best


@njit("void(int64, int64, int64, int64, int64, boolean)", nogil=True, cache=True)
def route(table, source, logits, scores, chosen, together):
    """See `TokenRouter`; `together` with the other threads, which are claimed then."""
    put_word(table + _SOURCE, source)
    put_word(table + _LOGITS, logits)
    if together:
        begin(word(table + _STATE), word(table + _PERFORM), table, word(table + _TASKS))
        finish(word(table + _STATE))
    else:
        for task in range(word(table + _TASKS)):
            _here(table, task)
    experts, shares = word(table + _EXPERTS), word(table + _SHARES)
    most = real(logits)
    for e in range(experts):
        value = real(logits + 4 * e)
        most = value if value > most else most
        put_real(shares + 4 * e, value)
    whole = exponentials(shares, most, experts)
    total = types.float32(0)
    for i in range(word(table + _TOP_K)):
        best = _largest(shares, experts)
        share = real(shares + 4 * best) / whole
        put_real(shares + 4 * best, types.float32(-1))
        put_real(scores + 4 * i, share)
        put_word(chosen + 8 * i, best)
        total += share
    if word(table + _SHARED) != 0:
        for i in range(word(table + _TOP_K)):
            put_real(scores + 4 * i, real(scores + 4 * i) / total)
