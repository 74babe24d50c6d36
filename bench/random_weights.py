"""Random weights in any codec, made about as fast as memory is filled: codes are random bits.

Values have a standard deviation near 0.02 and a mean near zero. Scales differ by an eighth at most,
but they do differ, so that a kernel which takes a wrong one gives a wrong answer.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.bench.checkpoint import Shape, Weight
from tierrun.engine.codecs.codec import ELEMENTS, Codec, Level, find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.codecs.planes import packed_bytes, planes
from tierrun.io.errors import UsageError

DEVIATION = 0.02
_INTEGER = 8.0
"""Integer levels of a scale are this, one less, or one more."""

_WORD_COLUMNS = 32
"""Inputs in the widest word of codes: a multiple of it leaves no bits of padding."""

Random = np.random.Generator


def generator(*seeds: int) -> Random:
    """Random numbers that only `seeds` decide, whatever order weights are made in."""
    return np.random.Generator(np.random.SFC64(seeds))


def weight_bytes(weight: Weight, shape: Shape, codec: str, random: Random) -> torch.Tensor:
    """The stored bytes of `weight`, noise in `codec` and everything else in bf16: uint8, flat."""
    if weight.kind == "noise":
        return matrix_bytes(codec, weight.shape, random)
    if weight.kind == "ones":
        values = torch.ones(weight.shape)
    elif weight.kind == "embedding":
        values = _normal(weight.shape, random)
        values[:, 0] = 8.0
    else:
        values = _normal(weight.shape, random) * (shape.rms / math.sqrt(shape.hidden))
        values[:, 0] = shape.sigma * _normal((shape.experts,), random) * (shape.rms / 8)
    return values.to(torch.bfloat16).flatten().view(torch.uint8)


def matrix_nbytes(codec: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix [out, in] in `codec`, a dense one or a packed one.

    Raises:
        UsageError: the inputs are no multiple of 32.
        StoreError: no such codec.
    """
    if codec in DTYPES:
        return math.prod(shape) * DTYPES[codec].itemsize
    if shape[1] % _WORD_COLUMNS:
        raise UsageError(f"matrix {list(shape)}: packed inputs come in multiples of 32")
    return packed_bytes(find_codec(codec), shape)


def matrix_bytes(codec: str, shape: tuple[int, ...], random: Random) -> torch.Tensor:
    """A random matrix [out, in] as it is stored, uint8."""
    if codec in DTYPES:
        values = _normal(shape, random) * DEVIATION
        return values.to(DTYPES[codec]).flatten().view(torch.uint8)
    return _packed(find_codec(codec), shape, random)


def _packed(codec: Codec, shape: tuple[int, ...], random: Random) -> torch.Tensor:
    data = torch.zeros(packed_bytes(codec, shape), dtype=torch.uint8)
    centres = _centres(codec)
    for plane in planes(codec, *shape):
        part = data[plane.offset : plane.offset + plane.nbytes]
        if plane.level is None:
            part.copy_(_codes(codec, plane.nbytes, random))
        else:
            count = plane.nbytes // plane.dtype.itemsize
            part.copy_(_elements(plane.level, next(centres), count, random))
    return data


def _codes(codec: Codec, nbytes: int, random: Random) -> torch.Tensor:
    words = random.integers(0, 1 << 64, -(-nbytes // 8), dtype=np.uint64)
    codes = torch.from_numpy(words.view(np.uint8)[:nbytes])
    if codec.book == "e4m3":
        codes[(codes & 127) == 127] = 0  # NaN
    return codes


def _centres(codec: Codec) -> Iterator[float]:
    """What each plane of scales, minima and zero points lies around, in their order."""
    numbers = codec.numbers().double().nan_to_num()
    mean, scale = numbers.mean().item(), DEVIATION / numbers.std(correction=0).item()
    yield from _factors(codec.scale, scale)
    if codec.minimum:
        yield from _factors(codec.minimum, mean * scale)
    if codec.zero_point is not None:
        yield mean


def _factors(levels: Sequence[Level], product: float) -> Iterator[float]:
    """Levels that make `product`; the last one takes what the others leave."""
    for level in levels[:-1]:
        factor = 1.0 if ELEMENTS[level.element].is_floating_point else _INTEGER
        yield factor
        product /= factor
    yield 1 / product if levels[-1].divides else product


def _elements(level: Level, centre: float, count: int, random: Random) -> torch.Tensor:
    """The bytes of `count` elements of `level` around `centre`."""
    dtype = ELEMENTS[level.element]
    if level.element == "e8m0":
        return torch.from_numpy(_near(126.5 + round(math.log2(centre)), 1, count, random))
    if level.element == "u4":
        low, high = (_near(centre, 2, count, random) for _ in range(2))
        return torch.from_numpy(low | high << 4)
    if not dtype.is_floating_point:
        return torch.from_numpy(_near(centre, 2, count, random))
    values = centre * (0.9 + 0.2 * random.random(count, dtype=np.float32))
    return torch.from_numpy(values).to(dtype).view(torch.uint8)


def _near(centre: float, spread: int, count: int, random: Random) -> NDArray[np.uint8]:
    """`spread` + 1 neighbouring integers, the middle of which is `centre` or nearly so."""
    least = math.ceil(centre - spread / 2)
    return random.integers(least, least + spread, count, dtype=np.uint8, endpoint=True)


def _normal(shape: tuple[int, ...], random: Random) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
