# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""32 rows of a packed matrix times a few rows of int8 activations: integers in a group of inputs,
fp32 across groups.

For each token, over groups g of 16 or 32 inputs of blocks b, in one order and with each operation
rounded once:

    block += (scale[g] · x_scale[b]) · (Σ number · x_code − zero_point[g] · Σ x_code)
    below += minimum[g] · (x_scale[b] · Σ x_code)

and, where the levels of scale and minimum are two, at the end of each group of the second:

    sum += scale_2 · block,    sum −= minimum_2 · below

So the bits depend on neither machine nor way, threads nor batches.
"""

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tierrun.engine.codecs.codec import BOOKS
from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.geometry import (
    COLUMNS,
    E2M1,
    ELEMENT,
    ELEMENTS,
    GROUP,
    HIGH,
    HIGH_OFFSET,
    HIGH_UNITS,
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
    ROWS,
    SCALE,
    SCALE_2,
    SPAN,
    UNITS,
    ZERO,
    ZERO_POINT,
    Geometry,
)
from tierrun.engine.kernels.host_codes import Tile
from tierrun.engine.kernels.host_product import Product
from tierrun.engine.kernels.int8_dots import PLAIN, WAYS, Codes, Dots, Way
from tierrun.engine.kernels.int8_rows import BLOCK_BYTES, SCALED_SUM, SUMS
from tierrun.engine.kernels.int8_rows import SCALE as X_SCALE
from tierrun.engine.kernels.lanes import BYTE, F32, I32, I64, Lanes, offset_by
from tierrun.engine.kernels.native import at

TOGETHER = 4
"""Tokens that share what is loaded and unpacked."""

_AHEAD = 4096
"""Bytes from what is read to what is prefetched: the fastest of 1 to 8 KiB from memory (bench/)."""

_LEVELS = (SCALE, SCALE_2, MINIMUM, MINIMUM_2, ZERO_POINT)
_SIZES = {"f32": 4, "f16": 2, "bf16": 2}
_BOOKS = {E2M1: (12, 2.0), IQ4: (127, 1.0)}
"""Kind → what makes its numbers positive, once they are multiplied to be integers."""
_HALF_SPAN = SPAN // 2


def without_shape(M: Geometry) -> Geometry:
    """What kernels are compiled for: all that matrices of one codec share."""
    shape = {ROWS, COLUMNS, LOW_OFFSET, LOW_UNITS, HIGH_OFFSET, HIGH_UNITS}
    shape |= {level + place for level in _LEVELS for place in (OFFSET, UNITS)}
    return tuple(0 if place in shape else value for place, value in enumerate(M))


def codes_of(M: Geometry) -> Codes:
    """What the codes of an integer codec, or of a book of integers, stand for."""
    if M[KIND] not in _BOOKS:
        return Codes((1 << (M[LOW] + M[HIGH])) - 1, M[ZERO])
    offset, factor = _BOOKS[M[KIND]]
    name = "e2m1" if M[KIND] == E2M1 else "iq4"
    book = tuple(int(value * factor) + offset for value in BOOKS[name]())
    return Codes(max(book), offset, book)


def unit_of(M: Geometry) -> float:
    """What sums of integers are to be multiplied by."""
    return 1.0 / _BOOKS[M[KIND]][1] if M[KIND] in _BOOKS else 1.0


def outer(M: Geometry) -> int:
    """Inputs of the second levels' groups; 0 where there are none."""
    pers = {M[level + PER] for level in _LEVELS[:4] if M[level + ELEMENT] != NO_LEVEL}
    return max((per for per in pers if SPAN < per < ROW), default=0)


