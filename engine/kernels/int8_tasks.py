# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Compiled code around `int8_tile`: the tasks of a layer's experts, and those of one matrix.

One function is compiled for each codec; what is here is compiled once, and is told everything else
(shapes, offsets, biases, the gate) in tables of int64.
"""

import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import binding
from numpy.typing import NDArray

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels import int8_amx
from tierrun.engine.kernels.geometry import COLUMNS, ROWS, Geometry
from tierrun.engine.kernels.host_job import (
    ADDRESS,
    BEGIN,
    END,
    HIDDEN,
    INNER,
    INNER_STRIDE,
    OUT,
    PLAN,
    TABLE,
    TABLE_ROW,
    UNQUANTISED,
    find_hidden,
    find_inner,
    pair,
)
from tierrun.engine.kernels.host_tasks import Tasks, bias_at
from tierrun.engine.kernels.int8 import obstacle
from tierrun.engine.kernels.int8_dots import WAYS, Way, possible
from tierrun.engine.kernels.int8_gates import gated_block
from tierrun.engine.kernels.int8_panel import panel_dots
from tierrun.engine.kernels.int8_rows import (
    BLOCK_BYTES,
    ZERO,
    copy_block,
    quantise_block,
    quantise_row,
    row_bytes,
)
from tierrun.engine.kernels.int8_tile import TOGETHER, tile_dots, without_shape
from tierrun.engine.kernels.jit import cfunc, njit
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import DTYPE_KINDS, GATES, Gate
from tierrun.engine.kernels.native import call_six, put_real, put_word, real, stack, word

log = logging.getLogger(__name__)

TILE_BYTES = 4 * TILE_ROWS * TOGETHER
_TWO_TILES, _THREE_TILES = 2 * TILE_BYTES, 3 * TILE_BYTES
_ROW_BYTES, _INPUT_BYTES = 4 * TILE_ROWS, 8 * TOGETHER

_TASK_WEIGHTS = 1 << 17
DOWN_TILES = 4
"""Tiles of a task of down: some 10 µs of a small expert; even, as two are computed together."""

_CODE, MATRIX, AT, _BIAS, _BIAS_AT, PANEL_CODE = 0, 8, 16, 24, 32, 40
_OPERAND_WORDS = 6
"""Bytes into an operand: the address of its tile function, of its geometry, where in a record the
matrix is, what its bias consists of (0: none) and where that is; its panel function."""
FIRST, DOWN, _GATE, _INTERLEAVED, _ALPHA, _LIMIT = 0, 48, 96, 104, 112, 120
PLAN_WORDS = 16
"""Bytes into a plan: two operands, then the gate; its two numbers are fp32."""


@lru_cache
def host_features() -> frozenset[str]:
    """LLVM's names of what this machine has, and lets us use."""
    found = {name for name, has in binding.get_host_cpu_features().items() if has}
    if "amx-int8" in found and not int8_amx.granted():
        found.remove("amx-int8")
    return frozenset(found)


def tile_function(M: Geometry, way: Way | None = None) -> int:
    """The address of what computes tiles of matrices like `M`, compiled or taken from disk.

    A C function of the addresses of the geometry (int64) and of the matrix, the tile's number, and
    the last three operands of `int8_tile.tile_dots`.

    Raises:
        ValueError: there is an `obstacle`.
    """
    return _address(M, way or possible(host_features(), panels=False)[0], _tile)


