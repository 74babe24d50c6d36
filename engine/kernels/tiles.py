# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, no-any-return"
"""Device functions: weights as fp16 tiles [rows, inputs] in the layout that tensor cores take.

A sum over inputs may run in any order, if both operands have the same one. In the registers of a
tensor core's left operand a lane holds pairs of neighbouring inputs, the four lanes of a row side
by side. So each lane takes whole words of codes, and inputs are in the order (`arranged`) in which
what it unpacks is what it must hold; activations are put into that order once per layer.

Between a load and the tensor core there are only element by element operations and new shapes, and
nothing that depends on a lane: then Triton moves the loads, not the numbers, into the tensor
core's layout, and copies what is loaded ahead into shared memory. (That is so on Hopper, of whose
warps none needs what another unpacks; on others the tile goes through shared memory.)
"""

import triton
import triton.language as tl

from tierrun.engine.kernels import geometry
from tierrun.engine.kernels.codes import (
    BF16,
    COLUMNS,
    DIVIDES,
    ELEMENT,
    F16,
    HIGH,
    HIGH_UNITS,
    INTERPRETED,
    KIND,
    LOW,
    LOW_UNITS,
    MINIMUM,
    NO_LEVEL,
    ROWS,
    SCALE,
    SCALE_2,
    ZERO_POINT,
    high_word,
    level,
    low_word,
    minimum,
    number,
    prepared,
)
from tierrun.engine.kernels.geometry import Geometry

_LANES = tl.constexpr(4)
"""Lanes that share a row of a tensor core's left operand."""


GROWTH = tl.constexpr(64.0)
"""What products of `shrunk` activations are multiplied with."""


def inputs_of_unit(matrix: Geometry) -> int:
    """Inputs that a lane unpacks at once: those of the widest plane's word. 1 where dense."""
    if geometry.is_dense(matrix):
        return 1
    return 32 // (matrix[geometry.HIGH] or matrix[geometry.LOW])


@triton.jit
def arranged(k, UNIT: tl.constexpr):
    """Where input `k` is in the arranged order: pairs of a unit, of four units by turns."""
    if UNIT == 1:
        return k
    else:
        block: tl.constexpr = 4 * UNIT
        lane, code = k % block // UNIT, k % UNIT
        return k // block * block + (code // 2 * 4 + lane) * 2 + code % 2


@triton.jit
def input_at(place, UNIT: tl.constexpr):
    """Which input is at `place` of the arranged order."""
    if UNIT == 1:
        return place
    else:
        block: tl.constexpr = 4 * UNIT
        code = place % block // 8 * 2 + place % 2
        return place // block * block + place // 2 % 4 * UNIT + code


@triton.jit
def to_bf16(x):
    """`x` fp32, to nearest even; Triton's interpreter would round towards zero."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def to_half(x):
    """`x` fp32 as fp16, to nearest even."""
    return x.to(tl.float16)


@triton.jit
def shrunk(x):
    """Activations `x` fp32 as operands: fp16 of 1 / GROWTH of them, at most the largest there is.

    So those up to 4·10⁶ are in range, and those of the usual size lose nothing.
    """
    x = x * (1.0 / GROWTH)
    x = tl.maximum(x, -65504.0, propagate_nan=tl.PropagateNan.ALL)
    return to_half(tl.minimum(x, 65504.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def load_packed(base, row, k, BK: tl.constexpr, M: tl.constexpr):
    """Inputs `k` to `k + BK` of the rows `row` [N], fp16 [N, BK] in the arranged order."""
    words: tl.constexpr = M[LOW] // M[HIGH] if M[HIGH] > 0 else 1
    inputs: tl.constexpr = words * (32 // M[LOW])
    unit = k // inputs + tl.arange(0, BK // inputs)
    if M[HIGH] > 0:
        place = _within(unit, M[HIGH_UNITS], BK, M)
        high = high_word(base, place[None, :], row[:, None], None, M)
    else:
        high = unit  # not looked at
    tile = _words(base, row, k, unit, high, 0, words, BK, M)
    runs = tl.reshape(tile, [row.shape[0], unit.shape[0] // _LANES, _LANES, inputs // 2, 2])
    return tl.reshape(tl.permute(runs, [0, 1, 3, 2, 4]), [row.shape[0], BK])


@triton.jit
def _within(place, END: tl.constexpr, BK: tl.constexpr, M: tl.constexpr):
    """`place` before END: beyond a row's end the last one, whose value means nothing."""
    return place if M[COLUMNS] % BK == 0 else tl.minimum(place, END - 1)


