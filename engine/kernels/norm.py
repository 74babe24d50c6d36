# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Root-mean-square normalisation of rows in one launch."""

import torch
import triton
import triton.language as tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension; fp32 in and out.

    `x` is [..., n] with contiguous rows; `weight` [n].
    """
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    warps = min(16, max(1, block // 256))
    _rms_norm[(len(rows),)](
        rows, weight, out, rows.stride(0), columns, eps, BLOCK=block, num_warps=warps
    )
    return out.view(x.shape)


@triton.jit
def _rms_norm(x, weight, out, stride, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    values = tl.load(x + row * stride + place, mask=inside, other=0.0)
    mean = tl.sum(values * values) / columns
    values = values * (1.0 / tl.sqrt(mean + eps))
    scale = tl.load(weight + place, mask=inside, other=0.0)
    tl.store(out + row * columns + place, values * scale, mask=inside)
