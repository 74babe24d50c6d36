# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""32 rows of a packed matrix times a panel of tokens: codes are unpacked once for all of them.

A panel (see `int8_rows`) is what the activations of up to PANEL tokens become. Chunk by chunk the
rows' codes are unpacked to bytes, and their scales and minima to fp32, into memory that stays in
cache; then some tokens at a time are multiplied, whose sums are in registers. For each token the
operations and their order are those of `int8_tile`, and so are the bits.
"""

from collections.abc import Callable
from contextlib import contextmanager
from math import gcd
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels import int8_amx
from tierrun.engine.kernels.geometry import (
    COLUMNS,
    ELEMENT,
    GROUP,
    MINIMUM,
    MINIMUM_2,
    NO_LEVEL,
    PER,
    ROW,
    ROWS,
    SCALE,
    SCALE_2,
    SPAN,
    ZERO_POINT,
    Geometry,
)
from tierrun.engine.kernels.host_codes import applied
from tierrun.engine.kernels.host_product import Product
from tierrun.engine.kernels.int8_dots import (
    AMX,
    AVX2,
    NEON,
    PLAIN,
    VNNI,
    VNNI_512,
    WAYS,
    Dots,
    Way,
)
from tierrun.engine.kernels.int8_rows import BLOCK_BYTES, CHUNK, CHUNK_BYTES, PANEL
from tierrun.engine.kernels.int8_tile import (
    Block,
    Group,
    Planes,
    Shape,
    Strip,
    accumulate,
    codes_of,
    outer,
    unit_of,
)
from tierrun.engine.kernels.lanes import BYTE, F32, I32, I64, Lanes, offset_by
from tierrun.engine.kernels.native import at, stacked

_WORDS = SPAN // 4
_LINE = 4 * TILE_ROWS
"""Bytes of a number for each row."""


class _Share(NamedTuple):
    """What registers hold the sums of: those of blocks and those below, by turns or `both`. For so
    many `blocks` of tokens, and the same rows, integers are summed up before (by AMX)."""

    tokens: int
    strips: int
    blocks: int = 1
    both: bool = False


_SHARES = {
    AMX: _Share(8, 1, blocks=int8_amx.TOKENS // 8, both=True),
    VNNI_512: _Share(6, 2),
    VNNI: _Share(3, 2),
    AVX2: _Share(4, 1),
    NEON: _Share(6, 2),
    PLAIN: _Share(2, 1),
}


@intrinsic(prefer_literal=True)
def panel_dots(typingctx, M, way, matrix, base, tile, count, panel, out):
    """Tile number `tile` of the matrix at `base` times the first `count` tokens of a panel.

    As `int8_tile.tile_dots`, but `panel` is the address of a panel, and `out` that of fp32
    [PANEL, 32], of which more rows may be written than there are tokens.
    """
    general = tuple(item.literal_value for item in M.types)
    chosen = WAYS[way.literal_value]
    word = types.int64

    def codegen(context, builder, signature, arguments):
        _, _, matrix, base, tile, count, panel, out = arguments
        product = Product(builder, frozenset(), general, at(builder, base, BYTE), tile, panel, out)
        emit(product, at(builder, matrix, I64), chosen, count)
        return context.get_dummy_value()

    return types.void(M, way, word, word, word, word, word, word), codegen


def emit(product: Product, matrix, way: Way, count) -> None:
    """Everything for `count` (int64) tokens."""
    builder = product.builder
    shape, tile = Shape(builder, matrix), _Unpacked(builder, product.M)
    rows = builder.sub(shape[ROWS], builder.mul(product.tile, I64(TILE_ROWS)))
    sums, share, dots = _Sums(product), _SHARES[way], None
    if way == AMX:
        dots = int8_amx.Sums(builder, product.M[GROUP], tile.spans * tile.groups)
        dots.begin()
    blocks = _up(builder, count, share.tokens)
    sums.clear(builder.mul(blocks, I64(share.tokens)))
    spans = _up(builder, shape[COLUMNS], SPAN)
    most = chunk_spans(product.M)
    with cgutils.for_range(builder, _up(builder, spans, most)) as loop:
        first = builder.mul(loop.index, I64(most))
        some = _least(builder, builder.sub(spans, first), I64(most))
        _unpack(product, shape, way, rows, tile, first, some)
        inputs = _chunk(product, first)
        ends = _ends_group(builder, product.M, first, some, spans)
        with _parts(builder, blocks, share.blocks) as (block, some_blocks):
            with cgutils.for_range(builder, I64(TILE_ROWS // (way.width * share.strips))) as part:
                row = builder.mul(part.index, I64(way.width * share.strips))
                some_rows = [builder.add(row, I64(way.width * i)) for i in range(share.strips)]
                if dots is not None:
                    _multiply(dots, tile, row, _token(builder, inputs, block, share), some)
                with cgutils.for_range(builder, some_blocks) as within:
                    of_block = builder.add(block, within.index)
                    token = builder.mul(of_block, I64(share.tokens))
                    made = _Product(tile, sums, way, some_rows, token, within.index, dots)
                    made.add(_token(builder, inputs, of_block, share), some)
                    if not ends_groups(product.M):
                        with builder.if_then(ends):
                            made.fold()
    with cgutils.for_range(builder, count) as loop:
        sums.finish(tile, loop.index)
    if dots is not None:
        dots.end()


def _least(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


@contextmanager
def _parts(builder, number, size: int):
    """A loop over `number` things, `size` at a time: the first one's number and how many."""
    with cgutils.for_range(builder, _up(builder, number, size)) as loop:
        first = builder.mul(loop.index, I64(size))
        yield first, _least(builder, builder.sub(number, first), I64(size))


