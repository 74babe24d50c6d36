# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""Decode: products of up to 8 tokens with matrices as they are stored, bound by reading weights.

A program owns some rows of one matrix for one expert (or for all tokens), and sums over the whole
input in one fixed order (`sums`): the result for a token and an expert depends on neither what else
is in the launch nor where the expert lies. Everything is fp32 from the number on.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tierrun.engine.kernels import geometry as _g
from tierrun.engine.kernels.codes import BF16, COLUMNS, KIND, ROWS
from tierrun.engine.kernels.geometry import Geometry
from tierrun.engine.kernels.sums import plain, row_sums

MOST_TOKENS = 8
"""Rows of `x` that `linear` takes."""

GATES = ("none", "silu", "gelu_tanh", "gelu", "gpt_oss")
"""Activations of the gate, by number; `none` leaves gate and up to the caller."""

_NONE, _SILU, _GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_GELU, _GPT_OSS = tl.constexpr(3), tl.constexpr(4)


class Gate(NamedTuple):
    """What is made of gate and up: `kind` of `GATES`, on [gate; up] or on rows in turn.

    `alpha` and `limit` are gpt-oss's: (up + 1) · gate · sigmoid(alpha · gate), both clamped.
    """

    kind: str
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0


class Bias(NamedTuple):
    """A vector at byte `offset` of each record, in `dtype`."""

    offset: int
    dtype: torch.dtype


class Config(NamedTuple):
    """How a product is cut up: rows of a program, its warps; 16-byte chunks per step if dense."""

    rows: int
    warps: int
    chunks: int = 0


_NO_GATE = Gate("none")
DTYPE_KINDS = {torch.bfloat16: _g.BF16, torch.float16: _g.F16, torch.float32: _g.F32}


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    geometry: Geometry,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`x` fp32 [T, in] times the matrix in `data` (uint8 [bytes]), transposed: fp32 [T, out].

    T is at most 8; weights are read once for all of them. `bias` is [out] in any plain dtype.
    """
    tokens, rows = len(x), geometry[_g.ROWS]
    assert tokens <= MOST_TOKENS
    _check(x, geometry)
    y = x.new_empty(tokens, rows) if out is None else out
    chosen = config or choose_config(geometry, experts=1)
    grid = (triton.cdiv(rows, chosen.rows),)
    _linear[grid](
        x, data, bias, y, M=geometry, T=tokens, **_meta(geometry, chosen), num_warps=chosen.warps
    )
    return y


def grouped(
    x: torch.Tensor,
    slab: torch.Tensor,
    slots: torch.Tensor,
    assignments_per_row: int,
    geometry: Geometry,
    offset: int,
    *,
    bias: Bias | None = None,
    gate: Gate = _NO_GATE,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """One matrix of each of some experts' records times a row of `x` each: fp32 [A, out].

    Assignment a takes row a // `assignments_per_row` of `x` (fp32 [·, in]) and the record at byte
    `slots[a]` (int64 [A], on the device) of `slab` (uint8), with the matrix at byte `offset` in it.
    Where the slot is odd (−1, say) nothing is read and nothing is written. With a `gate` other than
    `none` the matrix is gate and up, and the result [A, out / 2].
    """
    _check(x, geometry)
    assert slots.is_contiguous()
    kind = GATES.index(gate.kind)
    rows = geometry[_g.ROWS] // (2 if kind else 1)
    y = x.new_empty(len(slots), rows) if out is None else out
    chosen = config or choose_config(geometry, experts=8, gated=kind != 0)
    per_program = chosen.rows // 2 if _splits(geometry, gate) else chosen.rows
    grid = (triton.cdiv(rows, per_program), len(slots))
    _grouped[grid](
        x,
        slab,
        slots,
        y,
        assignments_per_row,
        offset,
        0 if bias is None else bias.offset,
        gate.alpha,
        gate.limit,
        M=geometry,
        BIAS=0 if bias is None else DTYPE_KINDS[bias.dtype],
        GATE=kind,
        INTERLEAVED=gate.interleaved,
        **_meta(geometry, chosen),
        num_warps=chosen.warps,
    )
    return y


def gate_up(
    x: torch.Tensor,
    slab: torch.Tensor,
    slots: torch.Tensor,
    top_k: int,
    geometry: Geometry,
    offset: int,
    gate: Gate,
    bias: Bias | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """The first product and the activation of each assignment: `x` [T, H] → fp32 [T·k, I].

    With the gate `none`, both halves as the matrix has them: [T·k, 2 I].
    """
    return grouped(
        x, slab, slots, top_k, geometry, offset, bias=bias, gate=gate, out=out, config=config
    )


def down(
    h: torch.Tensor,
    slab: torch.Tensor,
    slots: torch.Tensor,
    geometry: Geometry,
    offset: int,
    bias: Bias | None = None,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """The second product of each assignment, unweighted: `h` [A, I] → fp32 [A, H]."""
    return grouped(h, slab, slots, 1, geometry, offset, bias=bias, out=out, config=config)


def weighted_sum(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`y` fp32 [T, k, H] times `weights` fp32 [T, k], summed in the order of k: fp32 [T, H]."""
    tokens, top_k, hidden = y.shape
    out = y.new_empty(tokens, hidden)
    block = 256
    _weighted_sum[(triton.cdiv(hidden, block), tokens)](
        y, weights, out, hidden, TOP_K=top_k, BLOCK=block, num_warps=2
    )
    return out


