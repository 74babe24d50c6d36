"""Attention modules of a token in one compiled call, where a module's numbers show that it is the
usual one: projections, perhaps norms of queries and keys, rotation by halves, heads in groups.

Each is tried beside the compiled code on random numbers, so large that a cap, a gate or another
scale would show; one that differs goes on by itself, and so do prompts, masks and windows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tierrun.engine.host.cache import GrowingLayer
from tierrun.engine.host.classes import become
from tierrun.engine.host.linears import QuickLinear
from tierrun.engine.host.norms import QuickNorm
from tierrun.engine.kernels.token_attention import Heads, TokenAttention
from tierrun.engine.kernels.token_products import TokenProducts
from tierrun.engine.kernels.workers import Workers
from tierrun.engine.recognise import RmsNorm

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_BACK = "o_proj"
_NORMS = ("q_norm", "k_norm")
_PAST, _LARGE = 5, 16.0
_SAME = 1e-2
"""Relative; both round activations to int8, at places that differ by their last bits."""


class QuickAttention(nn.Module):
    """An attention module whose tokens `quick` computes."""

    quick: TokenAttention
    layer_idx: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer(kwargs)
        if args or layer is None:
            return super().forward(*args, **kwargs)
        x, rotation = kwargs["hidden_states"], kwargs["position_embeddings"]
        y = self.quick(x, rotation, layer.reserve(1), layer.length)
        layer.advance(1)
        return y.view(1, 1, -1), None

    def _layer(self, given: dict[str, Any]) -> GrowingLayer | None:
        """Of the cache, if the call is one that `quick` understands."""
        cache, rotation = given.get("past_key_values"), given.get("position_embeddings")
        x = given.get("hidden_states")
        if cache is None or rotation is None or x is None or self.layer_idx >= len(cache.layers):
            return None
        if given.get("attention_mask") is not None or not self.quick.takes(x, rotation):
            return None
        layer = cache.layers[self.layer_idx]
        return layer if type(layer) is GrowingLayer else None


def quicken_attention(model: nn.Module, workers: Workers) -> int:
    """Let the usual attention modules of `model` compute tokens so; how many there are."""
    return sum(_quicken(module, workers) for module in list(model.modules()))


def _quicken(module: Any, workers: Workers) -> bool:
    for quick in _candidates(module, workers):
        if _agrees(module, quick):
            become(module, QuickAttention, quick=quick)
            return True
    return False


def _candidates(module: Any, workers: Workers) -> Iterator[TokenAttention]:
    """What `module` would be if it were the usual one; by how much of a head is rotated."""
    children = dict(module.named_children())
    norms = [name for name in _NORMS if name in children]
    if set(children) != {*_PROJECTIONS, _BACK, *norms} or list(module.parameters(recurse=False)):
        return
    linears = [children[name] for name in (*_PROJECTIONS, _BACK)]
    size, scale = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    if not all(isinstance(linear, QuickLinear) for linear in linears):
        return
    if not all(isinstance(children[name], QuickNorm) for name in norms):
        return
    rows = [linear.quick.rows for linear in linears]
    if rows[0] != linears[-1].quick.columns:  # some of the queries are something else: a gate
        return
    if not isinstance(size, int) or not isinstance(scale, float) or not _divided(rows, size):
        return
    if len({linear.quick.columns for linear in linears[:-1]}) > 1:
        return
    known = [children[name].known if name in norms else None for name in _NORMS]
    if not _fits(known, rows, size):
        return
    project = TokenProducts(
        [x.stored for x in linears[:-1]], [x.bias for x in linears[:-1]], workers
    )
    for rotated in dict.fromkeys((size, _rotated(module, size))):
        heads = Heads(rows[0] // size, rows[1] // size, size, scale, rotated)
        yield TokenAttention(heads, project, linears[-1].quick, *known)


def _divided(rows: list[int], size: int) -> bool:
    """Whether so many rows of queries, keys and values are heads in groups."""
    queries, keys, values = rows[:3]
    return keys == values and queries % keys == 0 and keys % size == 0


def _fits(norms: list[RmsNorm | None], rows: list[int], size: int) -> bool:
    """Whether the norms are of heads, or of all of them at once, and with one epsilon."""
    found = [(norm, width) for norm, width in zip(norms, rows[:2], strict=True) if norm]
    lengths = all(norm.scale.numel() in (size, width) for norm, width in found)
    return lengths and len({norm.eps for norm, _ in found}) < 2


def _rotated(module: Any, size: int) -> int:
    """How many of a head's numbers the configuration says are rotated."""
    config = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    share = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", 1.0)
    return int(size * share) if isinstance(share, float) else size


class _Past:
    """As much of a cache as an attention module looks at: keys and values of some positions."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._held = keys, values

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        new = keys, values
        return tuple(torch.cat(pair, 2) for pair in zip(self._held, new, strict=True))


def _agrees(module: Any, quick: TokenAttention) -> bool:
    """Whether both make the same of a token after some others."""
    heads, generator = quick.heads, torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, quick.columns, generator=generator)
    angles = torch.randn(1, 1, heads.rotated // 2, generator=generator).repeat(1, 1, 2)
    rotation = angles.cos(), angles.sin()
    shape = 1, heads.keys, _PAST, heads.size
    keys = torch.randn(shape, generator=generator) * _LARGE
    values = torch.randn(shape, generator=generator)
    past, layer = _Past(keys, values), GrowingLayer(keys, values)
    try:
        with torch.inference_mode():
            wanted = module(
                hidden_states=x,
                position_embeddings=rotation,
                attention_mask=None,
                past_key_values=past,
            )
    except (TypeError, RuntimeError, AttributeError):  # it wants other things
        return False
    found = quick(x, rotation, layer.reserve(1), layer.length)
    theirs = wanted[0] if isinstance(wanted, tuple) else wanted
    if not isinstance(theirs, torch.Tensor) or theirs.numel() != found.numel():
        return False
    return bool((theirs.flatten() - found).norm() <= _SAME * theirs.norm())
