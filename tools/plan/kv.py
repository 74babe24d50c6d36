"""The key-value cache of an architecture, by asking it: a forward pass on the meta device."""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tierrun.engine.architecture import build_meta

log = logging.getLogger(__name__)

_SHORT, _LONG = 1024, 2048
_NO_EXPERTS = "tierrun-no-experts"


class Cache(NamedTuple):
    """Numbers (not bytes) that a position takes, and that any context takes besides."""

    per_token: float
    fixed: float
    reason: str


def cache_of(config: PreTrainedConfig) -> Cache:
    """What the cache of `config`'s model takes; estimated from the configuration where its forward
    pass cannot be followed without data, and `reason` says so."""
    try:
        model = build_meta(config, experts_implementation=_NO_EXPERTS)
        short, long = (_numbers(model, tokens) for tokens in (_SHORT, _LONG))
    except Exception as error:  # whatever an architecture does that needs real numbers
        log.debug("the cache of %s cannot be counted", config.model_type, exc_info=True)
        return _estimate(config, type(error).__name__)
    per_token = (long - short) / (_LONG - _SHORT)
    return Cache(per_token, short - per_token * _SHORT, "counted on the meta device")


def _numbers(model: PreTrainedModel, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    with torch.no_grad(), torch.device("meta"):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return sum(tensor.numel() for tensor in _tensors(cache, set()) if tensor.is_floating_point())


def _tensors(found: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor inside `found`, once."""
    if id(found) in seen:
        return
    seen.add(id(found))
    if isinstance(found, torch.Tensor):
        yield found
        return
    if isinstance(found, dict):
        parts = list(found.values())
    elif isinstance(found, list | tuple):
        parts = list(found)
    else:
        is_cache = "cache" in f"{type(found).__module__}.{type(found).__name__}".lower()
        parts = list(vars(found).values()) if is_cache and hasattr(found, "__dict__") else []
    for part in parts:
        yield from _tensors(part, seen)


def _estimate(config: PreTrainedConfig, why: str) -> Cache:
    """Keys and values of full attention in every layer."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    numbers = 2.0 * text.num_hidden_layers * keys * size
    return Cache(numbers, 0.0, f"estimated, full attention in every layer ({why})")


def _nothing(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: Any, top_k_weights: Any
) -> torch.Tensor:
    return torch.zeros_like(hidden_states)


ALL_EXPERTS_FUNCTIONS.register(_NO_EXPERTS, _nothing)
