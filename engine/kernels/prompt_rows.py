# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What a prompt needs row by row, with the rows divided among threads: norms, sums of experts."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tierrun.engine.kernels.jit import cfunc
from tierrun.engine.kernels.native import real, word
from tierrun.engine.kernels.reals import rms_norm, weighted_sum
from tierrun.engine.kernels.workers import Workers

_SOURCE, _OTHER, _TARGET, _ROWS, _COUNT, _NUMBER, _EACH = range(0, 56, 8)
"""Bytes into a job: what rows are read, their scales or weights, what rows are written, by address;
how many, of how many numbers; epsilon (fp32), or the rows of one sum; rows of a task."""

_TASK_NUMBERS = 1 << 16
"""Read by a task: some 20 µs."""


def norm(workers: Workers, x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS norm of rows of `scale`'s length, fp32 and contiguous as they are."""
    y, count = torch.empty_like(x), scale.numel()
    source, factors, target = x.data_ptr(), scale.data_ptr(), y.data_ptr()
    if x.numel() <= _TASK_NUMBERS:  # a token
        rms_norm(source, factors, x.numel() // count, count, eps, target)
    else:
        number = int(np.float32(eps).view(np.int32))
        given = source, factors, target
        _run(workers, _functions()[0], given, x.numel() // count, count, number, count)
    return y


def weighted_sums(workers: Workers, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of each token's experts, `outputs` [T, k, H], by their `weights` [T, k] and in their order:
    [T, H], all fp32 and contiguous."""
    tokens, k, width = outputs.shape
    y = outputs.new_empty(tokens, width)
    given = outputs.data_ptr(), weights.data_ptr(), y.data_ptr()
    if tokens == 1:
        weighted_sum(*given[:2], k, width, given[2])
    else:
        _run(workers, _functions()[1], given, tokens, width, k, k * width)
    return y


def _run(
    workers: Workers,
    function: Any,
    given: tuple[int, int, int],
    rows: int,
    count: int,
    number: int,
    numbers: int,
) -> None:
    """`numbers` are read for a row."""
    each = max(1, _TASK_NUMBERS // numbers)
    job = np.array([*given, rows, count, number, each], np.int64)
    workers.run(function.address, job.ctypes.data, -(-rows // each))


def _norm(job, task):
    each, count = word(job + _EACH), word(job + _COUNT)
    start, rows = each * task, min(each, word(job + _ROWS) - each * task)
    place = 4 * count * start
    source, scale, target = word(job + _SOURCE), word(job + _OTHER), word(job + _TARGET)
    rms_norm(source + place, scale, rows, count, real(job + _NUMBER), target + place)


def _sum(job, task):
    each, count, k = word(job + _EACH), word(job + _COUNT), word(job + _NUMBER)
    for row in range(each * task, min(each * (task + 1), word(job + _ROWS))):
        source, weights = (
            word(job + _SOURCE) + 4 * k * count * row,
            word(job + _OTHER) + 4 * k * row,
        )
        weighted_sum(source, weights, k, count, word(job + _TARGET) + 4 * count * row)


def compile_all() -> None:
    """Compile what threads call."""
    _functions()


@lru_cache
def _functions() -> tuple[Any, Any]:
    """C functions of a job and the number of a task: of norms, of sums."""
    norms, sums = (cfunc("void(int64, int64)", cache=True)(function) for function in (_norm, _sum))
    return norms, sums
