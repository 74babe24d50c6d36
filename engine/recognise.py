"""What a module computes, found by trying it on random numbers.

Architectures write the same norm and the same router in many ways. A module that gives what the
formula gives may be computed by a kernel; any other is left as it is.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_SCALES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda weight: weight,
    lambda weight: weight + 1.0,
)


class RmsNorm(NamedTuple):
    """What each number is multiplied by after the division, and what is added to the mean."""

    scale: torch.Tensor
    eps: float


def rms_norm_of(module: Any) -> RmsNorm | None:
    """The RMS norm that `module` is: with its weight, or with one plus its weight."""
    if not _looks_like_norm(module) or not _takes_one(module):
        return None
    eps = next((getattr(module, n) for n in _EPSILONS if hasattr(module, n)), None)
    weight = module.weight.data
    if not isinstance(eps, float) or weight.dtype != torch.float32:
        return None
    random = torch.randn(3, weight.numel(), generator=torch.Generator().manual_seed(0))
    x = random.to(weight.device) * 2
    try:
        with torch.no_grad():
            wanted = module(x)
    except (TypeError, RuntimeError, AttributeError):  # it wants something else
        return None
    for scale in _SCALES:
        found = _normed(x, scale(weight), eps)
        if wanted.shape == found.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6):
            return RmsNorm(scale(weight).contiguous(), eps)
    return None


def _takes_one(module: nn.Module) -> bool:
    """Whether it is called with hidden states alone; no gate, be it optional."""
    return len(inspect.signature(module.forward).parameters) == 1


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return (
        named
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 1
        and len(list(module.parameters())) == 1
        and not weight.is_meta
    )


def _normed(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


class PlainRouter(NamedTuple):
    """A product with `weight` [experts, hidden], softmax over all, the `top_k` largest, perhaps
    divided by their sum."""

    weight: torch.Tensor
    top_k: int
    renormalise: bool


def plain_router_of(module: Any, top_k: int) -> PlainRouter | None:
    """The router that `module` is; None for any other (sigmoids, groups, corrections)."""
    if not _looks_like_router(module) or not _takes_one(module):
        return None
    weight = module.weight.data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, weight.shape[1], generator=generator).to(weight.device)
    try:
        with torch.no_grad():
            wanted = module(x)
    except (TypeError, RuntimeError, AttributeError):  # it wants something else
        return None
    for renormalise in (True, False):
        if _same(wanted, _routed(x, weight, top_k, renormalise)):
            return PlainRouter(weight, top_k, renormalise)
    return None


def _looks_like_router(module: nn.Module) -> bool:
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


def _routed(x: torch.Tensor, weight: torch.Tensor, count: int, renormalise: bool) -> Any:
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
