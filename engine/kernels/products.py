# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, no-any-return"
"""The kernel of `matmul`: `W xᵀ` by tiles, so that weights are the operand that tensor cores take
from registers; each tile is turned once, at its end.
"""

import triton
import triton.language as tl

from tierrun.engine.kernels.codes import BF16, COLUMNS, F16, INTERPRETED, KIND, ROWS
from tierrun.engine.kernels.tiles import (
    GROWTH,
    arranged,
    fetch_packed,
    input_at,
    load_dense,
    shrunk,
    unpacked,
)


@triton.jit
def rearrange(
    x,
    x_stride,
    out,
    width,
    columns,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = input_at(place, UNIT)
    value = tl.load(x + row * x_stride + k, mask=k < columns, other=0.0)
    tl.store(out + row * width + place, shrunk(value.to(tl.float32)), mask=place < width)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def product(
    x,
    x_stride,
    slab,
    offset,
    slots,
    tiles,
    num_tiles,
    num_rows,
    order,
    bias,
    bias_offset,
    y,
    y_stride,
    M: tl.constexpr,
    BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Each program: BN rows of the matrix `M` for BM rows of `x`, whose inputs are arranged.

    Args:
        tiles: int32 [num_tiles, 3]: expert, first row, row after the last; None: all num_rows rows.
        slots: where in `slab` each expert's record begins; `offset`: where in it the matrix does.
        order: assignments in the order of rows. With GATHER row r is of token order[r] // GATHER;
            with SCATTER its result goes to row order[r].
        UNIT: of `arranged`, for what is stored.
        HOPPER: products are `wgmma`, which run while the program goes on.
    """
    # programs that take the same weights are neighbours: those are read from memory once
    tile = tl.program_id(0) % num_tiles
    block = tl.program_id(0) // num_tiles
    record = tl.zeros([], tl.int64)
    first, end = tile * BM, num_rows
    if tiles is not None:
        record = tl.load(slots + tl.load(tiles + 3 * tile))
        first, end = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    base = slab + tl.multiple_of(record + offset, 16)
    bias = None if BIAS == 0 else bias + record + bias_offset
    # experts' last tiles, if at most half full, are half the work
    if tiles is not None and BM > 32 and end - first <= BM // 2:
        _tile(
            x, x_stride, base, first, end, block, order, bias, y, y_stride,
            M, BIAS, GATHER, SCATTER, GATE, INTERLEAVED, ALPHA, LIMIT, UNIT,
            BM // 2, BN, BK, HOPPER,
        )  # fmt: skip
    else:
        _tile(
            x, x_stride, base, first, end, block, order, bias, y, y_stride,
            M, BIAS, GATHER, SCATTER, GATE, INTERLEAVED, ALPHA, LIMIT, UNIT,
            BM, BN, BK, HOPPER,
        )  # fmt: skip


@triton.jit
def _tile(
    x,
    x_stride,
    base,
    first,
    end,
    block,
    order,
    bias,
    y,
    y_stride,
    M: tl.constexpr,
    BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Rows `first` up to `end`, at most BM; `base` and `bias` point to the matrix and its bias."""
    place = first + tl.arange(0, BM)
    inside = place < end
    place = tl.minimum(place, end - 1)
    source = tl.load(order + place) // GATHER if GATHER > 0 else place
    inputs = x + source.to(tl.int64)[:, None] * x_stride

    row = _weight_row(block, BN, GATE > 0 and not INTERLEAVED, M)
    acc = _sums(inputs, base, row, BM, BK, M, HOPPER) * GROWTH
    if BIAS > 0:
        acc += _plain(bias, row, BIAS)[:, None]
    if GATE > 0:
        acc = _joined(acc, GATE, INTERLEAVED, ALPHA, LIMIT)
    out: tl.constexpr = acc.shape[0]
    rows: tl.constexpr = M[ROWS] * out // BN
    row = block * out + tl.arange(0, out)
    target = tl.load(order + place) if SCATTER else place
    to = y + target.to(tl.int64)[:, None] * y_stride + arranged(row, UNIT)[None, :]
    mask = inside[:, None] & (row < rows)[None, :]
    is_operand: tl.constexpr = y.dtype.element_ty == tl.float16
    tl.store(to, tl.trans(shrunk(acc) if is_operand else acc), mask=mask)


@triton.jit
def _weight_row(block, BN: tl.constexpr, TURNS: tl.constexpr, M: tl.constexpr):
    """The matrix's rows of a tile, [BN]; beyond the end the last one.

    With TURNS eight rows of the first half and eight of the second by turns: then those that belong
    together lie in the same thread's registers.
    """
    j = tl.arange(0, BN)
    if TURNS:
        half: tl.constexpr = M[ROWS] // 2
        i = block * (BN // 2) + j // 16 * 8 + j % 8
        if half % (BN // 2) != 0:
            i = tl.minimum(i, half - 1)
        return j // 8 % 2 * half + i
    else:
        row = block * BN + j
        return row if M[ROWS] % BN == 0 else tl.minimum(row, M[ROWS] - 1)


@triton.jit
def _sums(
    inputs,
    base,
    row,
    BM: tl.constexpr,
    BK: tl.constexpr,
    M: tl.constexpr,
    HOPPER: tl.constexpr,
):
    """Weights `row` [BN] times BM rows of activations (pointers [BM, 1]), fp32 [BN, BM]."""
    steps: tl.constexpr = (M[COLUMNS] + BK - 1) // BK
    inputs = inputs + tl.arange(0, BK)[None, :]
    acc = tl.zeros([row.shape[0], BM], tl.float32)
    if M[KIND] >= BF16:
        for step in range(0, steps):
            x = tl.load(inputs + step * BK)
            acc = _dot(load_dense(base, row, step * BK, BK, M), x, acc, HOPPER)
    else:
        raw = fetch_packed(base, row, 0, BK, M, HOPPER)
        for step in range(0, steps):
            x = tl.load(inputs + step * BK)
            w = unpacked(raw, step * BK, BK, M)
            # the next step's, on their way during this one's product; the last step's once more
            raw = fetch_packed(base, row, tl.minimum(step + 1, steps - 1) * BK, BK, M, HOPPER)
            acc = _dot(w, x, acc, HOPPER)
    return acc


@triton.jit
def _dot(w, x, acc, HOPPER: tl.constexpr):
    """`acc` plus `w` [N, K] times `x` [M, K] transposed; in fp32 where Triton interprets."""
    if INTERPRETED:
        w, x = w.to(tl.float32), x.to(tl.float32)
    acc = tl.dot(w, tl.trans(x), acc)
    return _finished(acc) if HOPPER else acc


@triton.jit
def _finished(acc):
    """`acc` fp32 itself, but looked at, so that Triton waits for the products it is the sum of.

    Else those of one step are still under way in the next one, while the registers of their left
    operand are written again (triton-lang/triton#9433; tests/engine/test_gpu_hazards.py).
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _plain(base, row, WHICH: tl.constexpr):
    """Numbers of a vector of plain ones, fp32."""
    if WHICH == BF16:
        return tl.load(base.to(tl.pointer_type(tl.bfloat16)) + row).to(tl.float32)
    elif WHICH == F16:
        return tl.load(base.to(tl.pointer_type(tl.float16)) + row).to(tl.float32)
    else:
        return tl.load(base.to(tl.pointer_type(tl.float32)) + row)


@triton.jit
def _joined(
    acc,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Gate and up, by turns of eight rows or of one, [N, M] to [N / 2, M] by the activation."""
    n: tl.constexpr = acc.shape[0]
    m: tl.constexpr = acc.shape[1]
    turn: tl.constexpr = 1 if INTERLEAVED else 8
    turns = tl.permute(tl.reshape(acc, [n // (2 * turn), 2, turn, m]), [0, 2, 3, 1])
    gate, up = tl.split(turns)
    return tl.reshape(_activated(gate, up, GATE, ALPHA, LIMIT), [n // 2, m])


@triton.jit
def _activated(gate, up, GATE: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    if GATE == 1:  # silu
        return gate * _logistic(gate) * up
    elif GATE == 2:  # gelu_tanh: (1 + tanh z) / 2 is the logistic function of 2 z
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate * _logistic(z) * up
    elif GATE == 3:  # gelu
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:  # gpt_oss
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1.0) * (gate * _logistic(ALPHA * gate))


@triton.jit
def _logistic(x):
    """1 / (1 + e^-x), without overflow: below -87 it is as small as makes no difference."""
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 87.0)))
