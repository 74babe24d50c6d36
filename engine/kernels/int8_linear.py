"""Products of one packed matrix on the CPU, activations as int8."""

import os
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.geometry import COLUMNS, ROWS, Geometry, packed_geometry
from tierrun.engine.kernels.int8 import FEW_TOKENS, obstacle
from tierrun.io.errors import StoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tierrun.engine.kernels.workers import Workers


class Int8Linear:
    """Owns the rows of blocks that activations become, so one call at a time.

    Its threads are shared by all who ask for as many.
    """

    def __init__(self, threads: int) -> None:
        """`threads`, the caller's among them; no more than the process has cores."""
        self._threads = max(1, min(threads, len(os.sched_getaffinity(0))))
        self._workers: Workers | None = None
        self._rows = np.empty(0, np.int64)

    def takes(self, weight: Packed) -> bool:
        """Whether there are kernels for `weight`."""
        return _matrix(weight) is not None

    def __call__(self, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        """`x` fp32 [n, in], inputs in the stored order, times `weight` [out, in]: [n, out].

        A row of the result depends on its row of `x` and on `weight` only.
        """
        from tierrun.engine.kernels import int8_many, int8_tasks, workers

        found = _matrix(weight)
        assert found is not None, "never asked whether it takes this"
        geometry, matrix = found
        if self._workers is None:
            self._workers = workers.workers(self._threads)
        x, y = x.contiguous(), x.new_empty(len(x), geometry[ROWS])
        few = len(x) <= FEW_TOKENS
        rows = self._room(len(x), geometry[COLUMNS], few=few)
        code = int8_tasks.tile_function if few else int8_tasks.panel_function
        each = int8_tasks.tiles_of_task(geometry[COLUMNS]) if few else 1
        job = np.array(
            [
                *(code(geometry), matrix.ctypes.data, weight.data.data_ptr()),
                *(len(x), rows.ctypes.data, y.data_ptr(), each, x.data_ptr()),
            ],
            np.int64,
        )
        if few:
            _quantise(x, rows.ctypes.data)
            multiply = int8_tasks.linear()
        else:
            quantise, multiply = int8_many.linear()
            slices = -(-len(x) // int8_many.SLICE)
            self._workers.run(quantise.address, job.ctypes.data, slices)
        tasks = -(-geometry[ROWS] // (TILE_ROWS * each))
        self._workers.run(multiply.address, job.ctypes.data, tasks)
        return y

    def _room(self, tokens: int, columns: int, *, few: bool) -> "NDArray[np.int64]":
        """Memory for rows of blocks of a few tokens, or for panels."""
        from tierrun.engine.kernels.int8_rows import PANEL, panel_bytes, row_bytes

        nbytes = row_bytes(columns) * tokens if few else panel_bytes(columns) * -(-tokens // PANEL)
        if self._rows.nbytes < nbytes:
            self._rows = np.empty(nbytes // 8, np.int64)
        return self._rows


def _quantise(x: torch.Tensor, target: int) -> None:
    """Rows of blocks at `target` of a few tokens."""
    from tierrun.engine.kernels import int8_rows

    columns = x.shape[1]
    nbytes = int8_rows.row_bytes(columns)
    for row in range(len(x)):
        int8_rows.quantise_row(x.data_ptr() + 4 * columns * row, columns, target + nbytes * row)


def _matrix(weight: Packed) -> "tuple[Geometry, NDArray[np.int64]] | None":
    """The geometry of `weight`, as kernels read it too; None if there are none for it."""
    return _found(weight.codec, weight.shape)


@lru_cache
def _found(codec: Codec, shape: torch.Size) -> "tuple[Geometry, NDArray[np.int64]] | None":
    try:
        geometry = packed_geometry(codec, shape)
    except StoreError:  # levels that no kernel knows
        return None
    return None if obstacle(geometry) else (geometry, np.array(geometry, np.int64))
