"""Which activation an experts module applies between its products, recognised by its numbers.

A module's own `_apply_gate` is tried on random numbers against the kinds that kernels fuse; no
table of architectures. What equals none of them is computed by the module itself, between two
launches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from tierrun.engine.kernels.matvec import Gate

_PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda gate: gelu(gate, approximate="tanh"),
    "gelu": gelu,
}
_ROWS = 64


def recognise(module: nn.Module, width: int) -> Gate | None:
    """The fused kind that equals `module._apply_gate` on gate and up of `width` each, or None."""
    theirs: Any = module
    if not theirs.has_gate:
        return None
    random = torch.Generator().manual_seed(0)
    both = torch.randn(_ROWS, 2 * width, generator=random) * 6  # beyond every limit in use
    with torch.no_grad():
        wanted = theirs._apply_gate(both.clone())
    for candidate in _candidates(theirs):
        if _matches(apply_gate(candidate, both), wanted):
            return candidate
    return None


def _candidates(module: Any) -> list[Gate]:
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    plain = [Gate(kind, turned) for kind in _PLAIN for turned in (False, True)]
    if not isinstance(alpha, float) or not isinstance(limit, float | int):
        return plain
    return plain + [Gate("gpt_oss", turned, alpha, float(limit)) for turned in (True, False)]


def apply_gate(gate_kind: Gate, both: torch.Tensor) -> torch.Tensor:
    """What the fused kernels compute, [n, 2 I] → [n, I]: their reference."""
    if gate_kind.interleaved:
        gate, up = both[..., ::2], both[..., 1::2]
    else:
        gate, up = both.chunk(2, dim=-1)
    if gate_kind.kind != "gpt_oss":
        return _PLAIN[gate_kind.kind](gate) * up
    gate = gate.clamp(max=gate_kind.limit)
    up = up.clamp(-gate_kind.limit, gate_kind.limit)
    return (up + 1) * gate * torch.sigmoid(gate_kind.alpha * gate)


def _matches(found: torch.Tensor, wanted: Any) -> bool:
    if not isinstance(wanted, torch.Tensor) or wanted.shape != found.shape:
        return False
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
