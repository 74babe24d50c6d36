# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the CPU has computed, from pinned memory into its place among the GPU's results."""

import torch
import triton
import triton.language as tl


def join(rows: torch.Tensor, wanted: torch.Tensor, outputs: torch.Tensor) -> None:
    """`outputs[a] = rows[wanted[a] - 1]` where `wanted[a]` is not 0: one launch, read in place.

    Args:
        rows: fp32 [n, H], pinned host memory.
        wanted: int64 [A], pinned host memory; both stay untouched until the device is past this.
        outputs: fp32 [A, H] on the device.
    """
    count, columns = outputs.shape
    block = 512
    grid = (count, triton.cdiv(columns, block))
    _join[grid](rows, wanted, outputs, columns, rows.stride(0), BLOCK=block, num_warps=4)


@triton.jit
def _join(rows, wanted, outputs, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    found = tl.load(wanted + row)
    if found != 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        value = tl.load(rows + (found - 1) * stride + column, mask=inside)
        tl.store(outputs + row * columns + column, value, mask=inside)
