# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Compiled code around `int8_panel`: the tasks of experts and of matrices with many tokens.

As those of `int8_tasks`, but a row of a job's table, or a part of a matrix's tokens, is a panel.
"""

from functools import lru_cache
from typing import Any

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.geometry import COLUMNS, ROWS
from tierrun.engine.kernels.host_job import (
    ADDRESS,
    BEGIN,
    END,
    HIDDEN,
    INNER,
    INNER_STRIDE,
    PLAN,
    TABLE,
    TABLE_ROW,
    UNQUANTISED,
    pair,
)
from tierrun.engine.kernels.host_tasks import Tasks
from tierrun.engine.kernels.int8_rows import PANEL, panel_block, panel_bytes, quantise_into
from tierrun.engine.kernels.int8_tasks import (
    AT,
    DOWN,
    FIRST,
    L_BASE,
    L_CODE,
    L_INPUT,
    L_MATRIX,
    L_OUT,
    L_ROWS,
    L_TILES,
    L_TOKENS,
    MATRIX,
    PANEL_CODE,
    activate,
    put_rows,
    put_tile,
    tiles,
    tiles_of,
)
from tierrun.engine.kernels.jit import cfunc, njit
from tierrun.engine.kernels.native import call_six, stack, word

SLICE = 8
"""Tokens that a task quantises."""
SLICES = PANEL // SLICE

_LINE = 4 * TILE_ROWS
_TILE_BYTES = _LINE * PANEL
_THREE_TILES = 3 * _TILE_BYTES


@njit("void(int64, int64, int64, int64, int64, int64)", cache=True)
def _multiply(operand, base, tile, count, panel, sums):
    """One tile of an operand of the record at `base`, if there is such a tile."""
    matrix, start = word(operand + MATRIX), base + word(operand + AT)
    if tile < tiles(word(matrix + 8 * ROWS)):
        call_six(word(operand + PANEL_CODE), matrix, start, tile, count, panel, sums)


def _first(job, record, tile):
    """32 gates and ups of a panel, and the activation: a block for each of its tokens."""
    row, plan = word(job + TABLE) + record * TABLE_ROW, word(job + PLAN)
    base, count, operand = word(row + ADDRESS), word(row + END) - word(row + BEGIN), plan + FIRST
    panel = word(job + HIDDEN) + record * panel_bytes(word(word(operand + MATRIX) + 8 * COLUMNS))
    sums = stack(_THREE_TILES)
    gates, ups, shift, _ = tiles_of(plan, tile)
    _multiply(operand, base, gates, count, panel, sums)
    _multiply(operand, base, ups, count, panel, sums + _TILE_BYTES)
    if shift != 0:
        _multiply(operand, base, ups + 1, count, panel, sums + 2 * _TILE_BYTES)
    to = word(job + INNER) + record * word(job + INNER_STRIDE)
    for i in range(count):
        activate(plan, base, tile, sums + _LINE * i, _TILE_BYTES, to + panel_block(i, tile))


def _down(job, record, tile):
    """32 rows of down for a panel's tokens."""
    row, operand = word(job + TABLE) + record * TABLE_ROW, word(job + PLAN) + DOWN
    base, begin = word(row + ADDRESS), word(row + BEGIN)
    count, sums = word(row + END) - begin, stack(_TILE_BYTES)
    panel = word(job + INNER) + record * word(job + INNER_STRIDE)
    _multiply(operand, base, tile, count, panel, sums)
    for i in range(count):
        put_rows(job, base, tile, begin + i, sums + _LINE * i)


def tasks(inner: int, outer: int) -> Tasks:
    """See `int8_tasks.tasks`."""
    first, down = _functions()
    numbers = -(-inner // TILE_ROWS), -(-outer // TILE_ROWS)
    return Tasks(first.address, down.address, *numbers, (first, down))


@lru_cache
def _functions() -> tuple[Any, Any]:
    """C functions of job, row of the table and tile."""
    first, down = (cfunc("void(int64, int64, int64)", cache=True)(f) for f in (_first, _down))
    return first, down


def _prepare(job, task):
    """Quantise some activations of one panel."""
    record, number = task // SLICES, task % SLICES
    row = word(job + TABLE) + record * TABLE_ROW
    columns = word(word(word(job + PLAN) + FIRST + MATRIX) + 8 * COLUMNS)
    begin, panel = word(row + BEGIN), word(job + HIDDEN) + record * panel_bytes(columns)
    for i in range(SLICE * number, min(SLICE * (number + 1), word(row + END) - begin)):
        source = word(job + UNQUANTISED) + 4 * columns * word(pair(job, begin + i) + 8)
        quantise_into(source, columns, panel, i)


@lru_cache
def prepare() -> Any:
    """What `workers` calls for each of SLICES tasks of every panel, before anything else."""
    return cfunc("void(int64, int64)", cache=True)(_prepare)


def _quantise(job, task):
    """Quantise some activations of a matrix."""
    columns = word(word(job + L_MATRIX) + 8 * COLUMNS)
    for token in range(SLICE * task, min(SLICE * (task + 1), word(job + L_TOKENS))):
        panel = word(job + L_ROWS) + token // PANEL * panel_bytes(columns)
        quantise_into(word(job + L_INPUT) + 4 * columns * token, columns, panel, token % PANEL)


def _linear(job, task):
    """Some tiles of one matrix for all tokens."""
    matrix, tokens, each = word(job + L_MATRIX), word(job + L_TOKENS), word(job + L_TILES)
    width, size = word(matrix + 8 * ROWS), panel_bytes(word(matrix + 8 * COLUMNS))
    sums = stack(_TILE_BYTES)
    for tile in range(each * task, min(each * (task + 1), tiles(width))):
        for start in range(0, tokens, PANEL):
            count, panel = min(PANEL, tokens - start), word(job + L_ROWS) + start // PANEL * size
            call_six(word(job + L_CODE), matrix, word(job + L_BASE), tile, count, panel, sums)
            for i in range(count):
                put_tile(
                    word(job + L_OUT) + 4 * width * (start + i), width, tile, 0, sums + _LINE * i
                )


@lru_cache
def linear() -> tuple[Any, Any]:
    """What `workers` calls for each SLICE of tokens, and then for a task of one matrix."""
    quantise, multiply = (cfunc("void(int64, int64)", cache=True)(f) for f in (_quantise, _linear))
    return quantise, multiply
