"""Tiny checkpoints that run: `tests.checkpoints` with numbers that fit each other."""

from pathlib import Path
from typing import Any

import torch
from tests.checkpoints import FAMILIES, quiet, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

ACCEPTED = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "minimax_m2",
    "gemma4_text",
)
"""The families that every release must run like transformers."""

OTHERS = tuple(family for family in FAMILIES if family not in ACCEPTED)

_LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
"""Attention over a compressed state: as many key as query heads, rotated parts of eight."""

_TOP_3: dict[str, Any] = {"num_experts_per_tok": 3}
"""The order of a sum shows from three terms on."""

_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"] * 2}
"""Recurrent layers and attention in turn."""

_RUNNABLE: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "initializer_range": 0.1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3_moe": _TOP_3,
    "gpt_oss": _TOP_3,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | _TOP_3,
    "deepseek_v32": _LATENT,
    "axk1": _LATENT,
    "axk2": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "bailing_hybrid": _LATENT | _HYBRID,
    "kimi_linear": _LATENT | _HYBRID,
    "granitemoehybrid": _HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
"""Family → the numbers with which its layers fit each other."""


def save_runnable(family: str, directory: Path, **overrides: Any) -> None:
    """A checkpoint of some layers, with weights large enough that tokens differ."""
    given = FAMILIES.get(family, {}) | _RUNNABLE.get(family, {}) | overrides
    layers = given.get("num_hidden_layers") or len(given.get("layer_types", range(4)))
    numbers = {"num_hidden_layers": layers, "initializer_range": 0.3}
    model = tiny_model(family, **numbers | _RUNNABLE.get(family, {}) | overrides)
    if family == "minimax":
        _restore_decays(model)
    with quiet():
        model.save_pretrained(directory)


@torch.no_grad()
def _restore_decays(model: PreTrainedModel) -> None:
    """MiniMax keeps its decay and what follows from it as weights: they must agree."""
    fresh = dict(AutoModelForCausalLM.from_config(model.config).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(fresh[name])


def prompt_tokens(count: int = 40, seed: int = 1) -> list[int]:
    """Token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 250, (count,), generator=generator).tolist()
