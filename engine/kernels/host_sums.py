# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The inner loop of the CPU's kernels: 32 rows of a matrix as stored times a few activations.

Everything is fp32 from the number on. A row's sum with one token is taken in one order, fixed by
the geometry: whatever else is computed beside it, the bits are the same.
"""

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.geometry import (
    BF16,
    COLUMNS,
    F16,
    GROUP,
    KIND,
    MINIMUM,
    ROWS,
    SPAN,
    ZERO_POINT,
    Geometry,
    is_dense,
)
from tierrun.engine.kernels.host_codes import Tile
from tierrun.engine.kernels.lanes import BYTE, F32, HALF, I16, I32, I64, Lanes, offset_by, total
from tierrun.engine.kernels.native import at

TOGETHER = 4
"""Tokens that share what is loaded and unpacked: more would not fit in registers."""

_CHAINS = 2
"""Sums in turn: an addition waits four cycles for the one before it."""
_ROWS_ABREAST = 4
"""Rows of a dense matrix, times tokens, summed side by side."""


@intrinsic(prefer_literal=True)
def tile_sums(typingctx, M, base, tile, count, inputs, out):
    """Tile number `tile` of the matrix `M` (constant) at `base` times `count` (1 … 4) rows.

    `inputs` is where TOGETHER addresses of fp32 rows [in] are, of which three are computed as four;
    `out` is where fp32 [TOGETHER, 32] goes. Rows beyond the matrix get anything.
    """
    matrix = tuple(item.literal_value for item in M.types)
    word = types.int64

    def codegen(context, builder, signature, arguments):
        features = frozenset(context.codegen().magic_tuple()[2].split(","))
        _, base, tile, count, inputs, out = arguments
        emitter = _Product(builder, features, matrix, at(builder, base, BYTE), tile, inputs, out)
        emitter.choose(count)
        return context.get_dummy_value()

    return types.void(M, word, word, word, word, word), codegen


@intrinsic(prefer_literal=True)
def plain_number(typingctx, kind, address):
    """The number at `address`, of a dense `kind` (BF16, …; constant), fp32."""
    chosen = kind.literal_value

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[1], BYTE.as_pointer())
        vector = _numbers(Lanes(builder, 1), chosen, pointer, I64(0))
        return builder.extract_element(vector, I32(0))

    return types.float32(kind, types.int64), codegen


class _Product:
    """Emits `tile_sums`."""

    def __init__(self, builder, features, M: Geometry, base, tile, inputs, out) -> None:
        self.builder, self.features, self.M = builder, features, M
        self.base, self.tile, self.inputs, self.out = base, tile, inputs, out

    def choose(self, count) -> None:
        """For one token, for two, or for four."""
        with self.builder.if_else(self.builder.icmp_signed("==", count, I64(1))) as (one, more):
            with one:
                self.rows(1)
            with more:
                two = self.builder.icmp_signed("==", count, I64(2))
                with self.builder.if_else(two) as (pair, four):
                    with pair:
                        self.rows(2)
                    with four:
                        self.rows(TOGETHER)

    def rows(self, tokens: int) -> None:
        """In a whole tile, or in the narrower last one."""
        whole, narrow = divmod(self.M[ROWS], TILE_ROWS)
        tile = _dense_tile if is_dense(self.M) else _packed_tile
        if not narrow or not whole:
            tile(self, tokens, narrow or TILE_ROWS)
            return
        inside = self.builder.icmp_signed("<", self.tile, I64(whole))
        with self.builder.if_else(inside) as (all_rows, some_rows):
            with all_rows:
                tile(self, tokens, TILE_ROWS)
            with some_rows:
                tile(self, tokens, narrow)

    def activations(self, tokens: int):
        """Pointers to the tokens' rows of inputs, as bytes."""
        places = at(self.builder, self.inputs, I64)
        found = []
        for token in range(tokens):
            address = self.builder.load(self.builder.gep(places, [I64(token)], source_etype=I64))
            found.append(self.builder.inttoptr(address, BYTE.as_pointer()))
        return found

    def result(self, token: int, row):
        """Where the sum of `row` (int64) of the tile goes, as bytes."""
        offset = self.builder.add(I64(4 * TILE_ROWS * token), self.builder.mul(row, I64(4)))
        return offset_by(self.builder, at(self.builder, self.out, BYTE), offset)


def _packed_tile(product: _Product, tokens: int, rows: int) -> None:
    """Lanes are rows."""
    builder, M = product.builder, product.M
    lanes = Lanes(builder, rows, product.features)
    tile = Tile(lanes, M, product.base, product.tile)
    x = product.activations(tokens)
    sums = [_variable(lanes) for _ in x]
    whole, rest = divmod(M[COLUMNS], SPAN)
    if whole:
        with cgutils.for_range(builder, I64(whole)) as loop:
            _span(tile, loop.index, SPAN, x, sums)
    if rest:
        _span(tile, I64(whole), rest, x, sums)
    for token, place in enumerate(sums):
        value = builder.load(place)
        if not tile.has_group_scale:
            value = lanes.times(value, tile.unit)
        target = product.result(token, I64(0))
        target = builder.bitcast(target, lanes.kind(F32).as_pointer())
        builder.store(tile.row_scaled(value), target, align=4)


def _span(tile: Tile, index, inputs: int, x, sums) -> None:
    """Add the products of the first `inputs` of span `index` to `sums`."""
    builder, lanes, M = tile.builder, tile.lanes, tile.M
    first = builder.mul(index, I64(SPAN))
    codes = tile.span(index)
    for start in range(0, inputs, M[GROUP]):
        some = range(start, min(inputs, start + M[GROUP]))
        found = _group_sums(lanes, codes, some, first, x)
        k = builder.add(first, I64(start))
        _add_group(tile, k, found, [(pointer, len(some)) for pointer in x], sums)