@intrinsic(prefer_literal=True)
def tile_dots(typingctx, M, way, matrix, base, tile, count, inputs, out):
    """Tile number `tile` of the matrix at `base` times `count` (1 … 4) rows.

    `M` is `without_shape`, `way` a number of WAYS (both constant), `matrix` the address of the
    whole geometry, int64. `inputs` is where TOGETHER addresses of rows of blocks are, of which
    three are computed as four; `out` where fp32 [TOGETHER, 32] goes.

    A negative `count` is for one token and two tiles of 32 rows, of which the other is so many
    further on: its sums go behind the TOGETHER rows of the first. Two tiles are read faster from
    memory than one after the other, as the processor reads only so far ahead of each.
    """
    general = tuple(item.literal_value for item in M.types)
    chosen = WAYS[way.literal_value]
    word = types.int64

    def codegen(context, builder, signature, arguments):
        _, _, matrix, base, tile, count, inputs, out = arguments
        product = Product(builder, frozenset(), general, at(builder, base, BYTE), tile, inputs, out)
        emit(product, at(builder, matrix, I64), chosen, count)
        return context.get_dummy_value()

    return types.void(M, way, word, word, word, word, word, word), codegen


def emit(product: Product, matrix, way: Way, count) -> None:
    """For one token, two or four; in a narrower last tile row by row."""
    builder = product.builder
    shape = Shape(builder, matrix)
    with builder.if_else(builder.icmp_signed("<", count, I64(0))) as (pair, alone):
        with pair:
            other = _other(product, builder.neg(count))
            _sum_up([*_strips(product, shape, way, 1), *_strips(other, shape, way, 1)])
        with alone:
            _emit_one(product, shape, way, count)


def _emit_one(product: Product, shape: "Shape", way: Way, count) -> None:
    builder = product.builder
    first = builder.mul(product.tile, I64(TILE_ROWS))
    rows = builder.sub(shape[ROWS], first)
    with builder.if_else(builder.icmp_signed(">=", rows, I64(TILE_ROWS))) as (whole, narrow):
        with whole:
            with builder.if_else(builder.icmp_signed("==", count, I64(1))) as (one, more):
                with one:
                    _sum_up(_strips(product, shape, way, 1))
                with more:
                    two = builder.icmp_signed("==", count, I64(2))
                    with builder.if_else(two) as (both, four):
                        with both:
                            _sum_up(_strips(product, shape, way, 2))
                        with four:
                            _sum_up(_strips(product, shape, way, TOGETHER))
        with narrow:
            planes = Planes(product, shape, rows)
            with cgutils.for_range(builder, count) as tokens:
                one_token = _for_token(product, tokens.index)
                with cgutils.for_range(builder, rows) as loop:
                    lanes = Lanes(builder, 1)
                    _sum_up([Strip(one_token, planes, PLAIN, lanes, loop.index, 1)])


def _other(product: Product, distance) -> Product:
    """The same product of the tile so many further on."""
    builder = product.builder
    tile = builder.add(product.tile, distance)
    out = builder.add(product.out, I64(4 * TILE_ROWS * TOGETHER))
    return Product(builder, product.features, product.M, product.base, tile, product.inputs, out)


def _for_token(product: Product, token) -> Product:
    """The same product of one token only."""
    builder = product.builder
    inputs = builder.add(product.inputs, builder.mul(token, I64(8)))
    out = builder.add(product.out, builder.mul(token, I64(4 * TILE_ROWS)))
    return Product(builder, product.features, product.M, product.base, product.tile, inputs, out)


def _strips(product: Product, shape: "Shape", way: Way, tokens: int) -> "list[Strip]":
    """A whole tile, a register's lanes at a time."""
    lanes, planes = Lanes(product.builder, way.width), Planes(product, shape, I64(TILE_ROWS))
    return [
        Strip(product, planes, way, lanes, I64(row), tokens, leads=row == 0)
        for row in range(0, TILE_ROWS, way.width)
    ]


