# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Decode attention: a few query tokens over a cache of fixed size, of which a part is visible.

The cache is cut into *splits* of fixed length. One kernel makes of every split a partial result
(the largest score, the sum of exponentials, the weighted sum of values), a second one adds them up.
A split in which no query sees anything is not read, and only marked: the cost follows what is
visible, not what is allocated. Query heads that share a key head are rows of the same matrix
product, so that keys and values are read once.

Guarantees: the same bits on every run, and for any length of the cache around the same visible
positions. So neither a split's length nor the order of any sum may depend on the cache's length;
which program computes a split may. Strides that grow with the length are not specialised on, or
are always multiples of 16: sums run in the order of a layout, which follows from alignment.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tierrun.engine.kernels.codes import INTERPRETED
from tierrun.engine.kernels.tiles import to_bf16

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MOST_TOKENS = 8
MOST_COLUMNS = 576
"""Numbers in a key or a value of one head …"""
_WIDEST_BYTES = 2048
"""… and its padded bytes: fp32 ends at 512 numbers, where shared memory does on small devices."""


class Config(NamedTuple):
    """How a call is cut up.

    `rows` × `block` scores make one matrix product; a split has `blocks` of these; and `programs`
    is about how many programs the work is spread over at most.
    """

    rows: int
    block: int
    blocks: int
    programs: int
    warps: int
    stages: int


_BLOCK = {32: 128, 64: 128, 128: 128, 256: 64, 512: 32, 1024: 32}
"""Positions in a block, by the bytes of a padded key; 16 if larger."""

_PROGRAMS = 1024
_VISIBLE = 1024
"""Positions for which splits should be just short enough to occupy a device …"""
_OCCUPYING = 128
"""… which so many programs do."""
_LONG_SPLIT = 256
"""Longer ones are not worth their share of read but hidden positions …"""
_ROWS_PER_SPLIT, _LONGEST_SPLIT = 4, 1024
"""… unless for many rows, whose partial results are as long as so many positions each."""
_SHARED_BYTES = 65536
"""Of a query, keys and values, with which loads ahead fit into the shared memory of any device."""
_MOST_CHECKED = 8192
"""Positions whose mask one program looks at."""
_QUERY_BYTES = 32768
"""Of a program's part of the query."""
_MANY_SUMS = 8192
"""Numbers in a program's sum of values that want twice the registers."""

_COMBINED = 32
"""Splits that are added up at once."""
_COLUMNS = 32
"""Columns of the result in a program of the second kernel."""

LOG2_E = math.log2(math.e)
_LOG2_E = tl.constexpr(LOG2_E)

