# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Several packed matrices times the same token, in one compiled call.

What is asked once for each of a model's matrices is kept in a table; a token brings two addresses.
Activations are int8 (`int8_rows`), as in `int8_linear`, and give the same bits.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.geometry import COLUMNS, ROWS, packed_geometry
from tierrun.engine.kernels.int8_rows import quantise_row, row_bytes
from tierrun.engine.kernels.int8_tasks import (
    TILE_BYTES,
    multiply_two,
    put_tile,
    tile_function,
    tiles_of_task,
)
from tierrun.engine.kernels.int8_tile import TOGETHER
from tierrun.engine.kernels.jit import cfunc, njit
from tierrun.engine.kernels.native import put_word, stack, word
from tierrun.engine.kernels.workers import begin, finish

if TYPE_CHECKING:
    from tierrun.engine.kernels.workers import Workers

_STATE, _PERFORM, _INPUTS, _BLOCKS, _OUT, _MATRICES, _TASKS = 0, 8, 16, 24, 32, 40, 48
_HEAD_WORDS = 7
"""Bytes into a table: the threads' state, the task function, how many inputs there are, where their
blocks are, where results go, how many matrices follow, and how many tasks all of them are."""
_CODE, _SHAPE, _BASE, _BIAS, _TO, _FIRST, _TILES = 0, 8, 16, 24, 32, 40, 48
_MATRIX_WORDS = 7
"""Bytes into a matrix's part: its tile function, geometry, bytes, bias (0: none) by address; its
place among the results, in numbers; its first task, and tiles of a task."""
_TWO_TILES, _INPUT_BYTES = 2 * TILE_BYTES, 8 * TOGETHER


class TokenProducts:
    """The products of `weights` (int8 kernels exist for them; one width) with one token.

    Results lie side by side. `address` is what compiled code is told; one call at a time, while
    the threads are claimed.
    """

    def __init__(
        self,
        weights: Sequence[Packed],
        biases: Sequence[torch.Tensor | None],
        workers: "Workers",
    ) -> None:
        shapes = [packed_geometry(weight.codec, weight.shape) for weight in weights]
        columns = shapes[0][COLUMNS]
        assert all(shape[COLUMNS] == columns for shape in shapes), "matrices of different widths"
        assert all(weight.inputs is None for weight in weights), "inputs in another order"
        self.rows, self.columns = sum(shape[ROWS] for shape in shapes), columns
        self._geometries = [np.array(shape, np.int64) for shape in shapes]
        self._blocks = np.zeros(row_bytes(columns) // 8, np.int64)
        self._weights = list(weights)
        self._biases = [None if b is None else b.float().contiguous() for b in biases]
        self.workers = workers
        self._table = np.array(self._words(), np.int64)
        self.address: int = self._table.ctypes.data

    def _words(self) -> list[int]:
        parts: list[int] = []
        to = tasks = 0
        tiles = tiles_of_task(self.columns)
        for weight, shape, bias in zip(self._weights, self._geometries, self._biases, strict=True):
            code = tile_function(packed_geometry(weight.codec, weight.shape))
            given = 0 if bias is None else bias.data_ptr()
            parts += [code, shape.ctypes.data, weight.data.data_ptr(), given, to, tasks, tiles]
            to += int(shape[ROWS])
            tasks += -(-int(shape[ROWS]) // (TILE_ROWS * tiles))
        head = [self.workers.state, perform().address, self.columns, self._blocks.ctypes.data]
        return [*head, 0, len(self._weights), tasks, *parts]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x` fp32 [in], contiguous in memory, whatever its shape: a new tensor [out]."""
        y = torch.empty(self.rows)
        self.workers.claim()
        multiply(self.address, x.data_ptr(), y.data_ptr())
        self.workers.release()
        return y


def _task(table, task):
    """Some tiles of one of the matrices."""
    number = word(table + _MATRICES) - 1
    part = table + 8 * (_HEAD_WORDS + _MATRIX_WORDS * number)
    while word(part + _FIRST) > task:
        part -= 8 * _MATRIX_WORDS
    shape, bias = word(part + _SHAPE), word(part + _BIAS)
    width, tiles = word(shape + 8 * ROWS), word(part + _TILES)
    inputs, sums = stack(_INPUT_BYTES), stack(_TWO_TILES)
    for i in range(TOGETHER):
        put_word(inputs + 8 * i, word(table + _BLOCKS))
    first = tiles * (task - word(part + _FIRST))
    to = word(table + _OUT) + 4 * word(part + _TO)
    for tile in range(first, min(first + tiles, (width + TILE_ROWS - 1) // TILE_ROWS), 2):
        code, base = word(part + _CODE), word(part + _BASE)
        multiply_two(code, shape, base, tile, tile + 1, inputs, sums)
        put_tile(to, width, tile, bias, sums)
        put_tile(to, width, tile + 1, bias, sums + TILE_BYTES)


@lru_cache
def perform() -> Any:
    """What threads call for a task."""
    return cfunc("void(int64, int64)", cache=True)(_task)


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def multiply(table, source, target):
    """The matrices of a `TokenProducts` times what is at `source`, to `target`."""
    quantise_row(source, word(table + _INPUTS), word(table + _BLOCKS))
    put_word(table + _OUT, target)
    begin(word(table + _STATE), word(table + _PERFORM), table, word(table + _TASKS))
    finish(word(table + _STATE))
