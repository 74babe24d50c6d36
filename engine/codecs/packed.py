"""A matrix in a codec's planes, over bytes that somebody else owns; expanded a tile at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tierrun.engine.codecs.codec import Codec, Level
from tierrun.engine.codecs.planes import TILE_ROWS, Fields, Plane, packed_bytes, planes
from tierrun.io.errors import CorruptError


class _Part(NamedTuple):
    """The planes of `tiles` equally wide tiles: each [tiles, units, rows of a tile]."""

    planes: tuple[torch.Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        tiles, _, rows = self.planes[0].shape
        return tiles, rows


@dataclass(frozen=True, slots=True)
class Packed:
    """The matrix `shape` [out, in] in `codec`; views only, nothing is copied.

    `whole` are the tiles of 32 rows, `tail` the narrower last one (of no rows, often).
    """

    codec: Codec
    shape: torch.Size
    whole: _Part
    tail: _Part
    nbytes: int

    @staticmethod
    def over(data: torch.Tensor, codec: Codec, shape: tuple[int, int]) -> "Packed":
        """The matrix in `data` (uint8, on a 4-byte boundary).

        Raises:
            CorruptError: `data` has not the bytes that a matrix of this shape needs.
        """
        wanted = packed_bytes(codec, shape)
        if data.numel() != wanted:
            raise CorruptError(
                f"a {codec.name} matrix {list(shape)} needs {wanted} bytes, not {data.numel()}; "
                "convert the model again"
            )
        whole, tail = [], []
        full = shape[0] // TILE_ROWS
        for plane in planes(codec, *shape):
            values = data[plane.offset : plane.offset + plane.nbytes].view(plane.dtype)
            split = full * TILE_ROWS * plane.units
            whole.append(values[:split].view(full, plane.units, TILE_ROWS))
            tail.append(values[split:].view(1, plane.units, shape[0] % TILE_ROWS))
        return Packed(
            codec, torch.Size(shape), _Part(tuple(whole)), _Part(tuple(tail)), data.numel()
        )

    def expand(self, first: int, last: int, out: torch.Tensor) -> torch.Tensor:
        """Rows `first` (a multiple of 32) to `last`, as columns: fp32 [in, last - first].

        `out` is fp32 memory for at least `padded_columns` × (last - first) elements; the result
        lies in it.
        """
        full = self.shape[0] // TILE_ROWS
        start, stop = first // TILE_ROWS, min(last // TILE_ROWS, full)
        rows = last - first
        matrix = out[: self.padded_columns * rows].view(self.padded_columns, rows)
        if stop > start:
            part = _Part(tuple(plane[start:stop] for plane in self.whole.planes))
            width = (stop - start) * TILE_ROWS
            _expand(self, part, matrix[:, :width].view(-1, stop - start, TILE_ROWS))
        if last > full * TILE_ROWS:
            _expand(self, self.tail, matrix[:, -self.tail.shape[1] :].unsqueeze(1))
        return matrix[: self.shape[1]]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` [n], fp32 [n, in]."""
        tiles, lanes = ids // TILE_ROWS, ids % TILE_ROWS
        gathered = [
            _rows_of(whole, tail, tiles, lanes)
            for whole, tail in zip(self.whole.planes, self.tail.planes, strict=True)
        ]
        out = torch.empty(self.padded_columns, 1, len(ids))
        _expand(self, _Part(tuple(gathered)), out)
        return out[: self.shape[1], 0].T.contiguous()

    def dense(self) -> torch.Tensor:
        """The whole matrix, fp32 [out, in]."""
        out = torch.empty(self.padded_columns * self.shape[0])
        return self.expand(0, self.shape[0], out).T.contiguous()

    @property
    def padded_columns(self) -> int:
        """The input dimension rounded up to whole words of every plane of codes."""
        return max(p.units * (32 // p.width) for p in self._planes() if p.width)

    def _planes(self) -> tuple[Plane, ...]:
        return planes(self.codec, self.shape[0], self.shape[1])


def dequantise(codec: Codec, fields: Fields) -> torch.Tensor:
    """The rows of `fields` in fp32 [rows, in]: the formula of `codec`, word for word."""
    rows, columns = fields.codes.shape
    values = codec.numbers()[fields.codes.int()]
    scale = _product(codec.scale, fields.scale, columns)
    if codec.zero_point is not None:
        assert fields.zero_point is not None
        values -= _spread(fields.zero_point.to(torch.float32), codec.zero_point, columns)
    values *= scale
    if codec.minimum:
        values -= _product(codec.minimum, fields.minimum, columns)
    return values.view(rows, columns)


def _product(
    levels: tuple[Level, ...], values: tuple[torch.Tensor, ...], columns: int
) -> torch.Tensor:
    """The product of `levels`, outermost first, fp32 [rows, columns]."""
    product: torch.Tensor | None = None
    for level, value in zip(levels, values, strict=True):
        factor = _spread(decode(level, value), level, columns)
        if product is None:
            product = factor
        else:
            product = product / factor if level.divides else factor * product
    assert product is not None
    return product


def _spread(values: torch.Tensor, level: Level, columns: int) -> torch.Tensor:
    per = columns if level.per is None else level.per
    return values.repeat_interleave(per, dim=1)[:, :columns]


def decode(level: Level, values: torch.Tensor) -> torch.Tensor:
    """Elements of `level` as fp32."""
    if level.element != "e8m0":
        return values.to(torch.float32)
    exponents = values.to(torch.int32)
    bits = torch.where(exponents == 0, 1 << 22, exponents << 23)  # 2^-127 is subnormal
    return bits.view(torch.float32)


def _rows_of(
    whole: torch.Tensor, tail: torch.Tensor, tiles: torch.Tensor, lanes: torch.Tensor
) -> torch.Tensor:
    """One plane of single rows, [1, units, n]."""
    inside = tiles < whole.shape[0]
    found = torch.empty(len(tiles), whole.shape[1], dtype=whole.dtype)
    # bytes are indexed, because not every dtype of a scale can be
    found[inside] = _as_bits(whole)[tiles[inside], :, lanes[inside]].view(whole.dtype)
    if not inside.all():
        found[~inside] = _as_bits(tail)[0, :, lanes[~inside]].T.contiguous().view(whole.dtype)
    return found.T.unsqueeze(0)


def _as_bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.dtype.itemsize])


