# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Emitters: from the planes of a packed matrix to numbers, scales and minima in fp32, on the CPU.

The twin of `codes`, which explains how numbers are made of codes without converting integers. A
vector's lanes are the rows of one tile: 32 of them, or those of the narrower last one.
"""

from tierrun.engine.codecs.codec import BOOKS
from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.geometry import (
    DIVIDES,
    E2M1,
    E4M3,
    ELEMENT,
    ELEMENTS,
    HIGH,
    HIGH_OFFSET,
    HIGH_UNITS,
    INTEGER,
    IQ4,
    KIND,
    LOW,
    LOW_OFFSET,
    LOW_UNITS,
    MINIMUM,
    MINIMUM_2,
    NO_LEVEL,
    OFFSET,
    PER,
    ROW,
    SCALE,
    SCALE_2,
    UNITS,
    ZERO,
    Geometry,
)
from tierrun.engine.kernels.lanes import BYTE, F32, HALF, I16, I32, I64, Lanes

_BOOKS = {E2M1: "e2m1", IQ4: "iq4"}
_E4M3_UNIT = 256.0
"""E4M3 is read as halves that are 2^8 times smaller."""
_MANTISSA = 23


class Tile:
    """Tile number `tile` (int64) of the matrix `M` at `base` (pointer to bytes), to be read."""

    def __init__(self, lanes: Lanes, M: Geometry, base, tile) -> None:
        self.lanes, self.builder = lanes, lanes.builder
        self.M, self.base, self.tile = M, base, tile

    @property
    def unit(self) -> float:
        """What numbers are to be multiplied by, besides their scale."""
        return _E4M3_UNIT if self.M[KIND] == E4M3 else 1.0

    @property
    def book(self) -> tuple[float, ...] | None:
        """16 numbers, of which the low four bits of a shifted word say one; or None."""
        if self.M[KIND] in _BOOKS:
            return BOOKS[_BOOKS[self.M[KIND]]]()
        codes = 1 << (self.M[LOW] + self.M[HIGH])
        if self.M[KIND] != INTEGER or codes > 16 or not self.lanes.permutes:
            return None
        # two instructions for a number instead of three, and no copies of constants
        return tuple(float(index % codes - self.M[ZERO]) for index in range(16))

    @property
    def has_group_scale(self) -> bool:
        """Whether a level of the scale is finer than a row."""
        return self.M[SCALE + PER] != ROW

    def span(self, index) -> "Span":
        """The codes of span number `index` (int64)."""
        return Span(self, index)

    def element(self, offset: int, units: int, unit, element, nbytes: int):
        """The elements of `unit` (int64) of the plane at byte `offset`, of `units` a row."""
        builder = self.builder
        whole = builder.mul(self.tile, I64(units * TILE_ROWS * nbytes))
        there = builder.add(whole, builder.mul(unit, I64(self.lanes.count * nbytes)))
        return self.lanes.load(self.base, builder.add(there, I64(offset)), element, nbytes)

    def level(self, which: int, k):
        """Level `which` (SCALE, …) for the group of input `k` (int64), fp32."""
        name = ELEMENTS[self.M[which + ELEMENT]]
        per = self.M[which + PER]
        group = I64(0) if per == ROW else self.builder.udiv(k, I64(per))
        unit = self.builder.lshr(group, I64(1)) if name == "u4" else group
        element, nbytes = _ELEMENTS[name]
        return self._decoded(name, self.stored(which, unit, element, nbytes), group)

    def stored(self, which: int, unit, element, nbytes: int):
        """The elements of `unit` of the plane of level `which`."""
        return self.element(self.M[which + OFFSET], self.M[which + UNITS], unit, element, nbytes)

    def _decoded(self, name: str, stored, group):
        builder, lanes = self.builder, self.lanes
        if name == "f32":
            return stored
        if name == "f16":
            return builder.fpext(stored, lanes.kind(F32))
        if name == "i8":
            return builder.sitofp(builder.sext(stored, lanes.kind(I32)), lanes.kind(F32))
        wide = builder.zext(stored, lanes.kind(I32))
        if name == "bf16":
            return lanes.as_numbers(lanes.moved(wide, 16))
        if name == "e8m0":
            zero = builder.icmp_unsigned("==", wide, lanes.integer(0))
            tiny = lanes.integer(1 << (_MANTISSA - 1))  # 2^-127 is subnormal
            return lanes.as_numbers(builder.select(zero, tiny, lanes.moved(wide, _MANTISSA)))
        if name == "e4m3":
            return lanes.times(self.halves(half_bits(lanes, lanes.moved(wide, 8))), _E4M3_UNIT)
        if name == "u4":
            odd = builder.shl(builder.and_(group, I64(1)), I64(2))
            wide = builder.lshr(wide, lanes.spread(builder.trunc(odd, I32)))
            wide = lanes.masked(wide, 15)
        return builder.sitofp(wide, lanes.kind(F32))

    def halves(self, bits):
        """The halves in the low 16 bits of each lane, fp32."""
        lanes, builder = self.lanes, self.builder
        short = builder.trunc(bits, lanes.kind(I16))
        return builder.fpext(builder.bitcast(short, lanes.kind(HALF)), lanes.kind(F32))

    def has(self, which: int) -> bool:
        """Whether the codec has that level."""
        return self.M[which + ELEMENT] != NO_LEVEL

    def group_scale(self, k):
        """The product of the scale's levels that are finer than a row, or None."""
        if not self.has_group_scale:
            return None
        product = self.level(SCALE, k)
        if self.has(SCALE_2) and self.M[SCALE_2 + PER] != ROW:
            product = self._applied(SCALE_2, product, self.level(SCALE_2, k))
        return product

    def row_scaled(self, sums):
        """`sums` with the level of the scale that holds for whole rows, if there is one."""
        for which in (SCALE, SCALE_2):
            if self.has(which) and self.M[which + PER] == ROW:
                return self._applied(which, sums, self.level(which, I64(0)))
        return sums

    def minimum(self, k):
        """The product of the minimum's levels; where the codec has one."""
        product = self.level(MINIMUM, k)
        if self.has(MINIMUM_2):
            product = self._applied(MINIMUM_2, product, self.level(MINIMUM_2, k))
        return product

    def _applied(self, which: int, product, factor):
        return applied(self.builder, self.M, which, product, factor)


