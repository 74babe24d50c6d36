"""Whole decoder layers of a token in two compiled calls, where a layer is the usual one.

That is: norm, attention, sum; norm, router, experts, sum. A layer whose parts are recognised is
tried beside that formula, with something simple in its experts' place; any other goes on by itself.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from tierrun.engine.architecture import experts_modules
from tierrun.engine.experts import hook_of, standing_in
from tierrun.engine.host.attention import QuickAttention
from tierrun.engine.host.cache import GrowingLayer
from tierrun.engine.host.classes import become
from tierrun.engine.host.norms import TokenNorm
from tierrun.engine.host.routers import QuickRouter
from tierrun.engine.kernels.token_layer import ABSENT, LACKING, TokenLayer

_PAST = 3


class QuickLayer(nn.Module):
    """Decoder layer `number` of those with experts, whose tokens `quick` computes.

    Its keys and values are number `place` in the cache; `routed` are its experts.
    """

    quick: TokenLayer
    routed: nn.Module
    number: int
    place: int
    following: TokenLayer | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hook, layer = hook_of(self.routed), self._layer(args, kwargs)
        if layer is None or hook is None or hook.watches(self.number):
            return super().forward(*args, **kwargs)
        quick, x, length, present = self.quick, args[0], layer.length, hook.present
        experts = None if present is None else present.ready(self.number)
        rotation, room = kwargs["position_embeddings"], layer.reserve(1)
        ahead = 0 if present is None else present.needed_next(self.number)
        found = quick.begin(x, rotation, room, length, experts, self.following, ahead)
        layer.advance(1)
        if found == ABSENT or present is None or experts is None:
            hook.saw(self.number, quick.hidden)
            y = quick.sum + hook(self.routed, quick.hidden, quick.chosen, quick.scores)
            return y.view(x.shape)
        present.noted()
        try:
            if found == LACKING or (ahead and self.following is None):
                present.beside(self.number, quick.hidden, quick.chosen)
        finally:
            y = quick.finish(experts)
        return y.view(x.shape)

    def _layer(self, args: tuple[Any, ...], given: dict[str, Any]) -> GrowingLayer | None:
        """Of the cache, if the call is one that `quick` understands."""
        cache, rotation = given.get("past_key_values"), given.get("position_embeddings")
        if len(args) != 1 or cache is None or rotation is None or self.place >= len(cache.layers):
            return None
        if given.get("attention_mask") is not None:
            return None
        layer = cache.layers[self.place]
        if type(layer) is not GrowingLayer or not self.quick.attention.takes(args[0], rotation):
            return None
        return layer


def quicken_layers(model: Any) -> int:
    """Let the usual decoder layers of `model` compute tokens so; how many there are. Comes last, as
    it looks for parts that are quick already."""
    found: list[QuickLayer] = []
    for number, path in enumerate(experts_modules(model)):
        block_path = path.rpartition(".")[0]
        layer = model.get_submodule(block_path.rpartition(".")[0])
        block, routed = model.get_submodule(block_path), model.get_submodule(path)
        quick = _candidate(layer, block, routed)
        if quick is not None and _agrees(layer, quick, routed):
            place = _part(layer, QuickAttention).layer_idx
            become(layer, QuickLayer, quick=quick, routed=routed, number=number, place=place)
            assert isinstance(layer, QuickLayer)
            found.append(layer)
    for one, other in pairwise(found):
        if other.number == one.number + 1:
            object.__setattr__(one, "following", other.quick)
    return len(found)


def _candidate(layer: nn.Module, block: nn.Module, routed: nn.Module) -> TokenLayer | None:
    """What `layer` would be if it were the usual one."""
    norms = [child for child in layer.children() if isinstance(child, TokenNorm)]
    attention, router = _part(layer, QuickAttention), _part(block, QuickRouter)
    usual = len(list(layer.children())) == 4 and len(norms) == 2
    if not usual or attention is None or router is None:
        return None
    if set(block.children()) != {router, routed}:
        return None
    width = attention.quick.columns
    widths = [norm.known.scale.numel() for norm in norms]
    if {*widths, router.quick.hidden, attention.quick.rows} != {width}:
        return None
    return TokenLayer(norms[0].known, attention.quick, norms[1].known, router.quick)


def _part(module: nn.Module, kind: type[nn.Module]) -> Any:
    return next((child for child in module.children() if isinstance(child, kind)), None)


class _Cache:
    """As much of a cache as a layer looks at."""

    def __init__(self, place: int, layer: GrowingLayer) -> None:
        self.layers = [layer] * (place + 1)


def _simple(
    module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """In the place of experts: depends on all that they are given."""
    return hidden.flip(-1) * ((chosen + 1) * weights).sum()


def _agrees(layer: nn.Module, quick: TokenLayer, routed: nn.Module) -> bool:
    """Whether both make the same of a token after some others."""
    heads, place = quick.attention.heads, _part(layer, QuickAttention).layer_idx
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, quick.columns, generator=generator)
    angles = torch.randn(1, 1, heads.rotated // 2, generator=generator).repeat(1, 1, 2)
    shape = 1, heads.keys, _PAST, heads.size
    past = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    rotation = angles.cos(), angles.sin()
    theirs, ours = GrowingLayer(*past), GrowingLayer(*past)
    try:
        with torch.inference_mode(), standing_in(routed, _simple):
            wanted = layer(
                x,
                attention_mask=None,
                position_ids=torch.tensor([[_PAST]]),
                past_key_values=_Cache(place, theirs),
                use_cache=True,
                position_embeddings=rotation,
            )
    except (TypeError, RuntimeError, AttributeError):  # it wants other things
        return False
    quick.begin(x, rotation, ours.reserve(1), _PAST, None, None, 0)
    found = quick.sum + _simple(routed, quick.hidden, quick.chosen, quick.scores)
    if not isinstance(wanted, torch.Tensor) or wanted.numel() != found.numel():
        return False
    return torch.allclose(found.flatten(), wanted.flatten(), rtol=1e-4, atol=1e-5)
