# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The activation between the two products, for 32 gates and ups at once.

Its exponential is a polynomial (Cephes' `expf`), right to two units in the last place: what comes
of it is rounded to int8 next.
"""

from numba import types
from numba.extending import intrinsic

from tierrun.engine.kernels.int8_rows import BLOCK, store, vector_call
from tierrun.engine.kernels.lanes import BYTE, F32, I32, I64, Lanes, shuffled
from tierrun.engine.kernels.matvec import GATES
from tierrun.engine.kernels.native import at

_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_EXP = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2),
    *(1.6666665459e-1, 5.0000001201e-1),
)
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""Abramowitz and Stegun 7.1.26: right to 1.5e-7."""
_ERF_STEP = 0.3275911
_LEAST = -87.0
"""The exponential of less is 0, nearly."""
_ROUNDING = 12582912.0
"""1.5 · 2^23: what is added to it is rounded to an integer, in its low bits."""
_ROOT_TWO_OVER_PI, _CUBIC, _ROOT_HALF = 0.7978845608028654, 0.044715, 0.7071067811865476


@intrinsic
def gated_block(typingctx, gates, ups, by_turns, kind, alpha, limit, target):
    """32 numbers at `target` from those at `gates` and `ups`, by a number `kind` of GATES.

    Those are addresses of fp32. With `by_turns` what is at `gates` and, after it, at `ups` are 16
    gates and their ups each, by turns.
    """

    def codegen(context, builder, signature, arguments):
        gates, ups, by_turns, kind, alpha, limit, target = arguments
        lanes = Lanes(builder, BLOCK)
        first, second = (lanes.load(at(builder, a, BYTE), I64(0), F32, 4) for a in (gates, ups))
        even, odd = (shuffled(builder, first, second, range(i, 64, 2)) for i in (0, 1))
        gate = builder.select(by_turns, even, first)
        up = builder.select(by_turns, odd, second)
        to = at(builder, target, BYTE)
        after = builder.append_basic_block("after")
        choice = builder.switch(kind, after)
        for number, name in enumerate(GATES):
            if name in _KINDS:
                block = builder.append_basic_block(name)
                choice.add_case(I64(number), block)
                builder.position_at_end(block)
                store(builder, _KINDS[name](lanes, gate, up, alpha, limit), to, 0)
                builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    word, real = types.int64, types.float32
    return types.void(word, word, types.boolean, word, real, real, word), codegen


def _silu(lanes: Lanes, gate, up, alpha, limit):
    builder = lanes.builder
    return builder.fmul(builder.fmul(gate, sigmoid(lanes, gate)), up)


def _gelu_tanh(lanes: Lanes, gate, up, alpha, limit):
    """(1 + tanh(v)) / 2 is the sigmoid of 2 v."""
    builder = lanes.builder
    cube = builder.fmul(builder.fmul(builder.fmul(gate, gate), gate), lanes.number(_CUBIC))
    inner = lanes.times(builder.fadd(gate, cube), 2 * _ROOT_TWO_OVER_PI)
    return builder.fmul(builder.fmul(gate, sigmoid(lanes, inner)), up)


def _gelu(lanes: Lanes, gate, up, alpha, limit):
    builder = lanes.builder
    whole = builder.fadd(lanes.number(1.0), _erf(lanes, lanes.times(gate, _ROOT_HALF)))
    return builder.fmul(builder.fmul(lanes.times(gate, 0.5), whole), up)


def _gpt_oss(lanes: Lanes, gate, up, alpha, limit):
    """See `matvec.Gate`; written so that a NaN stays one."""
    builder = lanes.builder
    most = lanes.spread(limit)
    least = builder.fneg(most)
    gate = builder.select(builder.fcmp_ordered(">", gate, most), most, gate)
    up = builder.select(builder.fcmp_ordered(">", up, most), most, up)
    up = builder.select(builder.fcmp_ordered("<", up, least), least, up)
    slope = sigmoid(lanes, builder.fmul(lanes.spread(alpha), gate))
    return builder.fmul(builder.fmul(builder.fadd(up, lanes.number(1.0)), gate), slope)


_KINDS = {"silu": _silu, "gelu_tanh": _gelu_tanh, "gelu": _gelu, "gpt_oss": _gpt_oss}


def sigmoid(lanes: Lanes, x):
    """1 / (1 + e^-x), which never overflows."""
    builder, one = lanes.builder, lanes.number(1.0)
    small = _exp_of_negative(lanes, builder.fneg(vector_call(lanes, "llvm.fabs", x)))
    upper = builder.select(builder.fcmp_ordered("<", x, lanes.number(0.0)), small, one)
    return builder.fdiv(upper, builder.fadd(one, small))


def _erf(lanes: Lanes, x):
    builder, one = lanes.builder, lanes.number(1.0)
    size = vector_call(lanes, "llvm.fabs", x)
    t = builder.fdiv(one, lanes.fma(lanes.number(_ERF_STEP), size, one))
    sum_ = _polynomial(lanes, _ERF, t)
    power = _exp_of_negative(lanes, builder.fneg(builder.fmul(size, size)))
    value = builder.fsub(one, builder.fmul(builder.fmul(sum_, t), power))
    negative = builder.fcmp_ordered("<", x, lanes.number(0.0))
    return builder.select(negative, builder.fneg(value), value)


def _exp_of_negative(lanes: Lanes, x):
    """e^x for x ≤ 0, NaN for NaN."""
    builder = lanes.builder
    low = lanes.number(_LEAST)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    shifted = lanes.fma(x, lanes.number(_LOG2_E), lanes.number(_ROUNDING))
    n = builder.fsub(shifted, lanes.number(_ROUNDING))
    r = lanes.fma(n, lanes.number(-_LN2_HIGH), x)
    r = lanes.fma(n, lanes.number(-_LN2_LOW), r)
    square = builder.fmul(r, r)
    value = lanes.fma(_polynomial(lanes, _EXP, r), square, builder.fadd(r, lanes.number(1.0)))
    bits = builder.bitcast(shifted, lanes.kind(I32))
    power = lanes.moved(builder.add(bits, lanes.integer(127)), 23)
    return builder.fmul(value, lanes.as_numbers(power))


def _polynomial(lanes: Lanes, coefficients, x):
    """By Horner's rule, the highest power first."""
    found = lanes.number(coefficients[0])
    for coefficient in coefficients[1:]:
        found = lanes.fma(found, x, lanes.number(coefficient))
    return found