def applied(builder, M: Geometry, which: int, product, factor):
    """`product` with a level of scale or minimum, which may divide."""
    divides = which != SCALE and M[which + DIVIDES]
    return (builder.fdiv if divides else builder.fmul)(product, factor)


class Span:
    """32 inputs of a tile; words are loaded when first asked for."""

    def __init__(self, tile: Tile, index) -> None:
        self.tile, self.index, self.M = tile, index, tile.M
        self.lanes = tile.lanes
        self.ready: dict[tuple[str, int], object] = {}

    def number(self, k: int):
        """What the code of input `k` (0 … 31) stands for, in `Tile.unit`s, fp32."""
        word, within = divmod(k, 32 // self.M[LOW])
        byte, field = within % 4, within // 4
        if self.M[KIND] == E4M3:
            return self._e4m3(word, byte)
        if self.M[HIGH]:
            key, place = ("both", 4 * word + field), 8 * byte
            codes = self._once(key, lambda: self._both(word, field))
        else:
            key, place = ("low", word), 8 * byte + self.M[LOW] * field
            codes = self._low(word)
        book = self.tile.book
        if book is None:
            return self._counted(key, codes, place)
        return self.lanes.looked_up(self.lanes.moved(codes, -place), book)

    def _low(self, word: int):
        return self._once(("low", word), lambda: self._word(LOW, LOW_OFFSET, LOW_UNITS, word))

    def _high(self, word: int):
        return self._once(("high", word), lambda: self._word(HIGH, HIGH_OFFSET, HIGH_UNITS, word))

    def _once(self, key: tuple[str, int], make):
        if key not in self.ready:
            self.ready[key] = make()
        return self.ready[key]

    def _word(self, width: int, offset: int, units: int, word: int):
        builder = self.tile.builder
        unit = builder.add(builder.mul(self.index, I64(self.M[width])), I64(word))
        return self.tile.element(self.M[offset], self.M[units], unit, I32, 4)

    def _both(self, word: int, field: int):
        """Four whole codes, one in each byte: bit field `field` of a word, with its high bits."""
        ratio = self.M[LOW] // self.M[HIGH]
        sub = word % ratio * (8 // self.M[LOW]) + field
        low = self._field(self._low(word), self.M[LOW], field, 0)
        high = self._field(self._high(word // ratio), self.M[HIGH], sub, self.M[LOW])
        return self.lanes.joined(low, high)

    def _field(self, word, width: int, field: int, place: int):
        """Bit field `field` of every byte, moved to bits `place` and up of its byte."""
        mask = (((1 << width) - 1) << place) * 0x01010101
        return self.lanes.masked(self.lanes.moved(word, place - width * field), mask)

    def _counted(self, key: tuple[str, int], word, place: int):
        """A code from bit `place` of `word` on, less ZERO: the mantissa of a power of two."""
        width = self.M[LOW] + self.M[HIGH]
        if place + width > _MANTISSA:  # longer than a mantissa; all that do share the shifted word
            name, number = key
            upper = self._once((f"{name} upper", number), lambda: self.lanes.moved(word, -16))
            return self._counted((f"{name} upper", number), upper, place - 16)
        code = self.lanes.masked(word, ((1 << width) - 1) << place)
        bits = self.lanes.joined(code, (127 + _MANTISSA - place) << _MANTISSA)
        power = float(1 << (_MANTISSA - place)) + self.M[ZERO]
        return self.tile.builder.fsub(self.lanes.as_numbers(bits), self.lanes.number(power))

    def _e4m3(self, word: int, byte: int):
        odd = byte % 2
        bits = self._once(
            ("halves", 2 * word + odd),
            lambda: half_bits(self.lanes, self.lanes.moved(self._low(word), 0 if odd else 8)),
        )
        return self.tile.halves(self.lanes.moved(bits, -16 * (byte // 2)))


def half_bits(lanes: Lanes, word):
    """E4M3 in bytes 1 and 3 as the bits of halves 2^8 times smaller (subnormals, too)."""
    magnitude = lanes.moved(lanes.masked(word, 0x7F007F00), -1)
    return lanes.joined(lanes.masked(word, 0x80008000), magnitude)


_ELEMENTS = {
    "f32": (F32, 4),
    "f16": (HALF, 2),
    "bf16": (I16, 2),
    "e4m3": (BYTE, 1),
    "e8m0": (BYTE, 1),
    "i8": (BYTE, 1),
    "u8": (BYTE, 1),
    "u4": (BYTE, 1),
}
"""Element of a level → its type in memory, and bytes."""
