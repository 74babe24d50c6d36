"""From codes, scales and minima back to numbers in fp32, exactly as `codec` says."""

from collections.abc import Callable, Iterator, Sequence

import torch

from tierrun.engine.codecs.codec import Codec, Level
from tierrun.engine.codecs.planes import Fields, Plane


def dequantise(codec: Codec, fields: Fields) -> torch.Tensor:
    """The rows of `fields` in fp32 [rows, in]: the formula of `codec`, word for word."""
    columns = fields.codes.shape[1]
    values = codec.numbers()[fields.codes.int()]
    if codec.zero_point is not None:
        assert fields.zero_point is not None
        values -= _spread(fields.zero_point.to(torch.float32), codec.zero_point, columns)
    values *= _product(codec.scale, fields.scale, columns)
    if codec.minimum:
        values -= _product(codec.minimum, fields.minimum, columns)
    return values


def _product(levels: Sequence[Level], values: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """The product of `levels` spread over the inputs, fp32 [rows, columns]."""
    product = _spread(_decode(levels[0], values[0]), levels[0], columns)
    for level, value in zip(levels[1:], values[1:], strict=True):
        factor = _spread(_decode(level, value), level, columns)
        product = product / factor if level.divides else factor * product
    return product


def _spread(values: torch.Tensor, level: Level, columns: int) -> torch.Tensor:
    per = columns if level.per is None else level.per
    return values.repeat_interleave(per, dim=1)[:, :columns]


def expand(
    codec: Codec,
    described: Sequence[Plane],
    parts: Sequence[torch.Tensor],
    columns: int,
    out: torch.Tensor,
) -> None:
    """Dequantise tiles into `out`, fp32 [padded columns, tiles, rows of a tile].

    `parts` are the planes `described`, each [tiles, units, rows of a tile]. What lies in `out`
    beyond `columns` means nothing.
    """
    _put_codes(codec, described, parts, out)
    levels = iter(part for plane, part in zip(described, parts, strict=True) if not plane.width)
    scale = _by_groups(codec.scale, levels, columns)
    minimum = _by_groups(codec.minimum, levels, columns) if codec.minimum else None
    if codec.zero_point is not None:
        zero_point = _groups(codec.zero_point, next(levels), columns)
        _apply(torch.Tensor.sub_, out, zero_point, codec.zero_point, columns)
    _apply(torch.Tensor.mul_, out, scale, codec.scale[0], columns)
    if minimum is not None:
        _apply(torch.Tensor.sub_, out, minimum, codec.minimum[0], columns)


def _put_codes(
    codec: Codec, described: Sequence[Plane], parts: Sequence[torch.Tensor], out: torch.Tensor
) -> None:
    """The numbers that the codes stand for, before scaling."""
    book = None if codec.book is None else codec.numbers()
    shift = 0
    for plane, words in zip(described, parts, strict=True):
        if not plane.width:
            continue
        fields = _fields(out, plane)
        for index in range(8 // plane.width):
            for byte in range(4):
                codes = words >> (8 * byte + plane.width * index)
                codes &= (1 << plane.width) - 1
                target = fields[:, index, byte].transpose(0, 1)
                if book is not None:
                    target.copy_(book.index_select(0, codes.flatten()).view(codes.shape))
                elif shift:
                    target.add_(codes.mul_(1 << shift).to(torch.float32))
                else:
                    target.copy_(codes.sub_(codec.zero))
        shift += plane.width


def _fields(out: torch.Tensor, plane: Plane) -> torch.Tensor:
    """`out` by words, bit fields and bytes of `plane`: input = word, field, byte."""
    covered = out[: plane.units * (32 // plane.width)]
    return covered.view(plane.units, 8 // plane.width, 4, *out.shape[1:])


def _by_groups(
    levels: Sequence[Level], parts: Iterator[torch.Tensor], columns: int
) -> torch.Tensor:
    """The product of `levels` for every group of the first one, [groups, tiles, rows]."""
    product = _groups(levels[0], next(parts), columns)
    for level in levels[1:]:
        assert levels[0].per is not None
        ratio = len(product) if level.per is None else level.per // levels[0].per
        factor = _groups(level, next(parts), columns)
        factor = factor.repeat_interleave(ratio, dim=0)[: len(product)]
        product = product / factor if level.divides else factor * product
    return product


def _groups(level: Level, part: torch.Tensor, columns: int) -> torch.Tensor:
    """A plane of `level` [tiles, units, rows] as fp32 [groups, tiles, rows]."""
    if level.element == "u4":
        assert level.per is not None
        part = torch.stack((part & 15, part >> 4), dim=2).flatten(1, 2)
        part = part[:, : -(-columns // level.per)]
    return _decode(level, part).transpose(0, 1)


def _apply(
    operation: Callable[[torch.Tensor, torch.Tensor], object],
    out: torch.Tensor,
    values: torch.Tensor,
    level: Level,
    columns: int,
) -> None:
    """`operation` on each group of inputs in `out` with its `values` [groups, tiles, rows]."""
    per = columns if level.per is None else level.per
    whole = columns // per
    grouped = out[: whole * per].view(whole, per, *out.shape[1:])
    operation(grouped, values[:whole].unsqueeze(1))
    if columns % per:
        operation(out[whole * per : columns], values[whole:])


def _decode(level: Level, values: torch.Tensor) -> torch.Tensor:
    """Elements of `level` as fp32."""
    if level.element != "e8m0":
        return values.to(torch.float32)
    exponents = values.to(torch.int32)
    bits = torch.where(exponents == 0, 1 << 22, exponents << 23)  # 2^-127 is subnormal
    return bits.view(torch.float32)
