"""The model of a store: transformers' own modules, with the store's weights behind them.

Built on the meta device; experts are never allocated; linear and embedding weights stay as stored;
the small rest (norms, routers, convolutions) is widened to fp32, in which the CPU computes.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from tierrun.engine.architecture import build_meta, expert_parameters, experts_modules, read_config
from tierrun.engine.codecs.weight import Weight, widened
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.resident import ResidentWeights
from tierrun.engine.stored import can_store, store_back
from tierrun.io.errors import ModelError, StoreError
from tierrun.io.extent import format_bytes
from tierrun.io.store import Store

log = logging.getLogger(__name__)

EXPERTS_IMPLEMENTATION = "tierrun"
"""The name of our function in transformers' ExpertsInterface."""

_WIDENED_WORTH_SAYING = 64 << 20

_Tensor = TypeVar("_Tensor", bound=torch.Tensor)


def load_model(
    store: Store,
    weights: ResidentWeights,
    kernels: CpuKernels,
    *,
    experts: str = EXPERTS_IMPLEMENTATION,
    attention: str | None = None,
) -> PreTrainedModel:
    """The causal language model of `store`, ready to run once its experts are hooked.

    `experts` and `attention` are names in transformers' interfaces (None: its own choice).

    Raises:
        StoreError: a weight that the architecture needs is not in the store.
        ModelError: transformers cannot build the architecture.
    """
    config = read_config(store.model_dir)
    given: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    model = build_meta(config, experts_implementation=experts, **given)
    _check_layers(model, store)
    for module in experts_modules(model).values():
        for parameter in expert_parameters(module).values():
            _mark_loaded(parameter)
    tied = _tied_names(model)
    for path, module in model.named_modules():
        _load_module(path, module, weights, kernels, tied)
    fill: Callable[[], None] = model.initialize_weights
    fill()  # fills the buffers that no checkpoint holds: rotary tables and such
    model.tie_weights()
    _check_complete(model)
    return model.requires_grad_(False)


def _check_layers(model: PreTrainedModel, store: Store) -> None:
    ours = [layer.path for layer in store.manifest.layers]
    theirs = list(experts_modules(model))
    if ours != theirs:
        raise ModelError(
            f"{store.roots[0]} has experts at {ours[:2]}… ({len(ours)} layers), this transformers "
            f"builds {theirs[:2]}… ({len(theirs)}); convert the model again"
        )


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter → the parameter it shares its values with, both ways."""
    tied: dict[str, str] = dict(model.all_tied_weights_keys)
    return tied | {source: target for target, source in tied.items()}


def _load_module(
    path: str,
    module: nn.Module,
    weights: ResidentWeights,
    kernels: CpuKernels,
    tied: dict[str, str],
) -> None:
    """Give `module`'s own parameters and persistent buffers their stored values."""
    prefix = f"{path}." if path else ""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if getattr(parameter, "_is_hf_initialized", False):
            continue  # an expert's
        stored = _stored(prefix + name, weights, tied)
        _check_shape(prefix + name, stored, parameter)
        if name == "weight" and can_store(module):
            _mark_loaded(store_back(module, stored, kernels))
        else:
            values = nn.Parameter(_widen(prefix + name, stored), requires_grad=False)
            module.register_parameter(name, _mark_loaded(values))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name in module._non_persistent_buffers_set or prefix + name not in weights:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        else:
            stored = _stored(prefix + name, weights, tied)
            _check_shape(prefix + name, stored, buffer)
            module._buffers[name] = _mark_loaded(_widen(prefix + name, stored).clone())


def _stored(name: str, weights: ResidentWeights, tied: dict[str, str]) -> Weight:
    return weights.weight(tied[name] if name not in weights and name in tied else name)


def _check_shape(name: str, stored: Weight, wanted: torch.Tensor) -> None:
    if stored.shape != wanted.shape:
        raise StoreError(
            f"weight {name} has shape {list(stored.shape)} in the store, the architecture wants "
            f"{list(wanted.shape)}; convert the model again"
        )


def _widen(name: str, stored: Weight) -> torch.Tensor:
    if isinstance(stored, torch.Tensor) and (
        not stored.is_floating_point() or stored.dtype == torch.float32
    ):
        return stored
    nbytes = stored.shape.numel() * 4
    if nbytes >= _WIDENED_WORTH_SAYING:
        log.warning("%s is widened to fp32 in memory (%s)", name, format_bytes(nbytes))
    return widened(stored)


def _mark_loaded(tensor: _Tensor) -> _Tensor:
    """Tell transformers' `initialize_weights` to leave this tensor alone."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def _check_complete(model: PreTrainedModel) -> None:
    experts = {
        id(p) for m in experts_modules(model).values() for p in expert_parameters(m).values()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta and id(tensor) not in experts]
    if left:
        raise ModelError(f"{model.config.model_type}: nothing fills {', '.join(left[:5])}")
