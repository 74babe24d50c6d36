"""Routers in two launches instead of seven, where a module's numbers show that it is a plain one.

Plain is: a product with a matrix, softmax over all experts, the largest k of it, perhaps divided by
their sum. A module that gives what that gives on random numbers computes its decode by our kernels;
any other (sigmoids, groups, corrections) is left as it is, and so are prompts.
"""

from typing import Any

import torch
from torch import nn

from tierrun.engine.architecture import experts_modules, top_k
from tierrun.engine.gpu import ops


def fuse_routers(model: Any) -> int:
    """Replace the plain routers of `model`, in place; how many there were."""
    return sum(_fuse_one(model, path) for path in experts_modules(model))


def _fuse_one(model: Any, path: str) -> bool:
    count = top_k(model, path)
    block = model.get_submodule(path.rpartition(".")[0])
    return any(_fuse(module, count) for module in block.children() if _looks_like_one(module))


def _looks_like_one(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    return (
        list(parameters) == ["weight"]
        and weight is not None
        and weight.dim() == 2
        and weight.dtype == torch.float32
        and not list(module.buffers())
        and not isinstance(module, nn.Linear)
    )


def _fuse(module: Any, count: int) -> bool:
    weight = module.weight.data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, weight.shape[1], generator=generator).to(weight.device)
    try:
        with torch.no_grad():
            wanted = module(x)
    except (TypeError, RuntimeError):  # it takes more than hidden states
        return False
    for renormalise in (True, False):
        if _same(wanted, _formula(x, weight, count, renormalise)):
            _replace(module, weight, count, renormalise)
            return True
    return False


def _formula(x: torch.Tensor, weight: torch.Tensor, count: int, renormalise: bool) -> Any:
    logits = nn.functional.linear(x, weight)
    scores, indices = logits.softmax(dim=-1).topk(count, dim=-1)
    return logits, scores / scores.sum(-1, keepdim=True) if renormalise else scores, indices


def _same(wanted: Any, found: tuple[torch.Tensor, ...]) -> bool:
    if not isinstance(wanted, tuple) or len(wanted) != len(found):
        return False
    return all(
        isinstance(theirs, torch.Tensor)
        and theirs.shape == ours.shape
        and theirs.dtype == ours.dtype
        and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-7)
        for theirs, ours in zip(wanted, found, strict=True)
    )


def _replace(module: Any, weight: torch.Tensor, count: int, renormalise: bool) -> None:
    plain = module.forward

    def forward(hidden_states: torch.Tensor) -> Any:
        rows = hidden_states.reshape(-1, weight.shape[1])
        if len(rows) > ops.DECODE_TOKENS:
            return plain(hidden_states)
        return ops.route(rows, weight, count, renormalise)

    module.forward = forward
