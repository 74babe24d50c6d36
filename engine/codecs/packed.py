"""A matrix in a codec's planes, over bytes that somebody else owns; expanded a tile at a time."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tierrun.engine.codecs.codec import Codec
from tierrun.engine.codecs.expand import expand
from tierrun.engine.codecs.planes import TILE_ROWS, packed_bytes, planes
from tierrun.io.errors import CorruptError


class _Tiles(NamedTuple):
    """Equally wide tiles of every plane: each [tiles, units, rows of a tile]."""

    planes: tuple[torch.Tensor, ...]

    @property
    def rows(self) -> int:
        return self.planes[0].shape[2]


@dataclass(frozen=True, slots=True)
class Packed:
    """The matrix `shape` [out, in] in `codec` over the bytes `data`; nothing is copied.

    `whole` are the tiles of 32 rows, `tail` the narrower last one (often of no rows). With
    `inputs` (int64 [in]) the columns are stored in another order: column j is the model's column
    `inputs[j]`.
    """

    codec: Codec
    shape: torch.Size
    data: torch.Tensor
    whole: _Tiles
    tail: _Tiles
    inputs: torch.Tensor | None = None

    @staticmethod
    def over(
        data: torch.Tensor,
        codec: Codec,
        shape: tuple[int, ...],
        inputs: torch.Tensor | None = None,
    ) -> "Packed":
        """The matrix in `data` (uint8).

        Raises:
            CorruptError: `data` has not the bytes that a matrix of this shape needs.
        """
        rows, columns = shape
        wanted = packed_bytes(codec, shape)
        if data.numel() != wanted:
            raise CorruptError(
                f"a {codec.name} matrix {list(shape)} needs {wanted} bytes, not {data.numel()}; "
                "convert the model again"
            )
        whole, tail = [], []
        tiles, left = divmod(rows, TILE_ROWS)
        for plane in planes(codec, rows, columns):
            values = data[plane.offset : plane.offset + plane.nbytes].view(plane.dtype)
            split = tiles * TILE_ROWS * plane.units
            whole.append(values[:split].view(tiles, plane.units, TILE_ROWS))
            tail.append(values[split:].view(1, plane.units, left))
        size = torch.Size(shape)
        return Packed(codec, size, data, _Tiles(tuple(whole)), _Tiles(tuple(tail)), inputs)

    @property
    def padded_columns(self) -> int:
        """The input dimension rounded up to whole words of every plane of codes."""
        described = planes(self.codec, *self.shape)
        return max(plane.units * (32 // plane.width) for plane in described if plane.width)

    def expand(
        self, first: int, last: int, out: torch.Tensor, work: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows `first` (a multiple of 32) to `last`, as columns: fp32 [in, last - first].

        Inputs are in the stored order. `out` is fp32 memory for at least `padded_columns` ×
        (last - first) elements, in which the result lies; `work` is int32 memory for half as many.
        """
        if work is None:
            work = torch.empty(out.numel() // 2, dtype=torch.int32)
        rows, split = last - first, self.shape[0] // TILE_ROWS * TILE_ROWS
        matrix = out[: self.padded_columns * rows].view(self.padded_columns, rows)
        start, stop = first // TILE_ROWS, min(last, split) // TILE_ROWS
        if stop > start:
            parts = tuple(plane[start:stop] for plane in self.whole.planes)
            columns = matrix[:, : (stop - start) * TILE_ROWS]
            self._expand(parts, columns.view(-1, stop - start, TILE_ROWS), work)
        if last > split:
            self._expand(self.tail.planes, matrix[:, -self.tail.rows :].unsqueeze(1), work)
        return matrix[: self.shape[1]]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` [n], fp32 [n, in]."""
        tiles, lanes = ids // TILE_ROWS, ids % TILE_ROWS
        parts = tuple(
            _rows_of(whole, tail, tiles, lanes)
            for whole, tail in zip(self.whole.planes, self.tail.planes, strict=True)
        )
        out = torch.empty(self.padded_columns, 1, len(ids))
        self._expand(parts, out, torch.empty(out.numel() // 2, dtype=torch.int32))
        return self._in_order(out[: self.shape[1], 0].T)

    def dense(self) -> torch.Tensor:
        """The whole matrix, fp32 [out, in]."""
        out = torch.empty(self.padded_columns * self.shape[0])
        return self._in_order(self.expand(0, self.shape[0], out).T)

    def _expand(
        self, parts: tuple[torch.Tensor, ...], out: torch.Tensor, work: torch.Tensor
    ) -> None:
        expand(self.codec, planes(self.codec, *self.shape), parts, self.shape[1], out, work)

    def _in_order(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [rows, in] with the columns in the model's order."""
        if self.inputs is None:
            return values.contiguous()
        ordered = torch.empty(values.shape)
        ordered[:, self.inputs] = values
        return ordered


def _rows_of(
    whole: torch.Tensor, tail: torch.Tensor, tiles: torch.Tensor, lanes: torch.Tensor
) -> torch.Tensor:
    """Single rows of one plane, [1, units, rows]."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[whole.dtype.itemsize]
    found = torch.empty(len(tiles), whole.shape[1], dtype=bits)  # not every dtype can be indexed
    inside = tiles < whole.shape[0]
    found[inside] = whole.view(bits)[tiles[inside], :, lanes[inside]]
    found[~inside] = tail.view(bits)[0].T[lanes[~inside]]
    return found.T.contiguous().view(whole.dtype).unsqueeze(0)