def choose_config(geometry: Geometry, experts: int, gated: bool = False) -> Config:
    """How to cut up a product with so many experts' matrices at once.

    The order of the sums follows from it, so it depends on nothing that differs from call to call.
    """
    if _g.is_dense(geometry):
        return _CONFIGS_DENSE[experts > 1]
    wide = 2 if gated else 1
    for rows, warps in ((32, 4), (16, 4), (8, 4)):
        if experts * geometry[_g.ROWS] // (wide * rows) >= 256:
            return Config(rows, warps)
    return Config(8, 4)


_CONFIGS_DENSE = {False: Config(4, 4, 128), True: Config(8, 4, 128)}


def _check(x: torch.Tensor, geometry: Geometry) -> None:
    """What the kernels' wide loads of `x` take for granted."""
    assert x.dtype == torch.float32 and x.shape[1] == geometry[_g.COLUMNS]
    assert x.is_contiguous() and x.data_ptr() % 16 == 0


def _splits(geometry: Geometry, gate: Gate) -> bool:
    """Whether a program's rows are gates and ups in turn."""
    return gate.interleaved and gate.kind != "none" and not _g.is_dense(geometry)


def _meta(geometry: Geometry, config: Config) -> dict[str, int]:
    """A program's rows, and inputs at once: so many that a thread has four rows of one span."""
    if _g.is_dense(geometry):
        return {"R": config.rows, "STEP": config.chunks}
    return {"R": config.rows, "STEP": 128 * config.warps // config.rows}


@triton.jit
def _linear(
    x, data, bias, y, M: tl.constexpr, T: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    sums = row_sums(x, data, (_within(row, M[ROWS], R),), M, T, STEP)
    for t in tl.static_range(T):
        value = sums[t]
        if bias is not None:
            value += tl.load(bias + row, mask=row < M[ROWS]).to(tl.float32)
        tl.store(y + t * M[ROWS] + row, value, mask=row < M[ROWS])


@triton.jit
def _grouped(
    x,
    slab,
    slots,
    y,
    assignments_per_row,
    offset,
    bias_offset,
    alpha,
    limit,
    M: tl.constexpr,
    BIAS: tl.constexpr,
    GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    R: tl.constexpr,
    STEP: tl.constexpr,
):
    assignment = tl.program_id(1)
    slot = tl.multiple_of(tl.load(slots + assignment), 64)
    if slot & 1:  # not for this launch, see `lookup`
        return
    record = slab + slot
    token = assignment // assignments_per_row
    x += tl.multiple_of(token * M[COLUMNS], _divisor(M))
    bias = record + bias_offset
    if GATE == _NONE:
        row = tl.program_id(0) * R + tl.arange(0, R)
        sums = row_sums(x, record + offset, (_within(row, M[ROWS], R),), M, 1, STEP)
        _put(y, assignment, row, _biased(sums[0], bias, row, M[ROWS], BIAS), M[ROWS])
    else:
        half: tl.constexpr = M[ROWS] // 2
        if INTERLEAVED and M[KIND] < BF16:
            both = tl.program_id(0) * R + tl.arange(0, R)
            sums = row_sums(x, record + offset, (_within(both, M[ROWS], R),), M, 1, STEP)
            value = _biased(sums[0], bias, both, M[ROWS], BIAS)
            gate, up = tl.split(tl.reshape(value, (R // 2, 2)))
            row = tl.program_id(0) * (R // 2) + tl.arange(0, R // 2)
        else:
            row = tl.program_id(0) * R + tl.arange(0, R)
            inside = _within(row, half, R)
            if INTERLEAVED:
                rows = (2 * inside, 2 * inside + 1)
            else:
                rows = (inside, inside + half)
            sums = row_sums(x, record + offset, rows, M, 1, STEP)
            gate = _biased(sums[0], bias, rows[0], M[ROWS], BIAS)
            up = _biased(sums[1], bias, rows[1], M[ROWS], BIAS)
        _put(y, assignment, row, _gated(gate, up, alpha, limit, GATE), half)


@triton.constexpr_function
def _divisor(M):
    """A power of two that divides the row length of `x`, for wide loads."""
    return min(M[_g.COLUMNS] & -M[_g.COLUMNS], 64)


@triton.jit
def _within(row, count: tl.constexpr, R: tl.constexpr):
    """`row`, in the last program no more than the last row: read twice rather than masked."""
    if count % R == 0:
        return row
    else:
        return tl.minimum(row, count - 1)


@triton.jit
def _put(y, assignment, row, value, width: tl.constexpr):
    tl.store(y + assignment * width + row, value, mask=row < width)


@triton.jit
def _biased(value, bias, row, count: tl.constexpr, BIAS: tl.constexpr):
    """`value` plus the elements `row` of the vector at byte pointer `bias`, if there is one."""
    if BIAS == 0:
        return value
    else:
        return value + tl.load(plain(bias, BIAS) + row, mask=row < count).to(tl.float32)


@triton.jit
def _gated(gate, up, alpha, limit, GATE: tl.constexpr):
    if GATE == _SILU:
        return gate * _sigmoid(gate) * up
    elif GATE == _GELU_TANH:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * _sigmoid(2 * inner) * up  # (1 + tanh(v)) / 2 = sigmoid(2 v)
    elif GATE == _GELU:
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1) * gate * _sigmoid(alpha * gate)


@triton.jit
def _sigmoid(value):
    small = tl.exp(-tl.abs(value))  # never overflows
    return tl.where(value < 0, small, 1.0) / (1 + small)


@triton.jit
def _weighted_sum(y, weights, out, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        weight = tl.load(weights + token * TOP_K + k)
        total += weight * tl.load(y + (token * TOP_K + k) * hidden + column, mask=inside)
    tl.store(out + token * hidden + column, total, mask=inside)
