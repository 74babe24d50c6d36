# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
"""Device functions: from the planes of a packed matrix to numbers, scales and minima in fp32.

A matrix is `base` (pointer to uint8) and `M`, its geometry. Elements are asked for by tensors that
broadcast against each other: units, or first inputs, [U, 1] and rows [1, R]. Rows are contiguous in
memory (in whole tiles), so R side by side make one wide load.

    value = (number - zero_point) * scale - minimum

Conversions of integers run at a quarter of the rate of additions (a sixteenth on some devices), and
table look-ups are loads. So a code is or-ed, where it lies in its word, into the mantissa of a
power of two large enough that the bit of its place is worth one; subtracting that power again, and
`ZERO` with it, leaves the number exactly: two instructions.
"""

import triton
import triton.language as tl

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels import geometry as _g

ROWS, COLUMNS = tl.constexpr(_g.ROWS), tl.constexpr(_g.COLUMNS)
KIND, ZERO, GROUP = tl.constexpr(_g.KIND), tl.constexpr(_g.ZERO), tl.constexpr(_g.GROUP)
LOW, LOW_OFFSET = tl.constexpr(_g.LOW), tl.constexpr(_g.LOW_OFFSET)
LOW_UNITS = tl.constexpr(_g.LOW_UNITS)
HIGH, HIGH_OFFSET = tl.constexpr(_g.HIGH), tl.constexpr(_g.HIGH_OFFSET)
HIGH_UNITS = tl.constexpr(_g.HIGH_UNITS)
SCALE, SCALE_2 = tl.constexpr(_g.SCALE), tl.constexpr(_g.SCALE_2)
MINIMUM, MINIMUM_2 = tl.constexpr(_g.MINIMUM), tl.constexpr(_g.MINIMUM_2)
ZERO_POINT = tl.constexpr(_g.ZERO_POINT)
ELEMENT, OFFSET, UNITS = tl.constexpr(_g.ELEMENT), tl.constexpr(_g.OFFSET), tl.constexpr(_g.UNITS)
PER, DIVIDES = tl.constexpr(_g.PER), tl.constexpr(_g.DIVIDES)
E2M1, IQ4, E4M3 = tl.constexpr(_g.E2M1), tl.constexpr(_g.IQ4), tl.constexpr(_g.E4M3)
BF16, F16 = tl.constexpr(_g.BF16), tl.constexpr(_g.F16)
SPAN, ROW, NO_LEVEL = tl.constexpr(_g.SPAN), tl.constexpr(_g.ROW), tl.constexpr(_g.NO_LEVEL)
TILE = tl.constexpr(TILE_ROWS)

_F32 = tl.constexpr(_g.ELEMENTS.index("f32"))
_F16 = tl.constexpr(_g.ELEMENTS.index("f16"))
_BF16 = tl.constexpr(_g.ELEMENTS.index("bf16"))
_E4M3 = tl.constexpr(_g.ELEMENTS.index("e4m3"))
_E8M0 = tl.constexpr(_g.ELEMENTS.index("e8m0"))
_I8 = tl.constexpr(_g.ELEMENTS.index("i8"))
_U4 = tl.constexpr(_g.ELEMENTS.index("u4"))

_BIAS = tl.constexpr(128)
# The books' numbers plus _BIAS as bytes, four to a word: IQ4_NL's, and twice E2M1's.
_IQ4_0, _IQ4_1 = tl.constexpr(0x3F2D1801), tl.constexpr(0x766A5D4F)
_IQ4_2, _IQ4_3 = tl.constexpr(0xA6998D81), tl.constexpr(0xF1D9C5B5)
_E2M1_0, _E2M1_1 = tl.constexpr(0x83828180), tl.constexpr(0x8C888684)
_E2M1_2, _E2M1_3 = tl.constexpr(0x7D7E7F80), tl.constexpr(0x74787A7C)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def whole_tiles(M):
    """Tiles of 32 rows."""
    return M[_g.ROWS] // TILE_ROWS


