"""One matrix as kernels see it: a flat tuple of integers, which can be a compile-time constant.

The tuple is indexed by the names below (`M[ROWS]`); kernels have the same names from `codes`. Every
offset is in bytes from the start of the matrix. A level of scale, minimum or zero point takes five
places (`M[SCALE + PER]`), and has element `NO_LEVEL` where the codec lacks it.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

from tierrun.engine.codecs.codec import Codec, Level
from tierrun.engine.codecs.planes import Plane, planes
from tierrun.io.errors import StoreError

Geometry = tuple[int, ...]

ROWS, COLUMNS = 0, 1
KIND, ZERO = 2, 3
"""What a code stands for: an `INTEGER` less `ZERO`, a number of the books `E2M1`, `IQ4` and `E4M3`;
or the dtype of a dense matrix."""
LOW, LOW_OFFSET, LOW_UNITS = 4, 5, 6
"""The plane of a code's low bits: their width, where it is, words per row."""
HIGH, HIGH_OFFSET, HIGH_UNITS = 7, 8, 9
"""The plane of its high bits, alike; width 0 where there is none."""
GROUP = 10
"""Inputs, up to 32, over which every level is constant: a divisor of 32."""
SCALE, SCALE_2, MINIMUM, MINIMUM_2, ZERO_POINT = 11, 16, 21, 26, 31
ELEMENT, OFFSET, UNITS, PER, DIVIDES = range(5)
"""Places within a level."""

INTEGER, E2M1, IQ4, E4M3, BF16, F16, F32 = range(7)
"""Kinds; from `BF16` on, a dense matrix, row-major."""

ELEMENTS = ("", "f32", "f16", "bf16", "e4m3", "e8m0", "i8", "u8", "u4")
"""Elements of levels by number; 0 (`NO_LEVEL`) is none."""
NO_LEVEL = 0

SPAN = 32
"""Inputs that kernels take at once: whole words of every plane."""
ROW = 1 << 30
"""`PER` of a level that holds for a whole row."""

_DENSE = {"bf16": BF16, "f16": F16, "f32": F32}
_BOOKS = {"e2m1": E2M1, "iq4": IQ4, "e4m3": E4M3}


def dense_geometry(codec: str, shape: tuple[int, ...]) -> Geometry:
    """A matrix [rows, columns] of plain numbers, `codec` one of bf16, f16, f32."""
    rows, columns = shape
    return (rows, columns, _DENSE[codec], 0) + (0,) * 6 + (SPAN,) + (0,) * 25


@lru_cache
def packed_geometry(codec: Codec, shape: tuple[int, ...]) -> Geometry:
    """A matrix [rows, columns] in `codec`.

    Raises:
        StoreError: the kernels cannot compute with such a codec.
    """
    rows, columns = shape
    found = planes(codec, rows, columns)
    codes = [plane for plane in found if plane.width]
    words = [(plane.width, plane.offset, plane.units) for plane in codes]
    low, high = words[0], words[1] if len(words) == 2 else (0, 0, 0)
    kind = INTEGER if codec.book is None else _BOOKS[codec.book]
    head = (rows, columns, kind, codec.zero, *low, *high, _group(codec, 32 // low[0]))
    return head + _levels(codec, found[len(codes) :])


def is_dense(geometry: Geometry) -> bool:
    """Whether it is a matrix of plain numbers."""
    return geometry[KIND] >= BF16


def _group(codec: Codec, inputs: int) -> int:
    """`GROUP`; `inputs` are those of a word of low bits."""
    zero_point = () if codec.zero_point is None else (codec.zero_point,)
    levels = (*codec.scale, *codec.minimum, *zero_point)
    group = gcd(SPAN, *(level.per for level in levels if level.per is not None))
    if group % inputs:
        raise StoreError(f"codec {codec.name} has groups that split words; no GPU kernel does")
    return group


def _levels(codec: Codec, found: Sequence[Plane]) -> Geometry:
    """The five levels' places, from the planes after those of codes."""
    scales, minima = len(codec.scale), len(codec.minimum)
    if scales > 2 or minima > 2 or any(level.per is None for level in codec.minimum):
        raise StoreError(f"codec {codec.name} has levels that no GPU kernel knows")
    places = [_level(plane) for plane in found]
    absent = (NO_LEVEL,) * 5
    scale = places[:scales] + [absent] * (2 - scales)
    minimum = places[scales : scales + minima] + [absent] * (2 - minima)
    zero_point = places[scales + minima :] or [absent]
    return tuple(value for level in scale + minimum + zero_point for value in level)


def _level(plane: Plane) -> Geometry:
    level = plane.level
    assert isinstance(level, Level)
    per = ROW if level.per is None else level.per
    return ELEMENTS.index(level.element), plane.offset, plane.units, per, int(level.divides)
