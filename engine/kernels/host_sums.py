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
    COLUMNS,
    GROUP,
    MINIMUM,
    ROWS,
    SPAN,
    ZERO_POINT,
    is_dense,
)
from tierrun.engine.kernels.host_codes import Tile
from tierrun.engine.kernels.host_dense import dense_tile, numbers
from tierrun.engine.kernels.host_product import Product
from tierrun.engine.kernels.lanes import BYTE, F32, I32, I64, Lanes, offset_by, total, variable
from tierrun.engine.kernels.native import at

TOGETHER = 4
"""Tokens that share what is loaded and unpacked: more would not fit in registers."""

_CHAINS = 2
"""Sums in turn: an addition waits four cycles for the one before it."""


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
        product = Product(builder, features, matrix, at(builder, base, BYTE), tile, inputs, out)
        _choose(product, count)
        return context.get_dummy_value()

    return types.void(M, word, word, word, word, word), codegen


@intrinsic(prefer_literal=True)
def plain_number(typingctx, kind, address):
    """The number at `address`, of a dense `kind` (BF16, …; constant), fp32."""
    chosen = kind.literal_value

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[1], BYTE.as_pointer())
        vector = numbers(Lanes(builder, 1), chosen, pointer, I64(0))
        return builder.extract_element(vector, I32(0))

    return types.float32(kind, types.int64), codegen


def _choose(product: Product, count) -> None:
    """For one token, for two, or for four."""
    builder = product.builder
    with builder.if_else(builder.icmp_signed("==", count, I64(1))) as (one, more):
        with one:
            _rows(product, 1)
        with more:
            two = builder.icmp_signed("==", count, I64(2))
            with builder.if_else(two) as (pair, four):
                with pair:
                    _rows(product, 2)
                with four:
                    _rows(product, TOGETHER)


def _rows(product: Product, tokens: int) -> None:
    """In a whole tile, or in the narrower last one."""
    whole, narrow = divmod(product.M[ROWS], TILE_ROWS)
    tile = dense_tile if is_dense(product.M) else _packed_tile
    if not narrow or not whole:
        tile(product, tokens, narrow or TILE_ROWS)
        return
    inside = product.builder.icmp_signed("<", product.tile, I64(whole))
    with product.builder.if_else(inside) as (all_rows, some_rows):
        with all_rows:
            tile(product, tokens, TILE_ROWS)
        with some_rows:
            tile(product, tokens, narrow)


def _packed_tile(product: Product, tokens: int, rows: int) -> None:
    """Lanes are rows."""
    builder, M = product.builder, product.M
    lanes = Lanes(builder, rows, product.features)
    tile = Tile(lanes, M, product.base, product.tile)
    x = product.activations(tokens)
    sums = [variable(lanes) for _ in x]
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
