# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Rows of activations as int8: blocks of 32 inputs with a scale and the sums of its two halves.

    x[k] ≈ code[k] · scale,    scale = max |x| / 127

A block is 48 bytes: 32 codes (−127 … 127), the scale (fp32), the sums of codes 0 … 15 and 16 … 31
(int32), the sum of all times the scale (fp32). One kind of block serves every codec. Where an
activation is not finite the scale is NaN, and so is every product.
"""

from math import inf, nan

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tierrun.engine.kernels.jit import njit
from tierrun.engine.kernels.lanes import BYTE, F32, I32, I64, Lanes, offset_by
from tierrun.engine.kernels.native import at, put_real, real, stack

BLOCK = 32
BLOCK_BYTES = 48
SCALE, SUMS, SCALED_SUM = 32, 36, 44
"""Bytes into a block."""

ZERO = np.float32(0)

_LEVELS, _FP32_BYTES = 127.0, 4 * BLOCK


@intrinsic
def quantise_block(typingctx, source, target):
    """32 fp32 numbers at `source` as a block at `target`."""

    def codegen(context, builder, signature, arguments):
        source, target = (at(builder, address, BYTE) for address in arguments)
        _quantise(builder, source, target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy_block(typingctx, source, target):
    """32 fp32 numbers at `source` to `target`."""

    def codegen(context, builder, signature, arguments):
        source, target = (at(builder, address, BYTE) for address in arguments)
        store(builder, Lanes(builder, BLOCK).load(source, I64(0), F32, 4), target, 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _quantise(builder, source, target) -> None:
    lanes = Lanes(builder, BLOCK)
    x = lanes.load(source, I64(0), F32, 4)
    largest = _largest_magnitude(lanes, x)
    scale = builder.fdiv(largest, F32(_LEVELS))
    inverse = builder.fdiv(F32(_LEVELS), largest)
    some = builder.fcmp_ordered(">", scale, F32(0.0))
    inverse = builder.select(some, inverse, F32(0.0))
    rounded = vector_call(lanes, "llvm.rint", builder.fmul(x, lanes.spread(inverse)))
    codes = builder.fptosi(_clamped(lanes, rounded), lanes.kind(I32))
    store(builder, builder.trunc(codes, lanes.kind(BYTE)), target, 0)
    finite = builder.fcmp_ordered("<", largest, F32(inf))
    scale = builder.select(finite, scale, F32(nan))
    store(builder, scale, target, SCALE)
    sums = []
    for half in range(2):
        order = ir.Constant(ir.VectorType(I32, 16), list(range(16 * half, 16 * half + 16)))
        some = builder.shuffle_vector(codes, codes, order)
        added = _called(builder, "llvm.vector.reduce.add.v16i32", I32, [some])
        store(builder, added, target, SUMS + 4 * half)
        sums.append(added)
    both = builder.sitofp(builder.add(*sums), F32)
    store(builder, builder.fmul(scale, both), target, SCALED_SUM)


def _largest_magnitude(lanes: Lanes, x):
    """As integers, which have the order of magnitudes: the reduction of fp32 minds NaN, lane by
    lane."""
    builder = lanes.builder
    bits = lanes.masked(builder.bitcast(x, lanes.kind(I32)), 0x7FFFFFFF)
    found = _called(builder, f"llvm.vector.reduce.umax.v{BLOCK}i32", I32, [bits])
    return builder.bitcast(found, F32)


def _clamped(lanes: Lanes, x):
    """A scale that is subnormal has few bits: a quotient may be beyond. NaN becomes a level."""
    for order, bound in (("<", _LEVELS), (">", -_LEVELS)):
        limit = lanes.number(bound)
        x = lanes.builder.select(lanes.builder.fcmp_ordered(order, x, limit), x, limit)
    return x


def vector_call(lanes: Lanes, name: str, x):
    """The intrinsic `name` of fp32 in every lane."""
    return _called(lanes.builder, f"{name}.v{lanes.count}f32", lanes.kind(F32), [x])


def _called(builder, name: str, result, given):
    kind = ir.FunctionType(result, [value.type for value in given])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)


def store(builder, value, pointer, offset: int) -> None:
    """`value` at byte `offset` of `pointer`, aligned to nothing."""
    place = offset_by(builder, pointer, I64(offset))
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=1)


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def _quantise_part(source, columns, number, target):
    """Block `number` of `columns` fp32 numbers at `source`; the last one is filled with 0."""
    first = BLOCK * number
    if columns >= first + BLOCK:
        quantise_block(source + 4 * first, target)
        return
    part = stack(_FP32_BYTES)
    for k in range(BLOCK):
        put_real(part + 4 * k, real(source + 4 * (first + k)) if first + k < columns else ZERO)
    quantise_block(part, target)


@njit("void(int64, int64, int64)", nogil=True, cache=True)
def quantise_row(source, columns, target):
    """`columns` fp32 numbers at `source` to blocks at `target`, side by side."""
    for number in range((columns + BLOCK - 1) // BLOCK):
        _quantise_part(source, columns, number, target + BLOCK_BYTES * number)


@njit("int64(int64)", nogil=True, cache=True)
def row_bytes(columns):
    """Of a row of so many inputs."""
    return (columns + BLOCK - 1) // BLOCK * BLOCK_BYTES


PANEL, CHUNK = 96, 8
"""Tokens of a panel, a multiple of what any machine takes at once, and a token's blocks that are
side by side."""
CHUNK_BYTES = CHUNK * BLOCK_BYTES


@njit("int64(int64)", nogil=True, cache=True)
def panel_bytes(columns):
    """Of a panel: of rows of so many inputs chunk by chunk, in a chunk token by token."""
    return (columns + BLOCK * CHUNK - 1) // (BLOCK * CHUNK) * PANEL * CHUNK_BYTES


@njit("int64(int64, int64)", nogil=True, cache=True)
def panel_block(token, number):
    """Where in a panel a token's block is."""
    chunk, within = number // CHUNK, number % CHUNK
    return (chunk * PANEL + token) * CHUNK_BYTES + within * BLOCK_BYTES


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def quantise_into(source, columns, panel, token):
    """`columns` fp32 numbers at `source` to the blocks of one token of the panel at `panel`."""
    for number in range((columns + BLOCK - 1) // BLOCK):
        _quantise_part(source, columns, number, panel + panel_block(token, number))