def _group_sums(lanes: Lanes, codes, some: range, first, x):
    """The numbers of the inputs `some` of a span times theirs, for each token."""
    builder = lanes.builder
    sums = [[None] * _CHAINS for _ in x]
    for k in some:
        number = codes.number(k)
        for token, pointer in enumerate(x):
            value = lanes.spread(_input(builder, pointer, first, k))
            before = sums[token][k % _CHAINS]
            sums[token][k % _CHAINS] = (
                builder.fmul(number, value) if before is None else lanes.fma(number, value, before)
            )
    return [builder.fadd(*chains) if chains[1] is not None else chains[0] for chains in sums]


def _add_group(tile: Tile, k, found, inputs, sums) -> None:
    """Add one group's sums to those of the tile: scaled, its minimum and zero point taken off."""
    builder, lanes = tile.builder, tile.lanes
    scale = tile.group_scale(k)
    scale = None if scale is None else lanes.times(scale, tile.unit)
    minimum = builder.fneg(tile.minimum(k)) if tile.has(MINIMUM) else None
    zero = builder.fneg(tile.level(ZERO_POINT, k)) if tile.has(ZERO_POINT) else None
    for part, (pointer, count), place in zip(found, inputs, sums, strict=True):
        all_inputs = None
        if minimum is not None or zero is not None:
            all_inputs = lanes.spread(_sum_of_inputs(builder, pointer, k, count))
        if zero is not None:
            part = lanes.fma(zero, all_inputs, part)
        value = builder.load(place)
        if minimum is not None:
            value = lanes.fma(minimum, all_inputs, value)
        value = builder.fadd(value, part) if scale is None else lanes.fma(scale, part, value)
        builder.store(value, place)


def _input(builder, pointer, first, k: int):
    offset = builder.mul(builder.add(first, I64(k)), I64(4))
    place = offset_by(builder, pointer, offset)
    return builder.load(builder.bitcast(place, F32.as_pointer()), align=4)


def _sum_of_inputs(builder, pointer, k, count: int):
    vector = Lanes(builder, count).load(pointer, builder.mul(k, I64(4)), F32, 4)
    return total(builder, vector)


def _dense_tile(product: _Product, tokens: int, rows: int) -> None:
    """Lanes are inputs, some rows side by side; in the last step a row may be taken twice."""
    builder, abreast = product.builder, max(1, _ROWS_ABREAST // tokens)
    x = product.activations(tokens)
    with cgutils.for_range(builder, I64(-(-rows // abreast))) as loop:
        for_rows = []
        for number in range(abreast):
            row = builder.add(builder.mul(loop.index, I64(abreast)), I64(number))
            inside = builder.icmp_signed("<", row, I64(rows))
            for_rows.append(builder.select(inside, row, I64(rows - 1)))
        _dense_rows(product, for_rows, x)


def _dense_rows(product: _Product, rows, x) -> None:
    builder, M = product.builder, product.M
    lanes = Lanes(builder, SPAN)
    nbytes = 2 if M[KIND] in (BF16, F16) else 4
    first = builder.mul(product.tile, I64(TILE_ROWS))
    stored = [
        offset_by(
            builder,
            product.base,
            builder.mul(builder.add(first, row), I64(M[COLUMNS] * nbytes)),
        )
        for row in rows
    ]
    sums = [[_variable(lanes) for _ in x] for _ in rows]
    whole, rest = divmod(M[COLUMNS], SPAN)
    if whole:
        with cgutils.for_range(builder, I64(whole)) as loop:
            start = builder.mul(loop.index, I64(SPAN))
            _dense_step(lanes, M[KIND], stored, x, start, sums)
    last = [[total(builder, builder.load(place)) for place in places] for places in sums]
    if rest:
        narrow = Lanes(builder, rest)
        more = [[_variable(narrow) for _ in x] for _ in rows]
        _dense_step(narrow, M[KIND], stored, x, I64(whole * SPAN), more)
        last = [
            [
                builder.fadd(a, total(builder, builder.load(b)))
                for a, b in zip(found, places, strict=True)
            ]
            for found, places in zip(last, more, strict=True)
        ]
    for row, values in zip(rows, last, strict=True):
        for token, value in enumerate(values):
            target = product.result(token, row)
            builder.store(value, builder.bitcast(target, F32.as_pointer()), align=4)


def _dense_step(lanes: Lanes, kind: int, stored, x, start, sums) -> None:
    """Add the products of as many inputs as there are lanes, from input `start` on."""
    builder = lanes.builder
    nbytes = 2 if kind in (BF16, F16) else 4
    values = [lanes.load(p, builder.mul(start, I64(4)), F32, 4) for p in x]
    for pointer, places in zip(stored, sums, strict=True):
        numbers = _numbers(lanes, kind, pointer, builder.mul(start, I64(nbytes)))
        for value, place in zip(values, places, strict=True):
            builder.store(lanes.fma(numbers, value, builder.load(place)), place)


def _numbers(lanes: Lanes, kind: int, pointer, offset):
    """Plain numbers of a dense `kind` as fp32."""
    builder = lanes.builder
    if kind == BF16:
        wide = builder.zext(lanes.load(pointer, offset, I16, 2), lanes.kind(I32))
        return lanes.as_numbers(lanes.moved(wide, 16))
    if kind == F16:
        return builder.fpext(lanes.load(pointer, offset, HALF, 2), lanes.kind(F32))
    return lanes.load(pointer, offset, F32, 4)


def _variable(lanes: Lanes):
    """A vector in memory, zero; the compiler keeps it in registers."""
    place = cgutils.alloca_once(lanes.builder, lanes.kind(F32))
    lanes.builder.store(lanes.number(0.0), place)
    return place
