"""What torch.compile and graph capture see of our kernels: opaque operators of known shapes.

A matrix's geometry travels as a number, since an operator takes no Python objects.
"""

import torch

from tierrun.engine.kernels import append as _append
from tierrun.engine.kernels import attention as _attention
from tierrun.engine.kernels import matmul, matvec
from tierrun.engine.kernels import norm as _norm
from tierrun.engine.kernels import rows as _rows
from tierrun.engine.kernels.geometry import COLUMNS, ROWS, Geometry, dense_geometry
from tierrun.engine.kernels.route import choose

_geometries: list[Geometry] = []
_numbers: dict[Geometry, int] = {}

DECODE_TOKENS = matvec.MOST_TOKENS
"""Up to so many rows a product is bound by reading weights, and goes to the decode kernels."""


def geometry_number(geometry: Geometry) -> int:
    """The number by which the operators know `geometry`."""
    if geometry not in _numbers:
        _numbers[geometry] = len(_geometries)
        _geometries.append(geometry)
    return _numbers[geometry]


@torch.library.custom_op("tierrun::linear", mutates_args=())
def linear(
    x: torch.Tensor, data: torch.Tensor, geometry: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x` fp32 [n, in] times the matrix in `data` (uint8), transposed: fp32 [n, out]."""
    shape = _geometries[geometry]
    if len(x) <= DECODE_TOKENS:
        return matvec.linear(x.contiguous(), data, shape, bias)
    return matmul.linear(x.contiguous(), data, shape, bias)


@linear.register_fake
def _(
    x: torch.Tensor, data: torch.Tensor, geometry: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], _geometries[geometry][ROWS])


@torch.library.custom_op("tierrun::rows", mutates_args=())
def rows(ids: torch.Tensor, data: torch.Tensor, geometry: int) -> torch.Tensor:
    """The rows `ids` [n] of the matrix in `data` (uint8): fp32 [n, in]."""
    return _rows.rows(ids.contiguous(), data, _geometries[geometry])


@rows.register_fake
def _(ids: torch.Tensor, data: torch.Tensor, geometry: int) -> torch.Tensor:
    columns = _geometries[geometry][COLUMNS]
    return ids.new_empty(ids.shape[0], columns, dtype=torch.float32)


@torch.library.custom_op("tierrun::attend", mutates_args=())
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Decode attention, [1, heads, T, D] over [1, key heads, L, …]: fp32 [1, T, heads, Dv]."""
    return _attention.attend(query, key, value, mask, scale, sinks, softcap)


@attend.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1], dtype=torch.float32)


@torch.library.custom_op("tierrun::append", mutates_args=("keys", "values"))
def append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    base: torch.Tensor,
) -> None:
    """See `tierrun.engine.kernels.append.append`."""
    _append.append(key, value, keys, values, position, base)


@append.register_fake
def _(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    base: torch.Tensor,
) -> None:
    return None


@torch.library.custom_op("tierrun::weighted_sum", mutates_args=())
def weighted_sum(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See `tierrun.engine.kernels.matvec.weighted_sum`."""
    return matvec.weighted_sum(y.contiguous(), weights.to(torch.float32).contiguous())


@weighted_sum.register_fake
def _(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return y.new_empty(y.shape[0], y.shape[2])


@torch.library.custom_op("tierrun::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """See `tierrun.engine.kernels.norm.rms_norm`."""
    return _norm.rms_norm(x, scale, eps)


@rms_norm.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("tierrun::route", mutates_args=())
def route(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits fp32 [T, E] of `x` fp32 [T, H] by `weight` fp32 [E, H], and what `choose` makes of
    them: weights [T, k] and experts [T, k]."""
    geometry = dense_geometry("f32", tuple(weight.shape))
    logits = matvec.linear(x.contiguous(), weight.view(-1).view(torch.uint8), geometry)
    scores, indices = choose(logits, top_k, renormalise)
    return logits, scores, indices


@route.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = x.shape[0]
    indices = x.new_empty(tokens, top_k, dtype=torch.int64)
    return x.new_empty(tokens, weight.shape[0]), x.new_empty(tokens, top_k), indices
