# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Emitters: sums of four codes times four int8 activations in every lane, by the machine at hand.

A lane is a row; its int32 holds the codes of four consecutive inputs. All ways give the same
integers: they differ in instructions only. `PLAIN` is what every machine can do.
"""

import platform
from collections.abc import Sequence
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from tierrun.engine.kernels.lanes import BYTE, I16, I32, Lanes


class Way(NamedTuple):
    """How a machine multiplies: `name`, and the lanes of a register of int32."""

    name: str
    width: int


AMX, VNNI_512 = Way("amx-int8", 16), Way("avx512-vnni", 16)
VNNI, AVX2 = Way("avx-vnni", 8), Way("avx2", 8)
NEON, PLAIN = Way("neon-dot", 4), Way("plain", 8)
WAYS = (AMX, VNNI_512, VNNI, AVX2, NEON, PLAIN)
"""The fastest first. AMX multiplies panels only, and its sums are made in `int8_amx`."""

_NEEDED = {
    AMX: ("amx-int8", "amx-tile", "avx512bw", "avx512vl"),
    VNNI_512: ("avx512vnni", "avx512bw", "avx512vl"),
    VNNI: ("avxvnni",),
    AVX2: ("avx2",),
    NEON: ("dotprod",),
    PLAIN: (),
}
_LARGEST_SUM = 32767
"""Of a pair of products in int16, beyond which `vpmaddubsw` saturates."""
_LARGEST = 127
"""Magnitude of an activation."""


def possible(features: frozenset[str], *, panels: bool) -> list[Way]:
    """The ways of a machine with LLVM's `features`, for panels or for few tokens."""
    here = WAYS if platform.machine() == "x86_64" else (NEON, PLAIN)
    return [way for way in here if features.issuperset(_NEEDED[way]) and (panels or way != AMX)]


class Codes(NamedTuple):
    """What the bytes of a word may be: 0 … `largest`, from which `offset` is to be subtracted.

    With a `book` a byte of the planes is looked up first: 16 numbers, `offset` added already.
    """

    largest: int
    offset: int
    book: tuple[int, ...] | None = None


