# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The tasks of a layer's experts on the CPU, compiled for the geometries of their matrices.

Compiled code is kept on disk by numba, under the constants of a closure. Those are numbers only
(a compiled function among them would make another key in every process); they include a digest of
the sources that emit code, which numba does not watch.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels import geometry as _g
from tierrun.engine.kernels.host_job import (
    ADDRESS,
    BEGIN,
    END,
    INNER,
    INNER_STRIDE,
    OUT,
    TABLE,
    TABLE_ROW,
    find_hidden,
    find_inner,
    pair,
)
from tierrun.engine.kernels.host_sums import TOGETHER, plain_number, tile_sums
from tierrun.engine.kernels.jit import cfunc, njit
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import DTYPE_KINDS, GATES, Gate
from tierrun.engine.kernels.native import put_real, real, stack, word

log = logging.getLogger(__name__)

_TILE_BYTES = 4 * TILE_ROWS * TOGETHER
_FIRST_BYTES, _INPUT_BYTES = 3 * _TILE_BYTES, 8 * TOGETHER
_NONE, _SILU, _GELU_TANH, _GELU, _GPT_OSS = range(len(GATES))
_BF16, _F16, _F32 = _g.BF16, _g.F16, _g.F32
_ONE, _ZERO, _HALF = np.float32(1), np.float32(0), np.float32(0.5)
_ROOT_TWO_OVER_PI, _CUBIC = np.float32(0.7978845608028654), np.float32(0.044715)
_ROOT_HALF = np.float32(0.7071067811865476)


class Tasks(NamedTuple):
    """Compiled functions of a layout, by address, and tasks of each product; `keep` owns them."""

    first: int
    down: int
    first_tasks: int
    down_tasks: int
    keep: tuple[Any, ...]