def _token(builder, inputs, block, share: _Share):
    """Where the activations of the first token of a block are."""
    return offset_by(builder, inputs, builder.mul(block, I64(share.tokens * CHUNK_BYTES)))


def _multiply(dots: int8_amx.Sums, tile: "_Unpacked", row, inputs, spans) -> None:
    """All groups of a chunk for rows from `row` on and the tokens at `inputs`."""
    builder, each = dots.builder, dots.inputs
    of_rows = offset_by(builder, tile.words, builder.mul(row, I64(4)))
    with cgutils.for_range(builder, spans) as loop:
        block = offset_by(builder, inputs, builder.mul(loop.index, I64(BLOCK_BYTES)))
        for group in range(tile.groups):
            number = builder.add(builder.mul(loop.index, I64(tile.groups)), I64(group))
            words = offset_by(builder, of_rows, builder.mul(number, I64(each // 4 * _LINE)))
            dots.multiply(number, words, offset_by(builder, block, I64(group * each)))


def chunk_spans(M: Geometry) -> int:
    """Spans that are unpacked at once: no group of second levels ends within them."""
    return gcd(outer(M) // SPAN, CHUNK)


def ends_groups(M: Geometry) -> bool:
    """Whether a group of the second levels ends with every chunk."""
    return outer(M) == chunk_spans(M) * SPAN


def _up(builder, number, divisor: int):
    """`number` divided by `divisor`, rounded up."""
    return builder.udiv(builder.add(number, I64(divisor - 1)), I64(divisor))


def _chunk(product: Product, first):
    """Where the activations of span number `first` are."""
    builder = product.builder
    chunk = builder.udiv(first, I64(CHUNK))
    within = builder.urem(first, I64(CHUNK))
    place = builder.mul(chunk, I64(PANEL * CHUNK_BYTES))
    place = builder.add(place, builder.mul(within, I64(BLOCK_BYTES)))
    return offset_by(builder, at(builder, product.inputs, BYTE), place)


def _ends_group(builder, M: Geometry, first, some, spans):
    """Whether a group of the second levels ends with `some` spans from `first` on."""
    if not outer(M):
        return ir.Constant(ir.IntType(1), 0)
    end = builder.add(first, some)
    whole = builder.icmp_signed("==", builder.urem(end, I64(outer(M) // SPAN)), I64(0))
    return builder.or_(whole, builder.icmp_signed("==", end, spans))


def _unpack(product: Product, shape: Shape, way: Way, rows, tile: "_Unpacked", first, some) -> None:
    """A chunk's spans: as many rows at once as there are lanes, in a narrower tile one by one."""
    builder = product.builder
    with builder.if_else(builder.icmp_signed(">=", rows, I64(TILE_ROWS))) as (whole, narrow):
        with whole:
            planes, lanes = Planes(product, shape, I64(TILE_ROWS)), Lanes(builder, way.width)
            starts = range(0, TILE_ROWS, way.width)
            strips = [
                Strip(product, planes, way, lanes, I64(row), 0, leads=row == 0) for row in starts
            ]
            tile.fill(strips, first, some)
        with narrow:
            planes, lanes = Planes(product, shape, rows), Lanes(builder, 1)
            with cgutils.for_range(builder, rows) as loop:
                tile.fill([Strip(product, planes, way, lanes, loop.index, 0)], first, some)


class _Unpacked:
    """A chunk of one tile: words of four codes, and what each group's levels make, for each row."""

    def __init__(self, builder, M: Geometry) -> None:
        self.builder, self.M = builder, M
        self.spans = chunk_spans(M)
        self.groups = SPAN // M[GROUP]
        self.words = _room(builder, self.spans * _WORDS)
        self.fine = {which: _room(builder, self.spans * self.groups) for which in self._fine()}
        self.coarse = {which: _room(builder, 1) for which in self._coarse()}

    def _fine(self) -> list[int]:
        """The levels of scale, minimum and zero point that change within a chunk."""
        found = [ZERO_POINT] if self._has(ZERO_POINT) else []
        for which, second in ((SCALE, SCALE_2), (MINIMUM, MINIMUM_2)):
            if any(self._has(x) and self.M[x + PER] <= SPAN for x in (which, second)):
                found.append(which)
        return found

    def _coarse(self) -> list[int]:
        levels = (SCALE, SCALE_2, MINIMUM, MINIMUM_2)
        return [x for x in levels if self._has(x) and self.M[x + PER] > SPAN]

    def _has(self, which: int) -> bool:
        return self.M[which + ELEMENT] != NO_LEVEL

    def fill(self, strips: list[Strip], first, some) -> None:
        """`some` spans from number `first` on, of the rows of `strips`."""
        builder = self.builder
        for strip in strips:
            strip.in_part = True  # there may be fewer units than a span has
            for which, place in self.coarse.items():
                value = strip.level(which, builder.mul(first, I64(SPAN)))
                self._put(strip, place, I64(0), value)
        with cgutils.for_range(builder, some) as loop:
            index = builder.add(first, loop.index)
            strips[0].prefetch(index)
            for strip in strips:
                self._fill_span(strip, loop.index, index)

    def _fill_span(self, strip: Strip, span, index) -> None:
        builder = self.builder
        words: dict[tuple[int, int], object] = {}
        for number in range(_WORDS):
            value = strip.dots.bytes_of(strip.codes_at(index, words, 4 * number))
            self._put(strip, self.words, builder.mul(span, I64(_WORDS)), value, number)
        for number in range(self.groups):
            k = builder.add(builder.mul(index, I64(SPAN)), I64(number * self.M[GROUP]))
            line = builder.mul(span, I64(self.groups))
            for which, place in self.fine.items():
                self._put(strip, place, line, _level(strip, which, k), number)

    def _put(self, strip: Strip, place, line, value, further: int = 0) -> None:
        pointer = _lane(self.builder, place, line, strip.row, value.type, further)
        self.builder.store(value, pointer, align=4)


def _level(strip: Strip, which: int, k):
    """What the arithmetic of a group takes."""
    if which == ZERO_POINT:
        return strip.builder.fneg(strip.level(which, k))
    return strip.fine(which, {SCALE: SCALE_2, MINIMUM: MINIMUM_2}[which], k)


def _room(builder, lines: int):
    """Memory for so many numbers of every row, as bytes."""
    return builder.bitcast(stacked(builder, lines * _LINE), BYTE.as_pointer())


def _lane(builder, place, line, row, kind, further: int = 0):
    """Where numbers from `row` on are, in the line that is `further` than `line`."""
    place = offset_by(builder, place, builder.mul(row, I64(4)))
    place = offset_by(builder, place, builder.mul(line, I64(_LINE)))
    place = offset_by(builder, place, I64(further * _LINE))
    return builder.bitcast(place, kind.as_pointer())


class _Sums:
    """The tokens' sums, a line of 32 rows each: those of the result, and what is not in it yet."""

    def __init__(self, product: Product) -> None:
        builder, self.M = product.builder, product.M
        self.builder = builder
        self.out = at(builder, product.out, BYTE)
        self.in_registers = ends_groups(self.M)
        has_below = self.M[MINIMUM + ELEMENT] != NO_LEVEL
        self.blocks = self._apart() if outer(self.M) else self.out
        self.below = self._apart() if has_below else None

    def _apart(self):
        return self.out if self.in_registers else _room(self.builder, PANEL)

    @property
    def places(self):
        """All that are in memory."""
        places = [self.out, self.blocks, *([] if self.below is None else [self.below])]
        return list(dict.fromkeys(places))

    def clear(self, tokens) -> None:
        """Those of the first `tokens`."""
        builder, lanes = self.builder, Lanes(self.builder, TILE_ROWS)
        with cgutils.for_range(builder, tokens) as loop:
            for place in self.places:
                zeros = lanes.number(0.0)
                builder.store(zeros, _lane(builder, place, loop.index, I64(0), zeros.type), align=4)

    def finish(self, tile: _Unpacked, token) -> None:
        """The result of one token."""
        builder, lanes = self.builder, Lanes(self.builder, TILE_ROWS)
        kind = lanes.kind(F32)
        place = _lane(builder, self.out, token, I64(0), kind)
        value = builder.load(place, align=4)
        if self.below is not None and not outer(self.M):
            below = _lane(builder, self.below, token, I64(0), kind)
            value = builder.fsub(value, builder.load(below, align=4))
        value = lanes.times(value, unit_of(self.M))
        for which, line in tile.coarse.items():
            if self.M[which + PER] == ROW:
                factor = builder.load(_lane(builder, line, I64(0), I64(0), kind), align=4)
                value = applied(builder, self.M, which, value, factor)
        builder.store(value, place, align=4)


class _Part(NamedTuple):
    """Sums of one kind: where they are in memory, the levels of their groups, what adds to them."""

    place: Any
    levels: tuple[int, int]
    add: Callable[..., None]


class _Product:
    """A chunk of some rows times some tokens from `token` on, added to their sums."""

    def __init__(
        self,
        tile: _Unpacked,
        sums: _Sums,
        way: Way,
        rows,
        token,
        block,
        made: int8_amx.Sums | None,
    ) -> None:
        """`made` has the sums of groups already; of those that it has, this is `block`."""
        self.builder, self.M, self.tile, self.sums = tile.builder, tile.M, tile, sums
        self.lanes, self.rows = Lanes(self.builder, way.width), rows
        self.block, self.made = block, made
        self.dots, self.share = Dots(way, self.lanes, codes_of(self.M)), _SHARES[way]
        self.tokens = [self.builder.add(token, I64(i)) for i in range(self.share.tokens)]

    def add(self, inputs, spans) -> None:
        """All of `spans`; the first token's activations are at `inputs`."""
        parts = self._parts()
        for some in [parts] if self.share.both else [[part] for part in parts]:
            self._pass(some, inputs, spans)

    def _parts(self) -> list[_Part]:
        found = [_Part(self.sums.blocks, (SCALE, SCALE_2), self._add_span)]
        if self.sums.below is not None:
            found.append(_Part(self.sums.below, (MINIMUM, MINIMUM_2), self._add_below))
        return found

    def _pass(self, parts: list[_Part], inputs, spans) -> None:
        """Add to the sums of `parts`, which are in registers meanwhile."""
        builder = self.builder
        held = [self._registers(part) for part in parts]
        with cgutils.for_range(builder, spans) as loop:
            start = offset_by(builder, inputs, builder.mul(loop.index, I64(BLOCK_BYTES)))
            places = [
                offset_by(builder, start, I64(i * CHUNK_BYTES)) for i in range(len(self.tokens))
            ]
            blocks = [Block(builder, x) for x in places]
            for part, registers in zip(parts, held, strict=True):
                part.add(registers, loop.index, blocks)
        for part, registers in zip(parts, held, strict=True):
            values = [[builder.load(register) for register in line] for line in registers]
            if self.sums.in_registers:
                self._fold(part, values)
            else:
                self._put(part.place, values)

    def _registers(self, part: _Part):
        """The sums of `part`, of each token and strip of rows."""
        builder, kind = self.builder, self.lanes.kind(F32)
        found = [[cgutils.alloca_once(builder, kind) for _ in self.rows] for _ in self.tokens]
        values = None if self.sums.in_registers else self._sums(part.place)
        for i, line in enumerate(found):
            for j, register in enumerate(line):
                builder.store(self.lanes.number(0.0) if values is None else values[i][j], register)
        return found

    def _sums(self, place):
        """The sums in memory at `place`."""
        kind = self.lanes.kind(F32)
        return [
            [
                self.builder.load(_lane(self.builder, place, token, row, kind), align=4)
                for row in self.rows
            ]
            for token in self.tokens
        ]

    def _put(self, place, values) -> None:
        for token, line in zip(self.tokens, values, strict=True):
            for row, value in zip(self.rows, line, strict=True):
                self.builder.store(
                    value, _lane(self.builder, place, token, row, value.type), align=4
                )

    def _add_span(self, held, span, blocks: list[Block]) -> None:
        for number, start in enumerate(range(0, SPAN, self.M[GROUP])):
            found = self._dots(span, start, blocks)
            for at_row, row in enumerate(self.rows):
                scale, zero = (
                    self._fine(which, span, number, row) for which in (SCALE, ZERO_POINT)
                )
                group = Group(self.lanes, start, self.M[GROUP], scale, zero)
                for token, block in enumerate(blocks):
                    group.add(held[token][at_row], found[token][at_row], block)

    def _dots(self, span, start: int, blocks: list[Block]):
        """Sums of a group, int32, for each token and each strip of rows."""
        builder, dots, inputs = self.builder, self.dots, self.M[GROUP]
        if self.made is not None:
            return self._dots_made(self.made, span, start, blocks)
        sums = []
        for block in blocks:
            correction = block.correction(dots, start, inputs)
            sums.append([dots.start(correction) for _ in self.rows])
        for k in range(start, start + inputs, 4):
            line = builder.mul(span, I64(_WORDS))
            words = [self._line(self.tile.words, line, row, I32, k // 4) for row in self.rows]
            for token, block in enumerate(blocks):
                x = block.four(k)
                for at_row, word in enumerate(words):
                    dots.add(sums[token][at_row], word, x)
        return [[dots.finished(one) for one in of_token] for of_token in sums]

    def _dots_made(self, made: int8_amx.Sums, span, start: int, blocks: list[Block]):
        """The same, from `made`."""
        builder, inputs, kind = self.builder, self.M[GROUP], self.lanes.kind(I32)
        number = builder.add(builder.mul(span, I64(self.tile.groups)), I64(start // inputs))
        first, found = builder.mul(self.block, I64(self.share.tokens)), []
        for token, block in enumerate(blocks):
            sums = made.of(number, builder.add(first, I64(token)), kind)
            if (correction := block.correction(self.dots, start, inputs)) is not None:
                sums = builder.add(sums, self.lanes.spread(correction))
            found.append([sums])
        return found

    def _add_below(self, held, span, blocks: list[Block]) -> None:
        for number, start in enumerate(range(0, SPAN, self.M[GROUP])):
            for at_row, row in enumerate(self.rows):
                minimum = self._fine(MINIMUM, span, number, row)
                for token, block in enumerate(blocks):
                    below = block.scaled_sum_of(start, self.M[GROUP])
                    accumulate(self.lanes, held[token][at_row], minimum, self.lanes.spread(below))

    def _fine(self, which: int, span, number: int, row):
        """A level of the span's group of that `number`; None if there is none."""
        if which not in self.tile.fine:
            return None
        line = self.builder.mul(span, I64(self.tile.groups))
        return self._line(self.tile.fine[which], line, row, F32, number)

    def _line(self, place, line, row, element, further: int = 0):
        pointer = _lane(self.builder, place, line, row, self.lanes.kind(element), further)
        return self.builder.load(pointer, align=4)

    def fold(self) -> None:
        """A group of the second levels ends: what is apart goes into the sums of the result."""
        for part in self._parts():
            self._fold(part, self._sums(part.place))
            zeros = self.lanes.number(0.0)
            self._put(part.place, [[zeros for _ in self.rows] for _ in self.tokens])

    def _fold(self, part: _Part, values) -> None:
        builder = self.builder
        for which in part.levels:
            if which not in self.tile.coarse or self.M[which + PER] == ROW:
                continue
            for at_row, row in enumerate(self.rows):
                factor = self._line(self.tile.coarse[which], I64(0), row, F32)
                factor = builder.fneg(factor) if which in (MINIMUM, MINIMUM_2) else factor
                for token, line in zip(self.tokens, values, strict=True):
                    to = _lane(builder, self.sums.out, token, row, factor.type)
                    accumulate(self.lanes, to, factor, line[at_row])
