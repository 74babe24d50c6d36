"""How a codec's parts lie in memory, and packing them so.

A matrix is a sequence of planes, each on a cache line: codes (one plane per power of two in their
bits), then scales, then minima. Every plane has the same order: tiles of 32 output rows (the last
one narrower), in a tile its units along the input dimension, in a unit the tile's rows side by
side. SIMD lanes and GPU threads are rows, so that no sum runs across them.

A unit of codes is a 32-bit word: byte j holds the codes of inputs k + j, k + 4 + j, k + 8 + j …
from its low bits up. Masking a shifted word leaves four consecutive inputs per row in four bytes,
which is what int8 dot products (`vpmaddubsw`, VNNI, NEON dot) take.
"""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from tierrun.engine.codecs.codec import ELEMENTS, Codec, Level
from tierrun.io.extent import align_up

TILE_ROWS = 32
PLANE_ALIGNMENT = 64

_WIDTHS = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
"""Bits of a code → widths of its planes, low bits first."""


class Plane(NamedTuple):
    """`units` elements of `dtype` per row, at byte `offset` of the matrix.

    `width` is the bits per code (planes of codes only); `level` describes the others.
    """

    units: int
    dtype: torch.dtype
    offset: int
    nbytes: int
    width: int
    level: Level | None


class Fields(NamedTuple):
    """The parts of some rows of a matrix, row by row, before packing.

    `codes` is uint8 [rows, in]; each level of scale and minimum is [rows, groups] in the dtype of
    its element (`u4` one value per group), and so are the zero points.
    """

    codes: torch.Tensor
    scale: tuple[torch.Tensor, ...]
    minimum: tuple[torch.Tensor, ...] = ()
    zero_point: torch.Tensor | None = None

    @property
    def levels(self) -> tuple[torch.Tensor, ...]:
        """All but the codes, in the order of their planes."""
        return (
            *self.scale,
            *self.minimum,
            *(() if self.zero_point is None else (self.zero_point,)),
        )


@lru_cache
def planes(codec: Codec, rows: int, columns: int) -> tuple[Plane, ...]:
    """The planes of a matrix [rows, columns]."""
    kinds: list[tuple[int, torch.dtype, int, Level | None]] = [
        (-(-columns // (32 // width)), torch.int32, width, None) for width in _WIDTHS[codec.bits]
    ]
    for level in levels(codec):
        groups = 1 if level.per is None else -(-columns // level.per)
        units = -(-groups // 2) if level.element == "u4" else groups
        kinds.append((units, ELEMENTS[level.element], 0, level))
    found, offset = [], 0
    for units, dtype, width, level_or_none in kinds:
        offset = align_up(offset, PLANE_ALIGNMENT)
        nbytes = rows * units * dtype.itemsize
        found.append(Plane(units, dtype, offset, nbytes, width, level_or_none))
        offset += nbytes
    return tuple(found)


def levels(codec: Codec) -> tuple[Level, ...]:
    """Everything but the codes, in the order of their planes."""
    zero_point = () if codec.zero_point is None else (codec.zero_point,)
    return (*codec.scale, *codec.minimum, *zero_point)


def packed_bytes(codec: Codec, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix of `shape` [out, in]."""
    last = planes(codec, prod(shape[:-1]), shape[-1])[-1]
    return last.offset + last.nbytes


def pack(codec: Codec, fields: Fields) -> torch.Tensor:
    """The bytes of the whole matrix of `fields`, uint8 [packed_bytes]."""
    rows, columns = fields.codes.shape
    data = torch.zeros(packed_bytes(codec, (rows, columns)), dtype=torch.uint8)
    for plane, part in zip(planes(codec, rows, columns), pack_planes(codec, fields), strict=True):
        data[plane.offset : plane.offset + plane.nbytes] = part
    return data


def pack_planes(codec: Codec, fields: Fields) -> list[torch.Tensor]:
    """The bytes of each plane for the rows of `fields`, uint8.

    Rows in multiples of a tile, packed in turn, can be joined plane by plane.
    """
    parts, shift = [], 0
    for width in _WIDTHS[codec.bits]:
        parts.append(_in_tiles(_words(fields.codes, shift, width)))
        shift += width
    for level, values in zip(levels(codec), fields.levels, strict=True):
        parts.append(_in_tiles(_halves(values) if level.element == "u4" else values))
    return parts


def _words(codes: torch.Tensor, shift: int, width: int) -> torch.Tensor:
    """`width` bits of `codes` [rows, in] from bit `shift` on, as int32 words [rows, units]."""
    per_word = 32 // width
    if missing := -codes.shape[1] % per_word:
        codes = torch.nn.functional.pad(codes, (0, missing))
    if width < 8:
        codes = (codes >> shift) & ((1 << width) - 1)
    fields = codes.reshape(codes.shape[0], -1, 8 // width, 4)
    words = fields[:, :, 0].clone()
    for index in range(1, 8 // width):
        words |= fields[:, :, index] << (width * index)
    return words.view(torch.int32).squeeze(-1)


def _halves(values: torch.Tensor) -> torch.Tensor:
    """Values below 16, uint8 [rows, groups], two to a byte."""
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, ::2] | (values[:, 1::2] << 4)


def _in_tiles(values: torch.Tensor) -> torch.Tensor:
    """`values` [rows, units] in the order of a plane, as bytes."""
    whole = values.shape[0] // TILE_ROWS * TILE_ROWS
    tiles = values[:whole].reshape(-1, TILE_ROWS, values.shape[1]).transpose(1, 2)
    parts = (tiles.contiguous().flatten(), values[whole:].T.contiguous().flatten())
    return torch.cat([part.view(torch.uint8) for part in parts if part.numel()])