@lru_cache
def tasks(first: Operand, down: Operand, gate: Gate) -> Tasks:
    """Compile, or take from disk, what computes records of a layout."""
    started = time.perf_counter()
    functions = (_cached(_first, *_place(first), *_gate(gate)), _cached(_down, *_place(down)))
    if any(function.cache_hits == 0 for function in functions):
        seconds = time.perf_counter() - started
        log.info("compiled the CPU's kernels for a layout of experts in %.1f s; kept", seconds)
    halves, rows = first.matrix[_g.ROWS] // 2, down.matrix[_g.ROWS]
    return Tasks(
        functions[0].address,
        functions[1].address,
        -(-halves // TILE_ROWS),
        -(-rows // TILE_ROWS),
        functions,
    )


def _place(operand: Operand) -> tuple[tuple[int, ...], int, int, int]:
    """The matrix, its offset, and its bias (kind 0: none)."""
    bias = operand.bias
    kind, offset = (0, 0) if bias is None else (DTYPE_KINDS[bias.dtype], bias.offset)
    return operand.matrix, operand.offset, kind, offset


def _gate(gate: Gate) -> tuple[int, bool, float, float]:
    return GATES.index(gate.kind), gate.interleaved, float(gate.alpha), float(gate.limit)


def _cached(make: Callable[..., Any], *constants: Any) -> Any:
    """The C function of `make(*constants)`, kept on disk."""
    return cfunc("void(int64, int64, int64)", cache=True)(make(*constants))


def _first(
    M: tuple[int, ...],
    OFFSET: int,
    BIAS: int,
    BIAS_OFFSET: int,
    GATE: int,
    INTERLEAVED: bool,
    ALPHA: float,
    LIMIT: float,
) -> Any:
    """32 gates and ups, and the activation, for a record's tokens.

    Gates and ups are rows by turns, or lie APART: then ups may begin within a tile, and 32 of them
    be in two tiles. UP is where they begin among the rows of all PARTS (tiles) computed.
    """
    INPUTS, WIDTH = M[_g.COLUMNS], M[_g.ROWS] // 2
    TILES = -(-M[_g.ROWS] // TILE_ROWS)
    STEP, APART, FAR, UP, PARTS = 2, 1, 1, 1, 2
    if not INTERLEAVED:
        FAR, SKEW = divmod(WIDTH, TILE_ROWS)
        STEP, APART, UP, PARTS = 1, WIDTH, TILE_ROWS + SKEW, 3 if SKEW else 2

    def first(job, record, tile):
        row = word(job + TABLE) + record * TABLE_ROW
        base, end = word(row + ADDRESS), word(row + END)
        inputs, sums = stack(_INPUT_BYTES), stack(_FIRST_BYTES)
        for start in range(word(row + BEGIN), end, TOGETHER):
            count = min(TOGETHER, end - start)
            find_hidden(job, start, count, 4 * INPUTS, inputs)
            for part in range(PARTS):
                number = STEP * tile + (FAR + part - 1 if part else 0)
                if number < TILES:
                    place = sums + part * _TILE_BYTES
                    tile_sums(M, base + OFFSET, number, count, inputs, place)
            for i in range(count):
                to = word(job + INNER) + (start + i) * word(job + INNER_STRIDE)
                for r in range(min(TILE_ROWS, WIDTH - TILE_ROWS * tile)):
                    h = TILE_ROWS * tile + r
                    gate = _sum(sums, i, STEP * r)
                    gate += bias_at(BIAS, base + BIAS_OFFSET, STEP * h)
                    up = _sum(sums, i, STEP * r + UP)
                    up += bias_at(BIAS, base + BIAS_OFFSET, STEP * h + APART)
                    value = _gated(gate, up, GATE, np.float32(ALPHA), np.float32(LIMIT))
                    put_real(to + 4 * h, value)

    return first


def _down(M: tuple[int, ...], OFFSET: int, BIAS: int, BIAS_OFFSET: int) -> Any:
    """32 rows of down for a record's tokens."""
    WIDTH = M[_g.ROWS]

    def down(job, record, tile):
        row = word(job + TABLE) + record * TABLE_ROW
        base, end = word(row + ADDRESS), word(row + END)
        inputs, sums = stack(_INPUT_BYTES), stack(_TILE_BYTES)
        for start in range(word(row + BEGIN), end, TOGETHER):
            count = min(TOGETHER, end - start)
            find_inner(job, start, count, inputs)
            tile_sums(M, base + OFFSET, tile, count, inputs, sums)
            for i in range(count):
                to = word(job + OUT) + 4 * WIDTH * word(pair(job, start + i))
                for r in range(min(TILE_ROWS, WIDTH - TILE_ROWS * tile)):
                    y = TILE_ROWS * tile + r
                    value = _sum(sums, i, r) + bias_at(BIAS, base + BIAS_OFFSET, y)
                    put_real(to + 4 * y, value)

    return down


@njit("float32(int64, int64, int64)", cache=True)
def bias_at(kind, address, row):
    """Number `row` of the vector at `address`, of a dense `kind`; 0 where there is none."""
    if kind == _BF16:
        return plain_number(_BF16, address + 2 * row)
    if kind == _F16:
        return plain_number(_F16, address + 2 * row)
    if kind == _F32:
        return plain_number(_F32, address + 4 * row)
    return _ZERO


@njit("float32(int64, int64, int64)", cache=True)
def _sum(sums, token, row):
    """The sum of `token` and of `row`, counted through tiles, from what `tile_sums` wrote."""
    tile, lane = row // TILE_ROWS, row % TILE_ROWS
    return real(sums + _TILE_BYTES * tile + 4 * (TILE_ROWS * token + lane))


@njit("float32(float32)", cache=True)
def _sigmoid(value):
    small = math.exp(-abs(value))  # never overflows
    return (small if value < _ZERO else _ONE) / (_ONE + small)


@njit("float32(float32, float32, int64, float32, float32)", cache=True)
def _gated(gate, up, kind, alpha, limit):
    if kind == _SILU:
        return gate * _sigmoid(gate) * up
    if kind == _GELU_TANH:
        inner = _ROOT_TWO_OVER_PI * (gate + _CUBIC * gate * gate * gate)
        return gate * _sigmoid(inner + inner) * up  # (1 + tanh(v)) / 2 = sigmoid(2 v)
    if kind == _GELU:
        return _HALF * gate * (_ONE + math.erf(gate * _ROOT_HALF)) * up
    # written so that a NaN stays one
    gate = limit if gate > limit else gate
    up = limit if up > limit else (-limit if up < -limit else up)
    return (up + _ONE) * gate * _sigmoid(alpha * gate)
