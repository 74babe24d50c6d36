"""Matrix products on the CPU with weights as stored, in int8 where there are kernels, or in fp32.

bf16 `linear` runs at 19 GFLOP/s without AVX-512, fp32 at 85–127 (measured, 2 cores): weights are
widened or dequantised tile by tile into a scratch that stays in cache, and multiplied there.
Nothing is ever expanded whole.
"""

import torch

from tierrun.engine.codecs.packed import Packed
from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.codecs.weight import Weight
from tierrun.engine.kernels.int8_linear import Int8Linear

TILE_ELEMENTS = 1 << 20
"""Weights widened at once: 4 MiB of fp32, the fastest of 64 KiB … 12 MiB measured (bench/)."""


def cpu_kernels(threads: int, *, exact: bool) -> "CpuKernels":
    """Those of an engine with so many threads: packed weights in int8, unless it is `exact`."""
    return CpuKernels(None if exact else Int8Linear(threads))


class CpuKernels:
    """The products of one engine; owns the scratch tile, so one call at a time.

    With `int8`, packed matrices that it takes are multiplied by it.
    """

    def __init__(self, int8: Int8Linear | None = None) -> None:
        self._int8 = int8
        self._scratch = torch.empty(TILE_ELEMENTS, dtype=torch.float32)
        self._work = torch.empty(TILE_ELEMENTS // 2, dtype=torch.int32)

    def linear(
        self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x` fp32 [n, in] times `weight` [out, in] in any dtype or codec, transposed: [n, out].

        The result depends on `x`, `weight` and `bias` only, not on where they lie.
        """
        if isinstance(weight, Packed):
            return self._packed(x, weight, bias)
        if weight.dtype == torch.float32:
            return torch.nn.functional.linear(x, weight, bias)
        y = x.new_empty(x.shape[0], weight.shape[0])
        for first in range(0, weight.shape[0], rows := self._tile_rows(weight.shape[1])):
            stored = weight[first : first + rows]
            _multiply(x, self._widen(stored).T, y[:, first : first + rows])
        return y if bias is None else y.add_(bias)

    def embedding(self, ids: torch.Tensor, weight: Weight) -> torch.Tensor:
        """The rows `ids` [n] of `weight` [rows, dim] in any dtype or codec: fp32 [n, dim]."""
        if isinstance(weight, Packed):
            return weight.rows(ids)
        return torch.nn.functional.embedding(ids, weight).to(torch.float32)

    def _packed(self, x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        x = x if weight.inputs is None else x[:, weight.inputs]
        if self._int8 is not None and len(x) and self._int8.takes(weight):
            y = self._int8(x, weight)
            return y if bias is None else y.add_(bias)
        rows, columns = weight.shape[0], weight.padded_columns
        step = max(1, self._tile_rows(columns) // TILE_ROWS) * TILE_ROWS
        scratch, work = self._scratch, self._work
        if scratch.numel() < columns * min(step, rows):  # one tile is larger
            scratch = torch.empty(columns * min(step, rows))
            work = torch.empty(scratch.numel() // 2, dtype=torch.int32)
        y = x.new_empty(len(x), rows)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            tile = weight.expand(first, last, scratch, work)
            _multiply(x, tile, y[:, first:last])
        return y if bias is None else y.add_(bias)

    def _tile_rows(self, columns: int) -> int:
        return max(1, TILE_ELEMENTS // columns)

    def _widen(self, stored: torch.Tensor) -> torch.Tensor:
        if stored.numel() > self._scratch.numel():
            return stored.to(torch.float32)  # one row longer than the scratch
        return self._scratch[: stored.numel()].view(stored.shape).copy_(stored)


def _multiply(x: torch.Tensor, tile: torch.Tensor, out: torch.Tensor) -> None:
    """`x` [n, in] times `tile` [in, rows] into `out` [n, rows]."""
    if len(x) == 1:
        torch.mv(tile.T, x[0], out=out[0])
    else:
        torch.mm(x, tile, out=out)
