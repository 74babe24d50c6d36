"""Matrix products for many tokens: weights dequantised in registers on their way to tensor cores.

fp16 operands, each number rounded once, sums in fp32: bf16 would be eight times coarser, enough to
turn a router's choice in small models. One kernel serves resident matrices and
experts. For experts, tokens are sorted (`Grouping`), and any subset of experts can be launched:
every element is computed by one program, from its own expert alone.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton

from tierrun.engine.kernels import geometry
from tierrun.engine.kernels.geometry import Geometry
from tierrun.engine.kernels.matvec import DTYPE_KINDS, GATES, Bias, Gate
from tierrun.engine.kernels.products import product, rearrange
from tierrun.engine.kernels.tiles import inputs_of_unit

PADDING = 128
"""Arranged activations end in zeros up to a multiple of this; no launch has more inputs a step."""

WIDE = 256
"""Rows of a program of `linear` where there is enough to do (`linear_block`)."""

_NO_GATE = Gate("none")
_BYTES = {geometry.BF16: 2, geometry.F16: 2, geometry.F32: 4}
"""Of a plain weight that is loaded ahead into shared memory; packed ones are not."""


class Launch(NamedTuple):
    """Weight rows and inputs of a step, warps, and how many steps' copies are under way.

    `registers` is the most that a thread may have on Hopper, for two programs to share a
    multiprocessor; None: what the compiler takes.
    """

    rows: int
    inputs: int
    warps: int
    stages: int
    registers: int | None = None


LAUNCHES = {
    (True, 16): Launch(64, 128, 4, 3),
    (True, 32): Launch(64, 128, 4, 3),
    (True, 64): Launch(128, 64, 8, 3),
    (True, 128): Launch(128, 64, 8, 3, 128),
    (True, WIDE): Launch(128, 64, 8, 3),
    (False, 16): Launch(64, 128, 4, 4),
    (False, 32): Launch(64, 128, 4, 4),
    (False, 64): Launch(128, 64, 4, 4),
    (False, 128): Launch(128, 64, 8, 4),
}
"""(packed, tokens of a tile) → launch."""


class Operand(NamedTuple):
    """A matrix at byte `offset` of every record, and its bias there."""

    matrix: Geometry
    offset: int = 0
    bias: Bias | None = None


class Grouping(NamedTuple):
    """Assignments (token, slot of its top-k) sorted by expert; made once per layer.

    `order` int32 [T·k] are the assignments, on the device; expert e has rows `starts[e]` to
    `starts[e + 1]` of it. `block` is how many rows a tile has.
    """

    order: torch.Tensor
    starts: tuple[int, ...]
    top_k: int
    block: int

    def tiles(self, experts: Iterable[int]) -> torch.Tensor:
        """The tiles of `experts`, int32 [n, 3]: expert, first row, row after its last."""
        rows = [
            (expert, first, self.starts[expert + 1])
            for expert in experts
            for first in range(self.starts[expert], self.starts[expert + 1], self.block)
        ]
        return upload(torch.tensor(rows, dtype=torch.int32).view(-1, 3), self.order.device)


def upload(small: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`small`, of the host, on the device, in stream order: the host waits for nothing."""
    if device.type != "cuda":
        return small
    return small.pin_memory().to(device, non_blocking=True)


def group(top_k: torch.Tensor, experts: int) -> Grouping:
    """Sort the assignments `top_k` int64 [T, k]; waits for the device, once."""
    ids = top_k.flatten()
    order = torch.sort(ids, stable=True).indices.to(torch.int32)
    counts: list[int] = torch.bincount(ids, minlength=experts).tolist()
    mean = len(ids) / max(1, sum(count > 0 for count in counts))
    starts = tuple(accumulate(counts, initial=0))
    return Grouping(order, starts, top_k.shape[1], group_block(mean))


def group_block(rows: float) -> int:
    """Tokens of a tile of experts that have so many each.

    128 where 64 would do: half of such a tile costs what one of 64 does (`products.product`), and
    an expert with more than 64 tokens is unpacked once, not twice (5 to 14 % faster on an H100,
    for 256 experts of 64 tokens each).
    """
    return 128 if rows > 32 else block_of(rows)


def block_of(rows: float) -> int:
    """Tokens of a tile, where so many share a matrix."""
    return next((block for block in (16, 32, 64) if rows <= block), 128)


def linear_block(rows: int, matrix: Geometry, device: torch.device) -> int:
    """Rows of `x` of a program of `linear`, which has so many.

    Packed weights are unpacked half as often for WIDE rows, but a multiprocessor has room for the
    registers of one such program, instead of two of half the size. That is 6 % faster on an H100
    (elsewhere registers spill); so up to a fifth of what all rounds of programs could compute may
    be idle.
    """
    if geometry.is_dense(matrix) or not _is_hopper(device):
        return block_of(rows)
    out, launch = matrix[geometry.ROWS], LAUNCHES[True, WIDE]
    programs = triton.cdiv(rows, WIDE) * triton.cdiv(out, launch.rows)
    processors = _processors(device)
    computed = triton.cdiv(programs, processors) * processors * WIDE * launch.rows
    return WIDE if rows * out >= 0.8 * computed else block_of(rows)