_HIDDEN = tl.constexpr(-1e30)
"""A float mask hides what is below: architectures write the lowest number of some dtype."""


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether `attend` takes these."""
    batch, heads, tokens, columns = query.shape
    key_heads, length = key.shape[1:3]
    return (
        batch == key.shape[0] == 1
        and 1 <= tokens <= MOST_TOKENS
        and heads % key_heads == 0
        and max(columns, value.shape[-1]) <= MOST_COLUMNS
        and key.shape[-1] == columns
        and value.shape[:3] == key.shape[:3]
        and all(t.stride(-1) == 1 for t in (query, key, value))
        and query.dtype in _DTYPES
        and key.dtype in _DTYPES
        and value.dtype == key.dtype
        and _widest(key, value) * key.element_size() <= _WIDEST_BYTES
        and (mask is None or mask.shape == (1, 1, tokens, length))
        and (mask is None or mask.dtype == torch.bool or mask.is_floating_point())
        and (sinks is None or sinks.shape == (heads,))
    )


def choose_config(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Config:
    """The launch parameters: from every size but the cache's length."""
    _, heads, tokens, _ = query.shape
    key_heads, rows = key.shape[1], heads // key.shape[1] * tokens
    widest = _widest(key, value)
    row_bytes = widest * key.element_size()
    tile = min(_padded(rows), max(16, _QUERY_BYTES // row_bytes))
    block = _BLOCK.get(row_bytes, 16)
    occupying = _VISIBLE * key_heads * triton.cdiv(rows, tile) // _OCCUPYING
    wanted = max(block, min(occupying, _LONG_SPLIT), min(_ROWS_PER_SPLIT * rows, _LONGEST_SPLIT))
    split = triton.next_power_of_2(wanted)
    warps = 8 if tile * widest >= _MANY_SUMS else 4
    is_small = (tile + 2 * block) * row_bytes <= _SHARED_BYTES
    stages = 2 if split > block and is_small else 1
    return Config(tile, block, split // block, _PROGRAMS, warps, stages)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`query` [1, heads, T, D] over `key`, `value` [1, key heads, L, D or Dv]: [1, T, heads, Dv].

    The result is fp32 and contiguous. Scores and sums are fp32; the operands of products have the
    cache's dtype. A query that sees nothing gives zeros.

    Args:
        mask: [1, 1, T, L]; True where a query may look, or a float to add to the score; None: all.
        sinks: [heads], scores without a value, in the denominator only.
        softcap: c, where scores s become c · tanh(s / c) before the mask.
    """
    assert supports(query, key, value, mask, sinks)
    _, heads, tokens, _ = query.shape
    rows, columns = heads * tokens, value.shape[-1]
    chosen = config or choose_config(query, key, value)
    programs, rounds = _spread(key, triton.cdiv(rows // key.shape[1], chosen.rows), chosen)
    splits = programs * rounds
    padded = triton.cdiv(splits, _COMBINED) * _COMBINED
    sums = query.new_empty(rows, padded, columns, dtype=torch.float32)
    stats = query.new_empty(2, rows, padded, dtype=torch.float32)
    out = query.new_empty(1, tokens, heads, columns, dtype=torch.float32)
    _launch_partials(
        query, key, value, mask, scaling, softcap, sums, stats, programs, rounds, chosen
    )
    _combine[(rows, triton.cdiv(columns, _COLUMNS))](
        sums, stats, out, out if sinks is None else sinks, heads, splits, padded,
        HAS_SINKS=sinks is not None, T=tokens, DV=columns, C=_COMBINED, BD=_COLUMNS,
        SPLITS=triton.next_power_of_2(padded), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def _launch_partials(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sums: torch.Tensor,
    stats: torch.Tensor,
    programs: int,
    rounds: int,
    chosen: Config,
) -> None:
    _, heads, tokens, columns = query.shape
    key_heads, length = key.shape[1:3]
    group = heads // key_heads
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    mask_strides = (0, 1) if mask is None else mask.stride()[2:]
    scale = scaling * LOG2_E if softcap is None else scaling / softcap
    cap = 0.0 if softcap is None else softcap * LOG2_E
    _partials[(programs, key_heads, triton.cdiv(group * tokens, chosen.rows))](
        query, key, value, query if mask is None else mask, sums, stats, scale, cap,
        length, sums.shape[1], *query.stride()[1:3], *key.stride()[1:3], *value.stride()[1:3],
        *mask_strides, MASK=kind, HAS_CAP=softcap is not None, G=group, T=tokens,
        D=columns, DV=value.shape[-1], BD=_padded(columns), BDV=_padded(value.shape[-1]),
        BM=chosen.rows, BL=chosen.block, NB=chosen.blocks, ROUNDS=rounds, STAGES=chosen.stages,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip


def _padded(size: int) -> int:
    """As tensor cores take it."""
    return max(16, int(triton.next_power_of_2(size)))


def _widest(key: torch.Tensor, value: torch.Tensor) -> int:
    return max(_padded(key.shape[-1]), _padded(value.shape[-1]))


def _spread(key: torch.Tensor, tiles: int, config: Config) -> tuple[int, int]:
    """Programs per key head and tile of rows, and the splits that each of them computes."""
    split = config.block * config.blocks
    splits = triton.cdiv(key.shape[2], split)
    wanted = triton.cdiv(splits * key.shape[1] * tiles, config.programs)
    rounds = min(triton.next_power_of_2(wanted), max(1, _MOST_CHECKED // split))
    return triton.cdiv(splits, rounds), rounds


@triton.jit
def _bias(mask, token, place, length, stride_t, stride_l, MASK: tl.constexpr):
    """What is added to the scores of `place`, −inf where it is hidden from `token`."""
    inside = place < length
    if MASK == "none":
        return tl.where(inside, 0.0, -float("inf")) + 0.0 * token
    else:
        at = mask + token * stride_t + place * stride_l
        if MASK == "bool":
            return tl.where(tl.load(at, mask=inside, other=0) != 0, 0.0, -float("inf"))
        else:
            found = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
            return tl.where(found > _HIDDEN, found, -float("inf"))


@triton.jit
def _operand(x, like):
    """`x` fp32 in the dtype of the pointer `like`."""
    if like.dtype.element_ty == tl.bfloat16:
        return to_bf16(x)
    else:
        return x.to(like.dtype.element_ty)


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # knows no bf16 here
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _bound(x):
    """`x` as a loop's bound, which in the interpreter may not be an array since numpy 2.4."""
    if INTERPRETED:
        return x.handle.data.item()
    else:
        return x


@triton.jit(do_not_specialize=["length", "stride_mask_t"])
def _partials(
    query, key, value, mask, sums, stats, scale, cap, length, padded,
    stride_qh, stride_qt, stride_kh, stride_kl, stride_vh, stride_vl, stride_mask_t, stride_mask_l,
    MASK: tl.constexpr, HAS_CAP: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BL: tl.constexpr, NB: tl.constexpr, ROUNDS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The splits `program + round · programs` of a key head, for BM rows, each a head and a token.

    Taking turns, all programs have the same share of a visible prefix.
    """
    program, programs, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    is_row, token = m < G * T, m % T
    row = (head * (G * T) + m).to(tl.int64)
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    q_at = query + (head * G + m // T)[:, None] * stride_qh + token[:, None] * stride_qt
    q = tl.load(q_at + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    q = _operand(q.to(tl.float32), key)

    # The first and the last of this program's blocks in which something is visible.
    block = tl.arange(0, ROUNDS * NB)
    start = ((block // NB * programs + program) * NB + block % NB) * BL
    place = start[:, None] + tl.arange(0, BL)[None, :]
    visible = _bias(mask, 0, place, length, stride_mask_t, stride_mask_l, MASK)
    for t in tl.static_range(1, T):
        more = _bias(mask, t, place, length, stride_mask_t, stride_mask_l, MASK)
        visible = tl.maximum(visible, more)
    is_visible = tl.max(visible, 1) > -float("inf")
    first = tl.min(tl.where(is_visible, block, ROUNDS * NB), 0)
    last = tl.max(tl.where(is_visible, block, -NB), 0)
    first_round, last_round = first // NB, last // NB

    empty = tl.arange(0, ROUNDS)
    is_empty = (empty < first_round) | (empty > last_round)
    m_at = stats + row * padded
    l_at = m_at + (tl.num_programs(1) * (G * T)).to(tl.int64) * padded
    mark_at = m_at[:, None] + (empty * programs + program)[None, :]
    nothing = tl.full([BM, ROUNDS], -float("inf"), tl.float32)
    tl.store(mark_at, nothing, mask=is_row[:, None] & is_empty[None, :])

    key += head.to(tl.int64) * stride_kh
    value += head.to(tl.int64) * stride_vh
    for turn in range(_bound(first_round), _bound(last_round + 1)):
        split = turn * programs + program
        largest = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        weighted = tl.zeros([BM, BDV], tl.float32)
        low, high = tl.maximum(first - turn * NB, 0), tl.minimum(last - turn * NB, NB - 1)
        for b in tl.range(_bound(low), _bound(high + 1), num_stages=STAGES):
            at = (split * NB + b) * BL + tl.arange(0, BL)
            if T == 1:
                seen = _bias(mask, 0, at, length, stride_mask_t, stride_mask_l, MASK)
                bias = seen[None, :]
            else:
                bias = _bias(
                    mask, token[:, None], at[None, :], length, stride_mask_t, stride_mask_l, MASK
                )
                seen = tl.max(bias, 0)
            is_read = seen > -float("inf")  # the rest may be anything
            far = at.to(tl.int64)
            k_at = key + far[None, :] * stride_kl + d[:, None]
            k = tl.load(k_at, mask=(d < D)[:, None] & is_read[None, :], other=0.0)
            v_at = value + far[:, None] * stride_vl + dv[None, :]
            v = tl.load(v_at, mask=is_read[:, None] & (dv < DV)[None, :], other=0.0)
            scores = _dot(q, k) * scale
            if HAS_CAP:
                scores = cap * (2.0 * tl.sigmoid(2.0 * scores) - 1.0)
            scores += bias if MASK != "float" else bias * _LOG2_E
            larger = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(larger == -float("inf"), 0.0, larger)
            p = tl.exp2(scores - shift[:, None])
            fade = tl.exp2(largest - shift)
            total = total * fade + tl.sum(p, 1)
            weighted = weighted * fade[:, None] + _dot(_operand(p, value), v)
            largest = larger
        tl.store(m_at + split, largest, mask=is_row)
        tl.store(l_at + split, total, mask=is_row)
        sums_at = sums + ((row * padded + split) * DV)[:, None] + dv[None, :]
        tl.store(sums_at, weighted, mask=is_row[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["splits"])
def _combine(
    sums, stats, out, sinks, heads, splits, padded,
    HAS_SINKS: tl.constexpr, T: tl.constexpr, DV: tl.constexpr,
    C: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """BD columns of one row, a head and a token: its partial results, C at a time, in order."""
    row = tl.program_id(0)
    dv = tl.program_id(1) * BD + tl.arange(0, BD)
    m_at = stats + row.to(tl.int64) * padded
    l_at = m_at + tl.num_programs(0).to(tl.int64) * padded
    split = tl.arange(0, SPLITS)
    every = tl.load(m_at + split, mask=split < splits, other=-float("inf"))
    is_full = every > -float("inf")
    first = tl.min(tl.where(is_full, split, SPLITS), 0) // C
    end = (tl.max(tl.where(is_full, split, -1), 0) + C) // C
    largest = tl.max(every, 0)
    sink = -float("inf")
    if HAS_SINKS:
        sink = tl.load(sinks + row // T).to(tl.float32) * _LOG2_E
        largest = tl.maximum(largest, sink)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.exp2(sink - shift)
    weighted = tl.zeros([BD], tl.float32)
    for chunk in tl.range(_bound(first), _bound(end), num_stages=2):
        some = chunk * C + tl.arange(0, C)
        m = tl.load(m_at + some, mask=some < splits, other=-float("inf"))
        is_some = m > -float("inf")  # of the others there is only m
        weight = tl.exp2(m - shift)
        total += tl.sum(weight * tl.where(is_some, tl.load(l_at + some), 0.0), 0)
        at = sums + ((row.to(tl.int64) * padded + some) * DV)[:, None] + dv[None, :]
        part = tl.load(at, mask=(dv < DV)[None, :], other=0.0)
        part = tl.where(is_some[:, None], part, 0.0)
        weighted += tl.sum(weight[:, None] * part, 0)
    result = weighted / tl.where(total > 0.0, total, 1.0)
    place = (row % T) * heads + row // T
    tl.store(out + place * DV + dv, result, mask=dv < DV)