@triton.jit
def _words(
    base,
    row,
    k,
    unit,
    high,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
):
    """The values of COUNT words of each unit's low bits, from FIRST on: fp16 [N, units, inputs]."""
    if COUNT == 1:
        words: tl.constexpr = M[LOW] // M[HIGH] if M[HIGH] > 0 else 1
        place = _within(unit * words + FIRST, M[LOW_UNITS], BK, M)
        low = low_word(base, place[None, :], row[:, None], None, M)
        scale, least, zero_point = _levels(base, row, k, unit.shape[0], FIRST, words, BK, M)
        values = _values(prepared(low, high, FIRST, M), scale, least, zero_point, 0, 1, M)
        return tl.reshape(values, [row.shape[0], unit.shape[0], 32 // M[LOW]])
    else:
        half: tl.constexpr = COUNT // 2
        one = _words(base, row, k, unit, high, FIRST, half, BK, M)
        other = _words(base, row, k, unit, high, FIRST + half, half, BK, M)
        both = tl.permute(tl.join(one, other), [0, 1, 3, 2])
        return tl.reshape(both, [row.shape[0], unit.shape[0], 2 * one.shape[2]])


@triton.jit
def _values(ready, scale, least, zero_point, I: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr):  # noqa: E741
    """Codes I, I + STEP, … of every word, [N, units, 2, 2, …]: the low bit of the index last."""
    if STEP == 32 // M[LOW]:
        value = number(ready, I, M)
        if M[ZERO_POINT + ELEMENT] != NO_LEVEL:
            value = value - zero_point
        value = value * scale
        if M[MINIMUM + ELEMENT] != NO_LEVEL:
            value = value - least
        return to_half(value)
    else:
        even = _values(ready, scale, least, zero_point, I, 2 * STEP, M)
        odd = _values(ready, scale, least, zero_point, I + STEP, 2 * STEP, M)
        return tl.join(even, odd)


@triton.constexpr_function
def _grain(BK, M):
    """Inputs over which every level is constant: all BK of a step, or up to 32."""
    levels = range(geometry.SCALE, geometry.ZERO_POINT + 1, geometry.SCALE_2 - geometry.SCALE)
    present = [at for at in levels if M[at + geometry.ELEMENT] != geometry.NO_LEVEL]
    return BK if all(M[at + geometry.PER] % BK == 0 for at in present) else M[geometry.GROUP]


@triton.jit
def _levels(
    base,
    row,
    k,
    UNITS: tl.constexpr,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
):
    """Scale, minimum and zero point of word WORD of each unit from input `k` on, fp32 [N, UNITS].

    Where four units are in one group, the four lanes of a row load the same, a group at a time:
    loads of fewer elements than there are threads are done in any layout. Else a load has all
    units.
    """
    unit: tl.constexpr = 32 // M[LOW] * WORDS
    grain: tl.constexpr = _grain(BK, M)
    least: tl.constexpr = M[MINIMUM + ELEMENT] != NO_LEVEL
    zero: tl.constexpr = M[ZERO_POINT + ELEMENT] != NO_LEVEL
    if grain >= _LANES * unit:
        scale = _repeated(_columns(base, row, k, 0, BK // grain, grain, BK, M), UNITS)
        m = (
            _repeated(_columns(base, row, k, 1, BK // grain, grain, BK, M), UNITS)
            if least
            else scale
        )
        z = (
            _repeated(_columns(base, row, k, 2, BK // grain, grain, BK, M), UNITS)
            if zero
            else scale
        )
    else:
        first = k + tl.arange(0, UNITS) * unit + WORD * (32 // M[LOW])
        first, row = _within(first, M[COLUMNS], BK, M)[None, :], row[:, None]
        scale = _level(base, row, first, 0, M)
        m = _level(base, row, first, 1, M) if least else scale
        z = _level(base, row, first, 2, M) if zero else scale
    return scale, m, z


@triton.jit
def _columns(
    base,
    row,
    k,
    WHICH: tl.constexpr,
    COUNT: tl.constexpr,
    GRAIN: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
):
    """`_level` for COUNT groups of GRAIN inputs from `k` on, [N, COUNT]."""
    if COUNT == 1:
        return _level(base, row, _within(k, M[COLUMNS], BK, M), WHICH, M)[:, None]
    else:
        half: tl.constexpr = COUNT // 2
        low = _columns(base, row, k, WHICH, half, GRAIN, BK, M)
        high = _columns(base, row, k + half * GRAIN, WHICH, half, GRAIN, BK, M)
        return tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [row.shape[0], COUNT])


@triton.jit
def _level(base, row, k, WHICH: tl.constexpr, M: tl.constexpr):
    """The scale (WHICH 0), minimum (1) or zero point (2) for inputs `k` of `row`, fp32."""
    if WHICH == 0:
        scale = level(base, k, row, None, M, SCALE)
        if M[SCALE_2 + ELEMENT] != NO_LEVEL:
            second = level(base, k, row, None, M, SCALE_2)
            scale = scale / second if M[SCALE_2 + DIVIDES] else second * scale
        return scale
    elif WHICH == 1:
        return minimum(base, k, row, None, M)
    else:
        return level(base, k, row, None, M, ZERO_POINT)


@triton.jit
def _repeated(values, UNITS: tl.constexpr):
    """Values [N, G] for every unit, [N, UNITS]."""
    n: tl.constexpr = values.shape[0]
    groups: tl.constexpr = values.shape[1]
    wide = tl.broadcast_to(values[:, :, None], [n, groups, UNITS // groups])
    return tl.reshape(wide, [n, UNITS])


@triton.jit
def load_dense(base, row, k, BK: tl.constexpr, M: tl.constexpr):
    """Inputs `k` to `k + BK` of the rows `row` [N] of plain numbers, fp16 [N, BK]."""
    inputs = k + tl.arange(0, BK)
    if M[ROWS] * M[COLUMNS] >= 1 << 31:
        row = row.to(tl.int64)
    offset = row[:, None] * M[COLUMNS] + inputs[None, :]
    mask = (inputs < M[COLUMNS])[None, :]
    whole: tl.constexpr = M[COLUMNS] % BK == 0
    if M[KIND] == BF16:
        values = _load(base.to(tl.pointer_type(tl.bfloat16)) + offset, mask, whole)
        return to_half(values.to(tl.float32))
    elif M[KIND] == F16:
        return _load(base.to(tl.pointer_type(tl.float16)) + offset, mask, whole)
    else:
        return to_half(_load(base.to(tl.pointer_type(tl.float32)) + offset, mask, whole))


@triton.jit
def _load(place, mask, WHOLE: tl.constexpr):
    """A load that needs no mask where the tile is WHOLE."""
    return tl.load(place) if WHOLE else tl.load(place, mask=mask, other=0.0)