def arrange(x: torch.Tensor, matrix: Geometry) -> torch.Tensor:
    """`x` [n, in] as an operand (`tiles.shrunk`), inputs as `matrix` is unpacked, padded."""
    unit = inputs_of_unit(matrix)
    width = _padded(matrix)
    out = torch.empty(len(x), width, dtype=torch.float16, device=x.device)
    if len(x):
        block = 1024
        grid = (len(x), triton.cdiv(width, block))
        rearrange[grid](x, x.stride(0), out, width, x.shape[1], unit, block)
    return out


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    matrix: Geometry,
    bias: torch.Tensor | None = None,
    block: int | None = None,
) -> torch.Tensor:
    """`x` [n, in] times a matrix [out, in] whose bytes are `data`, transposed: fp32 [n, out].

    `data` is contiguous and begins at a multiple of 16; its dtype does not matter. `block` is how
    many rows of `x` a program takes; None: `linear_block`.
    """
    block = block or linear_block(len(x), matrix, x.device)
    y = torch.empty(len(x), matrix[geometry.ROWS], dtype=torch.float32, device=x.device)
    operand = Operand(matrix, 0, None if bias is None else Bias(0, bias.dtype))
    data = data.view(-1).view(torch.uint8)
    _launch(arrange(x, matrix), operand, data, bias, y, _Rows(len(x), block))
    return y


def gate_up(
    x: torch.Tensor,
    grouping: Grouping,
    chosen: torch.Tensor,
    slab: torch.Tensor,
    slots: torch.Tensor,
    operand: Operand,
    gate: Gate,
    down: Geometry,
    h: torch.Tensor,
) -> None:
    """The first product of the experts whose tiles are `chosen`, into their rows of `h`.

    Args:
        x: tokens [T, …], `arrange`d for `operand.matrix`.
        chosen: what `grouping.tiles` gave.
        slab: uint8, in which expert e's record begins at byte `slots[e]` (int64, a multiple of 64).
        down: the matrix of the second product, whose order of inputs `h` is in.
        h: what `hidden` gave; with the gate `none` fp32 [T·k, rows] instead, in the matrix's order.
    """
    rows = _rows_of(grouping, chosen, slots)._replace(gather=True)
    _launch(x, operand, slab, slab, h, rows, gate, down)


def down(
    h: torch.Tensor,
    grouping: Grouping,
    chosen: torch.Tensor,
    slab: torch.Tensor,
    slots: torch.Tensor,
    operand: Operand,
    y: torch.Tensor,
) -> None:
    """The second product, into fp32 `y` [T·k, H]: row a belongs to slot a % k of token a // k."""
    rows = _rows_of(grouping, chosen, slots)._replace(scatter=True)
    _launch(h, operand, slab, slab, y, rows)


def hidden(grouping: Grouping, down: Geometry) -> torch.Tensor:
    """Memory for what joins the two products, fp16 [T·k, padded inputs]; zero where padded."""
    shape = len(grouping.order), _padded(down)
    make = torch.empty if shape[1] == down[geometry.COLUMNS] else torch.zeros
    return make(shape, dtype=torch.float16, device=grouping.order.device)


class _Rows(NamedTuple):
    """Which rows of activations a launch computes: all `number`, or those of a grouping's tiles.

    `block` of them are a program's.
    """

    number: int
    block: int
    grouping: Grouping | None = None
    tiles: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    gather: bool = False
    scatter: bool = False


def _rows_of(grouping: Grouping, chosen: torch.Tensor, slots: torch.Tensor) -> _Rows:
    return _Rows(len(chosen) * grouping.block, grouping.block, grouping, chosen, slots)


def _launch_of(matrix: Geometry, block: int, device: torch.device) -> Launch:
    """The checked-in launch, with the inputs that four words of high bits have, and what fits.

    Beside what is loaded ahead, shared memory has a step's unpacked weights (not on Hopper).
    """
    launch = LAUNCHES[not geometry.is_dense(matrix), block]
    inputs = max(launch.inputs, 4 * inputs_of_unit(matrix))
    stages = launch.stages * launch.inputs // inputs
    room = _shared_memory(device) - 2 * launch.rows * inputs * (not geometry.is_dense(matrix))
    step = inputs * (2 * block + launch.rows * _BYTES.get(matrix[geometry.KIND], 0))
    stages = max(1, min(max(2, stages), room // step))
    registers = launch.registers if _is_hopper(device) else None
    return launch._replace(inputs=inputs, stages=stages, registers=registers)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 1 << 20
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    """Whether products are those of Hopper (`wgmma`)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _padded(matrix: Geometry) -> int:
    return -(-matrix[geometry.COLUMNS] // PADDING) * PADDING


def _launch(
    x: torch.Tensor,
    operand: Operand,
    slab: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    rows: _Rows,
    gate: Gate = _NO_GATE,
    down: Geometry | None = None,
) -> None:
    matrix, grouping = operand.matrix, rows.grouping
    launch = _launch_of(matrix, rows.block, x.device)
    blocks = triton.cdiv(rows.number, rows.block)
    if blocks == 0:
        return
    product[(blocks * triton.cdiv(matrix[geometry.ROWS], launch.rows),)](
        x,
        x.stride(0),
        slab,
        operand.offset,
        rows.slots,
        rows.tiles,
        blocks,
        rows.number,
        None if grouping is None else grouping.order,
        bias,
        0 if operand.bias is None else operand.bias.offset,
        y,
        y.stride(0),
        M=matrix,
        BIAS=0 if operand.bias is None else DTYPE_KINDS[operand.bias.dtype],
        GATHER=grouping.top_k if grouping is not None and rows.gather else 0,
        SCATTER=rows.scatter,
        GATE=GATES.index(gate.kind),
        INTERLEAVED=gate.interleaved,
        ALPHA=gate.alpha,
        LIMIT=gate.limit,
        UNIT=1 if down is None or gate.kind == "none" else inputs_of_unit(down),
        BM=rows.block,
        BN=launch.rows,
        BK=launch.inputs,
        HOPPER=_is_hopper(x.device),
        num_warps=launch.warps,
        num_stages=launch.stages,
        maxnreg=launch.registers,
    )
