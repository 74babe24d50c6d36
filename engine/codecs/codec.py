"""What a codec is: how a weight matrix [out, in] is stored in few bits, described once.

    value[r, k] = (number(code[r, k]) - zero_point[r, g]) * scale[r, g] - minimum[r, g]

in fp32, where g counts groups along the input dimension, and scale and minimum are products of
their levels (K-quants: a small integer per group times a half per 256 inputs). Packing
(`planes`), exact dequantisation (`expand`) and the kernels read this description; nothing else
knows a format.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from tierrun.io.errors import StoreError

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def _e4m3() -> tuple[float, ...]:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return tuple(codes.to(torch.float32).tolist())


BOOKS: dict[str, Callable[[], tuple[float, ...]]] = {
    "iq4": lambda: tuple(map(float, _IQ4)),
    "e2m1": lambda: tuple(map(float, _E2M1)),
    "e4m3": _e4m3,
}
"""Code books: what each code stands for (llama.cpp's IQ4_NL; OCP's FP4 and FP8)."""

ELEMENTS = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.uint8,  # 2^(byte - 127)
    "i8": torch.int8,
    "u8": torch.uint8,
    "u4": torch.uint8,  # two groups to a byte, the even one in the low half
}
"""Element types of scales and minima, and the dtype of their planes."""


@dataclass(frozen=True, slots=True)
class Level:
    """One factor of a scale or minimum: an `element` for every `per` inputs (None: a whole row).

    `divides` says that the product so far is divided by it.
    """

    element: str
    per: int | None
    divides: bool = False


@dataclass(frozen=True, slots=True)
class Codec:
    """The description; see the module's head. `zero` is subtracted from every code.

    Codes are unsigned integers of `bits` bits; with a `book` they are looked up there instead. The
    last group of a row may be shorter.
    """

    name: str
    bits: int
    scale: tuple[Level, ...]
    zero: int = 0
    book: str | None = None
    minimum: tuple[Level, ...] = ()
    zero_point: Level | None = None

    def numbers(self) -> torch.Tensor:
        """What each code stands for before scaling, fp32 [2^bits]; not to be written to."""
        return _numbers(self)


@lru_cache
def _numbers(codec: Codec) -> torch.Tensor:
    if codec.book is not None:
        return torch.tensor(BOOKS[codec.book]())
    return torch.arange(1 << codec.bits, dtype=torch.float32) - codec.zero


def _k_quant(name: str, bits: int, group: int, element: str) -> Codec:
    levels = (Level(element, group), Level("f16", 256))
    return Codec(name, bits, scale=levels, minimum=levels)


_HALF = (Level("f16", 32),)
_NAMED = (
    Codec("q8_0", 8, _HALF, zero=128),
    Codec("q4_0", 4, _HALF, zero=8),
    Codec("q4_1", 4, _HALF, minimum=_HALF),
    Codec("q5_0", 5, _HALF, zero=16),
    Codec("q5_1", 5, _HALF, minimum=_HALF),
    _k_quant("q2_k", 2, 16, "u4"),
    Codec("q3_k", 3, (Level("i8", 16), Level("f16", 256)), zero=4),
    _k_quant("q4_k", 4, 32, "u8"),
    _k_quant("q5_k", 5, 32, "u8"),
    Codec("q6_k", 6, (Level("i8", 16), Level("f16", 256)), zero=32),
    Codec("iq4_nl", 4, _HALF, book="iq4"),
    Codec("iq4_xs", 4, (Level("i8", 32), Level("f16", 256)), book="iq4"),
    Codec("mxfp4", 4, (Level("e8m0", 32),), book="e2m1"),
    Codec("nvfp4", 4, (Level("e4m3", 16), Level("f32", None)), book="e2m1"),
    Codec("nvfp4_div", 4, (Level("e4m3", 16), Level("f32", None, divides=True)), book="e2m1"),
)
_BY_NAME = {codec.name: codec for codec in _NAMED}

_PARAMETRIC = re.compile(r"^(?P<base>fp8|int4z?|int8z?)_(g(?P<per>\d+)|row)_(?P<element>\w+)$")


def find_codec(name: str) -> Codec:
    """The codec called `name`.

    Besides the named ones there are families that say their group (or `row`) and the element of
    their scale: `fp8_g128_f32`, `int4_g32_bf16`, `int8_row_f32`, `int4z_g128_f16` (zero points).

    Raises:
        StoreError: no such codec.
    """
    if name not in _BY_NAME:
        _BY_NAME[name] = _parametric(name)
    return _BY_NAME[name]


def is_codec(name: str) -> bool:
    """Whether `find_codec` knows `name`."""
    try:
        find_codec(name)
    except StoreError:
        return False
    return True


def _parametric(name: str) -> Codec:
    match = _PARAMETRIC.match(name)
    if match is None or match["element"] not in ELEMENTS or match["per"] == "0":
        raise StoreError(f"codec {name} is unknown; update tierrun")
    per = int(match["per"]) if match["per"] else None
    scale = (Level(match["element"], per),)
    if match["base"] == "fp8":
        return Codec(name, 8, scale, book="e4m3")
    bits = int(match["base"][3])
    zero_point = Level("u8", per) if match["base"].endswith("z") else None
    return Codec(
        name, bits, scale, zero=0 if zero_point else 1 << (bits - 1), zero_point=zero_point
    )
