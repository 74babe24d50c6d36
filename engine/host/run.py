"""Decoder layers of a token, as many as there are one after another, in one compiled call.

The model calls its layers one by one. The first of a run computes them all; each of the others
finds that what it is given is what the layer before it gave, and answers with what it has made of
that already. Whether a model hands on what a layer gives, and nothing else, is seen in a first
token, layer by layer.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from tierrun.engine.experts import ExpertsHook, Interrupted, hook_of
from tierrun.engine.host.cache import GrowingLayer
from tierrun.engine.kernels.token_layer import ABSENT, BEGUN, TokenLayer
from tierrun.engine.kernels.token_run import TokenRun

Rotation = tuple[torch.Tensor, torch.Tensor]


class RunLayer(NamedTuple):
    """Number `number` of the layers with experts, which `routed` are; its keys and values are
    number `place` in the cache."""

    quick: TokenLayer
    routed: nn.Module
    number: int
    place: int

    def follows(self, other: "RunLayer") -> bool:
        """Whether it can be computed in one call with `other`, before it."""
        same = self.quick.columns == other.quick.columns
        rotated = [layer.quick.attention.heads.rotated for layer in (self, other)]
        return same and rotated[0] == rotated[1] and self.number == other.number + 1


class LayerRun:
    """A run of layers; keeps none of their modules but the experts."""

    def __init__(self, layers: list[RunLayer]) -> None:
        self._layers, self._kernel = layers, TokenRun([layer.quick for layer in layers])
        self._linked = [False] * len(layers)  # whether one is known to get what the last one gave
        self._parted: set[int] = set()
        # of this token:
        self._computed = 0
        self._caches: dict[int, GrowingLayer] = {}
        self._outputs: dict[int, torch.Tensor] = {}
        self._rotation: Rotation | None = None

    def __call__(
        self, at: int, args: tuple[Any, ...], given: dict[str, Any]
    ) -> torch.Tensor | None:
        """What layer `at` makes of what its module is given; None where the module must."""
        x, rotation = args[0] if len(args) == 1 else None, given.get("position_embeddings")
        if at == 0:
            self._begin()
        handed_on = x is not None and x is self._outputs.get(at - 1) and rotation is self._rotation
        if at < self._computed:
            if handed_on:
                return self._outputs[at]
            self._take_back(at)
        elif handed_on and at not in self._parted:
            self._linked[at] = True
        hook = hook_of(self._layers[at].routed)
        if hook is None or x is None or rotation is None or not self._understands(at, x, given):
            return None
        end = self._prepare(at, hook, given["past_key_values"])
        if end == at:
            return None
        self._compute(at, end, hook, x, rotation)
        self._rotation, self._computed = rotation, end
        return self._outputs[at]

    def _begin(self) -> None:
        """A token or a prompt begins."""
        self._computed, self._rotation = 0, None
        self._caches.clear()
        self._outputs.clear()

    def _understands(self, at: int, x: torch.Tensor, given: dict[str, Any]) -> bool:
        """Whether the call is one that the kernels compute."""
        if given.get("attention_mask") is not None or given.get("past_key_values") is None:
            return False
        if x.shape[:-1] != (1, 1):
            return False
        return self._layers[at].quick.attention.takes(x, given["position_embeddings"])

    def _prepare(self, at: int, hook: ExpertsHook, cache: Any) -> int:
        """Tell the kernel of all layers from `at` that can be computed together; their end."""
        end = at
        while end < len(self._layers) and (end == at or self._linked[end]):
            place = self._layers[end].place
            mine = cache.layers[place] if place < len(cache.layers) else None
            if type(mine) is not GrowingLayer or hook.watches(self._layers[end].number):
                break
            if end > at and mine.length != self._caches[at].length:
                break
            self._caches[end] = mine
            self._tell(end, hook)
            end += 1
        return end

    def _tell(self, at: int, hook: ExpertsHook) -> None:
        cache, number, present = self._caches[at], self._layers[at].number, hook.present
        experts = None if present is None else present.ready(number)
        ahead = 0 if present is None else present.needed_next(number)
        self._kernel.prepare(at, cache.reserve(1), cache.length, experts, ahead)

    def _compute(
        self, at: int, end: int, hook: ExpertsHook, x: torch.Tensor, rotation: Rotation
    ) -> None:
        """Layers `at` … `end` - 1 of `x`, those whose experts must be read one by one."""
        length = self._caches[at].length
        while at < end:
            if hook.interrupted:
                raise Interrupted
            stopped, found = self._kernel.through(at, end - 1, x, rotation, length)
            self._advance(at, stopped + 1, 1)
            if hook.present is not None and (stopped > at or found != ABSENT):
                hook.present.noted()
            self._outputs.update(enumerate(self._kernel.outputs[at : stopped + 1], at))
            if found != BEGUN:
                self._outputs[stopped] = self._with_reads(stopped, found, hook).view(x.shape)
            x, at = self._outputs[stopped], stopped + 1
            if at < end:
                self._tell(at, hook)  # something may have been read ahead for it

    def _with_reads(self, at: int, found: int, hook: ExpertsHook) -> torch.Tensor:
        """The output of layer `at`, whose experts are absent or begun; those of the next may be."""
        layer, present = self._layers[at], hook.present
        quick, number = layer.quick, layer.number
        experts = None if present is None else present.ready(number)
        if found == ABSENT:
            hook.saw(number, quick.hidden)
            return quick.sum + hook(layer.routed, quick.hidden, quick.chosen, quick.scores)
        assert present is not None and experts is not None, "they have begun"
        try:
            present.beside(number, quick.hidden, quick.chosen)
        finally:
            y = quick.finish(experts)
        return y

    def _take_back(self, at: int) -> None:
        """Layer `at` was computed from what it is not given: it, and those after it, as if never.

        It will not be computed with the one before it again.
        """
        self._advance(at, self._computed, -1)
        self._computed, self._linked[at] = at, False
        self._parted.add(at)

    def _advance(self, first: int, end: int, count: int) -> None:
        """There are so many positions more in the caches of these layers."""
        for at in range(first, end):
            self._caches[at].advance(count)