@triton.constexpr_function
def narrow_rows(M):
    """Rows of the narrower tile after them, or 0."""
    return M[_g.ROWS] % TILE_ROWS


@triton.constexpr_function
def spans(M):
    """Spans of 32 inputs, the last one of fewer where `is_ragged`."""
    return -(-M[_g.COLUMNS] // _g.SPAN)


@triton.constexpr_function
def is_ragged(M):
    """Whether the input is not whole spans."""
    return M[_g.COLUMNS] % _g.SPAN != 0


@triton.jit
def element(plane, units: tl.constexpr, unit, row, mask, other, M: tl.constexpr):
    """The elements of `unit` and `row` of a plane, `plane` a pointer to its first one.

    What lies outside of `mask` (None: nothing) is `other`.
    """
    place = place_of(units, unit, row, M)
    if mask is None:
        return tl.load(plane + place)
    else:
        return tl.load(plane + place, mask=mask, other=other)


@triton.jit
def place_of(units: tl.constexpr, unit, row, M: tl.constexpr):
    """Where in a plane the element of `unit` and `row` is."""
    tile = row // TILE
    if narrow_rows(M) == 0:
        return (tile * units + unit) * TILE + row % TILE
    else:  # the last tile is narrower
        width = tl.where(tile < whole_tiles(M), TILE, narrow_rows(M))
        return tile * (units * TILE) + unit * width + row % TILE


@triton.jit
def low_word(base, unit, row, mask, M: tl.constexpr):
    """Words of low bits, uint32: `unit` counts words, of 32 / LOW inputs each."""
    plane = (base + M[LOW_OFFSET]).to(tl.pointer_type(tl.uint32))
    return element(plane, M[LOW_UNITS], unit, row, mask, 0, M)


@triton.jit
def high_word(base, unit, row, mask, M: tl.constexpr):
    """Words of high bits, alike; only where M[HIGH] is not 0."""
    plane = (base + M[HIGH_OFFSET]).to(tl.pointer_type(tl.uint32))
    return element(plane, M[HIGH_UNITS], unit, row, mask, 0, M)


@triton.jit
def span_words(base, span, row, M: tl.constexpr):
    """All words of codes of a span: of low bits, of high bits (a tuple each)."""
    lows: tl.constexpr = M[LOW]
    highs: tl.constexpr = M[HIGH]
    low = ()
    for w in tl.static_range(lows):
        unit = span * M[LOW] + w
        some = unit * (32 // M[LOW]) < M[COLUMNS] if is_ragged(M) else None
        low = low + (low_word(base, unit, row, some, M),)
    high = ()
    for w in tl.static_range(highs):
        unit = span * M[HIGH] + w
        some = unit * (32 // M[HIGH]) < M[COLUMNS] if is_ragged(M) else None
        high = high + (high_word(base, unit, row, some, M),)
    return low, high


@triton.jit
def span_word(low, high, word: tl.constexpr, M: tl.constexpr):
    """Word number `word` of a span (of 32 / LOW inputs), `prepared`, from its `span_words`."""
    if M[HIGH] != 0:
        ratio: tl.constexpr = M[LOW] // M[HIGH]
        return prepared(low[word], high[word // ratio], word % ratio, M)
    else:
        return prepared(low[word], low[word], 0, M)


@triton.jit
def prepared(low, high, sub: tl.constexpr, M: tl.constexpr):
    """A word `low` of codes made ready for `number`: a tuple.

    `high` is the word with their high bits (anything where M[HIGH] is 0), of which `low` is the
    `sub`-th part: a word of high bits serves LOW / HIGH words of low bits.
    """
    if M[KIND] == E4M3:
        return _half_bits(low << 8), _half_bits(low)
    elif M[KIND] == IQ4:
        return _booked(low, _IQ4_0, _IQ4_1, _IQ4_2, _IQ4_3)
    elif M[KIND] == E2M1:
        return _booked(low, _E2M1_0, _E2M1_1, _E2M1_2, _E2M1_3)
    elif M[HIGH] == 0:
        return (low,)
    else:
        found = ()
        for field in tl.static_range(8 // M[LOW]):
            upper = _moved(high, M[HIGH], sub * (8 // M[LOW]) + field, M[LOW])
            found = found + (_moved(low, M[LOW], field, 0) | upper,)
        return found


@triton.jit
def number(ready, k: tl.constexpr, M: tl.constexpr):
    """The number of input `k` (0 … 32 / LOW - 1) of a word, fp32, from `prepared`."""
    if M[KIND] == E4M3:
        bits = (ready[k % 2] >> (16 * (k // 2))).to(tl.uint16)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif M[KIND] == IQ4 or M[KIND] == E2M1:
        # A look-up leaves the two codes of a byte, inputs k and k + 4, side by side.
        place: tl.constexpr = 8 * (2 * (k % 2) + k // 4)
        return _counted(ready[k % 4 // 2], place, 8, _BIAS, M[KIND] == E2M1)
    elif M[HIGH] == 0:
        return _counted(ready[0], 8 * (k % 4) + M[LOW] * (k // 4), M[LOW], M[ZERO], False)
    else:
        return _counted(ready[k // 4], 8 * (k % 4), M[LOW] + M[HIGH], M[ZERO], False)


@triton.jit
def _counted(
    word, place: tl.constexpr, width: tl.constexpr, zero: tl.constexpr, halves: tl.constexpr
):
    """`width` bits of `word` from bit `place` on, less `zero`, in ones or in halves, fp32."""
    if place + width > 23:  # longer than a mantissa; all that do share the shifted word
        return _counted(word >> 16, place - 16, width, zero, halves)
    else:
        bits = _merged(word, _ones(width, place), _power_bits(place + halves))
        return bits.to(tl.float32, bitcast=True) - _power(place + halves, zero, halves)


@triton.constexpr_function
def _ones(width, place):
    """`width` set bits from bit `place` on."""
    return ((1 << width) - 1) << place


@triton.constexpr_function
def _every_byte(width, place):
    """The same in each of four bytes."""
    return (((1 << width) - 1) << place) * 0x01010101


@triton.constexpr_function
def _power_bits(place):
    """The bits of the power of two that makes bit `place` of its mantissa one."""
    return (127 + 23 - place) << 23


@triton.constexpr_function
def _power(place, zero, halves):
    """That power, plus `zero` ones or `halves`."""
    return float(1 << (23 - place)) + (zero / 2 if halves else zero)


@triton.jit
def _merged(word, mask: tl.constexpr, bits: tl.constexpr):
    """`(word & mask) | bits`."""
    if INTERPRETED:
        return (word & mask) | bits
    else:  # left to the compiler this becomes two instructions, as each takes but one constant
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,n,n",
            [word, mask, bits],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _moved(word, width: tl.constexpr, field: tl.constexpr, place: tl.constexpr):
    """Bit field `field` of every byte of `word`, moved to bits `place` and up of its byte."""
    left: tl.constexpr = place - width * field
    moved = word << left if left >= 0 else word >> -left
    return moved & _every_byte(width, place)


@triton.jit
def _half_bits(word):
    """E4M3 in bytes 1 and 3 as the bits of halves 2^8 times smaller (subnormals, too)."""
    return (word & 0x80008000) | ((word & 0x7F007F00) >> 1)


@triton.jit
def _booked(word, b0: tl.constexpr, b1: tl.constexpr, b2: tl.constexpr, b3: tl.constexpr):
    """Bytes for the four-bit codes of `word`: those of its low half, those of its high."""
    return _looked_up(word, b0, b1, b2, b3), _looked_up(word >> 16, b0, b1, b2, b3)


@triton.jit
def _looked_up(word, b0: tl.constexpr, b1: tl.constexpr, b2: tl.constexpr, b3: tl.constexpr):
    """Bytes of the table b0 … b3 for the four codes in the low half of `word`."""
    if INTERPRETED:
        found = tl.zeros_like(word)
        for k in tl.static_range(4):
            code = (word >> (4 * k)) & 15
            low = tl.where(code < 4, tl.full(word.shape, b0, tl.uint32), b1)
            high = tl.where(code < 12, tl.full(word.shape, b2, tl.uint32), b3)
            found |= ((tl.where(code < 8, low, high) >> (8 * (code & 3))) & 255) << (8 * k)
        return found
    else:  # prmt takes bytes out of eight by three bits of a code, and then by the fourth
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, which;
            and.b32 which, $1, 0x7777;
            prmt.b32 low, $2, $3, which;
            prmt.b32 high, $4, $5, which;
            shr.b32 which, $1, 1;
            and.b32 which, which, 0x4444;
            or.b32 which, which, 0x3210;
            prmt.b32 $0, low, high, which;
            }""",
            "=r,r,n,n,n,n",
            [word, b0, b1, b2, b3],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def level(base, k, row, mask, M: tl.constexpr, which: tl.constexpr):
    """Level `which` (SCALE, …) of the groups of inputs `k` and of `row`, fp32; outside of `mask` 1.

    `k` is the first input of a unit all of whose inputs are in one group.
    """
    kind: tl.constexpr = M[which + ELEMENT]
    plane = base + M[which + OFFSET]
    if M[which + PER] == ROW:
        group = k * 0
    else:
        group = k // M[which + PER]
    if kind == _U4:
        both = element(plane, M[which + UNITS], group // 2, row, mask, 0x11, M)
        return ((both >> (4 * (group % 2)).to(tl.uint8)) & 15).to(tl.float32)
    elif kind == _E8M0:
        byte = element(plane, M[which + UNITS], group, row, mask, 127, M).to(tl.uint32)
        bits = tl.where(byte == 0, 1 << 22, byte << 23)  # 2^-127 is subnormal
        return bits.to(tl.float32, bitcast=True)
    elif kind == _E4M3:
        byte = element(plane, M[which + UNITS], group, row, mask, 0x38, M)
        bits = _half_bits(byte.to(tl.uint32) << 8).to(tl.uint16)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        typed = plane.to(tl.pointer_type(_dtype(kind)))
        return element(typed, M[which + UNITS], group, row, mask, 1, M).to(tl.float32)


@triton.jit
def fetched(
    base,
    OFFSET: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    start,
    unit,
    row,
    M: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Elements of a plane of `WIDTH` bits each, uint32: those of unit `start + unit` and `row`.

    `start` is the same for all threads, and only the pointer to the plane has it added.
    """
    plane = (base + OFFSET).to(tl.pointer_type(_unsigned(WIDTH)))
    if narrow_rows(M) == 0:
        plane = plane + start * TILE
    else:
        unit = start + unit
    place = plane + place_of(UNITS, unit, row, M)
    if INTERPRETED or not HOPPER:
        return tl.load(place).to(tl.uint32)
    else:
        # To Triton this is an operation element by element, done in the layout of what is made of
        # it: into the registers that need it, not by way of shared memory.
        return tl.inline_asm_elementwise(
            _load_of(WIDTH), "=r,l", [place], dtype=tl.uint32, is_pure=True, pack=1
        )


@triton.constexpr_function
def _unsigned(width):
    return {8: tl.uint8, 16: tl.uint16, 32: tl.uint32}[width]


@triton.constexpr_function
def _load_of(width):
    return f"ld.global.{'b' if width == 32 else 'u'}{width} $0, [$1];"


@triton.jit
def level_bits(base, start, unit, row, M: tl.constexpr, which: tl.constexpr, HOPPER: tl.constexpr):
    """What `level_number` needs for group `start + unit` of level `which`, `fetched`."""
    if M[which + PER] == ROW:
        start, unit = start * 0, unit * 0
    elif M[which + ELEMENT] == _U4:
        start, unit = start * 0, (start + unit) // 2
    width: tl.constexpr = _width(M[which + ELEMENT])
    return fetched(base, M[which + OFFSET], M[which + UNITS], width, start, unit, row, M, HOPPER)


@triton.constexpr_function
def _width(kind):
    """Bits of an element in memory; of two where they are of four."""
    return {_F32.value: 32, _F16.value: 16, _BF16.value: 16}.get(kind, 8)


@triton.jit
def level_number(bits, k, M: tl.constexpr, which: tl.constexpr):
    """`level` from what `level_bits` gave for the group of inputs `k`, fp32."""
    kind: tl.constexpr = M[which + ELEMENT]
    if kind == _F32:
        return bits.to(tl.float32, bitcast=True)
    elif kind == _F16:
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif kind == _BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    elif kind == _E8M0:
        return tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    elif kind == _E4M3:
        half = _half_bits(bits << 8).to(tl.uint16).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * 256.0
    elif kind == _U4:
        shift = k // M[which + PER] % 2 * 4
        return _counted((bits >> shift.to(tl.uint32)), 0, 4, 0, False)
    elif kind == _I8:
        return _counted(bits ^ 0x80, 0, 8, 128, False)
    else:
        return _counted(bits, 0, 8, 0, False)


@triton.constexpr_function
def _dtype(kind):
    """The Triton type of elements that convert to fp32 as they are."""
    known = {_F32.value: tl.float32, _F16.value: tl.float16, _BF16.value: tl.bfloat16}
    return known.get(kind, tl.int8 if kind == _I8.value else tl.uint8)


@triton.constexpr_function
def has_group_scale(M):
    """Whether a level of the scale is finer than a row."""
    return M[_g.SCALE + _g.PER] != _g.ROW


@triton.constexpr_function
def row_level(M):
    """The place of the level of the scale that holds for a whole row, or 0."""
    for which in (_g.SCALE, _g.SCALE_2):
        if M[which + _g.ELEMENT] != _g.NO_LEVEL and M[which + _g.PER] == _g.ROW:
            return which
    return 0


@triton.jit
def scale(base, k, row, mask, M: tl.constexpr):
    """The product of the scale's levels, fp32."""
    product = level(base, k, row, mask, M, SCALE)
    if M[SCALE_2 + ELEMENT] != NO_LEVEL:
        second = level(base, k, row, mask, M, SCALE_2)
        product = tl.div_rn(product, second) if M[SCALE_2 + DIVIDES] else second * product
    return product


@triton.jit
def group_scale(base, k, row, mask, M: tl.constexpr):
    """The product of the scale's levels that are finer than a row; where `has_group_scale`."""
    product = level(base, k, row, mask, M, SCALE)
    if M[SCALE_2 + ELEMENT] != NO_LEVEL and M[SCALE_2 + PER] != ROW:
        second = level(base, k, row, mask, M, SCALE_2)
        product = product / second if M[SCALE_2 + DIVIDES] else second * product
    return product


@triton.jit
def minimum(base, k, row, mask, M: tl.constexpr):
    """The product of the minimum's levels, fp32; only where the codec has one."""
    product = level(base, k, row, mask, M, MINIMUM)
    if M[MINIMUM_2 + ELEMENT] != NO_LEVEL:
        product = level(base, k, row, mask, M, MINIMUM_2) * product
    return product


@triton.jit
def row_scaled(value, base, row, mask, M: tl.constexpr):
    """`value` times (or divided by) the level of the scale that holds for whole rows, if any."""
    which: tl.constexpr = row_level(M)
    if which == 0:
        return value
    else:
        factor = level(base, row * 0, row, mask, M, which)
        return value / factor if M[which + DIVIDES] else value * factor
