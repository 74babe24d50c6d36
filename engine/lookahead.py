"""Look-ahead: the next layer's router, asked early.

The residual stream changes little from one layer to the next, so the next router on this router's
input names most of what the next layer will want (Eliseev & Mazur 2023; colibrì measures 72 %).
Which module is the router is learnt, not known: during the first forward passes every module
around the experts is watched, and the one whose output contains the very tensor of indices that
the experts receive is it.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tierrun.engine.architecture import experts_modules

log = logging.getLogger(__name__)


class _Call(NamedTuple):
    """A module's last call, as far as it matters."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class _Router(NamedTuple):
    """A router, and where in its output the indices are."""

    module: nn.Module
    position: int


class Lookahead:
    """Predicts what the next experts layer of one model will choose.

    Layers whose router was not found are never predicted; if that is all of them, it is said once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers: dict[int, _Router] = {}
        self._calls: dict[nn.Module, _Call] = {}
        self._handles: dict[int, list[RemovableHandle]] = {}
        self._predicting = False
        paths = list(experts_modules(model))
        self._num_layers = len(paths)
        for layer, path in enumerate(paths):
            self._handles[layer] = [self._watch(module) for module in _neighbours(model, path)]

    def _watch(self, module: nn.Module) -> RemovableHandle:
        """Have the calls of `module` recorded, which does not keep this object: a router and what
        computes it (threads among that) are gone when their engine is."""
        record = WeakMethod(self._record)

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            found = record()
            if found is not None:
                found(module, args, kwargs, output)

        return module.register_forward_hook(hook, with_kwargs=True)

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._predicting:
            self._calls[module] = _Call(module, args, kwargs, output)

    def watches(self, layer: int) -> bool:
        """Whether the router of `layer` is still looked for."""
        return layer in self._handles

    def saw(self, layer: int, hidden: torch.Tensor) -> None:
        """The router of `layer` computes `hidden` now, though its module is not called."""
        router = self._routers.get(layer)
        call = None if router is None else self._calls.get(router.module)
        if router is not None and call is not None and call.args:
            self._calls[router.module] = call._replace(args=(hidden, *call.args[1:]))

    def observe(self, layer: int, top_k: torch.Tensor) -> None:
        """The experts of `layer` were given `top_k`: the first time, find who made it."""
        if layer not in self._handles or layer in self._routers:
            return
        router = self._find(top_k)
        self._stop_watching(layer, router)
        if router is not None:
            self._routers[layer] = router
        elif layer == self._num_layers - 1 and not self._routers:
            log.warning("look-ahead is off: no module of this architecture outputs the routing")

    def _find(self, top_k: torch.Tensor) -> _Router | None:
        for call in self._calls.values():
            outputs = call.output if isinstance(call.output, tuple) else (call.output,)
            for position, output in enumerate(outputs):
                if isinstance(output, torch.Tensor) and output.data_ptr() == top_k.data_ptr():
                    return _Router(call.module, position)
        return None

    def _stop_watching(self, layer: int, router: _Router | None) -> None:
        """Only the router of `layer` stays watched, for its input."""
        for handle in self._handles.pop(layer):
            handle.remove()
        known = {found.module for found in self._routers.values()}
        self._calls = {module: call for module, call in self._calls.items() if module in known}
        if router is not None:
            self._watch(router.module)

    def predict(self, layer: int) -> list[int]:
        """The experts that `layer` will probably want, from what the layer before it saw.

        Empty where there is no such layer, or its router is not known yet.
        """
        here, there = self._routers.get(layer - 1), self._routers.get(layer)
        if here is None or there is None:
            return []
        seen, own = self._calls.get(here.module), self._calls.get(there.module)
        if seen is None or own is None:
            return []
        args = [_argument(i, seen.args, value) for i, value in enumerate(own.args)]
        kwargs = {name: _argument(name, seen.kwargs, value) for name, value in own.kwargs.items()}
        try:
            chosen = self._ask(there, args, kwargs)
        except RuntimeError as error:  # it takes more of its layer than hidden states (zaya)
            log.warning("look-ahead is off for layer %d, its router wants more: %s", layer, error)
            del self._routers[layer]
            return []
        return sorted(set(chosen.flatten().tolist()))

    def _ask(self, router: _Router, args: list[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        self._predicting = True
        try:
            ask: Callable[..., Any] = router.module
            output = ask(*args, **kwargs)
        finally:
            self._predicting = False
        indices = output[router.position] if isinstance(output, tuple) else output
        assert isinstance(indices, torch.Tensor)
        return indices


def _argument(where: int | str, seen: Any, own: Any) -> Any:
    """This layer's value for hidden states (first) and token ids, the next router's own otherwise.

    A router may take constants of its layer beside its input: those stay its own.
    """
    if where == 0 or (isinstance(own, torch.Tensor) and not own.is_floating_point()):
        try:
            return seen[where]
        except (IndexError, KeyError):
            return own
    return own


def _neighbours(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules of the block around the experts at `path`, other than the experts."""
    block, _, _ = path.rpartition(".")
    inside = f"{path}."
    return [
        module
        for name, module in model.get_submodule(block).named_modules(prefix=block)
        if name not in (block, path) and not name.startswith(inside)
    ]