def _expand(matrix: Packed, part: _Part, out: torch.Tensor) -> None:
    """Dequantise `part` into `out` [padded columns, tiles, rows of a tile]."""
    codec, columns = matrix.codec, matrix.shape[1]
    described = matrix._planes()
    shift, zero = 0, codec.zero
    for plane, words in zip(described, part.planes, strict=True):
        if plane.width:
            _add_codes(codec, plane.width, shift, zero, words, out)
            shift, zero = shift + plane.width, 0
    values = iter(v for p, v in zip(described, part.planes, strict=True) if not p.width)
    scale = _levels(codec.scale, values, columns)
    minimum = _levels(codec.minimum, values, columns) if codec.minimum else None
    if codec.zero_point is not None:
        zero_point = _units(codec.zero_point, next(values), columns)
        _by_group(out, zero_point, codec.zero_point, columns, torch.Tensor.sub_)
    _by_group(out, scale, codec.scale[0], columns, torch.Tensor.mul_)
    if minimum is not None:
        _by_group(out, minimum, codec.minimum[0], columns, torch.Tensor.sub_)


def _add_codes(
    codec: Codec, width: int, shift: int, zero: int, words: torch.Tensor, out: torch.Tensor
) -> None:
    """Put the numbers of the codes in `words` [tiles, units, rows] into `out`, or add high bits."""
    units = words.shape[1]
    fields = out[: units * (32 // width)].view(units, 8 // width, 4, *out.shape[1:])
    book = None if codec.book is None else codec.numbers()
    for index in range(8 // width):
        for byte in range(4):
            codes = (words >> (8 * byte + width * index)) & ((1 << width) - 1)
            target = fields[:, index, byte].transpose(0, 1)
            if book is not None:
                target.copy_(book[codes])
            elif shift == 0:
                target.copy_(codes.sub_(zero) if zero else codes)
            else:
                target.add_(codes, alpha=1 << shift)


def _levels(
    levels: tuple[Level, ...], values: Iterator[torch.Tensor], columns: int
) -> torch.Tensor:
    """The product of `levels` by groups of the first one, [groups, tiles, rows]."""
    product: torch.Tensor | None = None
    for level in levels:
        factor = _units(level, next(values), columns)
        if product is None:
            product = factor
            continue
        assert levels[0].per is not None
        ratio = product.shape[0] if level.per is None else level.per // levels[0].per
        factor = factor.repeat_interleave(ratio, dim=0)[: product.shape[0]]
        product = product / factor if level.divides else factor * product
    assert product is not None
    return product


def _units(level: Level, values: torch.Tensor, columns: int) -> torch.Tensor:
    """A plane of `level` [tiles, units, rows] as fp32 [groups, tiles, rows]."""
    if level.element == "u4":
        values = torch.stack((values & 15, values >> 4), dim=2).flatten(1, 2)
        assert level.per is not None
        values = values[:, : -(-columns // level.per)]
    return decode(level, values).transpose(0, 1)


def _by_group(
    out: torch.Tensor,
    values: torch.Tensor,
    level: Level,
    columns: int,
    apply: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    """`apply` to each group of columns of `out` its row of `values` [groups, tiles, rows]."""
    per = columns if level.per is None else level.per
    whole = columns // per
    grouped = out[: whole * per].view(whole, per, *out.shape[1:])
    apply(grouped, values[:whole].unsqueeze(1))
    if columns % per:
        apply(out[whole * per : columns], values[whole:])
