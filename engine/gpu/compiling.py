"""Regional torch.compile of the decoder layers, for single tokens only.

It fuses what lies between our kernels (norms, rotary embedding, routing). One layer at a time, so
that layers of one kind share their code; results go to the user's cache directory and are found
there by the next process. `--compile auto` compiles where an earlier `on` has left such results.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tierrun.engine.architecture import experts_modules

log = logging.getLogger(__name__)

_MOST_VARIANTS = 512
"""Compiled variants of one function that dynamo may keep: one per layer in the worst case."""


class CompiledLayers:
    """The decoder layers of `model`, compiled while `active`, as they were otherwise."""

    def __init__(self, model: PreTrainedModel, fingerprint: str) -> None:
        self._active, self._remembered, self._fingerprint = False, False, fingerprint
        self._set_up()
        for layer in decoder_layers(model):
            self._wrap(layer)

    def _set_up(self) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory()))
        config: Any = torch._dynamo.config
        config.allow_unspec_int_on_nn_module = True
        config.recompile_limit = config.accumulated_recompile_limit = _MOST_VARIANTS

    def _wrap(self, layer: Any) -> None:
        plain: Callable[..., Any] = layer.forward
        compiled = torch.compile(plain, dynamic=False)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (compiled if self._active else plain)(*args, **kwargs)

        layer.forward = forward

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, layers run compiled."""
        self._active = True
        try:
            yield
            if not self._remembered:
                remember(self._fingerprint)
                self._remembered = True
        finally:
            self._active = False


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Every element of the outermost module list around the experts."""
    path = next(iter(experts_modules(model)))
    parent: nn.Module = model
    for name in path.split("."):
        child = parent.get_submodule(name)
        if isinstance(parent, nn.ModuleList):
            return list(parent)
        parent = child
    return []


def cache_directory() -> Path:
    """Where compiled code is kept between processes."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return home / "tierrun" / "compiled"


def wanted(choice: str, fingerprint: str) -> bool:
    """Whether to compile: `on`, or `auto` where results for this model and machine are there."""
    return choice == "on" or (choice == "auto" and _marker(fingerprint).is_file())


def remember(fingerprint: str) -> None:
    """Note that this model's layers have been compiled on this machine."""
    marker = _marker(fingerprint)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        log.warning("%s cannot be written (%s): --compile auto stays off", marker, error.strerror)


def _marker(fingerprint: str) -> Path:
    machine = (fingerprint, torch.__version__, torch.cuda.get_device_name())
    digest = hashlib.sha256("|".join(machine).encode()).hexdigest()[:16]
    return cache_directory() / f"{digest}.compiled"
