# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""New keys and values into the cache, in its dtype, at a position that lies on the device."""

import torch
import triton
import triton.language as tl


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    base: torch.Tensor,
) -> None:
    """Write `key` [1, Hk, T, D] and `value` [1, Hv, T, Dv] into `keys` and `values` [1, H·, L, ·].

    The first goes to place `position` − `base`, int64 scalars on the device. The caches are
    contiguous, of any floating dtype.
    """
    key, value = _with_unit_stride(key), _with_unit_stride(value)
    key_heads, tokens, size = key.shape[1:]
    value_heads, value_size = value.shape[1], value.shape[3]
    _append[(max(key_heads, value_heads), tokens)](
        key,
        value,
        keys,
        values,
        position,
        base,
        key.stride(1),
        key.stride(2),
        value.stride(1),
        value.stride(2),
        keys.stride(1),
        values.stride(1),
        key_heads,
        value_heads,
        D=size,
        DV=value_size,
        BLOCK=triton.next_power_of_2(max(size, value_size)),
        num_warps=1,
    )


def _with_unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _append(
    key,
    value,
    keys,
    values,
    position,
    base,
    key_h,
    key_t,
    value_h,
    value_t,
    keys_h,
    values_h,
    key_heads,
    value_heads,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, token = tl.program_id(0), tl.program_id(1)
    place = tl.load(position) - tl.load(base) + token
    column = tl.arange(0, BLOCK)
    inside = (column < D) & (head < key_heads)
    found = tl.load(key + head * key_h + token * key_t + column, mask=inside)
    to = keys + head.to(tl.int64) * keys_h + place * D + column
    tl.store(to, found.to(keys.dtype.element_ty), mask=inside)
    inside = (column < DV) & (head < value_heads)
    found = tl.load(value + head * value_h + token * value_t + column, mask=inside)
    to = values + head.to(tl.int64) * values_h + place * DV + column
    tl.store(to, found.to(values.dtype.element_ty), mask=inside)
