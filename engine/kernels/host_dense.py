# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""Emitters: rows of a dense matrix, as they lie, times a few activations, on the CPU."""

from numba.core import cgutils

from tierrun.engine.codecs.planes import TILE_ROWS
from tierrun.engine.kernels.geometry import BF16, COLUMNS, F16, KIND, SPAN
from tierrun.engine.kernels.host_product import Product
from tierrun.engine.kernels.lanes import F32, HALF, I16, I32, I64, Lanes, offset_by, total, variable

_ROWS_ABREAST = 4
"""Rows of a dense matrix, times tokens, summed side by side."""


def dense_tile(product: Product, tokens: int, rows: int) -> None:
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


def _dense_rows(product: Product, rows, x) -> None:
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
    sums = [[variable(lanes) for _ in x] for _ in rows]
    whole, rest = divmod(M[COLUMNS], SPAN)
    if whole:
        with cgutils.for_range(builder, I64(whole)) as loop:
            start = builder.mul(loop.index, I64(SPAN))
            _dense_step(lanes, M[KIND], stored, x, start, sums)
    last = [[total(builder, builder.load(place)) for place in places] for places in sums]
    if rest:
        narrow = Lanes(builder, rest)
        more = [[variable(narrow) for _ in x] for _ in rows]
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
        found = numbers(lanes, kind, pointer, builder.mul(start, I64(nbytes)))
        for value, place in zip(values, places, strict=True):
            builder.store(lanes.fma(found, value, builder.load(place)), place)


def numbers(lanes: Lanes, kind: int, pointer, offset):
    """Plain numbers of a dense `kind` as fp32."""
    builder = lanes.builder
    if kind == BF16:
        wide = builder.zext(lanes.load(pointer, offset, I16, 2), lanes.kind(I32))
        return lanes.as_numbers(lanes.moved(wide, 16))
    if kind == F16:
        return builder.fpext(lanes.load(pointer, offset, HALF, 2), lanes.kind(F32))
    return lanes.load(pointer, offset, F32, 4)
