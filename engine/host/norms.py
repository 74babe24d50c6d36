"""RMS norms in one compiled call instead of six operations."""

from typing import Any

import torch
from torch import nn

from tierrun.engine.host.classes import become
from tierrun.engine.kernels.prompt_rows import norm
from tierrun.engine.kernels.workers import Workers
from tierrun.engine.recognise import RmsNorm, rms_norm_of


class QuickNorm(nn.Module):
    """An RMS norm of which `known` says what it computes, with the threads of `workers`."""

    known: RmsNorm
    workers: Workers

    def forward(self, hidden_states: torch.Tensor) -> Any:
        if not hidden_states.is_contiguous() or hidden_states.dtype != torch.float32:
            return super().forward(hidden_states)
        return norm(self.workers, hidden_states, self.known.scale, self.known.eps)


def quicken_norms(model: nn.Module, workers: Workers) -> int:
    """Let the RMS norms of `model` compute so; how many there are."""
    return sum(_quicken(module, workers) for module in model.modules())


def _quicken(module: nn.Module, workers: Workers) -> bool:
    known = rms_norm_of(module)
    if known is not None:
        become(module, QuickNorm, known=known, workers=workers)
    return known is not None
