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
    work: torch.Tensor,
) -> None:
    """Dequantise tiles into `out`, fp32 [padded columns, tiles, rows of a tile].

    `parts` are the planes `described`, each [tiles, units, rows of a tile]; `work` is int32 memory
    for half as many elements as `out`. What lies in `out` beyond `columns` means nothing.
    """
    _put_codes(codec, described, parts, out, work)
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
    codec: Codec,
    described: Sequence[Plane],
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    work: torch.Tensor,
) -> None:
    """The numbers that the codes stand for, before scaling."""
    book = None if codec.book is None else codec.numbers()
    for numbers, codes in _codes(described, parts, out, work):
        if book is not None:
            numbers.copy_(book.index_select(0, codes.flatten()).view(codes.shape))
        else:
            numbers.copy_(codes.sub_(codec.zero) if codec.zero else codes)


def _codes(
    described: Sequence[Plane], parts: Sequence[torch.Tensor], out: torch.Tensor, work: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The codes of every so many inputs, and where in `out` their numbers belong.

    Both are [tiles, units, rows]; the codes lie in `work` until the next ones are asked for.
    """
    (low, words), *high = [(d, p) for d, p in zip(described, parts, strict=True) if d.width]
    per_word = 32 // low.width
    targets = out[: low.units * per_word].view(low.units, per_word, *out.shape[1:])
    ratio = low.width // high[0][0].width if high else 1  # words for one of the high bits
    for word in range(ratio):
        some = words[:, word::ratio]
        codes, upper = work[: 2 * some.numel()].view(2, *some.shape)
        for index in range(per_word):
            _take(some, low.width, index, codes)
            for plane, bits in high:
                _take(bits[:, : some.shape[1]], plane.width, word * per_word + index, upper)
                codes |= upper.bitwise_left_shift_(low.width)
            yield targets[word::ratio, index].transpose(0, 1), codes


def _take(words: torch.Tensor, width: int, index: int, codes: torch.Tensor) -> None:
    """Code number `index` of every word: in its byte `index % 4`, bit field `index // 4`."""
    torch.bitwise_right_shift(words, 8 * (index % 4) + width * (index // 4), out=codes)
    codes &= (1 << width) - 1


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
    return power_of_two(values.to(torch.int32))


def power_of_two(byte: torch.Tensor) -> torch.Tensor:
    """2^(byte - 127) in fp32 for int32 bytes, as E8M0 says; 255 gives infinity."""
    bits = torch.where(byte == 0, 1 << 22, byte << 23)  # 2^-127 is subnormal
    return bits.view(torch.float32)


def first_bad_row(level: Level, values: torch.Tensor) -> int | None:
    """The first row of `values` [rows, groups] with an element that is NaN or infinite."""
    bad = (~_decode(level, values).isfinite()).any(dim=1)
    return int(bad.int().argmax()) if bad.any() else None
