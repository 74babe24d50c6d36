# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Loops over rows of fp32 numbers at an address, which the compiler turns into vectors.

Sums may be taken in any order (one and the same on a machine): nothing here is for `--exact`.
"""

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from tierrun.engine.kernels.jit import njit
from tierrun.engine.kernels.native import F32, I32, at

ANY_ORDER = {"reassoc", "nsz", "contract"}
"""What the compiler may do to sums; infinities and NaN stay what they are."""

_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_LEAST = -87.0
"""The exponential of less is 0, nearly."""


@intrinsic
def _pointer(typingctx, address):
    def codegen(context, builder, signature, arguments):
        return at(builder, arguments[0], F32)

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def _power_of_two(typingctx, exponent):
    """2 to the power of an int32."""

    def codegen(context, builder, signature, arguments):
        biased = builder.add(arguments[0], ir.Constant(I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(I32, 23)), F32)

    return types.float32(types.int32), codegen


@njit(inline="always")
def reals(address, count):
    """`count` numbers at `address` as an array."""
    return carray(_pointer(address), count, types.float32)


@njit("float32(int64, int64, int64)", nogil=True, cache=True, fastmath=ANY_ORDER)
def dot(a, b, count):
    """The sum of products."""
    x, y, found = reals(a, count), reals(b, count), types.float32(0)
    for i in range(count):
        found += x[i] * y[i]
    return found


@njit("void(int64, float32, int64, int64)", nogil=True, cache=True, fastmath=ANY_ORDER)
def add_times(target, factor, source, count):
    """Add `factor` times what is at `source` to what is at `target`."""
    to, given = reals(target, count), reals(source, count)
    for i in range(count):
        to[i] += factor * given[i]


@njit("float32(float32)", inline="always")
def exp_of_negative(x):
    """e^x for x ≤ 0 (Cephes' `expf`), right to two units in the last place; NaN for NaN."""
    x = types.float32(_LEAST) if x < types.float32(_LEAST) else x
    n = types.float32(int(x * types.float32(_LOG2_E) - types.float32(0.5)))
    r = x - n * types.float32(_LN2_HIGH) - n * types.float32(_LN2_LOW)
    p = types.float32(1.9875691500e-4)
    p = p * r + types.float32(1.3981999507e-3)
    p = p * r + types.float32(8.3334519073e-3)
    p = p * r + types.float32(4.1665795894e-2)
    p = p * r + types.float32(1.6666665459e-1)
    p = p * r + types.float32(5.0000001201e-1)
    return (p * r * r + r + types.float32(1)) * _power_of_two(types.int32(n))


@njit("float32(int64, float32, int64)", nogil=True, cache=True, fastmath=ANY_ORDER)
def exponentials(address, most, count):
    """Make each number x e^(x − `most`), none of which is positive; their sum."""
    x, found = reals(address, count), types.float32(0)
    for i in range(count):
        x[i] = exp_of_negative(x[i] - most)
        found += x[i]
    return found


@njit(
    "void(int64, int64, int64, int64, float32, int64)", nogil=True, cache=True, fastmath=ANY_ORDER
)
def rms_norm(source, weight, rows, count, eps, target):
    """Rows of `count` numbers by their root mean square, times `weight`; may be in place."""
    scale = reals(weight, count)
    for row in range(rows):
        start = source + 4 * count * row
        x, y = reals(start, count), reals(target + 4 * count * row, count)
        mean = dot(start, start, count) / types.float32(count)
        inverse = types.float32(1) / types.float32((mean + eps) ** types.float32(0.5))
        for i in range(count):
            y[i] = x[i] * inverse * scale[i]


@njit("void(int64, int64, int64, int64, int64)", nogil=True, cache=True)
def weighted_sum(source, weights, rows, count, target):
    """The sum of `rows` rows of `count` numbers, each times its weight, in their order."""
    scales, to = reals(weights, rows), reals(target, count)
    for row in range(rows):
        x = reals(source + 4 * count * row, count)
        for i in range(count):
            to[i] = x[i] * scales[row] + (to[i] if row else types.float32(0))
