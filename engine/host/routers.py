"""Plain routers of a token in one compiled call instead of five operations."""

from typing import Any

import torch
from torch import nn

from tierrun.engine.architecture import experts_modules, top_k
from tierrun.engine.host.classes import become
from tierrun.engine.kernels.token_router import TokenRouter
from tierrun.engine.kernels.workers import Workers
from tierrun.engine.recognise import plain_router_of


class QuickRouter(nn.Module):
    """A router whose tokens `quick` computes."""

    quick: TokenRouter

    def forward(self, hidden_states: torch.Tensor) -> Any:
        if hidden_states.numel() != self.quick.hidden or not hidden_states.is_contiguous():
            return super().forward(hidden_states)
        return self.quick(hidden_states)


def quicken_routers(model: Any, workers: Workers) -> int:
    """Let the plain routers of `model` compute tokens so; how many there are."""
    return sum(_quicken_one(model, path, workers) for path in experts_modules(model))


def _quicken_one(model: Any, path: str, workers: Workers) -> bool:
    count = top_k(model, path)
    block = model.get_submodule(path.rpartition(".")[0])
    return any(_quicken(module, count, workers) for module in block.children())


def _quicken(module: Any, count: int, workers: Workers) -> bool:
    router = plain_router_of(module, count)
    if router is not None:
        become(module, QuickRouter, quick=TokenRouter(*router, workers))
    return router is not None
