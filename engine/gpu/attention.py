"""Attention on the device, behind transformers' own AttentionInterface: no model code is touched.

Decode goes to a Triton kernel that reads the cache once per key head and only where the mask lets
it; prefill to torch's scaled_dot_product_attention; what neither understands (other arguments than
those below) to the architecture's own eager function, in fp32.
"""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tierrun.engine.gpu.ops import DECODE_TOKENS, attend
from tierrun.engine.kernels.attention import supports

ATTENTION = "tierrun"
"""The name of our function in transformers' AttentionInterface."""

_UNDERSTOOD = {"sliding_window", "position_ids", "is_causal", "use_cache", "indices", "s_aux"}
"""Arguments whose effect is in the mask, or that are handled here; a switch that is off is none."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`query` [1, heads, T, D] over `key`, `value` [1, key heads, L, …]: fp32 [1, T, heads, Dv]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = kwargs.get("s_aux")
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    odd = given - _UNDERSTOOD
    if not odd and supports(query, key, value, attention_mask, sinks):
        output: torch.Tensor = attend(query, key, value, attention_mask, scale, sinks, softcap)
        return output, None
    if odd or sinks is not None or softcap is not None:
        return _eager(module, query, key, value, attention_mask, scale, softcap, kwargs)
    return _prefill(query, key, value, attention_mask, scale), None


def _prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    causal = mask is None
    output = scaled_dot_product_attention(
        query.to(key.dtype),
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
    )
    return output.transpose(1, 2).to(torch.float32).contiguous()


def _eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """The architecture's own reference attention, which every modeling file has."""
    reference = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    given = dict(kwargs) if softcap is None else {**kwargs, "softcap": softcap}
    additive = _additive(mask, query, key)
    output, _ = reference(
        module, query, key.to(query.dtype), value.to(query.dtype), additive, scaling=scale, **given
    )
    return output, None


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`mask` (True: may be attended to; None: causal) as what is added to the scores."""
    if mask is None:
        tokens, length = query.shape[2], key.shape[2]
        ones = torch.ones(tokens, length, dtype=torch.bool, device=query.device)
        mask = ones.tril(length - tokens)[None, None]
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


def causal_mask(**kwargs: Any) -> torch.Tensor | None:
    """The mask [1, 1, T, L] (True: may be attended to); None where it is plainly causal."""
    plain = kwargs["q_length"] == kwargs["kv_length"] > DECODE_TOKENS
    kwargs["allow_is_causal_skip"] = plain and kwargs.get("allow_is_causal_skip", True)
    mask: torch.Tensor | None = sdpa_mask(**kwargs)
    return mask


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, causal_mask)
