# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Single rows of a matrix as stored: what an embedding looks up."""

import torch
import triton
import triton.language as tl

from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.kernels import codes
from tierrun.engine.kernels import geometry as _g
from tierrun.engine.kernels.codes import (
    COLUMNS,
    ELEMENT,
    GROUP,
    LOW,
    MINIMUM,
    NO_LEVEL,
    SPAN,
    ZERO_POINT,
)
from tierrun.engine.kernels.geometry import Geometry

_SPANS = 32
"""Spans of a program."""

_DTYPES = {_g.BF16: DTYPES["bf16"], _g.F16: DTYPES["f16"], _g.F32: DTYPES["f32"]}


def rows(ids: torch.Tensor, data: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The rows `ids` (int64 [n], contiguous) of the matrix in `data` (uint8 [bytes]): fp32 [n, in].

    Exactly what `Packed.rows` gives.
    """
    columns = geometry[_g.COLUMNS]
    if _g.is_dense(geometry):
        matrix = data.view(_DTYPES[geometry[_g.KIND]]).view(geometry[_g.ROWS], columns)
        return torch.nn.functional.embedding(ids, matrix).to(torch.float32)
    out = torch.empty(len(ids), columns, device=ids.device)
    if len(ids):
        blocks = triton.cdiv(columns, _SPANS * _g.SPAN)
        _rows[(blocks, len(ids))](ids, data, out, M=geometry, SPANS=_SPANS, num_warps=1)
    return out


@triton.jit
def _rows(ids, data, out, M: tl.constexpr, SPANS: tl.constexpr):
    place = tl.program_id(1)
    row = tl.load(ids + place + tl.arange(0, 1)).to(tl.int32)[None, :]
    span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)[:, None]
    inside = span * SPAN < M[COLUMNS]
    span = tl.where(inside, span, 0)
    low, high = codes.span_words(data, span, row, M)
    out += place.to(tl.int64) * M[COLUMNS]
    words: tl.constexpr = M[GROUP] * M[LOW] // 32
    for group in tl.static_range(SPAN // M[GROUP]):
        for w in tl.static_range(words):
            ready = codes.span_word(low, high, group * words + w, M)
            for k in tl.static_range(32 // M[LOW]):
                column = span * SPAN + group * M[GROUP] + w * (32 // M[LOW]) + k
                value = _value(codes.number(ready, k, M), data, column, row, M)
                tl.store(out + column, value, mask=inside & (column < M[COLUMNS]))


@triton.jit
def _value(number, base, column, row, M: tl.constexpr):
    """`number` of the inputs `column` made a value."""
    inside = column < M[COLUMNS]
    value = number
    if M[ZERO_POINT + ELEMENT] != NO_LEVEL:
        value -= codes.level(base, column, row, inside, M, ZERO_POINT)
    value *= codes.scale(base, column, row, inside, M)
    if M[MINIMUM + ELEMENT] != NO_LEVEL:
        value -= codes.minimum(base, column, row, inside, M)
    return value