def _sum_up(made: "list[Strip]") -> None:
    """The products of `made`, of one matrix and the same tokens, span by span."""
    product, planes = made[0].product, made[0].planes
    builder, M = product.builder, product.M
    x = product.activations(len(made[0].blocks))
    columns = planes.shape[COLUMNS]
    whole = builder.udiv(columns, I64(SPAN))
    if not (groups := outer(M) // SPAN):
        _spans(made, I64(0), whole, x)
        _part(made, builder.icmp_signed(">", columns, builder.mul(whole, I64(SPAN))), whole, x)
    else:
        spans = builder.udiv(builder.add(columns, I64(SPAN - 1)), I64(SPAN))
        with cgutils.for_range(
            builder, builder.udiv(builder.add(spans, I64(groups - 1)), I64(groups))
        ) as over:
            first = builder.mul(over.index, I64(groups))
            last = builder.add(first, I64(groups))
            for strip in made:
                strip.begin()
            within = builder.icmp_signed("<", last, whole)
            _spans(made, first, builder.select(within, last, whole), x)
            has_part = builder.icmp_signed(">", spans, whole)
            ends = builder.icmp_signed(">=", last, spans)
            _part(made, builder.and_(has_part, ends), whole, x)
            for strip in made:
                strip.fold(builder.mul(first, I64(SPAN)))
    for strip in made:
        strip.store()


def _spans(strips: "list[Strip]", first, last, x) -> None:
    """Whole spans, from number `first` up to `last`."""
    builder = strips[0].builder
    with cgutils.for_range(builder, builder.sub(last, first)) as loop:
        index = builder.add(first, loop.index)
        for strip in strips:
            strip.prefetch(index)
        _span(strips, index, x, in_part=False)


def _part(strips: "list[Strip]", exists, index, x) -> None:
    """The last span, if it `exists` and has fewer inputs: activations of the others are 0."""
    with strips[0].builder.if_then(exists):
        _span(strips, index, x, in_part=True)


def _span(strips: "list[Strip]", index, x, *, in_part: bool) -> None:
    builder = strips[0].builder
    place = builder.mul(index, I64(BLOCK_BYTES))
    blocks = [Block(builder, offset_by(builder, row, place)) for row in x]
    for strip in strips:
        strip.in_part = in_part
        strip.add(index, blocks)


class Shape:
    """The numbers of a geometry that are known at run time only, by their names."""

    def __init__(self, builder, matrix) -> None:
        self.builder, self.matrix = builder, matrix

    def __getitem__(self, place: int):
        pointer = self.builder.gep(self.matrix, [I64(place)], source_etype=I64)
        return self.builder.load(pointer, align=8)


class Planes:
    """Where each plane of the product's tile begins; `rows` (int64) of it are side by side."""

    def __init__(self, product: Product, shape: Shape, rows) -> None:
        self.builder, self.shape, self.rows = product.builder, shape, rows
        M = product.M
        self.units: dict[int, object] = {}
        self.starts = {LOW: self._start(product, LOW, LOW_OFFSET, LOW_UNITS, 4)}
        if M[HIGH]:
            self.starts[HIGH] = self._start(product, HIGH, HIGH_OFFSET, HIGH_UNITS, 4)
        for level in _LEVELS:
            if M[level + ELEMENT] != NO_LEVEL:
                nbytes = _SIZES.get(ELEMENTS[M[level + ELEMENT]], 1)
                places = level + OFFSET, level + UNITS
                self.starts[level] = self._start(product, level, *places, nbytes)

    def _start(self, product: Product, which: int, offset: int, units: int, nbytes: int):
        builder, shape = self.builder, self.shape
        self.units[which] = shape[units]
        of_tile = builder.mul(self.units[which], I64(TILE_ROWS * nbytes))
        before = builder.mul(product.tile, of_tile)
        return offset_by(builder, product.base, builder.add(shape[offset], before))


class Block:
    """A block of one token's activations."""

    def __init__(self, builder, pointer) -> None:
        self.builder, self.pointer = builder, pointer
        self.scale = self._load(X_SCALE, F32)
        self.sums = [self._load(SUMS + 4 * half, I32) for half in range(2)]

    def four(self, k: int):
        """The codes of inputs `k` to `k` + 3."""
        return self._load(k, I32)

    def sum_of(self, start: int, inputs: int):
        """The sum of the codes of a group, int32."""
        return self.builder.add(*self.sums) if inputs == SPAN else self.sums[start // _HALF_SPAN]

    def correction(self, dots: Dots, start: int, inputs: int):
        """What sums of products of a group begin with, int32; None for nothing."""
        if not dots.offset:
            return None
        return self.builder.mul(self.sum_of(start, inputs), I32(-dots.offset))

    def scaled_sum_of(self, start: int, inputs: int):
        """The same times the scale, fp32."""
        if inputs == SPAN:
            return self._load(SCALED_SUM, F32)
        return self.builder.fmul(self.scale, self.builder.sitofp(self.sum_of(start, inputs), F32))

    def _load(self, offset: int, kind):
        place = offset_by(self.builder, self.pointer, I64(offset))
        return self.builder.load(self.builder.bitcast(place, kind.as_pointer()), align=4)


class Group(NamedTuple):
    """A group of inputs from number `start` of a span on: its scale and negated zero point."""

    lanes: Lanes
    start: int
    inputs: int
    scale: Any
    zero: Any

    def add(self, place, found, block: Block) -> None:
        """Add `found`, int32 of one token, to the sum at `place`."""
        lanes, builder = self.lanes, self.lanes.builder
        part = builder.sitofp(found, lanes.kind(F32))
        if self.zero is not None:
            codes = lanes.spread(block.sum_of(self.start, self.inputs))
            part = lanes.fma(self.zero, builder.sitofp(codes, lanes.kind(F32)), part)
        factor = lanes.spread(block.scale)
        if self.scale is not None:
            factor = builder.fmul(self.scale, factor)
        accumulate(lanes, place, factor, part)


def accumulate(lanes: Lanes, place, a, b) -> None:
    """Add a · b to what is at `place`, rounded once."""
    lanes.builder.store(lanes.fma(a, b, lanes.builder.load(place)), place)


class Strip(Tile):
    """As many rows of a tile as there are lanes, from `row` (int64) on, and their sums."""

    def __init__(
        self,
        product: Product,
        planes: Planes,
        way: Way,
        lanes: Lanes,
        row,
        tokens: int,
        *,
        leads: bool = False,
    ) -> None:
        """`leads`: it prefetches for all rows of the tile."""
        super().__init__(lanes, product.M, product.base, product.tile)
        self.product, self.planes, self.row, self.leads = product, planes, row, leads
        self.dots = Dots(way, lanes, codes_of(self.M))
        self.in_part = False
        self.blocks = [self._variable() for _ in range(tokens)]
        self.below = [self._variable() for _ in range(tokens)] if self.has(MINIMUM) else []
        self.sums = [self._variable() for _ in range(tokens)] if outer(self.M) else self.blocks

    def _variable(self):
        place = cgutils.alloca_once(self.builder, self.lanes.kind(F32))
        self.builder.store(self.lanes.number(0.0), place)
        return place

    def begin(self) -> None:
        """A group of the second levels begins."""
        for place in self.blocks + self.below:
            self.builder.store(self.lanes.number(0.0), place)

    def add(self, index, blocks: list[Block]) -> None:
        """The groups of span number `index`."""
        first = self.builder.mul(index, I64(SPAN))
        words: dict[tuple[int, int], object] = {}
        for start in range(0, SPAN, self.M[GROUP]):
            k = self.builder.add(first, I64(start))
            sums = [self._dot(index, words, start, block) for block in blocks]
            self._add_group(k, start, sums, blocks)

    def prefetch(self, index) -> None:
        """What the planes of codes hold further on is wanted soon."""
        builder = self.builder
        if not self.leads:
            return
        for which in (LOW, HIGH) if self.M[HIGH] else (LOW,):
            nbytes = self.M[which] * 4 * TILE_ROWS
            start = offset_by(builder, self.planes.starts[which], builder.mul(index, I64(nbytes)))
            for line in range(0, nbytes, 64):
                place = offset_by(builder, start, I64(_AHEAD + line))
                kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
                call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
                builder.call(call, [place, I32(0), I32(3), I32(1)])

    def _dot(self, index, words, start: int, block: Block):
        """Σ number · code over a group of one token, int32."""
        dots = self.dots
        found = dots.start(block.correction(dots, start, self.M[GROUP]))
        for k in range(start, start + self.M[GROUP], 4):
            if ("bytes", k) not in words:
                words["bytes", k] = dots.bytes_of(self.codes_at(index, words, k))
            dots.add(found, words["bytes", k], block.four(k))
        return dots.finished(found)

    def codes_at(self, index, words, k: int):
        """The codes of inputs `k` to `k` + 3 of a span, one in each byte."""
        M = self.M
        word, within = divmod(k, 32 // M[LOW])
        low = self._field(self._word(index, words, LOW, word), M[LOW], within // 4, 0)
        if not M[HIGH]:
            return low
        word, within = divmod(k, 32 // M[HIGH])
        high = self._word(index, words, HIGH, word)
        return self.lanes.joined(low, self._field(high, M[HIGH], within // 4, M[LOW]))

    def _field(self, word, width: int, field: int, place: int):
        if width == 8:
            return word
        mask = (((1 << width) - 1) << place) * 0x01010101
        return self.lanes.masked(self.lanes.moved(word, place - width * field), mask)

    def _word(self, index, words, which: int, word: int):
        if (which, word) not in words:
            unit = self.builder.mul(index, I64(self.M[which]))
            unit = self.builder.add(unit, I64(word))
            words[which, word] = self.stored(which, unit, I32, 4)
        return words[which, word]

    def stored(self, which: int, unit, element, nbytes: int):
        """See `Tile`; `which` may be LOW or HIGH."""
        builder, planes = self.builder, self.planes
        if self.in_part:  # there may be no such unit
            last = builder.sub(planes.units[which], I64(1))
            unit = builder.select(builder.icmp_signed("<", unit, last), unit, last)
        place = builder.mul(builder.add(builder.mul(unit, planes.rows), self.row), I64(nbytes))
        return self.lanes.load(planes.starts[which], place, element, nbytes)

    def _add_group(self, k, start: int, sums, blocks: list[Block]) -> None:
        scale = self.fine(SCALE, SCALE_2, k)
        minimum = self.fine(MINIMUM, MINIMUM_2, k) if self.has(MINIMUM) else None
        zero = self.builder.fneg(self.level(ZERO_POINT, k)) if self.has(ZERO_POINT) else None
        group = Group(self.lanes, start, self.M[GROUP], scale, zero)
        for token, (found, block) in enumerate(zip(sums, blocks, strict=True)):
            group.add(self.blocks[token], found, block)
            if minimum is not None:
                below = self.lanes.spread(block.scaled_sum_of(start, self.M[GROUP]))
                accumulate(self.lanes, self.below[token], minimum, below)

    def fine(self, which: int, second: int, k):
        """The product of the levels that change within a span; None without any."""
        found = None
        for level in (which, second):
            if self.has(level) and self.M[level + PER] <= SPAN:
                value = self.level(level, k)
                found = value if found is None else self._applied(level, found, value)
        return found

    def fold(self, k) -> None:
        """A group of the second levels, which began with input `k`, ends."""
        self.in_part = False
        for level in (SCALE, SCALE_2):
            self._fold_level(level, k, self.blocks, negated=False)
        for level in (MINIMUM, MINIMUM_2):
            self._fold_level(level, k, self.below, negated=True)

    def _fold_level(self, level: int, k, places, negated: bool) -> None:
        if not self.has(level) or not SPAN < self.M[level + PER] < ROW:
            return
        factor = self.level(level, k)
        factor = self.builder.fneg(factor) if negated else factor
        for place, to in zip(places, self.sums, strict=True):
            accumulate(self.lanes, to, factor, self.builder.load(place))

    def store(self) -> None:
        """The sums go where the product wants them."""
        builder, lanes = self.builder, self.lanes
        for token, place in enumerate(self.sums):
            value = builder.load(place)
            if self.below and not outer(self.M):
                value = builder.fsub(value, builder.load(self.below[token]))
            value = self.row_scaled(lanes.times(value, unit_of(self.M)))
            target = self.product.result(token, self.row)
            target = builder.bitcast(target, lanes.kind(F32).as_pointer())
            builder.store(value, target, align=4)