def tiles_of_task(columns: int) -> int:
    """Of a matrix so wide, for a few tokens: some 10 µs, so that threads end together; even, as two
    tiles are computed together."""
    return 2 * max(1, _TASK_WEIGHTS // (2 * TILE_ROWS * columns))


def panel_function(M: Geometry, way: Way | None = None) -> int:
    """The same of what computes tiles for many tokens; see `int8_panel.panel_dots`."""
    return _address(M, way or possible(host_features(), panels=True)[0], _panel)


def _address(M: Geometry, way: Way, make: Callable[..., Any]) -> int:
    if (reason := obstacle(M)) is not None:
        raise ValueError(f"no int8 kernel for {reason}")
    address: int = _compiled(make, without_shape(M), WAYS.index(way)).address
    return address


@lru_cache
def _compiled(make: Callable[..., Any], general: Geometry, way: int) -> Any:
    """Kept on disk under its constants: numbers only."""
    started = time.perf_counter()
    found = cfunc("void(int64, int64, int64, int64, int64, int64)", cache=True)(make(general, way))
    if found.cache_hits == 0:
        seconds = time.perf_counter() - started
        log.info("compiled a CPU kernel (%s) in %.1f s; kept", WAYS[way].name, seconds)
    return found


def _tile(M: Geometry, WAY: int) -> Any:
    def tile(matrix, base, number, count, inputs, out):
        tile_dots(M, WAY, matrix, base, number, count, inputs, out)

    return tile


def _panel(M: Geometry, WAY: int) -> Any:
    def panel(matrix, base, number, count, inputs, out):
        panel_dots(M, WAY, matrix, base, number, count, inputs, out)

    return panel


class Plan:
    """What the tasks of a layout are told; `address` is where, as long as this object lives."""

    def __init__(self, first: Operand, down: Operand, gate: Gate) -> None:
        self._shapes = [np.array(operand.matrix, np.int64) for operand in (first, down)]
        self._words = np.zeros(PLAN_WORDS, np.int64)
        operands = zip((first, down), self._shapes, strict=True)
        for place, (operand, shape) in enumerate(operands):
            start = place * _OPERAND_WORDS
            self._words[start : start + _OPERAND_WORDS] = _operand(operand, shape)
        self._words[_GATE // 8 : _INTERLEAVED // 8 + 1] = GATES.index(gate.kind), gate.interleaved
        numbers = self._words.view(np.float32)
        numbers[_ALPHA // 4], numbers[_LIMIT // 4] = gate.alpha, gate.limit
        self.address: int = self._words.ctypes.data


def _operand(operand: Operand, shape: NDArray[np.int64]) -> tuple[int, ...]:
    bias = operand.bias
    kind, offset = (0, 0) if bias is None else (DTYPE_KINDS[bias.dtype], bias.offset)
    code, panels = tile_function(operand.matrix), panel_function(operand.matrix)
    return code, shape.ctypes.data, operand.offset, kind, offset, panels


@njit("int64(int64)", cache=True)
def tiles(rows):
    """Of so many rows."""
    return (rows + TILE_ROWS - 1) // TILE_ROWS


@njit("void(int64, int64, int64, int64, int64, int64)", cache=True)
def _multiply(operand, base, tile, count, inputs, sums):
    """One tile of an operand of the record at `base`, if there is such a tile."""
    matrix, start = word(operand + MATRIX), base + word(operand + AT)
    if tile < tiles(word(matrix + 8 * ROWS)):
        call_six(word(operand + _CODE), matrix, start, tile, count, inputs, sums)


@njit("void(int64, int64, int64, int64, int64, int64, int64)", cache=True)
def multiply_two(code, matrix, base, tile, other, inputs, sums):
    """Tiles `tile` and `other`, behind it or the same, as far as there are such, times one token.

    The sums of the other are TOGETHER rows behind those of the first, as in `int8_tile.tile_dots`.
    """
    rows = word(matrix + 8 * ROWS)
    if tile < other and TILE_ROWS * (other + 1) <= rows:
        call_six(code, matrix, base, tile, tile - other, inputs, sums)
        return
    if tile < tiles(rows):
        call_six(code, matrix, base, tile, 1, inputs, sums)
    if other < tiles(rows):
        call_six(code, matrix, base, other, 1, inputs, sums + TILE_BYTES)


@njit("void(int64, int64, int64, int64, int64, int64, int64)", cache=True)
def _multiply_both(operand, base, tile, other, count, inputs, sums):
    """Two tiles of an operand of the record at `base` times `count` tokens."""
    if count == 1:
        matrix, start = word(operand + MATRIX), base + word(operand + AT)
        multiply_two(word(operand + _CODE), matrix, start, tile, other, inputs, sums)
    else:
        _multiply(operand, base, tile, count, inputs, sums)
        _multiply(operand, base, other, count, inputs, sums + TILE_BYTES)


@njit("void(int64, int64, int64, int64, int64)", cache=True)
def _add_bias(operand, base, first, rows, sums):
    """Add the bias of some rows from `first` on to their sums, if there is one."""
    kind = word(operand + _BIAS)
    if kind != 0:
        for r in range(rows):
            value = bias_at(kind, base + word(operand + _BIAS_AT), first + r)
            put_real(sums + 4 * r, real(sums + 4 * r) + value)


@njit("void(int64, int64, int64, int64)", cache=True)
def _join(sums, apart, shift, ups):
    """32 ups of a token, which begin `shift` rows within the first of two tiles `apart`."""
    for r in range(TILE_ROWS):
        tile, lane = (r + shift) // TILE_ROWS, (r + shift) % TILE_ROWS
        put_real(ups + 4 * r, real(sums + tile * apart + 4 * lane))


@njit("UniTuple(int64, 4)(int64, int64)", cache=True)
def tiles_of(plan, tile):
    """What 32 activations need: the tiles of their gates and of their ups, by how many rows the
    latter begin within a tile (then two of them are needed), and how many of the 32 there are.
    """
    width = word(word(plan + FIRST + MATRIX) + 8 * ROWS) // 2
    rows = min(TILE_ROWS, width - TILE_ROWS * tile)
    if word(plan + _INTERLEAVED) != 0:
        return 2 * tile, 2 * tile + 1, 0, rows
    return tile, tile + width // TILE_ROWS, width % TILE_ROWS, rows


@njit("void(int64, int64, int64, int64, int64, int64)", cache=True)
def activate(plan, base, tile, sums, apart, target):
    """The block at `target` of 32 activations, from one token's `sums`, whose tiles are `apart`."""
    _, _, shift, rows = tiles_of(plan, tile)
    operand, interleaved = plan + FIRST, word(plan + _INTERLEAVED) != 0
    block, joined = stack(_ROW_BYTES), stack(_ROW_BYTES)
    ups = sums + apart
    if shift != 0:
        _join(ups, apart, shift, joined)
        ups = joined
    if interleaved:
        first = 2 * TILE_ROWS * tile
        _add_bias(operand, base, first, min(rows * 2, TILE_ROWS), sums)
        _add_bias(operand, base, first + TILE_ROWS, max(rows * 2 - TILE_ROWS, 0), ups)
    else:
        width = word(word(operand + MATRIX) + 8 * ROWS) // 2
        _add_bias(operand, base, TILE_ROWS * tile, rows, sums)
        _add_bias(operand, base, width + TILE_ROWS * tile, rows, ups)
    alpha, limit = real(plan + _ALPHA), real(plan + _LIMIT)
    gated_block(sums, ups, interleaved, word(plan + _GATE), alpha, limit, block)
    for r in range(rows, TILE_ROWS):
        put_real(block + 4 * r, ZERO)
    quantise_block(block, target)


@njit("void(int64, int64, int64, int64, int64)", cache=True)
def put_tile(to, width, tile, bias, sums):
    """The sums of a tile, and its bias (0: none), in a row of results; if there is such a tile."""
    if bias == 0 and TILE_ROWS * (tile + 1) <= width:
        copy_block(sums, to + 4 * TILE_ROWS * tile)
        return
    for r in range(TILE_ROWS * tile, min(TILE_ROWS * (tile + 1), width)):
        value = real(sums + 4 * (r - TILE_ROWS * tile))
        if bias != 0:
            value += real(bias + 4 * r)
        put_real(to + 4 * r, value)


@njit("void(int64, int64, int64, int64, int64)", cache=True)
def put_rows(job, base, tile, place, sums):
    """32 rows of down, and their bias, into the result of the assignment sorted at `place`."""
    operand = word(job + PLAN) + DOWN
    width = word(word(operand + MATRIX) + 8 * ROWS)
    _add_bias(operand, base, TILE_ROWS * tile, min(TILE_ROWS, width - TILE_ROWS * tile), sums)
    put_tile(word(job + OUT) + 4 * width * word(pair(job, place)), width, tile, 0, sums)


def _first(job, record, tile):
    """32 gates and ups of a record, and the activation: a block for each of its tokens."""
    row, plan = word(job + TABLE) + record * TABLE_ROW, word(job + PLAN)
    base, end, operand = word(row + ADDRESS), word(row + END), plan + FIRST
    matrix = word(operand + MATRIX)
    inputs, sums = stack(_INPUT_BYTES), stack(_THREE_TILES)
    gates, ups, shift, _ = tiles_of(plan, tile)
    for start in range(word(row + BEGIN), end, TOGETHER):
        count = min(TOGETHER, end - start)
        find_hidden(job, start, count, row_bytes(word(matrix + 8 * COLUMNS)), inputs)
        _multiply_both(operand, base, gates, ups, count, inputs, sums)
        if shift != 0:
            _multiply(operand, base, ups + 1, count, inputs, sums + 2 * TILE_BYTES)
        for i in range(count):
            to = word(job + INNER) + (start + i) * word(job + INNER_STRIDE)
            of_token = sums + 4 * TILE_ROWS * i
            activate(plan, base, tile, of_token, TILE_BYTES, to + BLOCK_BYTES * tile)


def _down(job, record, task):
    """DOWN_TILES tiles of down for a record's tokens."""
    row, operand = word(job + TABLE) + record * TABLE_ROW, word(job + PLAN) + DOWN
    base, end = word(row + ADDRESS), word(row + END)
    first, last = DOWN_TILES * task, tiles(word(word(operand + MATRIX) + 8 * ROWS))
    inputs, sums = stack(_INPUT_BYTES), stack(_TWO_TILES)
    for start in range(word(row + BEGIN), end, TOGETHER):
        count = min(TOGETHER, end - start)
        find_inner(job, start, count, inputs)
        for tile in range(first, min(first + DOWN_TILES, last), 2):
            _multiply_both(operand, base, tile, tile + 1, count, inputs, sums)
            for i in range(count):
                put_rows(job, base, tile, start + i, sums + 4 * TILE_ROWS * i)
                put_rows(job, base, tile + 1, start + i, sums + TILE_BYTES + 4 * TILE_ROWS * i)


def tasks(inner: int, outer: int) -> Tasks:
    """The tasks of every layout, and how many there are with these widths."""
    first, down = _functions()
    numbers = -(-inner // TILE_ROWS), -(-outer // (DOWN_TILES * TILE_ROWS))
    return Tasks(first.address, down.address, *numbers, (first, down))


@lru_cache
def _functions() -> tuple[Any, Any]:
    """C functions of job, record and tile."""
    first, down = (cfunc("void(int64, int64, int64)", cache=True)(f) for f in (_first, _down))
    return first, down


def _prepare_row(job, token):
    """Quantise the activations of one token."""
    columns = word(word(word(job + PLAN) + FIRST + MATRIX) + 8 * COLUMNS)
    source = word(job + UNQUANTISED) + 4 * columns * token
    quantise_row(source, columns, word(job + HIDDEN) + row_bytes(columns) * token)


_row_here = njit("void(int64, int64)", nogil=True, cache=True)(_prepare_row)


@njit("void(int64, int64)", nogil=True, cache=True)
def prepare(job, tokens):
    """Quantise the activations of a job, of so many tokens, if it is one of int8."""
    if word(job + PLAN) != 0:
        for token in range(tokens):
            _row_here(job, token)


@lru_cache
def prepare_rows() -> Any:
    """What `workers` calls for each token of a job, as `prepare` does at once."""
    return cfunc("void(int64, int64)", cache=True)(_prepare_row)


L_CODE, L_MATRIX, L_BASE, L_TOKENS, L_ROWS, L_OUT, L_TILES, L_INPUT = 0, 8, 16, 24, 32, 40, 48, 56
"""Bytes into the job of one matrix: its tile function, geometry and bytes by address; tokens, their
rows of blocks and of results [tokens, out] by address; tiles of a task; where the activations are.
For many tokens the function is that of panels, and panels are where else rows of blocks are."""


def _linear(job, task):
    """Some tiles of one matrix for all tokens, by twos."""
    matrix, tokens, each = word(job + L_MATRIX), word(job + L_TOKENS), word(job + L_TILES)
    width, stride = word(matrix + 8 * ROWS), row_bytes(word(matrix + 8 * COLUMNS))
    code, base = word(job + L_CODE), word(job + L_BASE)
    inputs, sums = stack(_INPUT_BYTES), stack(_TWO_TILES)
    for tile in range(each * task, min(each * (task + 1), tiles(width)), 2):
        other = tile + 1 if tile + 1 < each * (task + 1) else tiles(width)
        for start in range(0, tokens, TOGETHER):
            count = min(TOGETHER, tokens - start)
            for i in range(TOGETHER):
                token = start + min(i, count - 1)
                put_word(inputs + 8 * i, word(job + L_ROWS) + stride * token)
            if count == 1:
                multiply_two(code, matrix, base, tile, other, inputs, sums)
            else:
                call_six(code, matrix, base, tile, count, inputs, sums)
                if other < tiles(width):
                    call_six(code, matrix, base, other, count, inputs, sums + TILE_BYTES)
            for i in range(count):
                row = word(job + L_OUT) + 4 * width * (start + i)
                put_tile(row, width, tile, 0, sums + _ROW_BYTES * i)
                put_tile(row, width, other, 0, sums + TILE_BYTES + _ROW_BYTES * i)


@lru_cache
def linear() -> Any:
    """What `workers` calls for a task of one matrix."""
    return cfunc("void(int64, int64)", cache=True)(_linear)
