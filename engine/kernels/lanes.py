# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Vectors in LLVM IR, and what emits them: the words in which the CPU's kernels are written.

The compiler cuts a vector into as many registers as the machine's width asks for. Nothing is left
to its judgement otherwise: which operations there are and in which order sums are taken is the same
on every machine, but for the fused multiply-add where it lacks one.
"""

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

BYTE, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, F32 = ir.HalfType(), ir.FloatType()


class Lanes:
    """Emits operations on vectors of `count` lanes into `builder`.

    `features` are LLVM's names of what the machine has (`+avx512f`).
    """

    def __init__(self, builder, count: int, features: frozenset[str] = frozenset()) -> None:
        self.builder = builder
        self.count = count
        self.features = features

    def kind(self, element):
        """The vector type of `element`."""
        return ir.VectorType(element, self.count)

    def integer(self, value: int, element=I32):
        """A constant integer in every lane."""
        return ir.Constant(self.kind(element), [value & ((1 << element.width) - 1)] * self.count)

    def number(self, value: float):
        """A constant fp32 number in every lane."""
        return ir.Constant(self.kind(F32), [value] * self.count)

    def load(self, pointer, offset, element, nbytes: int):
        """Lanes from byte `offset` (int64) of `pointer` on; elements of `nbytes`."""
        place = offset_by(self.builder, pointer, offset)
        place = self.builder.bitcast(place, self.kind(element).as_pointer())
        return self.builder.load(place, align=nbytes)

    def spread(self, scalar):
        """`scalar` in every lane."""
        kind = self.kind(scalar.type)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, self.count), [0] * self.count)
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def fma(self, a, b, c):
        """a · b + c, rounded once."""
        kind = self.kind(F32)
        name = f"llvm.fma.v{self.count}f32"
        function = ir.FunctionType(kind, [kind] * 3)
        call = cgutils.get_or_insert_function(self.builder.module, function, name)
        return self.builder.call(call, [a, b, c])

    def times(self, vector, factor: float):
        """`vector` times a constant."""
        return vector if factor == 1 else self.builder.fmul(vector, self.number(factor))

    def masked(self, word, mask: int):
        """The bits of `word` (int32) that are set in `mask`."""
        return self.builder.and_(word, self.integer(mask))

    def joined(self, word, bits):
        """`word` with `bits` (constant or not) set, too."""
        bits = self.integer(bits) if isinstance(bits, int) else bits
        return self.builder.or_(word, bits)

    def moved(self, word, left: int):
        """`word` shifted by `left` bits, to the right where that is negative."""
        if left == 0:
            return word
        shift = self.builder.shl if left > 0 else self.builder.lshr
        return shift(word, self.integer(abs(left)))

    def as_numbers(self, bits):
        """The fp32 numbers with these bits (int32)."""
        return self.builder.bitcast(bits, self.kind(F32))

    @property
    def permutes(self) -> bool:
        """Whether a look-up is one instruction."""
        return "+avx512f" in self.features

    def looked_up(self, indices, book: Sequence[float]):
        """Of 16 numbers those that the low four bits of `indices` (int32) say."""
        if self.permutes:
            return self._permuted(indices, book, 16, "llvm.x86.avx512.permvar.sf.512")
        if "+avx2" in self.features:
            low, high = (
                self._permuted(indices, half, 8, "llvm.x86.avx2.permps")
                for half in (book[:8], book[8:])
            )
            upper = self.builder.icmp_unsigned("!=", self.masked(indices, 8), self.integer(0))
            return self.builder.select(upper, high, low)
        return self._selected(indices, book)

    def _permuted(self, indices, book: Sequence[float], width: int, name: str):
        """By a permutation of `width` lanes, which takes as many bits of an index as it needs."""
        builder, parts = self.builder, []
        numbers, words = ir.VectorType(F32, width), ir.VectorType(I32, width)
        order = [numbers, words]
        call = cgutils.get_or_insert_function(builder.module, ir.FunctionType(numbers, order), name)
        table = ir.Constant(numbers, list(book))
        for first in range(0, self.count, width):
            lanes = [min(first + lane, self.count - 1) for lane in range(width)]
            parts.append(builder.call(call, [table, shuffled(builder, indices, indices, lanes)]))
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            odd = parts[len(parts) // 2 * 2 :]
            parts = [_joined(builder, *pair) for pair in pairs] + odd
        return shuffled(builder, parts[0], parts[0], range(self.count))

    def _selected(self, indices, book: Sequence[float]):
        """By choosing between halves of the book, bit by bit."""
        left = [self.number(value) for value in book]
        for bit in range(4):
            chosen = self.builder.icmp_unsigned(
                "!=", self.masked(indices, 1 << bit), self.integer(0)
            )
            left = [
                self.builder.select(chosen, odd, even)
                for even, odd in zip(left[::2], left[1::2], strict=True)
            ]
        return left[0]


def offset_by(builder, pointer, offset):
    """`pointer` (to bytes) and `offset` (int64) bytes further."""
    return builder.gep(pointer, [offset], source_etype=BYTE)


def total(builder, vector):
    """The sum of all lanes, halves by halves."""
    count = vector.type.count
    while count > 1:
        half = count // 2
        low = shuffled(builder, vector, vector, range(half))
        high = shuffled(builder, vector, vector, range(half, 2 * half))
        rest = shuffled(builder, vector, vector, [count - 1]) if count % 2 else None
        vector = builder.fadd(low, high)
        if rest is not None:
            last = builder.extract_element(rest, I32(0))
            first = builder.fadd(builder.extract_element(vector, I32(0)), last)
            vector = builder.insert_element(vector, first, I32(0))
        count = half
    return builder.extract_element(vector, I32(0))


def shuffled(builder, a, b, lanes):
    """Of the lanes of `a`, then those of `b`, these."""
    lanes = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _joined(builder, a, b):
    """The lanes of `a`, then those of `b`; as many each, or those of `b` padded."""
    width = a.type.count
    if b.type.count < width:
        filled = [min(lane, b.type.count - 1) for lane in range(width)]
        b = shuffled(builder, b, b, filled)
    return shuffled(builder, a, b, range(2 * width))


def variable(lanes: Lanes):
    """A vector in memory, zero; the compiler keeps it in registers."""
    place = cgutils.alloca_once(lanes.builder, lanes.kind(F32))
    lanes.builder.store(lanes.number(0.0), place)
    return place