class Dots:
    """The sums of one strip of rows with some tokens, as they grow.

    `bytes_of` turns what the planes hold into what `add` takes.
    """

    def __init__(self, way: Way, lanes: Lanes, codes: Codes) -> None:
        self.way, self.lanes, self.codes = way, lanes, codes
        self.builder = lanes.builder
        # codes are made signed bytes where the instructions want it
        self.signed = way == AMX or (codes.largest > _LARGEST and way in (AVX2, NEON))
        self._taken = 0
        if self.signed:
            fits = codes.largest - codes.offset <= _LARGEST
            self._taken = codes.offset if fits else _LARGEST + 1

    @property
    def offset(self) -> int:
        """What is still to be taken off for each activation."""
        return self.codes.offset - self._taken

    def start(self, correction):
        """The sum of nothing: `correction` (int32), −`offset` times the sum of activations."""
        lanes = self.lanes
        return _Sum(lanes.integer(0) if self.offset == 0 else lanes.spread(correction))

    def bytes_of(self, word):
        """Four numbers or codes in each lane, from four codes of the planes."""
        codes = self.codes
        if codes.book is not None:
            return self._looked_up(word, [value - self._taken for value in codes.book])
        if self._taken == 0:
            return word
        signed = self.builder.sub(self._bytes(word), self._every_byte(self._taken))
        return self.builder.bitcast(signed, word.type)

    def add(self, to: "_Sum", words, x) -> None:
        """Add `words` times four activations, `x` (int32, signed bytes)."""
        if self.way == AVX2:
            self._add_pairs(to, words, x)
        elif self.way in (VNNI_512, VNNI):
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.way.width}"
            to.sum = self._called(name, I32, [to.sum, words, self.lanes.spread(x)])
        elif self.way == NEON:
            given = [to.sum, self._bytes(words), self._bytes(self.lanes.spread(x))]
            to.sum = self._called("llvm.aarch64.neon.sdot.v4i32.v16i8", I32, given)
        else:
            self._add_plainly(to, words, x)

    def finished(self, of: "_Sum"):
        """The sum, int32."""
        if of.pairs is not None:
            self._flush(of)
        return of.sum

    def _add_plainly(self, to: "_Sum", words, x) -> None:
        builder, lanes = self.builder, self.lanes
        for place in range(0, 32, 8):
            code = lanes.masked(lanes.moved(words, -place), 255)
            value = builder.ashr(builder.shl(x, I32(24 - place)), I32(24))
            to.sum = builder.add(to.sum, builder.mul(code, lanes.spread(value)))

    def _add_pairs(self, to: "_Sum", words, x) -> None:
        """AVX2: products are added in pairs, int16, as many as surely fit."""
        spread = self.lanes.spread(x)
        largest = self.codes.largest
        if self.signed:
            largest = 128
            signs = [self._bytes(spread), self._bytes(words)]
            spread = self._called("llvm.x86.avx2.psign.b", BYTE, signs)
            words = self._magnitudes(words)
        given = [self._bytes(words), self._bytes(spread)]
        pairs = self._called("llvm.x86.avx2.pmadd.ub.sw", I16, given)
        to.pairs = pairs if to.pairs is None else self.builder.add(to.pairs, pairs)
        to.added += 1
        if (to.added + 1) * largest * 2 * _LARGEST > _LARGEST_SUM:
            self._flush(to)

    def _flush(self, of: "_Sum") -> None:
        ones = ir.Constant(ir.VectorType(I16, 16), [1] * 16)
        pair_sums = self._called("llvm.x86.avx2.pmadd.wd", I32, [of.pairs, ones])
        of.sum, of.pairs, of.added = self.builder.add(of.sum, pair_sums), None, 0

    def _magnitudes(self, words):
        values = self._bytes(words)
        kind = ir.FunctionType(values.type, [values.type, ir.IntType(1)])
        name = f"llvm.abs.v{values.type.count}i8"
        call = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(call, [values, ir.IntType(1)(0)])

    def _looked_up(self, words, book: Sequence[int]):
        """Each byte (0 … 15) of `words` as an index into `book`."""
        count = 4 * self.lanes.count
        if self.way == PLAIN or self.lanes.count == 1:
            return self._selected(words, book)
        entries = [book[lane % 16] & 255 for lane in range(count)]
        table = ir.Constant(ir.VectorType(BYTE, count), entries)
        name = {
            64: "llvm.x86.avx512.pshuf.b.512",
            32: "llvm.x86.avx2.pshuf.b",
            16: "llvm.aarch64.neon.tbl1.v16i8",
        }[count]
        found = self._called(name, BYTE, [table, self._bytes(words)])
        return self.builder.bitcast(found, self.lanes.kind(I32))

    def _selected(self, words, book: Sequence[int]):
        """By choosing between halves of the book, bit by bit, in all bytes at once."""
        left = [self.lanes.integer((value & 255) * 0x01010101) for value in book]
        for bit in range(4):
            ones = self.lanes.masked(self.lanes.moved(words, -bit), 0x01010101)
            mask = self.builder.mul(ones, self.lanes.integer(255))
            left = [
                self.builder.xor(even, self.builder.and_(mask, self.builder.xor(even, odd)))
                for even, odd in zip(left[::2], left[1::2], strict=True)
            ]
        return left[0]

    def _every_byte(self, value: int):
        count = 4 * self.lanes.count
        return ir.Constant(ir.VectorType(BYTE, count), [value] * count)

    def _bytes(self, words):
        return self.builder.bitcast(words, ir.VectorType(BYTE, 4 * self.lanes.count))

    def _called(self, name: str, element, given):
        """The intrinsic `name`, whose result has the size of its last operand."""
        size = given[-1].type.count * given[-1].type.element.width
        result = ir.VectorType(element, size // element.width)
        kind = ir.FunctionType(result, [value.type for value in given])
        call = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(call, given)


class _Sum:
    """What is summed up: int32, and pairs of products in int16 that are not in it yet."""

    def __init__(self, sum_) -> None:
        self.sum = sum_
        self.pairs = None
        self.added = 0
