# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, no-any-return"
# mypy: disable-error-code="assignment"
"""Device functions: weights as fp16 tiles [rows, inputs] in the layout that tensor cores take.

A sum over inputs may run in any order, if both operands have the same one. In the registers of a
tensor core's left operand a lane holds pairs of neighbouring inputs, the four lanes of a row side
by side. So each lane takes whole words of codes, and inputs are in the order (`arranged`) in which
what it unpacks is what it must hold; activations are put into that order once per layer.

Between a load and the tensor core there are only element by element operations and new shapes.
Then Triton has all of them in the tensor core's layout, and those that load, too, as they are
element by element operations to it (`codes.fetched`): a thread loads the words and levels that it
needs itself, into registers, for a step while the tensor core computes the one before. (That is so
on Hopper, of whose warps none needs what another unpacks; on others loads are Triton's own, and
the tile goes through shared memory.) Plain numbers are loaded ahead into shared memory, by Triton.
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
    HIGH_OFFSET,
    HIGH_UNITS,
    INTERPRETED,
    KIND,
    LOW,
    LOW_OFFSET,
    LOW_UNITS,
    MINIMUM,
    MINIMUM_2,
    NO_LEVEL,
    PER,
    ROWS,
    SCALE,
    SCALE_2,
    ZERO_POINT,
    fetched,
    level_bits,
    level_number,
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
    return 1 if geometry.is_dense(matrix) else _unit_of(matrix)


@triton.constexpr_function
def _unit_of(M):
    return 32 // (M[geometry.HIGH] or M[geometry.LOW])


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
def fetch_packed(base, row, k, BK: tl.constexpr, M: tl.constexpr, HOPPER: tl.constexpr):
    """What `unpacked` needs for inputs `k` to `k + BK` of the rows `row` [N]: a tuple of uint32.

    Words of low bits, one of high bits, and the levels' elements: [N, units] of each, or [N] of
    those that hold for more inputs than four lanes take.
    """
    words: tl.constexpr = _words_of(M)
    inputs: tl.constexpr = _unit_of(M)
    unit = tl.arange(0, BK // inputs)
    found = ()
    for w in tl.static_range(words):
        start, place = _place(k // inputs * words, unit * words + w, M[LOW_UNITS], BK, M)
        place, rows = place[None, :], row[:, None]
        found = found + (
            fetched(base, M[LOW_OFFSET], M[LOW_UNITS], 32, start, place, rows, M, HOPPER),
        )
    if M[HIGH] > 0:
        start, place = _place(k // inputs, unit, M[HIGH_UNITS], BK, M)
        place, rows = place[None, :], row[:, None]
        found = found + (
            fetched(base, M[HIGH_OFFSET], M[HIGH_UNITS], 32, start, place, rows, M, HOPPER),
        )
    for which in tl.static_range(SCALE, ZERO_POINT + 1, SCALE_2 - SCALE):
        found = found + _fetch_level(base, row, k, unit * inputs, BK, M, which, HOPPER)
    return found


@triton.jit
def _fetch_level(
    base,
    row,
    k,
    first,
    BK: tl.constexpr,
    M: tl.constexpr,
    which: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """A level's elements: `first` are the first inputs of each unit."""
    columns: tl.constexpr = _num_columns(M, which, BK)
    per: tl.constexpr = M[which + PER]
    found = ()
    for i in tl.static_range(_num_fetched(M, which, BK)):
        if columns > 0:
            start = _within(k + i * (BK // columns), M[COLUMNS], BK, M) // per
            found = found + (level_bits(base, start, 0, row, M, which, HOPPER),)
        else:
            at = first + i * (32 // M[LOW])
            if M[COLUMNS] % BK == 0 and BK % per == 0:
                start, group = k // per, at // per
            else:
                start, group = 0, _within(k + at, M[COLUMNS], BK, M) // per
            group, rows = group[None, :], row[:, None]
            found = found + (level_bits(base, start, group, rows, M, which, HOPPER),)
    return found


@triton.jit
def _place(start, place, END: tl.constexpr, BK: tl.constexpr, M: tl.constexpr):
    """Two whose sum is `start + place` before END; the first is the same for all threads."""
    if M[COLUMNS] % BK == 0:
        return start, place
    else:
        return 0, _within(start + place, END, BK, M)


@triton.jit
def _within(place, END: tl.constexpr, BK: tl.constexpr, M: tl.constexpr):
    """`place` before END: beyond a row's end the last one, whose value means nothing."""
    return place if M[COLUMNS] % BK == 0 else tl.minimum(place, END - 1)


@triton.constexpr_function
def _words_of(M):
    """Words of low bits of a unit."""
    return _unit_of(M) * M[geometry.LOW] // 32


@triton.constexpr_function
def _num_columns(M, which, BK):
    """How many values of a level a step has, if each holds for units of all four lanes; or 0."""
    grain = BK if M[which + geometry.PER] % BK == 0 else M[geometry.GROUP]
    return BK // grain if grain % (_LANES.value * _unit_of(M)) == 0 else 0


@triton.constexpr_function
def _num_fetched(M, which, BK):
    """How many tensors `fetch_packed` has for a level."""
    if M[which + geometry.ELEMENT] == geometry.NO_LEVEL:
        return 0
    in_units = 1 if M[which + geometry.PER] % _unit_of(M) == 0 else _words_of(M)
    return _num_columns(M, which, BK) or in_units


@triton.constexpr_function
def _first_fetched(M, which, BK):
    """The place of the first of them."""
    levels = range(geometry.SCALE, which, geometry.SCALE_2 - geometry.SCALE)
    words = _words_of(M) + (M[geometry.HIGH] > 0)
    return words + sum(_num_fetched(M, level, BK) for level in levels)


@triton.jit
def unpacked(raw, k, BK: tl.constexpr, M: tl.constexpr):
    """The numbers of what was fetched for inputs `k` on, fp16 [N, BK] in the arranged order."""
    rows: tl.constexpr = raw[0].shape[0]
    units: tl.constexpr = raw[0].shape[1]
    tile = _words(raw, k, 0, _words_of(M), BK, M)
    runs = tl.reshape(tile, [rows, units // _LANES, _LANES, BK // units // 2, 2])
    return tl.reshape(tl.permute(runs, [0, 1, 3, 2, 4]), [rows, BK])


@triton.jit
def _words(raw, k, FIRST: tl.constexpr, COUNT: tl.constexpr, BK: tl.constexpr, M: tl.constexpr):
    """The values of COUNT words of each unit's low bits, from FIRST on: fp16 [N, units, inputs]."""
    rows: tl.constexpr = raw[0].shape[0]
    units: tl.constexpr = raw[0].shape[1]
    if COUNT == 1:
        high = raw[_words_of(M) if M[HIGH] > 0 else 0]
        scale, least, zero_point = _levels(raw, k, FIRST, BK, M)
        ready = prepared(raw[FIRST], high, FIRST, M)
        values = _values(ready, scale, least, zero_point, 0, 1, M)
        return tl.reshape(values, [rows, units, 32 // M[LOW]])
    else:
        half: tl.constexpr = COUNT // 2
        one = _words(raw, k, FIRST, half, BK, M)
        other = _words(raw, k, FIRST + half, half, BK, M)
        both = tl.permute(tl.join(one, other), [0, 1, 3, 2])
        return tl.reshape(both, [rows, units, 2 * one.shape[2]])


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


@triton.jit
def _levels(raw, k, WORD: tl.constexpr, BK: tl.constexpr, M: tl.constexpr):
    """Scale, minimum and zero point of word WORD of each unit, fp32 [N, units]."""
    scale = _level(raw, k, WORD, BK, M, SCALE)
    least, zero_point = scale, scale
    if M[SCALE_2 + ELEMENT] != NO_LEVEL:
        second = _level(raw, k, WORD, BK, M, SCALE_2)
        scale = scale / second if M[SCALE_2 + DIVIDES] else second * scale
    if M[MINIMUM + ELEMENT] != NO_LEVEL:
        least = _level(raw, k, WORD, BK, M, MINIMUM)
    if M[MINIMUM_2 + ELEMENT] != NO_LEVEL:
        least = _level(raw, k, WORD, BK, M, MINIMUM_2) * least
    if M[ZERO_POINT + ELEMENT] != NO_LEVEL:
        zero_point = _level(raw, k, WORD, BK, M, ZERO_POINT)
    return scale, least, zero_point


@triton.jit
def _level(raw, k, WORD: tl.constexpr, BK: tl.constexpr, M: tl.constexpr, which: tl.constexpr):
    """Level `which` for word WORD of each unit, fp32 [N, units]."""
    units: tl.constexpr = raw[0].shape[1]
    at: tl.constexpr = _first_fetched(M, which, BK)
    columns: tl.constexpr = _num_columns(M, which, BK)
    if columns > 0:
        bits = _wide(raw, at, columns, units // columns)
    else:
        bits = raw[at + WORD % _num_fetched(M, which, BK)]
    first = k + tl.arange(0, units) * (BK // units) + WORD * (32 // M[LOW])
    return level_number(bits, first[None, :], M, which)


@triton.jit
def _wide(raw, AT: tl.constexpr, COUNT: tl.constexpr, TIMES: tl.constexpr):
    """COUNT columns [N] from raw[AT] on, each repeated, [N, COUNT * TIMES]."""
    rows: tl.constexpr = raw[AT].shape[0]
    if COUNT == 1:
        return tl.broadcast_to(raw[AT][:, None], [rows, TIMES])
    else:
        half: tl.constexpr = COUNT // 2
        low = _wide(raw, AT, half, TIMES)
        high = _wide(raw, AT + half, half, TIMES)
        both = tl.permute(tl.join(low, high), [0, 2, 1])
        return tl.reshape(both, [rows, COUNT * TIMES])


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
