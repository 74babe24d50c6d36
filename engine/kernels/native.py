# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""What compiled CPU code needs beyond Python: memory and functions by address, atomics, futexes.

Intrinsics of numba: each is one or two instructions. An address is an int64. Importing this module
imports numba, which takes a second: nothing imports it before kernels are wanted.
"""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I32, I64 = ir.IntType(32), ir.IntType(64)
BYTE, F32 = ir.IntType(8), ir.FloatType()

_FUTEX_CALLS = {"x86_64": 202, "aarch64": 98}
"""Linux's number of the system call `futex`."""
_PAUSES = {"x86_64": ("llvm.x86.sse2.pause", ()), "aarch64": ("llvm.aarch64.hint", (1,))}
_WAIT, _WAKE = 128, 129  # of a futex that only this process uses
_EVERY = 0x7FFFFFFF
_MONOTONIC = 1  # the number of a clock, on Linux


def at(builder, address, element):
    """`address` as a pointer to `element`."""
    return builder.inttoptr(address, element.as_pointer())


@intrinsic
def word(typingctx, address):
    """The int64 at `address`."""

    def codegen(context, builder, signature, arguments):
        return builder.load(at(builder, arguments[0], I64))

    return types.int64(types.int64), codegen


@intrinsic
def put_word(typingctx, address, value):
    """Store an int64."""

    def codegen(context, builder, signature, arguments):
        builder.store(arguments[1], at(builder, arguments[0], I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def real(typingctx, address):
    """The fp32 number at `address`."""

    def codegen(context, builder, signature, arguments):
        return builder.load(at(builder, arguments[0], F32))

    return types.float32(types.int64), codegen


@intrinsic
def put_real(typingctx, address, value):
    """Store an fp32 number."""

    def codegen(context, builder, signature, arguments):
        builder.store(arguments[1], at(builder, arguments[0], F32))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic(prefer_literal=True)
def stack(typingctx, nbytes):
    """The address of `nbytes` (a constant) of the stack, on a cache line."""
    count = nbytes.literal_value

    def codegen(context, builder, signature, arguments):
        return builder.ptrtoint(stacked(builder, count), I64)

    return types.int64(nbytes), codegen


def stacked(builder, nbytes: int):
    """A pointer to `nbytes` of the stack, on a cache line; numba's own would be filled with 0."""
    with builder.goto_entry_block():
        pointer = builder.alloca(ir.ArrayType(BYTE, nbytes))
    pointer.align = 64
    return pointer


@intrinsic
def load_atomic(typingctx, address):
    """The int64 at `address`, in the one order that all atomics here have."""

    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(at(builder, arguments[0], I64), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_atomic(typingctx, address, value):
    """Store an int64, alike."""

    def codegen(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], at(builder, arguments[0], I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def add_atomic(typingctx, address, value):
    """Add to the int64 at `address`, alike; what was there before."""

    def codegen(context, builder, signature, arguments):
        pointer = at(builder, arguments[0], I64)
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Let the other thread of this core have a few cycles."""

    def codegen(context, builder, signature, arguments):
        name, hints = _PAUSES[platform.machine()]
        kind = ir.FunctionType(ir.VoidType(), [I32] * len(hints))
        pause = cgutils.get_or_insert_function(builder.module, kind, name)
        builder.call(pause, [I32(hint) for hint in hints])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(typingctx):
    """Let another thread that waits for a core have this one."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


def _futex(builder, address, operation, value):
    kind = ir.FunctionType(I64, [I64], var_arg=True)
    call = cgutils.get_or_insert_function(builder.module, kind, "syscall")
    number = I64(_FUTEX_CALLS[platform.machine()])
    builder.call(call, [number, address, I32(operation), value, I64(0)])


@intrinsic
def sleep_while(typingctx, address, value):
    """Sleep if the low half of the int64 at `address` is that of `value`, until a `wake`."""

    def codegen(context, builder, signature, arguments):
        _futex(builder, arguments[0], _WAIT, builder.trunc(arguments[1], I32))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def wake(typingctx, address):
    """Wake all threads that sleep at `address`."""

    def codegen(context, builder, signature, arguments):
        _futex(builder, arguments[0], _WAKE, I32(_EVERY))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def call(typingctx, function, first, second):
    """Call `function`, the address of one of two int64 that returns nothing."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(at(builder, arguments[0], kind), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def call_three(typingctx, function, first, second, third):
    """The same of three."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(at(builder, arguments[0], kind), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def call_six(typingctx, function, a, b, c, d, e, f):
    """The same of six."""

    def codegen(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 6)
        builder.call(at(builder, arguments[0], kind), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def nanoseconds(typingctx):
    """The monotonic clock, as `time.perf_counter` reads it, in ns."""

    def codegen(context, builder, signature, arguments):
        pair = cgutils.alloca_once(builder, ir.ArrayType(I64, 2))
        kind = ir.FunctionType(I32, [I32, I64])
        clock = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        address = builder.ptrtoint(pair, I64)
        builder.call(clock, [I32(_MONOTONIC), address])
        seconds, rest = (builder.load(builder.gep(pair, [I32(0), I32(place)])) for place in (0, 1))
        return builder.add(builder.mul(seconds, I64(10**9)), rest)

    return types.int64(), codegen
