"""Routers in two launches instead of seven, where a module's numbers show that it is a plain one.

It computes its decode by our kernels then; prompts it goes on computing itself.
"""

from typing import Any

import torch

from tierrun.engine.architecture import experts_modules, top_k
from tierrun.engine.gpu import ops
from tierrun.engine.recognise import PlainRouter, plain_router_of


def fuse_routers(model: Any) -> int:
    """Replace the plain routers of `model`, in place; how many there were."""
    return sum(_fuse_one(model, path) for path in experts_modules(model))


def _fuse_one(model: Any, path: str) -> bool:
    count = top_k(model, path)
    block = model.get_submodule(path.rpartition(".")[0])
    return any(_fuse(module, count) for module in block.children())


def _fuse(module: Any, count: int) -> bool:
    router = plain_router_of(module, count)
    if router is None:
        return False
    _replace(module, router)
    return True


def _replace(module: Any, router: PlainRouter) -> None:
    plain = module.forward

    def forward(hidden_states: torch.Tensor) -> Any:
        rows = hidden_states.reshape(-1, router.weight.shape[1])
        if len(rows) > ops.DECODE_TOKENS:
            return plain(hidden_states)
        return ops.route(rows, *router)

    module.forward = forward
