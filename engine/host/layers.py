"""Which decoder layers are the usual ones, whose tokens compiled code computes whole (`run.py`).

That is: norm, attention, sum; norm, router, experts, sum. A layer whose parts are recognised is
tried beside that formula, with something simple in its experts' place; any other goes on by itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tierrun.engine.architecture import experts_modules
from tierrun.engine.experts import standing_in
from tierrun.engine.host.attention import QuickAttention
from tierrun.engine.host.cache import GrowingLayer
from tierrun.engine.host.classes import become
from tierrun.engine.host.norms import QuickNorm
from tierrun.engine.host.routers import QuickRouter
from tierrun.engine.host.run import LayerRun, RunLayer
from tierrun.engine.kernels.token_layer import TokenLayer
from tierrun.engine.kernels.token_run import TokenRun

_PAST = 3


class QuickLayer(nn.Module):
    """A decoder layer whose tokens `run` computes, in which it is number `at`."""

    run: LayerRun
    at: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.run(self.at, args, kwargs)
        return super().forward(*args, **kwargs) if y is None else y


def quicken_layers(model: Any) -> int:
    """Let the usual decoder layers of `model` compute tokens so; how many there are. Comes last, as
    it looks for parts that are quick already."""
    found: list[tuple[nn.Module, RunLayer]] = []
    for number, path in enumerate(experts_modules(model)):
        block_path = path.rpartition(".")[0]
        layer = model.get_submodule(block_path.rpartition(".")[0])
        block, routed = model.get_submodule(block_path), model.get_submodule(path)
        quick = _candidate(layer, block, routed)
        if quick is not None and _agrees(layer, quick, routed):
            place = _part(layer, QuickAttention).layer_idx
            found.append((layer, RunLayer(quick, routed, number, place)))
    for together in _runs(found):
        run = LayerRun([layer for _, layer in together])
        for at, (module, _) in enumerate(together):
            become(module, QuickLayer, run=run, at=at)
    return len(found)


def _runs(found: list[tuple[nn.Module, RunLayer]]) -> Iterator[list[tuple[nn.Module, RunLayer]]]:
    """Those that follow one another, and are of one width and rotation."""
    together: list[tuple[nn.Module, RunLayer]] = []
    for module, layer in found:
        if together and not layer.follows(together[-1][1]):
            yield together
            together = []
        together.append((module, layer))
    if together:
        yield together


def _candidate(layer: nn.Module, block: nn.Module, routed: nn.Module) -> TokenLayer | None:
    """What `layer` would be if it were the usual one."""
    norms = [child for child in layer.children() if isinstance(child, QuickNorm)]
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
    run = TokenRun([quick])
    run.prepare(0, ours.reserve(1), _PAST, None, 0)
    run.through(0, 0, x, rotation, _PAST)  # no experts: it ends before them
    found = quick.sum + _simple(routed, quick.hidden, quick.chosen, quick.scores)
    if not isinstance(wanted, torch.Tensor) or wanted.numel() != found.numel():
        return False
    return torch.allclose(found.flatten(), wanted.flatten(), rtol=1e-4, atol=1e-5)
