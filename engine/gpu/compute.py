"""One layer's experts as launches: products in place, wherever their slots are."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tierrun.engine.gpu.layout import NO_GATE, ExpertLayout
from tierrun.engine.kernels import matmul, matvec
from tierrun.engine.kernels.geometry import ROWS
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import Gate

Group = Sequence[tuple[int, int]]
"""Experts that lie in VRAM, each with the byte offset of its slot."""


class ExpertCompute:
    """The MLP of one experts module over records laid out as `layout`."""

    def __init__(self, module: nn.Module, layout: ExpertLayout) -> None:
        self._module: Any = module
        self.layout = layout

    def decode(
        self, hidden: torch.Tensor, slab: torch.Tensor, slots: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Compute the assignments whose slot is not −1 into their rows of `outputs`.

        Args:
            hidden: fp32 [T, H].
            slab: uint8; slots are byte offsets from its start.
            slots: int64 [A] on the device, A = T·k: assignment a is of token a // k.
            outputs: fp32 [A, H]; rows of −1 stay as they are.
        """
        layout, top_k = self.layout, len(slots) // len(hidden)
        first = [_decode(hidden, slab, slots, top_k, p, layout.gate) for p in layout.first]
        h = first[0] if layout.gate.kind != "none" else self.activated(first)
        _decode(h, slab, slots, 1, layout.down, NO_GATE, outputs)

    def activated(self, first: Sequence[torch.Tensor]) -> torch.Tensor:
        """The module's own activation on gate and up (together or apart): fp32 [A, I]."""
        module, both = self._module, first[0]
        if len(first) == 2:
            concatenated = module.is_concatenated
            both = torch.cat(tuple(first), 1) if concatenated else torch.stack(tuple(first), 2)
        h = module._apply_gate(both.flatten(1)) if module.has_gate else module.act_fn(both)
        assert isinstance(h, torch.Tensor)
        return h.contiguous()


def _decode(
    x: torch.Tensor,
    slab: torch.Tensor,
    slots: torch.Tensor,
    per_row: int,
    operand: Operand,
    gate: Gate,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    return matvec.grouped(
        x,
        slab,
        slots,
        per_row,
        operand.matrix,
        operand.offset,
        bias=operand.bias,
        gate=gate,
        out=out,
    )


class Prefill:
    """One layer of a prompt: the products of any group of its experts, for all their tokens.

    `experts` are those that some token has chosen, most used first; `counts` how many by expert.
    Making one waits for the device, once.
    """

    def __init__(
        self, compute: ExpertCompute, hidden: torch.Tensor, top_k: torch.Tensor, num_experts: int
    ) -> None:
        self._compute, self._layout, self._hidden = compute, compute.layout, hidden
        self._grouping = matmul.group(top_k, num_experts)
        starts = self._grouping.starts
        self.counts = [last - first for first, last in zip(starts, starts[1:], strict=False)]
        order = sorted(range(num_experts), key=lambda expert: -self.counts[expert])
        self.experts = [expert for expert in order if self.counts[expert]]
        self._arranged = [matmul.arrange(hidden, one.matrix) for one in self._layout.first]
        self._offsets = [0] * num_experts

    def run(self, slab: torch.Tensor, group: Group, outputs: torch.Tensor) -> None:
        """Compute the experts of `group` into the rows of `outputs` (fp32 [T·k, H]) that want them.

        `slab` as in `ExpertCompute.decode`.
        """
        for expert, offset in group:
            self._offsets[expert] = offset
        slots = matmul.upload(torch.tensor(self._offsets), self._hidden.device)
        tiles = self._grouping.tiles([expert for expert, _ in group])
        h = self._first(tiles, slab, slots)
        matmul.down(h, self._grouping, tiles, slab, slots, self._layout.down, outputs)

    def _first(self, tiles: torch.Tensor, slab: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        gate, down, grouping = self._layout.gate, self._layout.down.matrix, self._grouping
        fused = gate.kind != "none"
        found = []
        for operand, x in zip(self._layout.first, self._arranged, strict=True):
            h = matmul.hidden(grouping, down) if fused else self._memory(operand)
            matmul.gate_up(x, grouping, tiles, slab, slots, operand, gate, down, h)
            found.append(h)
        return found[0] if fused else matmul.arrange(self._compute.activated(found), down)

    def _memory(self, operand: Operand) -> torch.Tensor:
        shape = len(self._grouping.order), operand.matrix[ROWS]
        return torch.zeros(shape, device=self._hidden.device)  # other groups' rows are read too
